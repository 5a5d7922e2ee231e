import asyncio
import signal
import sqlite3
import threading
from asyncio import CancelledError
from functools import partial

import pytest

from trl_sgpo import CallableJudge, JudgeItem, Verdict


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
    async def judge(problem, steps):
        return 0

    with pytest.raises(TypeError, match="function=7 is not callable"):
        CallableJudge(7)
    with pytest.raises(TypeError, match="is a coroutine function"):
        CallableJudge(judge)
    for deadline in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"batch_deadline={deadline} must be a positive number"):
            CallableJudge(len, batch_deadline=deadline)


def test_name():
    assert CallableJudge(status).name == f"{__name__}.status"
    assert CallableJudge(partial(status)).name == f"{__name__}.status"


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
