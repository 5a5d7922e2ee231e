"""
Right or wrong, as training rewards it: by math-verify as TRL's `accuracy_reward` asks it, or by a reward function of the
user's own.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_sgpo.judge_evaluation.data import short


UNPARSEABLE = "[unparseable]"  # TRL's word for a completion in which no answer was found


@dataclass(frozen=True)
class Score:
    """Whether a completion is right, and whether it holds an answer at all (None: unknown). Without one it is wrong."""

    correct: bool
    found: bool | None


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


def reward(
    function: Callable[..., Any],
    completions: Sequence[Any],
    prompt: Any,
    row: Mapping[str, Any],
    threshold: float,
) -> list[Score]:
    """
    Scores completions of one problem by a reward function, which is called as TRL's trainer calls it: with `prompts`,
    `completions`, and each column of the row. A completion is right if its reward reaches `threshold`.

    Example:

    ```python
    >>> def ends_with(completions, last, **kwargs):
    ...     return [float(text.endswith(own)) for text, own in zip(completions, last)]
    >>> reward(ends_with, ["a 6", "a 9"], "3 + 3?", {"last": "6"}, threshold=0.5)
    [Score(correct=True, found=None), Score(correct=False, found=None)]
    ```
    """
    n = len(completions)
    columns = {name: [value] * n for name, value in row.items() if name not in ("prompt", "completion")}
    name = getattr(function, "__name__", str(function))
    try:
        rewards = function(prompts=[prompt] * n, completions=list(completions), **columns)
    except Exception as error:
        raise ValueError(
            f"reward_func {name} failed: {type(error).__name__}: {error}. It is called as in training, with `prompts`, "
            f"`completions` and the columns {sorted(columns)} of the set."
        ) from error
    if not isinstance(rewards, list | tuple) or len(rewards) != n or not all(_is_number(one) for one in rewards):
        raise ValueError(
            f"reward_func {name} gave {short(rewards)} for {n} completions. It has to give a list with one number for each."
        )
    return [Score(one >= threshold, None) for one in rewards]


def check_reward_function(function: Any) -> None:
    """Raises a `ValueError` for an object that cannot be called as a reward function."""
    if not callable(function) or isinstance(function, type) or inspect.iscoroutinefunction(function):
        raise ValueError(
            f"reward_func={function!r} is no reward function. Give the dotted path of a function of `completions` and the "
            "columns of the set, as in training. It may not be `async`."
        )


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not math.isnan(float(value))


def check_math_verify() -> None:
    """Raises an `ImportError` with the remedy if math-verify is not installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError("Answers are compared by math-verify: `pip install trl-sgpo[math]`.") from error
