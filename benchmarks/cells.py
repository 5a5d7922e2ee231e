"""What stands in the cells of the tables."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def thousands(tokens: float, budget: float) -> str:
    return f"{tokens / 1000:.0f}k" if math.isfinite(tokens) else f"> {budget / 1000:.0f}k"


def spread(values: Sequence[float], show: Any) -> str:
    """The median, and the smallest and the largest value."""
    return f"{show(statistics.median(values))} [{show(min(values))}, {show(max(values))}]"


def ratio(x: float, y: float, budget_x: float, budget_y: float) -> str:
    """x over y. For one that did not get there (infinite) its budget stands, and the ratio is a bound."""
    if y == 0 or (math.isinf(x) and math.isinf(y)):
        return "-"
    if math.isinf(x):
        return f"> {budget_x / y:.1f}"
    return f"{x / y:.2f}" if math.isfinite(y) else f"< {x / budget_y:.2f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
