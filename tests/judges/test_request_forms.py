"""What a server does not understand or cannot answer is left out of a request: system messages, output constraints."""

import json
import logging

import pytest
from server import Answer, started

from trl_sgpo import JudgeItem
from trl_sgpo.judges import endpoint
from trl_sgpo.judges.openai import OpenAIJudge
from trl_sgpo.judges.prompt import RULES


ITEMS = [JudgeItem(f"Problem {i}", ("Add.", "It is 5.", f"Answer {i}")) for i in range(12)]
VERDICT = json.dumps({"analysis": "Hm.", "first_error_step": "2"})


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch):
    monkeypatch.setattr(endpoint.log_once, "_logged", set())


@pytest.fixture
def serve():
    with started() as start:
        yield start


def form(request):
    """The output constraint of a request."""
    return request.body.get("response_format", {}).get("type", "text")


def roles(request):
    return [message["role"] for message in request.body["messages"]]


def errors(verdicts):
    return [verdict.first_error for verdict in verdicts]


class TestSystemMessages:
    @pytest.mark.parametrize(
        ("status", "text"),
        [
            (400, "System role not supported"),
            (400, "Unsupported value: 'messages[0].role' does not support 'system' with this model."),
            (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
            (400, "Only user and assistant roles are supported!"),
            (422, "messages.0.role: Input should be 'user' or 'assistant'"),
            (400, "Developer instruction is not enabled for models/gemma-3-27b-it"),
            (500, "TemplateError: System role not supported"),
            (400, "Bad Request"),
        ],
    )
    def test_a_server_that_refuses_them(self, serve, caplog, status, text):
        caplog.set_level(logging.INFO)
        server = serve(lambda request: Answer(text, status=status) if "system" in roles(request) else VERDICT)
        judge = OpenAIJudge("m", server.url)
        for _ in range(2):
            assert errors(judge.judge(ITEMS)) == [1] * 12
        last = server.requests[-1]
        assert roles(last) == ["user"]
        assert last.question.startswith(RULES)
        assert last.question.count("Problem:") == 1
        assert "the rules stand in the user's message" in caplog.text
        if text != "Bad Request":
            assert form(last) == "json_schema"  # nothing else was given up
            assert last.body["temperature"] == 0
            assert sum("system" in roles(request) for request in server.requests) <= 12

    def test_one_that_refuses_four_things_one_after_the_other(self, serve):
        """As o1-mini does."""

        def reply(request):
            body = request.body
            for found, text in (
                ("max_tokens" in body, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
                ("system" in roles(request), "Unsupported value: 'messages[0].role' does not support 'system'."),
                (body.get("temperature", 1) != 1, "Unsupported value: 'temperature' does not support 0.0. Only 1 is."),
                (form(request) != "text", f"'response_format' of type '{form(request)}' is not supported."),
            ):
                if found:
                    return Answer(text, status=400)
            return "FIRST_ERROR: 2"

        server = serve(reply)
        judge = OpenAIJudge("o1-mini", server.url)
        assert errors(judge.judge(ITEMS)) == [1] * 12
        assert set(server.requests[-1].body) == {"model", "messages", "max_completion_tokens"}

    def test_one_that_takes_them_gets_them(self, serve):
        server = serve(lambda request: VERDICT)
        OpenAIJudge("m", server.url).judge(ITEMS)
        assert {tuple(roles(request)) for request in server.requests} == {("system", "user")}


EMPTY = {
    "null": Answer(message={"content": None}),
    "nothing": Answer(message={"content": ""}),
    "white space": Answer(" \n\t\n"),
    "white space without end": Answer("\n" * 500, finish_reason="length"),
    "an object without fields": Answer("{}"),
    "a null of JSON": Answer("null"),
    "an empty part": Answer(message={"content": [{"type": "text", "text": ""}]}),
    "tool calls": Answer(message={"content": None, "tool_calls": []}, finish_reason="tool_calls"),
}


class TestEmptyAnswers:
    @pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
    def test_without_the_constraint_there_are_some(self, serve, caplog, empty):
        caplog.set_level(logging.INFO)
        server = serve(lambda request: "FIRST_ERROR: 2" if form(request) == "text" else empty)
        judge = OpenAIJudge("m", server.url)
        first = errors(judge.judge(ITEMS))
        assert first.count(1) == 12 - 3  # three show that it is no accident
        assert errors(judge.judge(ITEMS)) == [1] * 12
        assert "output is 'text', not 'json_schema'" in caplog.text
        assert form(server.requests[-1]) == "text"

    def test_objects_without_a_schema_are_tried_first(self, serve):
        server = serve(lambda request: EMPTY["null"] if form(request) == "json_schema" else VERDICT)
        judge = OpenAIJudge("m", server.url)
        judge.judge(ITEMS)
        assert errors(judge.judge(ITEMS)) == [1] * 12
        assert {form(request) for request in server.requests} == {"json_schema", "json_object"}

    def test_a_few_change_nothing(self, serve):
        """Nor do many, if others are answered between."""
        server = serve(lambda request: EMPTY["null"] if request.number % 3 else VERDICT)
        judge = OpenAIJudge("m", server.url, max_concurrency=1)
        for _ in range(3):
            verdicts = judge.judge(ITEMS)
            assert errors(verdicts) == [1, None, None] * 4
            assert verdicts[1].reason == "the judge's answer is empty"
        assert {form(request) for request in server.requests} == {"json_schema"}

    def test_a_model_that_says_nothing_whatever_it_is_asked(self, serve):
        """The constraint is not the cause, which is found out with few requests."""
        server = serve(lambda request: EMPTY["nothing"])
        judge = OpenAIJudge("m", server.url)
        items = [JudgeItem(f"Problem {i}", ("Add.",)) for i in range(50)]
        assert {verdict.reason for verdict in judge.judge(items)} == {"the judge's answer is empty"}
        assert len(server.requests) <= 50 + 2
        server.reply = lambda request: VERDICT
        assert errors(judge.judge(ITEMS)) == [1] * 12
        assert form(server.requests[-1]) == "json_schema"

    def test_thinking_that_is_cut_off_has_another_cause(self, serve):
        server = serve(lambda request: Answer(message={"content": None}, finish_reason="length"))
        verdicts = OpenAIJudge("m", server.url).judge(ITEMS)
        assert {verdict.reason for verdict in verdicts} == {"the judge was cut off at max_tokens=1024"}
        assert {form(request) for request in server.requests} == {"json_schema"}

    @pytest.mark.parametrize("output", ["json_schema", "json_object"])
    def test_a_fixed_output_is_kept_and_the_reason_names_it(self, serve, output):
        server = serve(lambda request: "FIRST_ERROR: 2" if form(request) == "text" else EMPTY["null"])
        verdicts = OpenAIJudge("m", server.url, output=output).judge(ITEMS)
        assert {verdict.reason for verdict in verdicts} == {
            f"the judge's answer is empty with output={output!r}: try output='text'"
        }
        assert errors(OpenAIJudge("m", server.url, output="text").judge(ITEMS)) == [1] * 12


class TestBreakdowns:
    @pytest.mark.parametrize(
        "text",
        [
            "response_format is not supported",
            "Failed to compile json_schema",
            "xgrammar: unsupported grammar",
            "guided decoding backend failed",
            "Structured outputs are not available",
        ],
    )
    @pytest.mark.parametrize("status", [500, 502, 503])
    def test_one_that_names_the_constraint(self, serve, caplog, status, text):
        server = serve(lambda request: Answer(text, status=status) if form(request) != "text" else "FIRST_ERROR: 2")
        judge = OpenAIJudge("m", server.url, max_retries=0)
        assert errors(judge.judge(ITEMS)) == [1] * 12
        assert form(server.requests[-1]) == "text"
        assert "IS DOWN" not in caplog.text

    def test_one_that_names_another_key(self, serve):
        server = serve(
            lambda request: Answer("seed: not implemented", status=500) if "seed" in request.body else VERDICT
        )
        judge = OpenAIJudge("m", server.url, max_retries=0, extra_body={"seed": 1})
        assert errors(judge.judge(ITEMS)) == [1] * 12
        assert form(server.requests[-1]) == "json_schema"

    def test_one_that_names_nothing_is_an_outage(self, serve):
        server = serve(lambda request: Answer("Internal Server Error", status=500))
        verdicts = OpenAIJudge("m", server.url, max_retries=0, breaker_failures=3).judge(ITEMS)
        assert any("not asked for" in verdict.reason for verdict in verdicts) or len(server.requests) == 12
        assert {form(request) for request in server.requests} == {"json_schema"}

    def test_one_that_goes_on_without_the_constraint_is_an_outage(self, serve, caplog):
        server = serve(lambda request: Answer("grammar engine is gone", status=500))
        judge = OpenAIJudge("m", server.url, max_retries=0, max_concurrency=2, breaker_failures=3)
        assert all("500" in verdict.reason for verdict in judge.judge(ITEMS))
        assert "IS DOWN" in caplog.text
        assert judge.servers.endpoints[0].request_format.output == "json_schema"

    def test_a_fixed_output(self, serve):
        server = serve(lambda request: Answer("grammar: unsupported", status=500))
        verdicts = OpenAIJudge("m", server.url, max_retries=0, output="json_schema").judge(ITEMS[:2])
        assert all("HTTP 500" in verdict.reason and "grammar: unsupported" in verdict.reason for verdict in verdicts)
        assert {form(request) for request in server.requests} == {"json_schema"}
