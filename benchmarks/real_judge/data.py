"""
The data: solutions with planted errors, and two halves of annotated ones, which never share a problem.

- `planted.jsonl`: of a third of GSM8K's training problems, the third that benchmarks/pretrained imitates. So the judge knows
  no solution of the problems that its policies are trained on.
- `annotated.jsonl`: of half of the problems of Mr-Ben maths and ProcessBench math.
- `heldout_*.jsonl`: of the other half, and all of ProcessBench gsm8k.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.pretrained.tasks import GSM8K
from recipes.judge.plant_errors import make_rows, read_data
from trl_sgpo.judge_evaluation.data import Row, read_rows, sample_rows
from trl_sgpo.judge_training.data import same_problem


SEED = 0
HALVED = ("mrben_math", "processbench_math")
NEVER_TRAINED_ON = "processbench_gsm8k"
HUB = {
    "mrben_math": ("Randolphzeng/Mr-Ben", None),
    "processbench_math": ("Qwen/ProcessBench", "math"),
    NEVER_TRAINED_ON: ("Qwen/ProcessBench", "gsm8k"),
}


def annotated(name: str, folder: Path | None) -> list[Row]:
    """All rows of a set, from `folder/name.jsonl` or from the Hub."""
    if folder is not None:
        return read_rows([str(folder / f"{name}.jsonl")])[0]
    hub_name, split = HUB[name]
    rows, _ = read_rows([hub_name], split)
    return [row for row in rows if split or row.subset.lower().endswith("math")]


def gsm8k_third(folder: Path | None) -> list[dict[str, str]]:
    """The problems that benchmarks/pretrained imitates, with their calculator marks."""
    rows = read_data(GSM8K if folder is None else str(folder / "train.jsonl"), "main", "train")
    random.Random(0).shuffle(rows)
    return rows[: len(rows) // 3]


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of a random half of the problems, and the others."""
    problems = sorted({same_problem(row.problem) for row in rows})
    random.Random(SEED).shuffle(problems)
    first = set(problems[: len(problems) // 2])
    parts = ([row for row in rows if (same_problem(row.problem) in first) is here] for here in (True, False))
    first_half, second_half = parts
    return first_half, second_half


def write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain(row: Row) -> dict:
    names = ("id", "subset", "problem", "steps", "label", "final_answer_correct")
    return {name: value for name, value in asdict(row).items() if name in names}


def length(row: Row) -> int:
    return len(row.problem) + sum(map(len, row.steps))


def make(
    folder: Path, annotated_folder: Path | None, gsm8k: Path | None, planted: int, characters: int, heldout: int | None
) -> dict[str, int]:
    """
    Writes all files and returns their numbers of rows.

    Args:
        planted (`int`):
            Solutions with planted errors, or without one, to train on.
        characters (`int`):
            Longer annotated solutions, with their problem, are not trained on.
        heldout (`int`, *optional*):
            At most so many rows of each held-out half. ProcessBench gsm8k is always whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict]] = {"annotated": []}
    for name in HALVED:
        first, second = halves(annotated(name, annotated_folder))
        files["annotated"] += [plain(row) for row in first if length(row) <= characters]
        files[f"heldout_{name}"] = [plain(row) for row in sample_rows(second, heldout, SEED)]
    files[f"heldout_{NEVER_TRAINED_ON}"] = [plain(row) for row in annotated(NEVER_TRAINED_ON, annotated_folder)]
    files["planted"] = make_rows(gsm8k_third(gsm8k), planted, seed=SEED)
    for name, rows in files.items():
        write(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}
