"""A plain function as a judge."""

import inspect
import logging
import sqlite3
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.log_once import LogOnce


logger = logging.getLogger(__name__)

# Modules that raise if they are used in another thread than theirs
_OF_ONE_THREAD = ("signal", "asyncio.events", "asyncio.unix_events")
_REMEDY = (
    "Give a function `f(problem, steps, **row)` that returns the 0-based index of the first wrong step, or None for no "
    "error."
)


class CallableJudge(StepJudge):
    """
    A judge made of a plain function. [`StepwiseJudge`] turns a function into one by itself.

    Args:
        function (`Callable`):
            `f(problem, steps, **row) -> int | None`: the 0-based index of the first wrong step, `None` for no error.
            The first two are given by position, so they may be called otherwise; by name if they are keyword-only. It
            gets the dataset columns that it has parameters for, or all of them if it takes `**kwargs`, but none that is
            called like one of the first two: to get a column `problem`, call the first parameter otherwise. It may also
            return a [`Verdict`], to abstain or to give a reason. If it raises, the verdict is an abstention, and the
            first traceback is logged.
        batch_deadline (`float`, *optional*, defaults to `600.0`):
            Seconds that one batch may take. A completion that is not judged by then is an abstention, so a function
            that hangs does not hang the training. Keep it below the process group's timeout. The function runs in a
            thread of its own. `None`: no limit, and the function runs in the calling thread. Code that sets signals
            needs this, such as the timeouts of `math_verify` (or switch them off, `parse(..., parsing_timeout=None)`
            and `verify(..., timeout_seconds=None)`, and keep the deadline).

    Raises:
        TypeError: If `function` cannot be called with a problem and steps, or gives a coroutine or a generator.
        ValueError: If `batch_deadline` is not positive.

    Example:

    ```python
    >>> judge = CallableJudge(lambda problem, steps: 1 if "2 + 2 = 5" in steps[1] else None)
    >>> judge.judge([JudgeItem("What is 2 + 2?", ("Add them.", "2 + 2 = 5"))])[0].first_error
    1
    ```
    """

    def __init__(self, function: Callable[..., Any], batch_deadline: float | None = 600.0) -> None:
        if not callable(function) or inspect.isclass(function):
            raise TypeError(
                f"function={function!r} is {'a class' if inspect.isclass(function) else 'not callable'}. {_REMEDY}"
            )
        if (kind := _kind_without_answer(function)) is not None:
            raise TypeError(
                f"function={function!r} is {kind}, and a judge is called synchronously. Subclass "
                "`StepJudge` and run the batch in its `judge` method, for instance with `asyncio.run`."
            )
        if batch_deadline is not None and not 0 < batch_deadline <= threading.TIMEOUT_MAX:
            raise ValueError(f"batch_deadline={batch_deadline} must be a positive number of seconds, or None.")
        self.function = function
        self.batch_deadline = batch_deadline
        self._by_name, self.column_names, self.required_columns, self._taken = _read_signature(function)
        self._log_once = LogOnce(logger)

    @property
    def name(self) -> str:
        function = getattr(self.function, "func", self.function)  # the function inside a functools.partial
        module = getattr(function, "__module__", None)
        own = getattr(function, "__qualname__", type(function).__name__)
        return f"{module}.{own}" if module and module != "__main__" else own

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        if self.batch_deadline is None:
            return [self._judge_one(item) for item in items]
        verdicts: list[Verdict] = []
        too_late = threading.Event()
        # The current CUDA device belongs to a thread, and a new one begins with device 0
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            if device is not None:
                torch.cuda.set_device(device)
            for item in items:
                if too_late.is_set():
                    return
                verdicts.append(self._judge_one(item))

        # A daemon thread: one that hangs for good must not keep the program from ending
        thread = threading.Thread(target=work, name="CallableJudge", daemon=True)
        thread.start()
        thread.join(self.batch_deadline)
        too_late.set()
        done = list(verdicts)
        late = Verdict.abstain(f"not judged within batch_deadline={self.batch_deadline:g} s")
        return done + [late] * (len(items) - len(done))

    def _judge_one(self, item: JudgeItem) -> Verdict:
        columns = columns_for(item.row, self.column_names, self._taken)
        try:
            if self._by_name:
                answer = self.function(problem=item.problem, steps=list(item.steps), **columns)
            else:
                answer = self.function(item.problem, list(item.steps), **columns)
        except BaseException as error:  # a panic of an extension in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            self._log_once.failed(f"The judge {self.name} raised an exception")
            if _is_bound_to_a_thread(error):
                self._log_once(
                    "thread",
                    f"The judge {self.name} cannot run in the thread {threading.current_thread().name!r}: signals need "
                    "the main thread, and event loops and connections the thread that made them. Give it "
                    "`CallableJudge(function, batch_deadline=None)`, which runs it in the calling thread, without a "
                    "time limit. Or switch off what sets signals: `parse(..., parsing_timeout=None)` and "
                    "`verify(..., timeout_seconds=None)` of math_verify.",
                )
            return Verdict.abstain(f"{type(error).__name__}: {error}")
        if isinstance(answer, Verdict):
            return answer
        if inspect.iscoroutine(answer):
            answer.close()  # the reason names it; Python need not warn that nobody awaited it
        return Verdict.no_error(len(item.steps)) if answer is None else Verdict.error(answer, len(item.steps))


def _is_bound_to_a_thread(error: BaseException | None) -> bool:
    """Whether a failure, or one that it was made of, comes from something that works in some thread only."""
    while error is not None:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        raised_in = frame.tb_frame.f_globals.get("__name__") if frame else None
        # Libraries put these failures into words of their own, but what refused the thread stands in the chain
        if raised_in in _OF_ONE_THREAD or (isinstance(error, sqlite3.ProgrammingError) and "thread" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def columns_for(row: Mapping[str, Any], names: Sequence[str] | None, taken: Container[str] = ()) -> dict[str, Any]:
    """The columns of a row with these names, or all of them if `names` is `None`, without those that are `taken`."""
    return {name: row[name] for name in (row if names is None else names) if name in row and name not in taken}


def _kind_without_answer(function: Callable[..., Any]) -> str | None:
    """What a function is, if a call of it gives something that has yet to run; `None` if the call runs it."""
    from trl.trainer.utils import is_async_callable

    if is_async_callable(function):
        return "a coroutine function"
    while isinstance(function, partial):
        function = function.func
    for call in (function, getattr(function, "__call__", None)):  # noqa: B004  # the method, not whether there is one
        if inspect.isasyncgenfunction(call) or inspect.isgeneratorfunction(call):
            return "a generator function"
    return None


def _read_signature(function: Callable[..., Any]) -> tuple[bool, list[str] | None, list[str], set[str]]:
    """
    How a judge function is called: whether problem and steps are given by name; the columns that it has parameters for,
    `None` for any; those of them that it cannot do without; the names that no column may have.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have no signature
        return False, [], [], set()
    by_name = False
    try:
        first = list(signature.bind_partial("", []).arguments)[:2]
    except TypeError:
        by_name, first = True, ["problem", "steps"]
    others = [parameter for name, parameter in signature.parameters.items() if name not in first]
    required = [p.name for p in others if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    try:
        if by_name:
            signature.bind_partial(problem="", steps=[])
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in others):
            raise TypeError("more than two parameters can be given by position only")
    except TypeError as error:
        raise TypeError(
            f"function={function!r} with the signature {signature} cannot be called with a problem and steps ({error}). "
            f"{_REMEDY}"
        ) from None
    if first in (["steps", "problem"], ["self", "problem"]):
        raise TypeError(
            f"function={function!r} with the signature {signature} would take the problem for its {first[0]!r}: the problem "
            f"comes first, then the steps, and a method needs its object. {_REMEDY}"
        )
    taken = _filled_names(function)
    taken |= {
        name for name in first if by_name or signature.parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    }
    if any(p.kind is p.VAR_KEYWORD for p in others):
        return by_name, None, required, taken
    named = [p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return by_name, named, required, taken


def _filled_names(function: Callable[..., Any]) -> set[str]:
    """The parameters that have their values already: of a method the first one, of a partial those that it fills."""
    if not isinstance(function, partial):
        return set() if inspect.isfunction(function) else {"self"}
    with suppress(TypeError, ValueError):  # some built-ins have no signature
        names = list(inspect.signature(function.func).parameters)[: len(function.args)]
        return {*names, *function.keywords, *_filled_names(function.func)}
    return set(function.keywords)
