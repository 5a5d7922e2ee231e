"""What one reads from a learning curve: a record's `curve`, a list of points with `tokens` and `accuracy`."""

import itertools
from typing import Any


def tokens_to(record: dict[str, Any], accuracy: float = 0.5) -> float:
    """Generated tokens at which the curve first reaches an accuracy, between two evaluations by a line; inf if never."""
    points = record["curve"]
    if points[0]["accuracy"] >= accuracy:
        return 0.0
    for before, after in itertools.pairwise(points):
        if after["accuracy"] >= accuracy > before["accuracy"]:
            share = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return float("inf")


def area(record: dict[str, Any], tokens: int) -> float:
    """
    Mean accuracy over the first `tokens` generated tokens: the area under the curve by trapezoids, divided by its width. A run
    that ended keeps its last accuracy. Where runs end early at a goal, `stop_at`, the curve is cut off at its height, so that
    one that ended has no less than one that went on.
    """
    goal = record.get("stop_at") or 1.0
    points = [(point["tokens"], min(point["accuracy"], goal)) for point in record["curve"]]
    points.append((max(tokens, points[-1][0]), points[-1][1]))
    total = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= tokens or x1 == x0:
            continue
        end = min(x1, tokens)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        total += (end - x0) * (y0 + y_end) / 2
    return total / tokens
