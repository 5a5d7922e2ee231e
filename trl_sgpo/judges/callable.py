"""A plain function as a judge."""

import inspect
import logging
import sqlite3
import threading
from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.log_once import LogOnce


logger = logging.getLogger(__name__)

# Modules that raise if they are used in another thread than theirs
_OF_ONE_THREAD = ("signal", "asyncio.events", "asyncio.unix_events")


class CallableJudge(StepJudge):
    """
    A judge made of a plain function. [`StepwiseJudge`] turns a function into one by itself.

    Args:
        function (`Callable`):
            `f(problem, steps, **row) -> int | None`: the 0-based index of the first wrong step, `None` for no error.
            It gets the dataset columns that it has parameters for, or all of them if it takes `**kwargs`. It may also
            return a [`Verdict`], to abstain or to give a reason. If it raises, the verdict is an abstention, and the
            first traceback is logged.
        batch_deadline (`float`, *optional*, defaults to `600.0`):
            Seconds that one batch may take. A completion that is not judged by then is an abstention, so a function
            that hangs does not hang the training. Keep it below the process group's timeout. The function runs in a
            thread of its own. `None`: no limit, and the function runs in the calling thread. Code that sets signals
            needs this, such as the timeouts of `math_verify` (or switch them off, `parse(..., parsing_timeout=None)`
            and `verify(..., timeout_seconds=None)`, and keep the deadline).

    Raises:
        TypeError: If `function` is not callable, or is a coroutine function.
        ValueError: If `batch_deadline` is not positive.

    Example:

    ```python
    >>> judge = CallableJudge(lambda problem, steps: 1 if "2 + 2 = 5" in steps[1] else None)
    >>> judge.judge([JudgeItem("What is 2 + 2?", ("Add them.", "2 + 2 = 5"))])[0].first_error
    1
    ```
    """

    def __init__(self, function: Callable[..., Any], batch_deadline: float | None = 600.0) -> None:
        if not callable(function):
            raise TypeError(
                f"function={function!r} is not callable. Give a function `f(problem, steps, **row)` that returns the "
                "0-based index of the first wrong step, or None for no error."
            )
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"function={function!r} is a coroutine function, and a judge is called synchronously. Subclass "
                "`StepJudge` and run the batch in its `judge` method, for instance with `asyncio.run`."
            )
        if batch_deadline is not None and not 0 < batch_deadline <= threading.TIMEOUT_MAX:
            raise ValueError(f"batch_deadline={batch_deadline} must be a positive number of seconds, or None.")
        self.function = function
        self.batch_deadline = batch_deadline
        self.column_names = _column_names(function)
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
        try:
            answer = self.function(item.problem, list(item.steps), **columns_for(item.row, self.column_names))
        except (Exception, SystemExit, CancelledError) as error:
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


def columns_for(row: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """The columns of a row that a judge function gets: those with these names, or all of them if `names` is `None`."""
    # A column called "problem" or "steps" must not collide with the two arguments that are always given
    wanted = row if names is None else names
    return {name: row[name] for name in wanted if name in row and name not in ("problem", "steps")}


def _column_names(function: Callable[..., Any]) -> list[str] | None:
    """The parameters of a judge function beyond `problem` and `steps`; `None` if it takes any column."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-ins have no signature
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters[2:] if parameter.kind in named]
