"""The data of a judge's training: what is trained on, what is calibrated on, and what is kept out."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trl_sgpo.judge_evaluation.data import Row, read_rows


if TYPE_CHECKING:
    from trl_sgpo.judge_training.arguments import JudgeTrainArguments
    from trl_sgpo.judges import JudgeItem

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class JudgeData:
    """
    Training and dev data. No problem is in both. `excluded` counts the rows that were taken out of `train`, because
    their problem is in `exclude` or in `dev_data`. `skipped` counts those that could not be used, by reason.
    """

    train: list[Row]
    dev: list[Row]
    excluded: int
    skipped: dict[str, int]


def read_data(arguments: "JudgeTrainArguments", seed: int = 0) -> JudgeData:
    """
    Reads the data, takes out the excluded problems, and splits off the dev data, whose problems `seed` draws. A row
    that cannot be understood, or nothing left to train or calibrate on, raises a `ValueError`.
    """
    rows, sources = read_rows(arguments.data, arguments.split)
    skipped: Counter[str] = Counter()
    for source in sources:
        skipped.update(source["skipped"])
    held_out = read_rows(arguments.exclude)[0] if arguments.exclude else []
    dev = read_rows(arguments.dev_data)[0] if arguments.dev_data else []
    forbidden = {same_problem(row.problem) for row in [*held_out, *dev]}
    train = [row for row in rows if same_problem(row.problem) not in forbidden]
    excluded = len(rows) - len(train)
    if not dev:
        problems = sorted({same_problem(row.problem) for row in train})
        random.Random(seed).shuffle(problems)
        kept = set(problems[: max(1, round(arguments.dev_share * len(problems)))] if len(problems) > 1 else [])
        dev = [row for row in train if same_problem(row.problem) in kept]
        train = [row for row in train if same_problem(row.problem) not in kept]
    for name, part in (("train", train), ("calibrate", dev)):
        if not part:
            raise ValueError(
                f"data={arguments.data} leaves nothing to {name} on: {len(rows)} rows were read, {excluded} of them "
                f"have a problem of exclude={arguments.exclude}, and {sum(skipped.values())} more could not be used "
                f"({dict(skipped)}). Give more data, or `dev_data`."
            )
    if all(row.label == -1 for row in train):
        raise ValueError(f"data={arguments.data} has no solution with an error, so there is nothing to learn from it.")
    return JudgeData(train, dev, excluded, dict(skipped))


def same_problem(text: str) -> str:
    """The letters and digits of a problem. They are equal for two spellings of one problem."""
    return re.sub(r"[\W_]+", " ", text).strip().casefold()


def as_item(row: Row, known_wrong: bool = False) -> "JudgeItem":
    """What the judge is asked about a row."""
    from trl_sgpo.judges import JudgeItem

    return JudgeItem(row.problem, row.steps, known_wrong=known_wrong)


def ask_in_batches(
    ask: "Callable[[list[JudgeItem]], list[Answer]]", rows: Sequence[Row], batch_size: int = 64
) -> list[Answer]:
    """What `ask` gives for the rows, in their order. A bar shows how many are done."""
    from tqdm.auto import tqdm

    answers: list[Answer] = []
    with tqdm(total=len(rows), desc="judging the dev data", unit="solution") as bar:
        for start in range(0, len(rows), batch_size):
            answers += ask([as_item(row) for row in rows[start : start + batch_size]])
            bar.update(len(answers) - bar.n)
    return answers
