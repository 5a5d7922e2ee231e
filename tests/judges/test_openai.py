"""Against real HTTP servers on loopback, which do wrong whatever a server can do wrong."""

import asyncio
import copy
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import by_kind, logged, words_as_steps
from server import Answer, Clock, free_port, started

from trl_sgpo import JudgeItem, StepwiseJudge
from trl_sgpo.judges import CachedJudge, endpoint
from trl_sgpo.judges.openai import OpenAIJudge
from trl_sgpo.judges.prompt import JudgePrompt


KEY = "uniq7h3-k3y-value"
# More than any test waits: a judge that comes back did not wait for it
NEVER = 3600.0
SILENT = Answer(seconds=NEVER)
DRIPPING = Answer("FIRST_ERROR: 1" * 10_000, trickle=0.05)
ITEMS = [JudgeItem(f"Problem {i}", ("Add.", "It is 5.", f"Answer {i}")) for i in range(6)]
VERDICT = json.dumps({"analysis": "Hm.", "first_error_step": "2"})
CHOICES = {"choices": [{"finish_reason": "stop", "message": {"content": "FIRST_ERROR: 2"}}]}


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch):
    monkeypatch.setattr(endpoint.log_once, "_logged", set())


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def serve():
    with started() as start:
        yield start


def judged(judge, items=ITEMS):
    """Verdicts, each of which is whole."""
    verdicts = judge.judge(items)
    assert len(verdicts) == len(items)
    for verdict in verdicts:
        assert (verdict.status == "error") == (verdict.first_error is not None)
    return verdicts


def wait_for(condition):
    """Waits until something is so, a while at most."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def statuses(verdicts):
    return {verdict.status for verdict in verdicts}


class TestAnswers:
    def test_order_is_kept_and_connections_too(self, serve):
        # The last ones come back first
        server = serve(
            lambda request: Answer(f"FIRST_ERROR: {request.number % 3 + 1}", seconds=0.05 * (6 - request.number))
        )
        judge = OpenAIJudge("m", server.url)
        for _ in range(3):
            assert [verdict.first_error for verdict in judge.judge(ITEMS)] == [0, 1, 2, 0, 1, 2]
        assert server.connections == 6
        assert judge.usage == {
            "requests": 18,
            "prompt_tokens": 1800,
            "completion_tokens": 126,
            "retries": 0,
            "failures": 0,
        }

    def test_what_is_sent(self, serve):
        server = serve()
        OpenAIJudge("m", server.url, max_tokens=77, extra_body={"seed": 3}).judge(ITEMS[:1])
        body = server.requests[0].body
        schema = body.pop("response_format")["json_schema"]
        assert schema["strict"]
        assert list(schema["schema"]["properties"]) == ["analysis", "first_error_step"]
        assert schema["schema"]["properties"]["first_error_step"]["enum"] == ["1", "2", "3"]
        assert [message["role"] for message in body.pop("messages")] == ["system", "user"]
        assert body == {"model": "m", "max_tokens": 77, "temperature": 0.0, "seed": 3}

    @pytest.mark.parametrize(
        ("answer", "first_error"),
        [
            (json.dumps({"analysis": "Hm.", "first_error_step": "2"}), 1),
            ("It ignores the response format.\n**FIRST_ERROR:** 3", 2),
            (Answer(message={"content": None, "reasoning": "Hm. FIRST_ERROR: 2"}), 1),
            (Answer(message={"content": "", "reasoning_content": "Hm. FIRST_ERROR: 2"}), 1),
            (Answer(message={"content": [{"type": "text", "text": "FIRST_ERROR: 2"}]}), 1),
            (Answer(message={"content": "FIRST_ERROR: 2", "reasoning": "FIRST_ERROR: 1"}), 1),
            (
                Answer(
                    message={"content": None, "reasoning_content": 'Hm.\n{"analysis": "", "first_error_step": "2"}'}
                ),
                1,
            ),
            (Answer(message={"content": " ", "reasoning": "maybe 1, but no.\n**FIRST_ERROR: 2**\n"}), 1),
            # cut off, but after its end
            (Answer(VERDICT + "\n" * 500, finish_reason="length"), 1),
            (Answer(f"```json\n{VERDICT}\n```" + "\t" * 500, finish_reason="length"), 1),
            (Answer(VERDICT, finish_reason="length"), 1),
            (Answer("So.\nFIRST_ERROR: 2\n \n", finish_reason="length"), 1),
            (Answer(body={**CHOICES, "usage": {"prompt_tokens": "many"}}), 1),
            (Answer(body={**CHOICES, "usage": "none", "error": None}), 1),
        ],
    )
    def test_verdicts(self, serve, answer, first_error):
        verdict = OpenAIJudge("m", serve(lambda request: answer).url).judge(ITEMS[:1])[0]
        assert (verdict.status, verdict.first_error, verdict.n_steps) == ("error", first_error, 3)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("I cannot say.", "holds no verdict"),
            ("FIRST_ERROR: 4", "named step 4 of 3"),
            ('{"analysis": "", "first_error_step": "-1"}', "named step -1 of 3"),
            ('{"analysis": "cut, FIRST_ERROR: 1', "broken JSON"),
            (Answer(finish_reason="length"), "cut off at max_tokens=1024"),
            (Answer(VERDICT[:-1] + "\n" * 500, finish_reason="length"), "cut off at max_tokens=1024"),
            (Answer("FIRST_ERROR: 1, wait\n", finish_reason="length"), "cut off at max_tokens=1024"),
            (
                Answer(message={"content": "", "reasoning": VERDICT + "\n"}, finish_reason="length"),
                "cut off at max_tokens=1024",
            ),
            # drafts
            ("<think>FIRST_ERROR: 1? no, 2 is", "thought and gave no verdict"),
            (
                Answer(message={"content": "", "reasoning": "maybe FIRST_ERROR: 1, but wait"}),
                "thought and gave no verdict",
            ),
            (Answer(message={"content": None, "reasoning_content": "FIRST_ERROR: 1?"}), "thought and gave no verdict"),
            (
                Answer(message={"content": " ", "reasoning": f"Perhaps {VERDICT}, but step 1 is odd"}),
                "thought and gave no verdict",
            ),
            (Answer(message={"content": "Hm.", "reasoning": "FIRST_ERROR: 1"}), "holds no verdict"),
            (Answer(finish_reason="content_filter"), "content filter"),
            (Answer(finish_reason="abort"), "broke the judge's answer off"),
            (Answer(message={"content": None, "refusal": "I must not."}), "refused to answer: I must not."),
            (Answer(message={"content": None}), "is empty"),
            (Answer(message={"content": {"a": 1}, "reasoning": 3}), "is empty"),
            (Answer(message=None), "holds no message"),
            (Answer(message="FIRST_ERROR: 1"), "holds no message"),
            (Answer(message={"content": None}, finish_reason=["stop"]), "is empty"),
            (Answer(body={"choices": []}), "holds no message"),
            (Answer(body={"choices": [None]}), "holds no message"),
            (Answer(body={"choices": None}), "JSON without a list of choices"),
            (Answer(body={"object": "list", "data": [1]}), "JSON without a list of choices"),
            (Answer(body=[1, 2]), "JSON without a list of choices"),
            (Answer(body=b"FIRST_ERROR: 1"), "answered with no JSON: FIRST_ERROR: 1"),
            (Answer(body=b"[" * 100_000), "answered with no JSON"),
            (Answer(body=b"\xff\xfe\x00"), "answered with no JSON"),
            (Answer(body=b"x" * 5_000_000), "longer than 4000000 bytes"),
            (Answer(body={"error": {"message": "provider is out", "code": 401}}), "HTTP 401"),
            (Answer("no such thing", status=418), "HTTP 418"),
            (Answer(status=307, headers={"Location": "/elsewhere"}), "HTTP 307"),
        ],
    )
    def test_no_verdict(self, serve, answer, reason):
        server = serve(lambda request: answer)
        judge = OpenAIJudge("m", server.url, max_retries=0)
        verdicts = judged(judge, ITEMS[:2])
        assert statuses(verdicts) == {"abstain"}
        for verdict in verdicts:
            assert reason in verdict.reason
        assert len(server.requests) == 2
        server.reply = lambda request: "FIRST_ERROR: 2"
        assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}

    def test_nothing_to_judge(self):
        assert OpenAIJudge("m", "http://127.0.0.1:1/v1").judge([]) == []

    def test_no_error(self, serve):
        item = JudgeItem("Problem 1", ("Add.", "It is 4."), known_wrong=False)
        assert OpenAIJudge("m", serve(lambda request: "FIRST_ERROR: none").url).judge([item])[0].status == "no_error"


class TestFaults:
    """
    What a fault costs: abstentions, no more time than the deadline, and nothing in the next batch. A reason that is not the
    deadline's says that the judge came back before it.
    """

    @pytest.mark.parametrize(
        ("answer", "reason", "deadline", "requests"),
        [
            (500, "HTTP 500", 10.0, 12),
            (Answer("wait", status=408, headers={"Retry-After": "0.1"}), "HTTP 408", 10.0, 12),
            (Answer("slow down", status=429, headers={"Retry-After": "3600"}), "Retry-After: 3600 s", 10.0, 6),
            (
                Answer("slow down", status=429, headers={"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}),
                "After",
                10.0,
                6,
            ),
            (Answer("slow down", status=429, headers={"Retry-After": "20"}), "HTTP 429", 10.0, 6),
            (SILENT, "batch_deadline", 1.0, 6),
            (DRIPPING, "batch_deadline", 1.0, 6),
            (Answer(cut=True), "ClientPayloadError", 10.0, 12),
            (Answer("who?", status=401), "environment variable OPENAI_API_KEY, which is not set", 10.0, 6),
            (Answer("what?", status=404), "model='m'", 10.0, 6),
        ],
    )
    def test_abstains_in_time(self, serve, monkeypatch, clock, answer, reason, deadline, requests):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        server = serve(lambda request: answer)
        judge = OpenAIJudge("m", server.url, batch_deadline=deadline, max_retries=1)
        verdicts = judged(judge)
        assert statuses(verdicts) == {"abstain"}
        for verdict in verdicts:
            assert reason in verdict.reason
        assert len(server.requests) == requests == judge.usage["requests"]
        clock.skip(61)  # it is asked again then, whatever Retry-After says
        server.reply = lambda request: f"FIRST_ERROR: {request.number % 3 + 1}"
        assert [verdict.first_error for verdict in judge.judge(ITEMS)] == [0, 1, 2, 0, 1, 2]

    @pytest.mark.parametrize("answer", [SILENT, DRIPPING])
    def test_timeout_of_a_request(self, serve, answer):
        server = serve(lambda request: answer if request.number == 2 else "FIRST_ERROR: 3")
        verdicts = judged(OpenAIJudge("m", server.url, timeout=1.0))
        assert [verdict.first_error for verdict in verdicts] == [2, 2, None, 2, 2, 2]
        assert "no answer within timeout=1 s" in verdicts[2].reason

    def test_nothing_listens(self):
        judge = OpenAIJudge("m", f"http://127.0.0.1:{free_port()}/v1")
        verdicts = judged(judge)
        assert statuses(verdicts) == {"abstain"}
        assert f"{judge.servers.base_urls[0]} cannot be reached (" in verdicts[0].reason
        assert verdicts[0].reason.endswith("Check the address, and whether the server is up")
        assert judge.usage["retries"] == 12

    def test_retries_help(self, serve):
        seen = set()

        def reply(request):
            if request.number in seen:
                return "FIRST_ERROR: 1"
            seen.add(request.number)
            if request.number % 2:
                return Answer(cut=True)
            return Answer("wait", status=429, headers={"Retry-After": "0.2"})

        judge = OpenAIJudge("m", serve(reply).url)
        assert statuses(judged(judge)) == {"error"}
        assert judge.usage["retries"] == judge.usage["failures"] == 6

    def test_what_the_deadline_cuts_off_does_not_reach_the_next_batch(self, serve):
        server = serve(lambda request: "FIRST_ERROR: 1" if request.number < 3 else SILENT)
        judge = OpenAIJudge("m", server.url, batch_deadline=1.0, max_concurrency=5)
        assert [verdict.first_error for verdict in judged(judge)] == [0, 0, 0, None, None, None]
        assert wait_for(lambda: server.lost == 3)
        assert server.under_way == 0
        server.reply = lambda request: "FIRST_ERROR: 2"
        assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}
        assert len(server.requests) == 12

    def test_the_deadline_holds_with_a_queue_and_retries(self, serve):
        server = serve(lambda request: Answer(status=503, seconds=0.2))
        items = [JudgeItem(f"Problem {i}", ("Add.",)) for i in range(100)]
        judge = OpenAIJudge("m", server.url, batch_deadline=1.0, max_concurrency=2, max_retries=5)
        verdicts = judged(judge, items)
        assert statuses(verdicts) == {"abstain"}
        assert len(server.requests) <= 2 * 5  # of 600; one takes 0.2 s and two are under way
        assert "batch_deadline" in verdicts[-1].reason

    def test_an_interrupt_ends_the_requests(self, serve):
        server = serve(lambda request: SILENT)
        judge = OpenAIJudge("m", server.url)
        # A process that was started in the background ignores interrupts
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                judge.judge(ITEMS)
        finally:
            signal.signal(signal.SIGINT, handler)
        assert wait_for(lambda: server.lost == len(server.requests))
        assert server.under_way == 0
        server.reply = lambda request: "FIRST_ERROR: 2"
        assert statuses(judge.judge(ITEMS)) == {"error"}

    def test_a_first_step_that_is_too_long(self, serve):
        server = serve()
        items = [JudgeItem("Problem 0", ("x" * 1000,)), JudgeItem("Problem 1", ("Add.", "x" * 1000))]
        first, second = OpenAIJudge("m", server.url, max_characters=100).judge(items)
        assert "longer than max_characters=100" in first.reason
        assert second.first_error == 0
        assert len(server.requests) == 1


def refusing(*names, status=422, text="Unexpected fields in the request: {}"):
    """A server that refuses keys of a request."""

    def reply(request):
        found = [name for name in names if name in request.body]
        return Answer(text.format(found), status=status) if found else "FIRST_ERROR: 2"

    return reply


class TestLadder:
    def test_response_format_is_refused(self, serve, caplog):
        server = serve(refusing("response_format"))
        judge = OpenAIJudge("m", server.url)
        caplog.set_level(logging.INFO)
        assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}
        assert [record.message for record in caplog.records] == [
            f"The judge's server {server.url} refuses a part of what it is sent. From now on: output is 'text', not "
            "'json_schema'."
        ]
        before = len(server.requests)
        assert before <= 6 + 1 + 6
        assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}
        assert len(server.requests) - before == 6
        assert "response_format" not in server.requests[-1].body
        assert "FIRST_ERROR: k" in server.requests[-1].question

    def test_json_objects_only(self, serve):
        def reply(request):
            form = request.body.get("response_format", {}).get("type")
            if form == "json_schema":
                return Answer("response_format.type must be json_object", status=400)
            return json.dumps({"analysis": form, "first_error_step": "3"})

        judge = OpenAIJudge("m", serve(reply).url)
        assert {json.loads(verdict.reason)["analysis"] for verdict in judge.judge(ITEMS)} == {"json_object"}

    @pytest.mark.parametrize("text", ["Unexpected fields in the request: {}", "Bad Request"])
    def test_everything_optional_is_refused(self, serve, text):
        server = serve(refusing("response_format", "temperature", "seed", "top_k", text=text))
        judge = OpenAIJudge("m", server.url, extra_body={"seed": 1, "top_k": 2})
        assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}
        assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}
        body = server.requests[-1].body
        assert set(body) == {"model", "messages", "max_tokens"}

    def test_a_server_that_wants_the_new_name_of_the_length_limit(self, serve, caplog):
        text = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        server = serve(refusing("max_tokens", status=400, text=text))
        judge = OpenAIJudge("m", server.url)
        assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}
        body = server.requests[-1].body
        assert body["max_completion_tokens"] == 1024
        assert body["response_format"]["type"] == "json_schema"  # nothing else was given up

    def test_only_what_is_named_is_left_out(self, serve, caplog):
        server = serve(refusing("temperature", status=400, text="Unsupported value: 'temperature' must be 1"))
        OpenAIJudge("m", server.url, extra_body={"seed": 1}).judge(ITEMS)
        body = server.requests[-1].body
        assert "temperature" not in body
        assert body["seed"] == 1
        assert body["response_format"]["type"] == "json_schema"
        assert "no temperature is sent" in caplog.text

    @pytest.mark.parametrize("text", ["This model's maximum context length is 100 tokens.", "Sorry."])
    def test_a_question_that_is_too_long_changes_nothing_for_the_others(self, serve, text):
        def reply(request):
            return Answer(text, status=400) if request.number == 0 else "FIRST_ERROR: 2"

        server = serve(reply)
        judge = OpenAIJudge("m", server.url, max_concurrency=1)
        for _ in range(2):
            verdicts = judge.judge(ITEMS)
            assert [verdict.first_error for verdict in verdicts] == [None, 1, 1, 1, 1, 1]
            assert "HTTP 400" in verdicts[0].reason
            assert ("max_characters" in verdicts[0].reason) == ("context" in text)
        formats = {r.body.get("response_format", {}).get("type") for r in server.requests if r.number > 0}
        assert formats == {"json_schema"}
        if "context" in text:
            assert len(server.requests) == 12

    @pytest.mark.parametrize(
        "text",
        [
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
            "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
            "Requested token count exceeds the model's maximum context length of 4096 tokens.",
            "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
            "the request exceeds the available context size, try increasing it",
            "prompt is too long: 210000 tokens > 200000 maximum",
            "Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000",
        ],
    )
    def test_how_servers_say_too_long(self, text):
        assert endpoint.is_too_long(text)

    @pytest.mark.parametrize(
        "text",
        [
            "Unexpected fields in the request: {'response_format'}",
            "Invalid schema for response_format 'verdict': the enum exceeds the maximum length of 500",
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
            "Extra inputs are not permitted",
        ],
    )
    def test_how_they_say_other_things(self, text):
        assert not endpoint.is_too_long(text)

    def test_a_server_that_refuses_everything(self, serve):
        server = serve(lambda request: Answer("No.", status=400))
        items = [JudgeItem(f"Problem {i}", ("Add.",)) for i in range(50)]
        verdicts = OpenAIJudge("m", server.url).judge(items)
        assert statuses(verdicts) == {"abstain"}
        assert "HTTP 400" in verdicts[0].reason
        assert len(server.requests) <= 50 + 8 * 5

    def test_a_fixed_output(self, serve):
        server = serve(refusing("response_format"))
        assert statuses(OpenAIJudge("m", server.url, output="json_schema").judge(ITEMS)) == {"abstain"}
        assert OpenAIJudge("m", server.url, output="text").judge(ITEMS[:1])[0].first_error == 1


class TestServers:
    def test_same_problem_adjacent_and_one_prefix(self, serve):
        server = serve()
        items = [
            JudgeItem(f"Problem {p} of many", (f"Step {g}.", "It is 5."), reference=f"The answer is {p + 10}.")
            for g in range(4)
            for p in range(3)
        ]
        OpenAIJudge("m", server.url, max_concurrency=1).judge(items)
        assert server.peak == 1
        assert [request.number for request in server.requests] == [0] * 4 + [1] * 4 + [2] * 4
        assert [
            request.question.count(f"Step {g}.") for g, request in zip([0, 1, 2, 3] * 3, server.requests, strict=True)
        ] == [1] * 12
        for p in range(3):
            questions = [request.question for request in server.requests if request.number == p]
            shared = questions[0][: questions[0].index("<step-")]
            assert all(question.startswith(shared) for question in questions)
            assert f"Problem {p} of many" in shared
            assert f"The answer is {p + 10}." in shared

    def test_concurrency_is_bounded(self, serve):
        server = serve(lambda request: Answer("FIRST_ERROR: 1", seconds=0.05))
        items = [JudgeItem(f"Problem {i}", ("Add.",)) for i in range(40)]
        assert statuses(OpenAIJudge("m", server.url, max_concurrency=7).judge(items)) == {"error"}
        assert server.peak == 7

    def test_two_servers_share_the_work_and_keep_problems_together(self, serve):
        servers = [serve(lambda request: Answer("FIRST_ERROR: 1", seconds=0.02)) for _ in range(2)]
        items = [JudgeItem(f"Problem {p}", (f"Step {g}",)) for p in range(16) for g in range(4)]
        judge = OpenAIJudge("m", [server.url for server in servers], max_concurrency=64)
        assert statuses(judge.judge(items)) == {"error"}
        counts = [len(server.requests) for server in servers]
        assert sum(counts) == 64
        assert min(counts) >= 16
        problems = [{request.number for request in server.requests} for server in servers]
        assert not problems[0] & problems[1]  # a problem moves only where its server is full

    @pytest.mark.parametrize("fault", [None, 500, 401, SILENT])
    def test_one_of_two_servers_is_down(self, serve, fault):
        good = serve(lambda request: f"FIRST_ERROR: {request.number % 3 + 1}")
        bad = serve(lambda request: fault) if fault else None
        url = bad.url if bad else f"http://127.0.0.1:{free_port()}/v1"
        items = [JudgeItem(f"Problem {i}", ("Add.", "It is 5.", "So 6.")) for i in range(60)]
        timeout = 1.5 if isinstance(fault, Answer) else 20.0
        judge = OpenAIJudge(
            "m", [url, good.url], max_retries=0, breaker_failures=3, max_concurrency=4, timeout=timeout
        )
        assert [verdict.first_error for verdict in judged(judge, items)] == [i % 3 for i in range(60)]
        if bad:
            assert len(bad.requests) <= 8
            before = len(bad.requests)
        assert statuses(judge.judge(items)) == {"error"}
        if bad:
            assert len(bad.requests) == before

    def test_breaker_opens_and_closes(self, serve, caplog, clock):
        server = serve(lambda request: 500)
        items = [JudgeItem(f"Problem {i}", ("Add.",)) for i in range(30)]
        judge = OpenAIJudge("m", server.url, max_retries=0, max_concurrency=2, breaker_failures=4, breaker_seconds=40)
        verdicts = judge.judge(items)
        assert statuses(verdicts) == {"abstain"}
        assert 4 <= len(server.requests) <= 5
        # The first failure and what follows from it are said, and not every completion that nobody was asked about
        assert [" IS DOWN: " in message for message in caplog.messages] == [False, True]
        assert "times in a row and is not asked for" in verdicts[-1].reason
        assert "HTTP 500" in verdicts[-1].reason
        before = len(server.requests)
        judge.judge(items)  # nobody is asked
        assert len(server.requests) == before
        clock.skip(39)
        judge.judge(items)
        assert len(server.requests) == before
        clock.skip(2)
        judge.judge(items)  # one trial, in vain
        assert len(server.requests) == before + 1
        clock.skip(79)
        judge.judge(items)  # the pause has doubled
        assert len(server.requests) == before + 1
        assert caplog.text.count("IS DOWN") == 1
        server.reply = lambda request: "FIRST_ERROR: 1"
        clock.skip(2)
        assert statuses(judge.judge(items)) == {"error"}  # those that waited for the trial too
        assert len(server.requests) == before + 1 + 30
        assert "answers again" in caplog.text

    def test_a_hanging_server_is_left_alone_after_a_batch(self, serve):
        server = serve(lambda request: SILENT)
        judge = OpenAIJudge("m", server.url, batch_deadline=0.5, breaker_failures=3)
        judge.judge(ITEMS)
        assert "is not asked for" in judged(judge)[0].reason  # and not that the deadline passed
        assert len(server.requests) == 6

    def test_a_slow_server_is_not_down(self, serve):
        """Requests time out at the end of a queue, on a server that answers others all the time."""
        everyone = threading.Event()  # is there before anyone is answered

        def reply(request):
            if len(server.requests) == 30:
                everyone.set()
            return Answer("FIRST_ERROR: 1", after=everyone) if request.number < 8 else SILENT

        server = serve(reply)
        items = [JudgeItem(f"Problem {i}", ("Add.",)) for i in range(30)]
        judge = OpenAIJudge("m", server.url, timeout=2.0, breaker_failures=3)
        assert [verdict.status for verdict in judge.judge(items)] == ["error"] * 8 + ["abstain"] * 22
        server.reply = lambda request: "FIRST_ERROR: 1"
        assert statuses(judge.judge(items)) == {"error"}


class TestVotes:
    def test_plurality(self, serve):
        answers = iter(["FIRST_ERROR: 2", "FIRST_ERROR: 1", "FIRST_ERROR: 2", "no idea"])
        server = serve(lambda request: next(answers))
        judge = OpenAIJudge("m", server.url, votes=4)
        verdict = judge.judge(ITEMS[:1])[0]
        assert (verdict.first_error, verdict.confidence) == (1, 0.5)
        assert len(server.requests) == 4
        assert {request.body["temperature"] for request in server.requests} == {0.7}
        assert all("n" not in request.body for request in server.requests)

    def test_too_little_agreement(self, serve):
        answers = iter(["FIRST_ERROR: 2", "FIRST_ERROR: 1", "FIRST_ERROR: 2", Answer(status=400)])
        judge = OpenAIJudge(
            "m", serve(lambda request: next(answers)).url, votes=4, temperature=1, min_agreement=0.6, output="text"
        )
        assert "below min_agreement=0.6" in judge.judge(ITEMS[:1])[0].reason


class TestWhereItRuns:
    def test_inside_a_running_event_loop(self, serve):
        server = serve()

        async def notebook():
            return OpenAIJudge("m", server.url).judge(ITEMS)

        assert statuses(asyncio.run(notebook())) == {"error"}

    def test_from_several_threads(self, serve):
        server = serve(lambda request: Answer(f"FIRST_ERROR: {request.number % 3 + 1}", seconds=0.02))
        judge = OpenAIJudge("m", server.url, max_concurrency=3)
        results = {}

        def work(name):
            results[name] = [[verdict.first_error for verdict in judge.judge(ITEMS)] for _ in range(5)]

        threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(result == [[0, 1, 2, 0, 1, 2]] * 5 for result in results.values())
        assert len(results) == 4
        assert server.peak == server.connections == 3

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
    def test_after_a_fork(self, serve):
        code = """if True:
            import os, sys
            from trl_sgpo import JudgeItem
            from trl_sgpo.judges.openai import OpenAIJudge
            items = [JudgeItem(f"Problem {i}", ("Add.", "It is 5.")) for i in range(6)]
            judge = OpenAIJudge("m", sys.argv[1])
            def check():
                assert {v.first_error for v in judge.judge(items)} == {1}, judge.judge(items)
            check()
            for way in ("judges", "does nothing"):
                child = os.fork()
                if child == 0:
                    if way == "judges":
                        check()
                        check()
                    sys.exit(0)
                assert os.waitpid(child, 0)[1] == 0
                check()
            print("fine")
        """
        server = serve(lambda request: "FIRST_ERROR: 2")
        run = subprocess.run(
            [sys.executable, "-c", code, server.url], capture_output=True, text=True, timeout=60, cwd=os.getcwd()
        )
        assert (run.stdout, run.stderr, run.returncode) == ("fine\n", "", 0)
        assert len(server.requests) == 5 * 6
        assert server.connections <= 12  # the parent's were left alone

    def test_pickle_and_copy(self, serve):
        judge = OpenAIJudge("m", serve().url, temperature=0.5, extra_body={"seed": 1})
        judge.judge(ITEMS)
        for other in (pickle.loads(pickle.dumps(judge)), copy.deepcopy(judge)):
            assert other.cache_key == judge.cache_key
            assert statuses(other.judge(ITEMS)) == {"error"}

    def test_a_judge_that_is_gone_closes_its_connections(self, serve, caplog):
        server = serve()
        judge = OpenAIJudge("m", server.url)
        judge.judge(ITEMS)
        del judge
        assert wait_for(lambda: not server._writers)
        assert "Unclosed" not in caplog.text


class TestTheKey:
    def test_it_is_sent_and_stays_in_the_environment(self, serve, monkeypatch, caplog, tmp_path, make_trainer):
        monkeypatch.setenv("MY_KEY", f" {KEY}\n")
        caplog.set_level(logging.DEBUG)
        masked = f"{KEY[:4]}****{KEY[-4:]}"

        def reply(request):
            if request.number == 0:
                return Answer(f"Incorrect API key provided: {KEY}. You have {request.headers}.", status=401)
            if request.number == 1:
                return Answer(body=f"<html>{'x' * 190}{KEY}</html>".encode())
            if request.number == 2:
                return f"You are {request.headers['authorization']}. FIRST_ERROR: 1"
            if request.number == 3:
                return Answer(f"Incorrect API key provided: {masked}", status=403)
            if request.number == 4:
                return Answer("Use sk-abcdefghijkl, please", status=500)
            return Answer(message={"content": None, "refusal": KEY})

        server = serve(reply)
        judge = OpenAIJudge("m", server.url, api_key_env="MY_KEY", max_retries=0)
        cached = CachedJudge(judge, tmp_path / "cache.sqlite")
        verdicts = cached.judge(ITEMS)
        cached.close()
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        trainer = make_trainer([by_kind, StepwiseJudge(judge, segmenter=words_as_steps)], max_steps=1)
        trainer.create_model_card()
        trainer.save_model()
        places = {
            "reasons": repr(verdicts),
            "log": caplog.text + repr([record.__dict__ for record in caplog.records]),
            "judge": f"{judge.name} {judge!r} {judge.cache_key} {vars(judge)} {judge.usage} {pickle.dumps(judge)!r}",
            "config": f"{trainer.args} {trainer.args.to_json_string()}",
        }
        for path in tmp_path.rglob("*"):
            if path.is_file():
                places[str(path)] = path.read_bytes().decode("latin-1")
        assert any(name.endswith("README.md") for name in places)
        assert any(name.endswith("cache.sqlite") for name in places)
        for name, text in places.items():
            assert KEY not in text, name
            assert KEY[:8] not in text, name
        assert masked not in places["reasons"]
        assert "sk-abcdefghijkl" not in places["reasons"] + places["log"]
        assert "MY_KEY" in verdicts[0].reason

    @pytest.mark.parametrize(
        "url",
        [f"http://user:{KEY}@host/v1", f"http://{KEY}@host/v1", f"https://host/v1?api-key={KEY}", f"{KEY}://host:x"],
    )
    def test_credentials_in_the_address(self, url, monkeypatch):
        with pytest.raises(ValueError, match="base_url") as error:
            OpenAIJudge("m", [url])
        assert KEY not in str(error.value) or url.startswith(KEY)
        if not url.startswith(KEY):
            monkeypatch.setenv("OPENAI_BASE_URL", url)
            with pytest.raises(ValueError, match="holds credentials or a query"):
                OpenAIJudge("m")

    @pytest.mark.parametrize("value", [KEY, "sk-123456789", "hf_abcdefgh", "a b", "", None])
    def test_a_key_in_place_of_a_name(self, value):
        with pytest.raises(ValueError, match=r"api_key_env .* is not the name") as error:
            OpenAIJudge("m", api_key_env=value)
        assert not value or value not in str(error.value)


class TestLog:
    def test_one_line_per_kind_of_failure(self, serve, caplog):
        server = serve(lambda request: 500 if request.number % 2 else "hm")
        judge = OpenAIJudge("m", server.url, max_retries=0, breaker_failures=1000)
        for _ in range(3):
            judge.judge(ITEMS)
        assert len(caplog.records) == 1
        assert "HTTP 500" in caplog.text

    def test_the_hint_of_a_wrong_key(self, serve, caplog, monkeypatch):
        monkeypatch.setenv("MY_KEY", KEY)
        judge = OpenAIJudge("m", serve(lambda request: 401).url, api_key_env="MY_KEY", breaker_failures=3)
        judge.judge(ITEMS)
        assert "Check the key in the environment variable MY_KEY." in caplog.text
        assert "IS DOWN: 3 requests failed in a row" in caplog.text


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"timeout": 0}, ValueError, "timeout=0 must be positive"),
            ({"batch_deadline": math.nan}, ValueError, "batch_deadline=nan must be positive"),
            ({"max_concurrency": 0}, ValueError, "max_concurrency=0 must be a whole number of at least 1"),
            ({"max_retries": -1}, ValueError, "max_retries=-1 must be a whole number of at least 0"),
            ({"max_tokens": 1.5}, ValueError, "max_tokens=1.5 must be a whole number"),
            ({"max_characters": 0}, ValueError, "max_characters"),
            (
                {"votes": 4, "temperature": 0},
                ValueError,
                "votes=4 with temperature=0 would ask the same thing 4 times.*temperature=0.7",
            ),
            ({"temperature": -1}, ValueError, "temperature=-1"),
            ({"min_agreement": 2}, ValueError, "min_agreement=2 must lie in"),
            ({"output": "yaml"}, ValueError, "output='yaml' is unknown: it must be one of"),
            ({"extra_body": {"stream": True}}, ValueError, "extra_body holds 'stream'"),
            ({"extra_body": {"a": object()}}, TypeError, "extra_body cannot be written as JSON"),
            ({"prompt": "Judge!"}, TypeError, "prompt='Judge!' is no `JudgePrompt`"),
            ({"model": ""}, TypeError, "model='' is no name"),
            ({"base_url": []}, TypeError, "base_url is of type list, or empty"),
            ({"base_url": "localhost:8000"}, ValueError, "base_url='localhost:8000' is no http"),
            ({"base_url": "http://host:port/v1"}, ValueError, "base_url holds no valid address"),
        ],
    )
    def test_bad_ones(self, arguments, error, message):
        with pytest.raises(error, match=message):
            OpenAIJudge(**{"model": "m", **arguments})

    def test_the_address_of_the_environment(self, monkeypatch):
        monkeypatch.setenv("OPENAI_BASE_URL", "http://host:1/v1/")
        assert OpenAIJudge("m").servers.base_urls == ("http://host:1/v1",)
        monkeypatch.delenv("OPENAI_BASE_URL")
        assert OpenAIJudge("m").servers.base_urls == ("https://api.openai.com/v1",)

    def test_cache_key(self):
        base = OpenAIJudge("m", "http://a/v1", timeout=1)
        assert base.cache_key == OpenAIJudge("m", "http://b/v1", timeout=2, max_retries=0).cache_key
        others = [
            OpenAIJudge("other"),
            OpenAIJudge("m", prompt=JudgePrompt(rules="Be strict.")),
            OpenAIJudge("m", max_tokens=5),
            OpenAIJudge("m", max_characters=5),
            OpenAIJudge("m", temperature=0.5),
            OpenAIJudge("m", temperature=0.5, votes=3),
            OpenAIJudge("m", output="text"),
            OpenAIJudge("m", extra_body={"seed": 1}),
            OpenAIJudge("m", extra_body={"seed": 2}),
        ]
        assert len({judge.cache_key for judge in [base, *others]}) == 10

    def test_without_aiohttp(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "aiohttp", None)
        with pytest.raises(ImportError, match=r"pip install trl-sgpo\[api\]"):
            OpenAIJudge("m")


def test_training_goes_on_whatever_the_server_does(serve, make_trainer, caplog, clock):
    """Six updates: a mix of faults, then the server goes down and comes back, and the run ends as it should."""
    faults = [
        "FIRST_ERROR: 1",
        "FIRST_ERROR: 2",
        "FIRST_ERROR: 99",
        "what?",
        500,
        Answer(status=429, headers={"Retry-After": "3600"}),
        SILENT,
        DRIPPING,
        Answer(cut=True),
        Answer(body=b"{}"),
        Answer(finish_reason="length"),
        Answer("context length exceeded", status=400),
    ]
    count = iter(range(10_000))
    server = serve(lambda request: faults[next(count) % len(faults)])
    judge = OpenAIJudge(
        "m", server.url, timeout=0.5, batch_deadline=1.5, max_retries=0, breaker_failures=4, breaker_seconds=0.2
    )
    rounds = 0
    inner = judge.judge

    def counted(items):
        nonlocal rounds
        if rounds == 2:
            server.stop()
            clock.skip(65)  # longer than a server is left alone that limits the rate of requests
        if rounds == 4:
            server.start()
            server.reply = lambda request: f"FIRST_ERROR: {len(request.question) % 2 + 1}"
            clock.skip(5)
        rounds += 1
        return inner(items)

    judge.judge = counted
    trainer = make_trainer(
        [lambda completions, **kwargs: [0.0] * len(completions), StepwiseJudge(judge, segmenter=words_as_steps)],
        max_steps=6,
    )
    trainer.train()
    rates = logged(trainer, "sgpo/abstain_rate")
    assert trainer.state.global_step == rounds == len(rates) == 6
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert rates[2] == rates[3] == 1.0
    assert rates[5] == 0.0
    assert 0 < rates[0] < 1
    assert caplog.text.count("IS DOWN") >= 1
