"""What was recorded, and what one reads from a record: tokens to an accuracy, area under a curve, the best learning rate."""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.controlled_study.settings import (
    COMPLETIONS_PER_UPDATE,
    LEARNING_RATES,
    TUNING_CHECK_SEEDS,
    TUNING_SEEDS,
    Run,
)


class Records:
    """
    The lines of `runs.jsonl` and `bases.jsonl` in a folder, by key.

    A line that was cut off by an interruption is left out, and its run is made again.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {
            "completions_per_update": COMPLETIONS_PER_UPDATE,
            "beside": "",
        }  # which the first records do not name
        self.runs = {record["key"]: defaults | record for record in self._read("runs.jsonl")}
        self.bases = {record["base"]: record for record in self._read("bases.jsonl")}

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return []
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def done(self, run: Run) -> bool:
        """Whether a run is recorded, with at least as many tokens."""
        return run.key in self.runs and self.runs[run.key]["tokens"] >= run.tokens

    def append(self, record: dict[str, Any]) -> None:
        if "base" in record and "key" not in record:
            name, self.bases[record["base"]] = "bases.jsonl", record
        else:
            name, self.runs[record["key"]] = "runs.jsonl", record
        path = self.folder / name
        cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write(("\n" if cut_off else "") + json.dumps(record) + "\n")


def select(records: Records, **where: Any) -> list[dict[str, Any]]:
    """The recorded runs with these values, by seed. Tuning is left out, and runs that were made beside others only."""
    where = {"beside": ""} | where
    tuning = (*TUNING_SEEDS, *TUNING_CHECK_SEEDS)
    rows = [r for r in records.runs.values() if r["seed"] not in tuning and not r.get("report")]
    return sorted((r for r in rows if all(r[k] == v for k, v in where.items())), key=lambda r: r["seed"])


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


def tuning_runs(
    dial: str, arm: str, tokens: int, judge: str = "exact", rates: Sequence[float] = LEARNING_RATES
) -> list[Run]:
    """The runs that choose the learning rate of an arm on a dial, with a judge."""
    return [
        Run(dial, arm, learning_rate, seed, tokens, judge=judge, stop_at=0.75)
        for learning_rate in rates
        for seed in TUNING_SEEDS
    ]


# Arms that take another's learning rate: they are that arm with a guard switched on
TUNED_AS = {
    **{f"sgpo_{guard}": "sgpo" for guard in ("spread", "half", "handover", "votes")},
    **{f"prefix_{guard}": "prefix" for guard in ("handover", "votes")},
}


def best_learning_rate(
    records: Records, dial: str, arm: str, judge: str, completions_per_update: int = COMPLETIONS_PER_UPDATE
) -> float | None:
    """
    The learning rate, of those that all arms are tuned on, with the largest mean area under the curve over the tuning seeds;
    `None` if none was tried. Other group sizes take that of groups of eight.
    """
    for tuned in (arm, TUNED_AS.get(arm, arm)):
        found: dict[float, list[dict[str, Any]]] = {}
        for record in records.runs.values():
            condition = tuple(record[k] for k in ("dial", "arm", "judge", "completions_per_update", "group_size"))
            same = condition == (dial, tuned, judge, completions_per_update, 8)
            if same and record["seed"] in TUNING_SEEDS and record["learning_rate"] in LEARNING_RATES:
                found.setdefault(record["learning_rate"], []).append(record)
        if found:
            tokens = min(record["tokens"] for rows in found.values() for record in rows)
            return max(found, key=lambda rate: statistics.fmean(area(record, tokens) for record in found[rate]))
    return None
