"""Judges of the study that are wrong on purpose, made from the exact step checker."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from trl_sgpo.tasks.rewrite_chain import first_wrong_block


KINDS = ("random", "early", "late", "stubborn", "last")


def noisy_judge(kind: str, probability: float, seed: int) -> Callable[..., int | None]:
    """
    The exact step checker, wrong with a given probability.

    Args:
        kind (`str`):
            What a wrong verdict is. `"random"`: any step of the completion, the right one included, all equally likely.
            `"early"`: a step before the first wrong one (if there is none, the verdict stays right). `"late"`: a step
            after it (if there is none, it stays right). `"stubborn"`: as `"random"`, but the same text is always misjudged
            in the same way, whatever the seed, so that asking again does not help. `"last"`: the last step, so that a longer
            completion has a higher score.
        probability (`float`):
            Share of the verdicts that are replaced, in [0, 1].
        seed (`int`):
            Seed of the replacements.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: it must be one of {KINDS}.")
    of_run = random.Random(seed)

    def judge(problem: str, steps: Sequence[str], **row: Any) -> int | None:
        true = first_wrong_block(problem, steps)
        rng = random.Random("\n".join((problem, *steps))) if kind == "stubborn" else of_run
        if true is None or rng.random() >= probability:
            return true
        wrong = {
            "random": range(len(steps)),
            "stubborn": range(len(steps)),
            "early": range(true),
            "late": range(true + 1, len(steps)),
            "last": range(len(steps) - 1, len(steps)),
        }[kind]
        return rng.choice(wrong) if len(wrong) else true

    judge.__name__ = f"{kind}_{probability:g}"
    return judge
