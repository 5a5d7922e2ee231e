import asyncio
import re
import signal
import sqlite3
import threading
from asyncio import CancelledError
from functools import partial

import numpy as np
import pytest
import torch
from conftest import first_long_word
from toys import CountingJudge

from trl_sgpo import CallableJudge, JudgeItem, StepwiseJudge, Verdict
from trl_sgpo.judges.base import ask


ITEM = JudgeItem("What is 2 + 2?", ("Add.", "It is 5."), row={"solution": "4", "level": 3, "problem": "a column"})


def status(verdicts):
    return [(verdict.status, verdict.first_error) for verdict in verdicts]


def test_answers_become_verdicts():
    answers = iter([1, None, Verdict.abstain("hm"), Verdict.error(0, reason="no")])
    verdicts = CallableJudge(lambda problem, steps: next(answers)).judge([ITEM] * 4)
    assert status(verdicts) == [("error", 1), ("no_error", None), ("abstain", None), ("error", 0)]
    assert verdicts[3].reason == "no"


def test_columns_reach_the_function_by_name():
    seen = {}

    def named(problem, steps, level, missing=7):
        seen["named"] = (problem, steps, level, missing)

    def keyword_only(problem, steps, *, solution):
        seen["keyword_only"] = solution

    def anything(problem, steps, **row):
        seen["anything"] = row

    for function in (named, keyword_only, anything, partial(keyword_only), lambda problem, steps: None):
        assert status(CallableJudge(function).judge([ITEM])) == [("no_error", None)]
    # A column called `problem` does not collide with the argument
    assert seen["named"] == (ITEM.problem, ["Add.", "It is 5."], 3, 7)
    assert seen["keyword_only"] == "4"
    assert seen["anything"] == {"solution": "4", "level": 3}


def test_an_exception_is_an_abstention_and_its_traceback_is_shown_once(caplog):
    def judge(problem, steps):
        raise KeyError("oops")

    judge = CallableJudge(judge)
    for _ in range(3):
        verdicts = judge.judge([ITEM, ITEM])
        assert status(verdicts) == [("abstain", None)] * 2
        assert verdicts[0].reason == "KeyError: 'oops'"
    assert caplog.text.count("Traceback") == 1


def test_a_function_that_hangs_is_left_behind():
    release = threading.Event()
    calls = []

    def judge(problem, steps):
        calls.append(1)
        if len(calls) == 3:
            release.wait()
        return 0

    verdicts = CallableJudge(judge, batch_deadline=0.3).judge([ITEM] * 5)  # comes back although nothing is released
    assert status(verdicts) == [("error", 0)] * 2 + [("abstain", None)] * 3
    assert verdicts[2].reason == "not judged within batch_deadline=0.3 s"
    release.set()


def test_what_was_left_behind_stops():
    release = threading.Event()
    threads = []

    def judge(problem, steps):
        threads.append(threading.current_thread())
        release.wait()
        return 0

    CallableJudge(judge, batch_deadline=0.1).judge([ITEM] * 50)
    release.set()
    threads[0].join()
    assert len(threads) == 1


def test_code_that_wants_the_main_thread(caplog):
    def judge(problem, steps):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    assert status(CallableJudge(judge).judge([ITEM])) == [("abstain", None)]
    assert "batch_deadline=None" in caplog.text
    assert status(CallableJudge(judge, batch_deadline=None).judge([ITEM])) == [("no_error", None)]


def raised_differently(original):
    """As libraries do: in words of their own."""
    try:
        original()
    except Exception as error:
        raise LookupError("this is not supported here") from error


def handles_signals_in_an_event_loop():
    loop = asyncio.new_event_loop()
    try:
        loop.add_signal_handler(signal.SIGUSR1, print)
        loop.remove_signal_handler(signal.SIGUSR1)
    finally:
        loop.close()


CONNECTION = sqlite3.connect(":memory:")


@pytest.mark.parametrize(
    "original",
    [
        lambda: signal.signal(signal.SIGALRM, signal.SIG_DFL),
        handles_signals_in_an_event_loop,
        asyncio.get_event_loop_policy().get_event_loop,
        lambda: CONNECTION.execute("select 1"),
    ],
    ids=["signal", "signal_handler_of_a_loop", "event_loop", "sqlite3"],
)
def test_what_is_bound_to_a_thread_is_known_by_what_refused_it(original, caplog):
    def judge(problem, steps):
        raised_differently(original)
        return 0

    asyncio.set_event_loop(loop := asyncio.new_event_loop())
    try:
        assert status(CallableJudge(judge).judge([ITEM])) == [("abstain", None)]
        assert "batch_deadline=None" in caplog.text
        assert status(CallableJudge(judge, batch_deadline=None).judge([ITEM])) == [("error", 0)]
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@pytest.mark.parametrize("error", [ValueError("main thread"), KeyError("a"), sqlite3.ProgrammingError("closed")])
def test_another_failure_gives_no_such_advice(error, caplog):
    def judge(problem, steps):
        raise error

    assert status(CallableJudge(judge).judge([ITEM])) == [("abstain", None)]
    assert "batch_deadline=None" not in caplog.text


def test_a_judge_that_uses_math_verify(caplog):
    """Its timeouts set signals. Without them it runs in the judge's thread, with them in the calling one."""
    math_verify = pytest.importorskip("math_verify")

    def judge(problem, steps, timeout=3):
        gold, found = (math_verify.parse(text, parsing_timeout=timeout) for text in ("$4$", "$5$"))
        return None if math_verify.verify(gold, found, timeout_seconds=timeout) else 1

    assert status(CallableJudge(judge).judge([ITEM])) == [("abstain", None)]
    assert "batch_deadline=None" in caplog.text
    assert "parsing_timeout=None" in caplog.text
    assert status(CallableJudge(judge, batch_deadline=None).judge([ITEM])) == [("error", 1)]
    assert status(CallableJudge(partial(judge, timeout=None)).judge([ITEM])) == [("error", 1)]


def test_without_a_deadline_it_runs_in_the_calling_thread():
    threads = []
    CallableJudge(lambda problem, steps: threads.append(threading.current_thread()), batch_deadline=None).judge([ITEM])
    assert threads == [threading.current_thread()]


def test_bad_arguments():
    with pytest.raises(TypeError, match="function=7 is not callable"):
        CallableJudge(7)
    for deadline in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"batch_deadline={deadline} must be a positive number"):
            CallableJudge(first_long_word, batch_deadline=deadline)


async def asynchronous(problem, steps):
    return 0


def generator(problem, steps):
    yield 0


async def asynchronous_generator(problem, steps):
    yield 0


class Asynchronous:
    async def __call__(self, problem, steps):
        return 0

    async def method(self, problem, steps):
        return 0


class Generator:
    def __call__(self, problem, steps):
        yield 0


@pytest.mark.parametrize("wrap", [CallableJudge, StepwiseJudge])
@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (asynchronous, "coroutine"),
        (partial(asynchronous, problem="p"), "coroutine"),
        (Asynchronous().method, "coroutine"),
        (Asynchronous(), "coroutine"),
        (partial(Asynchronous(), steps=[]), "coroutine"),
        (partial(partial(Asynchronous().method)), "coroutine"),
        (generator, "generator"),
        (asynchronous_generator, "generator"),
        (Generator(), "generator"),
        (partial(Generator()), "generator"),
    ],
)
def test_what_gives_no_answer_when_it_is_called_is_refused(function, kind, wrap):
    with pytest.raises(TypeError, match=f"is a {kind} function, and a judge is called synchronously. Subclass"):
        wrap(function)


@pytest.mark.filterwarnings("error")
def test_a_coroutine_that_a_plain_function_returns_is_named_in_the_reason():
    (verdict,) = ask(CallableJudge(lambda problem, steps: asynchronous(problem, steps)), [ITEM])
    assert verdict.status == "abstain"
    assert "is of type coroutine" in verdict.reason


@pytest.mark.parametrize(
    "function",
    [
        lambda: 0,
        lambda problem: 0,
        lambda text, *, steps: 0,
        lambda *, text, parts: 0,
        lambda problem, steps, level, /: 0,
        partial(lambda problem, steps: 0, "a problem"),
        [].append,
        len,
        CountingJudge().judge,
    ],
)
def test_a_function_that_cannot_take_a_problem_and_steps_is_refused(function):
    with pytest.raises(
        TypeError, match=r"with the signature \(.*\) cannot be called with a problem and steps \(.*f\(problem, steps"
    ):
        CallableJudge(function)


@pytest.mark.parametrize("function", [lambda steps, problem: 0, lambda self, problem, steps: 0])
def test_a_function_that_takes_the_problem_for_something_else_is_refused(function):
    with pytest.raises(TypeError, match=r"would take the problem for its '(steps|self)': the problem comes first"):
        CallableJudge(function)


@pytest.mark.parametrize("batch_deadline", [60.0, None])
def test_a_panic_that_is_no_exception_costs_one_verdict(batch_deadline):
    class Panic(BaseException):
        pass

    def judge(problem, steps):
        if problem == "bad":
            raise Panic("index out of bounds")
        return 0

    items = [JudgeItem(problem, ("a",)) for problem in ("good", "bad", "good")]
    verdicts = CallableJudge(judge, batch_deadline).judge(items)
    assert [verdict.first_error for verdict in verdicts] == [0, None, 0]
    assert verdicts[1].reason == "Panic: index out of bounds"


def test_a_class_is_refused():
    with pytest.raises(TypeError, match=r"is a class\. Give a function"):
        CallableJudge(Generator)


ROW = {"question": "Q", "solution_steps": "S", "problem": "P", "steps": "T", "config": "C", "self": "me", "level": 3}


class Judge:
    def __call__(self, question, steps, **row):
        return row

    def method(self, question, solution_steps, **row):
        return row


@pytest.mark.parametrize(
    ("function", "left_out"),
    [
        (lambda question, steps, **row: row, {"question", "steps"}),
        (lambda problem, solution_steps, **row: row, {"problem", "solution_steps"}),
        (lambda question, solution_steps, **row: row, {"question", "solution_steps"}),
        (lambda problem, steps, **row: row, {"problem", "steps"}),
        (lambda problem, steps, /, **row: row, set()),
        (lambda *, problem, steps, **row: row, {"problem", "steps"}),
        (lambda *both, **row: row, set()),
        (
            lambda **row: {name: value for name, value in row.items() if name not in ("problem", "steps")},
            {"problem", "steps"},
        ),
        (Judge(), {"question", "steps", "self"}),
        (Judge().method, {"question", "solution_steps", "self"}),
        (partial(lambda config, question, steps, **row: row, 7), {"config", "question", "steps"}),
        (partial(Judge().method), {"question", "solution_steps", "self"}),
    ],
)
def test_the_first_two_parameters_may_be_called_like_columns(function, left_out):
    (verdict,) = ask(CallableJudge(function), [JudgeItem("What is 2 + 2?", ("Add.",), row=ROW)])
    assert "multiple values" not in verdict.reason
    assert "is of type dict" in verdict.reason  # it was called, and gave its row
    assert {name for name in ROW if f"'{name}': {ROW[name]!r}" in verdict.reason} == ROW.keys() - left_out


def test_a_column_called_problem_reaches_a_function_that_calls_its_parameters_otherwise():
    seen = []
    CallableJudge(lambda text, parts, problem: seen.append((text, problem))).judge([ITEM])
    assert seen == [("What is 2 + 2?", "a column")]


def test_parameters_given_by_name():
    seen = []

    def judge(*, steps, problem, level):
        seen.append((problem, steps, level))

    assert status(CallableJudge(judge).judge([ITEM])) == [("no_error", None)]
    assert seen == [(ITEM.problem, ["Add.", "It is 5."], 3)]


def test_what_a_partial_fills_is_not_replaced_by_a_column():
    seen = []
    for function in (
        lambda problem, steps, level: seen.append(level),
        lambda problem, steps, **row: seen.append(row["level"]),
    ):
        CallableJudge(partial(function, level=7)).judge([ITEM])
    assert seen == [7, 7]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (True, "a bool"),
        (np.True_, "of type bool"),
        (np.array(True), "of type ndarray"),
        (torch.tensor(True), "a bool"),
        (torch.tensor([True]), "a bool"),
        (torch.tensor(1.0), "of type Tensor"),
        (0.0, "of type float"),
        (np.float32(1), "of type float32"),
        ("0", "of type str"),
        ([0], "of type list"),
        ((0,), "of type tuple"),
        ({"first_error": 0}, "of type dict"),
    ],
)
def test_an_answer_that_is_no_integer_is_an_abstention_that_names_its_type(answer, kind):
    (verdict,) = ask(CallableJudge(lambda problem, steps: answer), [ITEM])
    assert verdict.status == "abstain"
    assert re.search(f"is {kind}.*, and the index of a step is an integer", verdict.reason)


@pytest.mark.parametrize("answer", [1, np.int64(1), np.array(1), torch.tensor(1), torch.tensor(1, dtype=torch.uint8)])
def test_integers_of_other_libraries_are_steps(answer):
    (verdict,) = ask(CallableJudge(lambda problem, steps: answer), [ITEM])
    assert status([verdict]) == [("error", 1)]


def test_a_step_that_is_not_there():
    (verdict,) = ask(CallableJudge(lambda problem, steps: 2), [ITEM])
    assert verdict.reason == "first_error=2 is not the 0-based index of one of 2 steps"


def test_name():
    assert CallableJudge(first_long_word).name == "conftest.first_long_word"
    assert CallableJudge(partial(first_long_word)).name == "conftest.first_long_word"


def test_a_cancelled_call_is_one_abstention():
    """Clients that work asynchronously raise it."""
    answers = iter([0, CancelledError(), 1])

    def judge(problem, steps):
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    items = [ITEM] * 3
    assert [verdict.status for verdict in CallableJudge(judge).judge(items)] == ["error", "abstain", "error"]
