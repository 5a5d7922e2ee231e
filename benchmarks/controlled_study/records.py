"""What was recorded: the runs, the bases, and the learning rate that tuning chose."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import read_lines
from benchmarks.controlled_study.settings import (
    COMPLETIONS_PER_UPDATE,
    LEARNING_RATES,
    TUNING_CHECK_SEEDS,
    TUNING_SEEDS,
    Run,
)
from benchmarks.curves import area
from trl_sgpo.analysis.jsonable import append_lines


class Records:
    """The lines of `runs.jsonl` and `bases.jsonl` in a folder, by key."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {
            "completions_per_update": COMPLETIONS_PER_UPDATE,
            "beside": "",
        }  # which the first records do not name
        self.runs = {record["key"]: defaults | record for record in read_lines(folder / "runs.jsonl")}
        self.bases = {record["base"]: record for record in read_lines(folder / "bases.jsonl")}

    def done(self, run: Run) -> bool:
        """Whether a run is recorded, with at least as many tokens."""
        return run.key in self.runs and self.runs[run.key]["tokens"] >= run.tokens

    def append(self, record: dict[str, Any]) -> None:
        if "base" in record and "key" not in record:
            name, self.bases[record["base"]] = "bases.jsonl", record
        else:
            name, self.runs[record["key"]] = "runs.jsonl", record
        append_lines(self.folder / name, [record])


def select(records: Records, **where: Any) -> list[dict[str, Any]]:
    """The recorded runs with these values, by seed. Tuning is left out, and runs that were made beside others only."""
    where = {"beside": ""} | where
    tuning = (*TUNING_SEEDS, *TUNING_CHECK_SEEDS)
    rows = [r for r in records.runs.values() if r["seed"] not in tuning and not r.get("report")]
    return sorted((r for r in rows if all(r[k] == v for k, v in where.items())), key=lambda r: r["seed"])


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
