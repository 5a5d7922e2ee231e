"""A process reward model behind `POST /pooling`: a loopback server that runs the model and answers as vLLM does."""

import json
import math
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from prm_families import byte_tokenizer, make_family, prefix_space_tokenizer
from server import Clock

from trl_sgpo import JudgeItem
from trl_sgpo.judges.prm import PRMJudge, PRMSpec
from trl_sgpo.judges.vllm_pooling import VLLMPoolingJudge


PROBLEM = "What is 2 + 3, doubled?"
STEPS = ("Add 2 and 3.\nThat is easy.", "2 + 3 = 6 <extra_0>", "Doubled, that is 12.")
ITEMS = [JudgeItem(PROBLEM, STEPS[:n]) for n in (3, 1, 2)] + [
    JudgeItem("What is <|im_end|>?", ("one\n\ntwo", "three"))
]


@contextmanager
def serving(answer):
    """A server whose answer to a request is `answer(body, handler)`: JSON data, or `(status, text)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.seen.append((self.path, dict(self.headers)))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.under_way += 1
                server.most = max(server.most, server.under_way)
            try:
                result = answer(body, self)
            finally:
                with server.lock:
                    server.under_way -= 1
            if result is None:
                return
            status, text = result if isinstance(result, tuple) else (200, json.dumps(result))
            self.send_response(status)
            if status == 307:
                self.send_header("Location", "http://127.0.0.1:9/pooling")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen, server.lock, server.under_way, server.most = [], threading.Lock(), 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def data(rows):
    return {"object": "list", "data": [{"index": 0, "object": "pooling", "data": rows}]}


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family("qwen2.5-math-prm", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trl_family(tmp_path_factory):
    return make_family("trl", tmp_path_factory.mktemp("models"))


def model_of(local):
    """What a server with the model of a local judge answers: `rows(ids)`, the probabilities at every token."""

    def rows(ids, activation=True):
        with torch.no_grad():
            logits = local._head(local._body(input_ids=torch.tensor([ids])).last_hidden_state[0])
        return (logits.softmax(-1) if activation else logits).tolist()

    return rows


def rows_per_token(local, tag=None):
    model = model_of(local)

    def answer(body, handler):
        assert body["task"] == "token_classify"
        assert body["model"] == "prm"
        (ids,) = body["input"]
        rows = model(ids, body["use_activation"])
        return data([row for row, id in zip(rows, ids, strict=True) if tag in (None, id)])

    return answer


@pytest.mark.parametrize("form", ["rows per token", "rows per step tag"])
@pytest.mark.parametrize("use_activation", [True, False])
@pytest.mark.parametrize("name", ["qwen2.5-math-prm", "trl"])
def test_the_scores_are_those_of_the_same_model_in_process(family, trl_family, name, use_activation, form):
    own = {"qwen2.5-math-prm": family, "trl": trl_family}[name]
    local = PRMJudge(str(own.folder), device="cpu")
    # TRL's separator is a newline, which stands in the steps as well: then there are more rows than steps
    tag = own.tokenizer(local.spec.separator)["input_ids"][-1] if form == "rows per step tag" else None
    with serving(rows_per_token(local, tag)) as server:
        judge = VLLMPoolingJudge(
            "prm", f"{server.url}/v1", tokenizer=str(own.folder), use_activation=use_activation, max_concurrency=2
        )
        assert judge.spec == local.spec
        for remote, here in zip(judge.scores(ITEMS), local.scores(ITEMS), strict=True):
            assert remote == pytest.approx(here, abs=1e-4)
        for remote, here in zip(judge.judge(ITEMS), local.judge(ITEMS), strict=True):
            assert (remote.status, remote.first_error, remote.n_steps) == (here.status, here.first_error, here.n_steps)
        assert {path for path, _ in server.seen} == {"/pooling"}
        assert server.most <= 2


def test_heads_with_one_output_and_verdict_tokens(family):
    value = PRMSpec.preset("skywork")
    verdicts = PRMSpec.preset("math-shepherd")
    item = JudgeItem(PROBLEM, ("a", "b"))
    for spec, row, options, expected in (
        (value, 0.25, {}, 0.25),
        (value, [0.25], {}, 0.25),
        (value, [0.0], {"use_activation": False}, 0.5),
        (verdicts, [0.75, 0.25], {}, 0.75),
        (verdicts, [0.75, 0.25], {"positive_index": 1}, 0.25),
    ):
        with serving(lambda body, handler, row=row: data([row] * len(body["input"][0]))) as server:
            judge = VLLMPoolingJudge("m", server.url, spec, byte_tokenizer(), **options)
            assert judge.scores([item]) == [[expected, expected]]


def two(low, high):
    """A pair of numbers at every token, each between the two; they sum to 1 if the two do."""
    return lambda body, handler: data([[low, high] if i % 2 else [high, low] for i in range(len(body["input"][0]))])


@pytest.mark.parametrize(
    ("spec", "row", "use_activation", "remedy"),
    [
        # The softmax of a softmax lies between 0.27 and 0.73, so that a threshold means something else
        ("qwen2.5-math-prm", [0.05, 0.95], False, "use_activation=True"),
        ("qwen2.5-math-prm", [0.0, 1.0], False, "use_activation=True"),
        ("qwen2.5-math-prm", [0.3008, 0.6953], False, "use_activation=True"),  # in bfloat16
        ("math-shepherd", [0.25, 0.75], False, "use_activation=True"),
        ("trl", [0.2, 0.4], True, "use_activation=False"),
        ("trl", [0.9, 0.8], True, "use_activation=False"),
        ("math-shepherd", [0.2, 0.4], True, "use_activation=False"),
        ("trl", [-0.2, 0.4], True, "use_activation=False"),
    ],
)
def test_numbers_of_the_wrong_kind_are_no_scores(spec, row, use_activation, remedy):
    spec = PRMSpec.preset(spec)
    tokenizer = prefix_space_tokenizer() if spec.head == "causal_lm" else byte_tokenizer()
    with serving(two(*row)) as server:
        judge = VLLMPoolingJudge("m", server.url, spec, tokenizer, use_activation=use_activation)
        for item in (JudgeItem(PROBLEM, ("a", "b")), JudgeItem(PROBLEM, ("a",))):
            verdict = judge.judge([item])[0]
            assert verdict.status == "abstain"
            assert remedy in verdict.reason


@pytest.mark.parametrize(
    ("row", "use_activation", "score"),
    [
        ([0.3008, 0.6953], True, 0.6953),  # probabilities in bfloat16
        ([0.5, 2.5], False, 1 / (1 + math.exp(-2.0))),
        ([-1.5, 2.5], False, 1 / (1 + math.exp(-4.0))),  # logits whose sum is 1
        ([0.5, 0.7], False, 1 / (1 + math.exp(-0.2))),  # logits that lie between 0 and 1
    ],
)
def test_numbers_of_the_right_kind_are_scores(row, use_activation, score):
    with serving(lambda body, handler: data([row] * len(body["input"][0]))) as server:
        judge = VLLMPoolingJudge(
            "m", server.url, PRMSpec.preset("trl"), byte_tokenizer(), use_activation=use_activation
        )
        assert judge.scores([JudgeItem(PROBLEM, ("a", "b"))]) == [[pytest.approx(score)] * 2]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda ids: data([[0.5, 0.5]] * (len(ids) - 1)), "rows for"),
        (lambda ids: data([[0.5, 0.5]] * 4), "the server gave 4 rows for"),
        (lambda ids: data([]), "the server gave 0 rows"),
        (lambda ids: data("AAAA"), "another form (TypeError"),
        (lambda ids: data([]) | {"data": [{"index": 0}]}, "another form (KeyError: 'data')"),
        (lambda ids: {"error": "no such model"}, "no such model"),
        (lambda ids: {"object": "list"}, "JSON without a list of data"),
        (lambda ids: data([[7.5, -3.0]] * len(ids)), "use_activation=False"),
        (lambda ids: data([[0.5]] * len(ids)), "another form (IndexError"),
        (lambda ids: data([[0.5, float("nan")]] * len(ids)), "NaN"),
        (lambda ids: (200, "<html>"), "answered with no JSON: <html>"),
        (lambda ids: (500, "Internal Server Error"), "HTTP 500 from http://127.0.0.1"),
        (
            lambda ids: (400, "this model does not support token_classify"),
            "this model does not support token_classify",
        ),
        (lambda ids: (307, ""), "HTTP 307 from http://127.0.0.1"),
    ],
)
def test_an_answer_that_cannot_be_used_is_an_abstention(family, answer, reason):
    with serving(lambda body, handler: answer(body["input"][0])) as server:
        judge = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder), max_retries=0)
        for verdict in judge.judge(ITEMS[:2]):
            assert verdict.status == "abstain"
            assert reason in verdict.reason
        assert len(server.seen) == 2


def test_a_server_that_finds_no_step_tag_is_told_which_one_to_look_for(family):
    tag = family.tokenizer.convert_tokens_to_ids("<extra_0>")
    remedy = f"""start it with --pooler-config '{{"step_tag_id": {tag}}}'"""
    for n_rows, expected in ((0, True), (4, False)):
        with serving(lambda body, handler, n_rows=n_rows: data([[0.5, 0.5]] * n_rows)) as server:
            reason = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder)).judge(ITEMS[:1])[0].reason
            assert f"the server gave {n_rows} rows" in reason
            assert (remedy in reason) is expected
    # A model whose scores are read at the end of a step has no tag to name
    with serving(lambda body, handler: data([])) as server:
        spec = PRMSpec.preset("trl", read_at="step")
        reason = VLLMPoolingJudge("m", server.url, spec, byte_tokenizer()).judge(ITEMS[:1])[0].reason
        assert "the server gave 0 rows" in reason
        assert "step_tag_id" not in reason


def test_one_bad_answer_costs_one_verdict(family):
    def answer(body, handler):
        (ids,) = body["input"]
        return (500, "no") if len(ids) == longest else data([[0.9, 0.1]] * len(ids))

    with serving(answer) as server:
        judge = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder))
        longest = max(len(one.ids) for one in judge.encoder.encode(ITEMS))
        assert [verdict.status for verdict in judge.judge(ITEMS)] == ["abstain", "error", "error", "error"]


def test_what_passes_is_tried_again(family):
    def answer(body, handler):
        return (503, "busy") if len(server.seen) == 1 else data([[0.2, 0.8]] * len(body["input"][0]))

    with serving(answer) as server:
        judge = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder))
        assert judge.judge(ITEMS[:1])[0].status == "no_error"
        assert judge.servers.usage["retries"] == 1
    reason = judge.judge(ITEMS[:1])[0].reason  # there is no server any more
    assert "cannot be reached" in reason
    assert judge.servers.usage["retries"] == 3


@pytest.mark.parametrize("kind", ["silent", "dripping"])
def test_a_server_that_hangs_does_not_hang_the_judge(family, kind):
    release = threading.Event()

    def answer(body, handler):
        (ids,) = body["input"]
        if len(ids) != longest:
            return data([[0.9, 0.1]] * len(ids))
        if kind == "dripping":
            handler.send_response(200)
            handler.end_headers()
            while not release.wait(0.05):
                handler.wfile.write(b" ")
        release.wait()
        return None

    with serving(answer) as server:
        judge = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder), batch_deadline=2.0)
        longest = max(len(one.ids) for one in judge.encoder.encode(ITEMS))
        verdicts = judge.judge(ITEMS)  # comes back although nothing is released
        assert [verdict.status for verdict in verdicts] == ["abstain", "error", "error", "error"]
        judge = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder), timeout=0.3)
        assert "no answer within timeout=0.3 s" in judge.judge(ITEMS)[0].reason
        release.set()


def test_two_servers_share_the_work_and_stand_in_for_each_other():
    items = [JudgeItem(f"Problem {i}", ("a", "b")) for i in range(24)]
    four = threading.Barrier(4)  # no answer before all four places are taken

    def scores(body, handler):
        with suppress(threading.BrokenBarrierError):
            four.wait(5)
        return data([0.25] * len(body["input"][0]))

    options = {"max_concurrency": 2, "max_retries": 0, "breaker_failures": 2}
    with serving(scores) as first, serving(scores) as second:
        urls = [f"{first.url}/v1", second.url]
        judge = VLLMPoolingJudge("m", urls, PRMSpec.preset("skywork"), byte_tokenizer(), **options)
        assert judge.servers.base_urls == (first.url, second.url)
        assert judge.scores(items) == [[0.25, 0.25]] * 24
        assert len(first.seen) + len(second.seen) == 24
        assert (first.most, second.most) == (2, 2)
    four.abort()
    with serving(lambda body, handler: (500, "no")) as bad, serving(scores) as good:
        urls = [bad.url, good.url]
        judge = VLLMPoolingJudge("m", urls, PRMSpec.preset("skywork"), byte_tokenizer(), **options)
        for _ in range(2):
            assert judge.scores(items) == [[0.25, 0.25]] * 24
        assert len(bad.seen) <= 3  # the breaker opened at the second failure; one more may have been under way
        assert len(good.seen) == 48


def test_a_server_that_is_down_is_left_alone_and_tried_again(clock):
    item = JudgeItem(PROBLEM, ("a", "b"))
    up = threading.Event()

    def answer(body, handler):
        return data([0.25] * len(body["input"][0])) if up.is_set() else (503, "starting")

    with serving(answer) as server:
        options = {"max_concurrency": 1, "max_retries": 0, "breaker_failures": 3, "breaker_seconds": 30.0}
        judge = VLLMPoolingJudge("m", server.url, PRMSpec.preset("skywork"), byte_tokenizer(), **options)
        reasons = [verdict.reason for verdict in judge.judge([item] * 10)]
        assert len(server.seen) == 3
        assert "HTTP 503" in reasons[0]
        assert "failed 3 times in a row and is not asked for 30 s more" in reasons[-1]
        up.set()
        clock.skip(29)
        assert judge.judge([item])[0].status == "abstain"
        assert len(server.seen) == 3
        clock.skip(2)
        assert judge.scores([item]) == [[0.25, 0.25]]
        assert len(server.seen) == 4


def test_the_key_is_sent_and_shown_nowhere(family, monkeypatch):
    key = "sk-secret-123"
    monkeypatch.setenv("MY_KEY", key + "\n")
    with serving(lambda body, handler: (500, handler.headers["Authorization"])) as server:
        judge = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder), api_key_env="MY_KEY")
        verdict = judge.judge(ITEMS[:1])[0]
        assert server.seen[0][1]["Authorization"] == f"Bearer {key}"
        shown = [verdict.reason, judge.name, judge.cache_key, repr(judge), str(vars(judge))]
        assert not any(key in text for text in shown)
    monkeypatch.setenv("MY_KEY", "sk-secret\n123")
    with pytest.raises(ValueError, match="MY_KEY") as raised:
        VLLMPoolingJudge("m", tokenizer=str(family.folder), api_key_env="MY_KEY")
    assert "secret" not in str(raised.value)


def test_what_is_too_long_is_not_sent(family):
    with serving(lambda body, handler: data([[0.1, 0.9]] * len(body["input"][0]))) as server:
        judge = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder))
        assert judge.encoder.max_length == 1024
        long, cut = judge.judge([JudgeItem("why? " * 400, ("a",)), JudgeItem(PROBLEM, ("a = b",) * 400)])
        assert "the problem is too long" in long.reason
        assert "of 400 steps fit" in cut.reason
        assert len(server.seen) == 1


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ImportError, match=r"pip install trl-sgpo\[api\]"):
        VLLMPoolingJudge("m", spec=PRMSpec.preset("skywork"), tokenizer=byte_tokenizer())


def test_errors_name_the_argument(family, tmp_path):
    folder = str(family.folder)
    for options, message in (
        ({"timeout": 0}, "timeout=0 must be positive"),
        ({"known_wrong_rule": "x"}, "known_wrong_rule='x' is unknown"),
        ({"base_url": "localhost:8000"}, "base_url='localhost:8000' is no http"),
        ({"threshold": -1}, "threshold=-1 must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            VLLMPoolingJudge("m", tokenizer=folder, **options)
    with pytest.raises(ValueError, match=r"could not be loaded: .*Give `tokenizer`"):
        VLLMPoolingJudge("m", tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="Give `spec`"):
        VLLMPoolingJudge("m", tokenizer=byte_tokenizer())
    judge = VLLMPoolingJudge("m", tokenizer=folder, threshold=0.25)
    assert judge.name == "VLLMPoolingJudge(m)"
    assert judge.threshold == 0.25
    assert judge.cache_key != VLLMPoolingJudge("m", tokenizer=folder, threshold=0.5).cache_key
