"""
A server that limits the rate of requests is not down: it is asked more slowly, until the deadline of the batch. No test
here bounds a time more tightly than the deadline does.
"""

import time

import pytest
from server import Answer, Clock, started

from trl_sgpo import JudgeItem
from trl_sgpo.judges import endpoint, pace
from trl_sgpo.judges.openai import OpenAIJudge
from trl_sgpo.judges.pace import Pace


ITEMS = [JudgeItem(f"Problem {i}", ("Add.", "It is 5.", f"Answer {i}")) for i in range(128)]
FOR_EVER = float("inf")


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


def refused(status=429, text="Rate limit reached", **headers):
    return Answer(text, status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def limited(per_second, refusal, seconds=1.0):
    """
    A server with so many answers per second, counted in windows of `seconds`; everything else is refused. On a machine so slow that nothing else would be, some
    are refused all the same.
    """
    state = {"window": 0.0, "answered": 0, "requests": 0}

    def reply(request):
        state["requests"] += 1
        if time.monotonic() - state["window"] >= seconds:
            state.update(window=time.monotonic(), answered=0)
        state["answered"] += 1
        is_refused = state["answered"] > per_second * seconds or 20 <= state["requests"] < 30
        return refusal if is_refused else "FIRST_ERROR: 2"

    return reply


def reasons(verdicts):
    return {verdict.reason for verdict in verdicts if verdict.status == "abstain"}


REFUSALS = {
    "429": refused(),
    "429 with Retry-After": refused(Retry_After="0.2"),
    "429 with Retry-After: 0": refused(Retry_After="0"),
    "429 in milliseconds": refused(retry_after_ms="200", Retry_After="1"),
    "529": refused(529, "Overloaded"),
    "503 with Retry-After": refused(503, "busy", Retry_After="0.2"),
    "503 of nginx": Answer(body=b"<h1>503 Service Temporarily Unavailable</h1>", status=503),
    "403 of Google": refused(403, "Rate Limit Exceeded"),
    "400 of a router": refused(400, "ThrottlingException: Too many requests, please wait"),
    "500 of a router": refused(500, "The engine is currently overloaded"),
    "429 in an answer of status 200": Answer(body={"error": {"message": "Rate limit exceeded", "code": 429}}),
}


class TestEverythingIsJudged:
    @pytest.mark.parametrize(
        ("refusal", "n_servers"),
        [(name, 1) for name in REFUSALS] + [("429", 2), ("429 with Retry-After", 2), ("503 of nginx", 2)],
    )
    def test_by_servers_with_a_rate_limit(self, serve, caplog, monkeypatch, refusal, n_servers):
        monkeypatch.setattr(pace, "FIRST_BACKOFF", 0.1)  # as everything here is faster than at a real server
        servers = [serve(limited(200 // n_servers, REFUSALS[refusal], seconds=0.2)) for _ in range(n_servers)]
        judge = OpenAIJudge("m", [server.url for server in servers], max_retries=0, batch_deadline=100)
        verdicts = judge.judge(ITEMS)
        assert reasons(verdicts) == set()
        assert [verdict.first_error for verdict in verdicts] == [1] * 128
        assert "IS DOWN" not in caplog.text
        assert sum("limits the rate of requests" in record.message for record in caplog.records) <= n_servers
        sent = sum(len(server.requests) for server in servers)
        assert sent == 128 + judge.usage["failures"] == judge.usage["requests"]
        assert judge.usage["retries"] == judge.usage["failures"] > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("n_servers", [1, 2])
    @pytest.mark.parametrize("refusal", [refused(), refused(Retry_After="1")], ids=["bare", "with Retry-After"])
    def test_by_servers_with_10_answers_per_second(self, serve, caplog, refusal, n_servers):
        servers = [serve(limited(10, refusal)) for _ in range(n_servers)]
        judge = OpenAIJudge("m", [server.url for server in servers])
        assert reasons(judge.judge(ITEMS)) == set()
        assert "IS DOWN" not in caplog.text

    def test_by_one_limited_server_and_a_free_one(self, serve):
        tight, free = serve(lambda request: refused()), serve(lambda request: "FIRST_ERROR: 2")
        judge = OpenAIJudge("m", [tight.url, free.url], max_concurrency=16, batch_deadline=100)
        assert reasons(judge.judge(ITEMS)) == set()
        assert len(free.requests) == 128
        assert len(tight.requests) < 128  # it is left alone meanwhile

    def test_by_a_server_that_takes_few_at_a_time(self, serve):
        server = serve(lambda request: refused() if server.under_way > 8 else Answer("FIRST_ERROR: 2", seconds=0.02))
        judge = OpenAIJudge("m", server.url, max_concurrency=16, batch_deadline=100)
        assert reasons(judge.judge(ITEMS[:48])) == set()
        assert 1 <= judge.servers.endpoints[0].pace.limit < 16

    def test_with_faults_between(self, serve, caplog):
        """A lost connection has its own retries, and a refusal for the rate takes none of them."""
        seen = {}

        def reply(request):
            seen[request.number] = seen.get(request.number, 0) + 1
            return (
                {2: Answer(cut=True), 4: 500}.get(seen[request.number], refused(Retry_After="0.05"))
                if seen[request.number] < 6
                else "FIRST_ERROR: 2"
            )

        judge = OpenAIJudge("m", serve(reply).url, max_retries=2, batch_deadline=100, breaker_failures=1000)
        assert reasons(judge.judge(ITEMS[:4])) == set()

    def test_what_is_under_way_is_halved(self, serve):
        """The first refusal comes when 8 are under way; the 7 others are answered only after it."""
        first = []

        def reply(request):
            first.append(request.number)
            return refused(Retry_After="0.2") if len(first) == 8 else Answer("FIRST_ERROR: 2", seconds=0.1)

        server = serve(reply)
        judge = OpenAIJudge("m", server.url, max_concurrency=8, batch_deadline=100)
        assert reasons(judge.judge(ITEMS[:40])) == set()
        assert server.peak == 8
        assert 4 < judge.servers.endpoints[0].pace.limit <= 8  # half, and a little more for every answer


class TestWithoutHope:
    def test_the_deadline_holds_and_the_reason_says_why(self, serve, caplog):
        server = serve(lambda request: refused(Retry_After="0.1"))
        judge = OpenAIJudge("m", server.url, batch_deadline=1.5)
        found = reasons(judge.judge(ITEMS))
        assert found
        for reason in found:
            assert reason.startswith("HTTP 429") or (
                "batch_deadline=1.5 s. The server limits the rate" in reason and "HTTP 429" in reason
            )
        assert len(server.requests) < 2 * 128
        assert "IS DOWN" not in caplog.text

    @pytest.mark.parametrize(("seconds", "is_down"), [(2.5, False), (0, True)])
    def test_what_begins_shortly_before_the_deadline_is_no_fault(self, serve, caplog, seconds, is_down):
        """The first request is answered after so many seconds, the second one never."""
        server = serve(lambda request: Answer("FIRST_ERROR: 2", seconds=30 if request.number else seconds))
        judge = OpenAIJudge("m", server.url, max_concurrency=1, breaker_failures=1, batch_deadline=4)
        assert len(reasons(judge.judge(ITEMS[:2]))) == 1
        assert ("IS DOWN" in caplog.text) == is_down

    @pytest.mark.parametrize("delay", ["3600", "20", "Fri, 01 Jan 2100 00:00:00 GMT"])
    def test_a_server_that_wants_to_be_left_alone_is(self, serve, clock, caplog, delay):
        """For as long as it says, but for a minute at most: then one batch tries again."""
        server = serve(lambda request: refused(Retry_After=delay))
        judge = OpenAIJudge("m", server.url, max_concurrency=8, batch_deadline=10)
        assert all("Retry-After" in reason for reason in reasons(judge.judge(ITEMS)))
        assert len(server.requests) == 8  # and not 128
        assert all("Retry-After" in reason for reason in reasons(judge.judge(ITEMS)))
        assert len(server.requests) == 8
        assert "IS DOWN" not in caplog.text
        clock.skip(61)
        server.reply = lambda request: "FIRST_ERROR: 2"
        assert reasons(judge.judge(ITEMS)) == set()

    def test_an_account_without_credit_is_not_waited_for(self, serve):
        text = "You exceeded your current quota, please check your plan and billing details. insufficient_quota"
        server = serve(lambda request: refused(text=text))
        judge = OpenAIJudge("m", server.url, max_concurrency=4, breaker_failures=8)
        assert any("has nothing left" in reason for reason in reasons(judge.judge(ITEMS)))
        assert len(server.requests) <= 8 + 3

    @pytest.mark.parametrize("fault", [500, 503, Answer(cut=True), Answer("no", status=502)])
    def test_an_outage_is_still_one(self, serve, clock, caplog, fault):
        """After rate limits too: the breaker opens as soon as ever, and closes when the server is back."""
        server = serve(limited(500, refused(Retry_After="0.1")))
        judge = OpenAIJudge("m", server.url, max_retries=0, breaker_failures=4, breaker_seconds=40, batch_deadline=100)
        assert reasons(judge.judge(ITEMS)) == set()
        clock.skip(pace.LONGEST_WAIT)  # a 503 now is not one of a server that answers others
        server.reply = lambda request: fault
        before = len(server.requests)
        assert any("is not asked for" in reason for reason in reasons(judge.judge(ITEMS * 3)))
        assert len(server.requests) - before < 3 * 128
        assert caplog.text.count("IS DOWN") == 1
        server.reply = lambda request: "FIRST_ERROR: 2"
        clock.skip(41)
        assert reasons(judge.judge(ITEMS)) == set()

    def test_a_refusal_while_a_server_is_tried_again(self, serve, clock, caplog):
        """It neither ends the outage nor lengthens it."""
        server = serve(lambda request: 500)
        judge = OpenAIJudge("m", server.url, max_retries=0, breaker_failures=4, breaker_seconds=40, batch_deadline=100)
        judge.judge(ITEMS[:8])
        clock.skip(41)
        replies = iter([refused(Retry_After="0.1")] * 3)
        server.reply = lambda request: next(replies, "FIRST_ERROR: 2")
        assert reasons(judge.judge(ITEMS[:8])) == set()
        assert caplog.text.count("IS DOWN") == 1


class TestPace:
    @pytest.fixture
    def now(self, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr(pace, "monotonic", lambda: now[0])
        monkeypatch.setattr(pace.random, "uniform", lambda low, high: high)
        return now

    def test_places(self, now):
        own = Pace(8, 30)
        own.under_way = 8
        assert not own.is_ready
        for _ in range(8):  # refused all at once, which tells one thing only
            own.refused(0, None, "no")
            own.under_way -= 1
        assert (own.limit, own.period, own.resume) == (4, 1, 1000.5)
        assert not own.is_ready
        now[0] += 0.5
        assert own.is_ready
        for _ in range(4):
            own.answered(1)
        assert own.limit == pytest.approx(4.92, abs=0.01)  # one more after as many answers as there are places
        for _ in range(1000):
            own.answered(1)
        assert own.limit == 8

    def test_an_old_answer_makes_no_room(self, now):
        own = Pace(8, 30)
        own.under_way = 8
        own.refused(0, None, "no")
        own.answered(0)
        assert own.limit == 4

    def test_at_least_one(self, now):
        own = Pace(8, 30)
        for period in range(10):
            own.refused(period, None, "no")
        assert own.limit == 1

    def test_pauses_grow_while_nothing_is_answered(self, now):
        own = Pace(8, 30)
        pauses = []
        for period in range(7):
            own.refused(period, None, "no")
            pauses.append(own.resume - now[0])
            now[0] = own.resume
        assert pauses == [0.5, 1, 2, 4, 8, 8, 8]
        for _ in range(4):
            own.answered(7)
        own.refused(7, None, "no")
        assert own.resume - now[0] == 0.5

    def test_the_server_says_when(self, now):
        own = Pace(8, 30)
        own.refused(0, 3.0, "no")
        assert own.resume == 1003
        own.refused(0, 7.0, "no")  # one more of the same time
        own.refused(0, 2.0, "no")
        assert own.resume == 1007
        assert own.is_worth_waiting(1008)
        assert not own.is_worth_waiting(1006)

    def test_zero_seconds_do_not_make_a_storm(self, now):
        own = Pace(8, 30)
        for period in range(4):
            own.refused(period, 0.0, "no")
        assert own.resume > now[0]

    def test_a_server_that_refuses_everything_is_tried_now_and_then(self, now):
        own = Pace(8, 30)
        period = 0
        while own.is_worth_waiting(FOR_EVER):
            own.refused(period, None, "no")
            period += 1
            now[0] = own.resume - 0.01
        assert 120 < now[0] - 1000 < 180
        now[0] = own.resume
        assert own.is_ready  # one tries
        own.under_way = 1
        assert not own.is_ready
        assert own.is_worth_waiting(FOR_EVER)  # the others wait for what it finds
        own.refused(period, None, "no")
        assert not own.is_worth_waiting(FOR_EVER)
        assert own.resume - now[0] == 30
        now[0] = own.resume
        own.answered(period + 1)
        own.refused(period + 1, None, "no")
        assert own.is_worth_waiting(FOR_EVER)
