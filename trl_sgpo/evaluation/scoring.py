"""Right or wrong, by math-verify as TRL's `accuracy_reward` asks it: an evaluation measures what training rewards."""

from collections.abc import Sequence
from dataclasses import dataclass


UNPARSEABLE = "[unparseable]"  # TRL's word for a completion in which no answer was found


@dataclass(frozen=True)
class Score:
    """Whether a completion is right, and whether it holds an answer at all. Without one it is wrong."""

    correct: bool
    found: bool


def score(completions: Sequence[str], golds: Sequence[str]) -> list[Score | None]:
    r"""
    Scores completions against gold answers; None if a gold answer itself cannot be parsed. math-verify stops what takes
    long by signals, so it has to run in the main thread; elsewhere TRL switches its time limits off.

    Example:

    ```python
    >>> score(["It is $\\boxed{0.5}$.", "It is 0.5."], [r"\boxed{\frac{1}{2}}"] * 2)
    [Score(correct=True, found=True), Score(correct=False, found=False)]
    ```
    """
    check_math_verify()
    from trl.rewards import accuracy_reward

    columns: dict[str, list[str]] = {}
    rewards = accuracy_reward(
        [[{"role": "assistant", "content": text}] for text in completions],
        list(golds),
        log_extra=columns.__setitem__,
    )
    return [
        None if reward is None else Score(bool(reward), parsed != UNPARSEABLE)
        for reward, parsed in zip(rewards, columns["answer_parsed"], strict=True)
    ]


def check_math_verify() -> None:
    """Raises an `ImportError` with the remedy if math-verify is not installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError("Answers are compared by math-verify: `pip install trl-sgpo[math]`.") from error
