"""
What a step-wise judge is asked, what it answers, and how it is asked so that the result is always verdicts ([`ask`]).
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class JudgeItem:
    """
    One completion to judge.

    Args:
        problem, steps (`str` and `tuple[str, ...]`):
            The problem as the policy saw it, and the steps of the completion, in order.
        reference (`str`, *optional*):
            A reference solution or answer, if the dataset has one.
        known_wrong (`bool`, *optional*, defaults to `True`):
            Whether the final answer is known to be wrong, so that "no error" cannot be right.
        row (`Mapping[str, Any]`, *optional*):
            The other columns of the dataset row.
        context (`Mapping[int, str]`, *optional*):
            By step index, text just before that step that the policy did not write: tool results.
    """

    problem: str
    steps: tuple[str, ...]
    reference: str | None = None
    known_wrong: bool = True
    row: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[int, str] = field(default_factory=dict)


def is_empty(value: Any) -> bool:
    """Whether a value of a dataset says nothing. Zero and `False` do say something."""
    if hasattr(value, "tolist"):  # NumPy's and torch's
        value = value.tolist()
    if value is None or isinstance(value, str):
        return not (value or "").strip()
    if isinstance(value, Mapping | list | tuple | set):
        return all(map(is_empty, value.values() if isinstance(value, Mapping) else value))
    try:
        return bool(value != value)  # NaN
    except (TypeError, ValueError):
        return str(value) == "<NA>"  # pandas' missing value is neither equal nor unequal


@dataclass(frozen=True)
class Verdict:
    """
    What a judge says of one completion. Write it with [`Verdict.error`], [`Verdict.no_error`] or [`Verdict.abstain`].

    Args:
        status (`str`):
            `"error"`: `first_error` is the first wrong step. `"no_error"`: every step is right. `"abstain"`: the judge
            cannot say, or failed. An abstention is never turned into a number.
        first_error, n_steps (`int`, *optional*):
            0-based index of the first wrong step, and how many steps the judge saw, against mix-ups.
        confidence (`float`, *optional*):
            The judge's confidence in [0, 1], if it has one.
        reason (`str`, *optional*, defaults to `""`):
            Why, in words. Shown in the completions table.
        checked (`Sequence[int]`, *optional*):
            0-based indices of the steps in which the judge found something to check. `None`: it read all of them. A step
            before the first wrong one that was not checked is left out of all that is scored and paid. Otherwise a policy
            that is paid for right steps would learn to write what nobody checks.
    """

    status: Literal["error", "no_error", "abstain"]
    first_error: int | None = None
    n_steps: int | None = None
    confidence: float | None = None
    reason: str = ""
    checked: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.checked, list):  # else two equal verdicts would differ, and could not be hashed
            object.__setattr__(self, "checked", tuple(self.checked))

    @classmethod
    def error(
        cls,
        first_error: int,
        n_steps: int | None = None,
        confidence: float | None = None,
        reason: str = "",
        checked: Sequence[int] | None = None,
    ) -> "Verdict":
        """Step `first_error` (0-based) is the first wrong one."""
        return cls("error", first_error, n_steps, confidence, reason, checked)

    @classmethod
    def no_error(
        cls,
        n_steps: int | None = None,
        confidence: float | None = None,
        reason: str = "",
        checked: Sequence[int] | None = None,
    ) -> "Verdict":
        """Every step is right, or was not checked."""
        return cls("no_error", None, n_steps, confidence, reason, checked)

    @classmethod
    def abstain(cls, reason: str) -> "Verdict":
        """The judge cannot say, and why."""
        return cls("abstain", reason=reason)


class StepJudge(ABC):
    """
    A step-wise judge: finds the first wrong step of each completion. It need not be able to solve the problem.

    Subclass it and write [`~StepJudge.judge`]. It does not raise for a single item: a timeout, a refusal or an answer
    that cannot be parsed is `Verdict.abstain(reason)`.
    """

    @property
    def name(self) -> str:
        """What the model card and the logs call this judge. Never put a key or a token here."""
        return type(self).__name__

    @abstractmethod
    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict per item, in the same order. There is at least one item, and each has at least one step."""


def ask(
    judge: StepJudge, items: Sequence[JudgeItem], on_exception: Callable[[StepJudge], None] | None = None
) -> list[Verdict]:
    """
    A judge's verdicts, checked. Never raises: if the judge does, or gives a wrong number of verdicts or none,
    they are abstentions with that reason. `on_exception(judge)` is called inside the handler.
    """
    try:
        verdicts = list(judge.judge(list(items)))
    except BaseException as error:  # a panic of an extension in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        if on_exception is not None:
            on_exception(judge)
        return [Verdict.abstain(f"{type(error).__name__}: {error}")] * len(items)
    if len(verdicts) != len(items):
        # Which verdict belongs to which completion cannot be known
        return [Verdict.abstain(f"the judge gave {len(verdicts)} verdicts for {len(items)} items")] * len(items)
    return [checked_verdict(verdict, len(item.steps)) for verdict, item in zip(verdicts, items, strict=True)]


def identity(judge: StepJudge) -> str:
    """What a cache knows a judge by: its `cache_key`, if it has one (a string), else its name."""
    cache_key = getattr(judge, "cache_key", None)
    return cache_key if isinstance(cache_key, str) else judge.name


def checked_verdict(verdict: Any, n_steps: int) -> Verdict:
    """The verdict if it makes sense for a completion of `n_steps` steps, else an abstention that says why not."""
    try:
        return _check(verdict, n_steps)
    except BaseException as error:  # fields of odd types may raise anything wherever they are read or printed
        if isinstance(error, KeyboardInterrupt):
            raise
        return Verdict.abstain(f"the judge returned a verdict that cannot be read ({type(error).__name__})")


def _check(verdict: Any, n_steps: int) -> Verdict:
    if not isinstance(verdict, Verdict):
        return Verdict.abstain(f"the judge returned {type(verdict).__name__}, not a Verdict")
    reason = verdict.reason if isinstance(verdict.reason, str) else str(verdict.reason)
    if verdict.n_steps is not None and verdict.n_steps != n_steps:
        return Verdict.abstain(f"the judge saw {verdict.n_steps} steps where there are {n_steps}")
    if verdict.status == "abstain":
        return Verdict.abstain(reason)
    if verdict.status not in ("error", "no_error"):
        return Verdict.abstain(f"the judge returned the unknown status {verdict.status!r}")
    given: Any = verdict.checked
    checked: set[int] | None = None
    if given is not None:
        if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__"):
            return Verdict.abstain(f"checked is of type {type(given).__name__}, and not a list of indices of steps")
        checked = set()
        for entry in given:
            index, fault = _step(entry, n_steps)
            if index is None:
                return Verdict.abstain(f"checked: {fault}")
            checked.add(index)
    kept = None if checked is None else tuple(sorted(checked))
    if verdict.status == "no_error":
        return Verdict.no_error(n_steps, verdict.confidence, reason, kept)
    first_error, fault = _step(verdict.first_error, n_steps)
    if first_error is None:
        return Verdict.abstain(f"first_error={fault}")
    return Verdict.error(first_error, n_steps, verdict.confidence, reason, kept)


def _step(given: Any, n_steps: int) -> tuple[int | None, str]:
    """The index of a step as an `int`; `None`, and the value with what is wrong with it, if it is none."""
    try:
        index = operator.index(given)  # an int or one of numpy's or torch's; a float is none
    except TypeError:
        return None, f"{given!r} is of type {type(given).__name__}, and the index of a step is an integer"
    # torch's booleans are integers to Python, and numpy's are not
    if isinstance(given, bool) or "bool" in str(getattr(given, "dtype", "")):
        return None, f"{given!r} is a bool, and the index of a step is an integer"
    if not 0 <= index < n_steps:
        return None, f"{given!r} is not the 0-based index of one of {n_steps} steps"
    return index, ""
