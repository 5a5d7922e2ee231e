"""`OpenAIJudge` against a real vLLM with a tiny random model: what a server promises is kept for any model."""

import json
import time

import pytest
import torch
from toys import byte_tokenizer, save_model, tiny_llama
from vllm_server import serving

from trl_sgpo import JudgeItem
from trl_sgpo.judges.openai import OpenAIJudge


STEPS = ("Add 2 and 3.", "2 + 3 = 6", "So it is 6.")
ITEMS = [JudgeItem(f"What is {i} + 3?", STEPS) for i in range(24)]
LENGTH, BLOCK, BLOCKS = 4096, 128, 34  # tokens of a question and its answer, tokens of a block, blocks of the cache


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_llama(tokenizer, hidden_size=64)  # heads of 32, the smallest that vLLM has on a CPU
    with torch.no_grad():
        # Else the strings of its JSON would hardly end: after any token it writes a quotation mark in one case of ten
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids('"'), 0] = 0.4
    save_model(model, tokenizer, folder)
    options = ("--max-model-len", LENGTH, "--block-size", BLOCK, "--num-gpu-blocks-override", BLOCKS)
    with serving(folder, tmp_path_factory.mktemp("log") / "log", *map(str, options)) as server:
        yield server


def judge_of(server, **options):
    return OpenAIJudge("m", f"{server.url}/v1", **{"temperature": 1.0, **options})


def test_every_answer_has_the_form_of_the_schema(server):
    judge = judge_of(server)
    verdicts = judge.judge(ITEMS)
    for verdict in verdicts:
        assert verdict.status == "error", verdict
        answer = json.loads(verdict.reason)
        assert list(answer) == ["analysis", "first_error_step"]
        assert isinstance(answer["analysis"], str)
        assert answer["first_error_step"] == str(verdict.first_error + 1)
    assert len({verdict.first_error for verdict in verdicts}) > 1
    assert judge.servers.endpoints[0].request_format.output == "json_schema"  # nothing was refused
    assert judge.usage["requests"] == 24
    assert judge.usage["failures"] == 0
    # It is the schema that does it: without one the same model says nothing that could be read
    for verdict in judge_of(server, output="text", max_tokens=64).judge(ITEMS):
        assert verdict.status == "abstain"


def test_an_answer_that_comes_too_late_is_an_abstention(server):
    endless = {"output": "text", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    for options, reason in (
        ({"batch_deadline": 0.5}, "not judged within batch_deadline=0.5 s"),
        ({"timeout": 0.5}, "no answer within timeout=0.5 s"),
    ):
        before = server.metric("vllm:generation_tokens_total")
        verdicts = judge_of(server, **endless, **options).judge(ITEMS[:2])
        for verdict in verdicts:
            assert verdict.status == "abstain"
            assert reason in verdict.reason
        # The call did not wait for the answers, and the server was told: they are never finished
        while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
            time.sleep(0.1)
        assert server.metric("vllm:generation_tokens_total") - before < 2 * 2000
    assert judge_of(server).judge(ITEMS[:1])[0].status == "error"  # the server is well


@pytest.mark.parametrize(
    ("options", "problem", "reason"),
    [
        ({"max_tokens": 4}, "What is 2 + 3?", "the judge was cut off at max_tokens=4"),
        ({}, "why? " * 1000, "give the judge a smaller `max_characters`"),
        ({"model": "other"}, "What is 2 + 3?", "mostly ends in /v1, and model='other'"),
    ],
)
def test_what_the_server_cannot_answer_is_an_abstention(server, options, problem, reason):
    judge = OpenAIJudge(**{"model": "m", "base_url": f"{server.url}/v1", "temperature": 1.0, **options})
    (verdict,) = judge.judge([JudgeItem(problem, STEPS)])
    assert verdict.status == "abstain"
    assert reason in verdict.reason
    assert judge.usage["requests"] == 1


def test_what_the_completions_of_a_problem_share_is_computed_once(server, tokenizer):
    problems = [f"{i}. Find the sum of all of these: " + f"{i + 2}, " * 400 for i in range(3)]
    items = [JudgeItem(problem, (f"Add number {j}.", *STEPS)) for j in range(3) for problem in problems]
    judge = judge_of(server, max_concurrency=1)

    def cached_tokens(ask):
        before = server.metric("vllm:prefix_cache_hits_total")
        ask()
        return server.metric("vllm:prefix_cache_hits_total") - before

    shared = 0
    for problem in problems:
        question = tokenizer.apply_chat_template(judge.prompt.ask(JudgeItem(problem, STEPS)).messages, tokenize=False)
        shared += 2 * (len(tokenizer(question[: question.index("<step-")])["input_ids"]) // BLOCK * BLOCK)
    # The cache has room for the question about one problem, not for those about all
    assert cached_tokens(lambda: judge.judge(items)) >= shared
    assert cached_tokens(lambda: [judge.judge([item]) for item in items]) < shared
