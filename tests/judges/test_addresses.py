"""The address of a judge's server, and the proxy that the environment names for it."""

import socket

import pytest
from prm_families import byte_tokenizer
from server import Answer, started

from trl_sgpo import JudgeItem
from trl_sgpo.judges import addresses
from trl_sgpo.judges.addresses import checked_urls, proxy_for
from trl_sgpo.judges.openai import OpenAIJudge
from trl_sgpo.judges.prm import PRMSpec
from trl_sgpo.judges.vllm_pooling import VLLMPoolingJudge


PROXY = "http://proxy.invalid:3128"
ITEM = JudgeItem("Problem 1", ("Add.", "It is 5."))


@pytest.fixture(autouse=True)
def proxies(monkeypatch):
    """The variables for proxies of this test only: `proxies(name=value)`."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def serve():
    with started() as start:
        yield start


def pooling_judge(url):
    return VLLMPoolingJudge("prm", url, PRMSpec.preset("skywork"), byte_tokenizer(), max_retries=0)


class TestProxies:
    @pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
    def test_this_machine_is_asked_itself(self, serve, proxies, variable, host):
        proxies(**{variable: PROXY})
        rows = {"data": [{"data": [0.25] * 1000}]}
        for server, make in (
            (serve(), lambda url: OpenAIJudge("m", f"{url}/v1", max_retries=0)),
            (serve(lambda request: Answer(body=sized(request, rows))), pooling_judge),
        ):
            url = server.url.removesuffix("/v1").replace("127.0.0.1", host)
            assert make(url).judge([ITEM])[0].status == "error"
            assert len(server.requests) == 1

    @pytest.mark.parametrize(
        "host",
        [
            "localhost:8000",
            "judge.localhost",
            "127.5.0.1",
            "0.0.0.0:8000",
            "[::1]:8000",
            "[::]:8000",
            "[::ffff:127.0.0.1]:8000",
            "[::ffff:0.0.0.0]",
            "node7:8000",
            "NODE7.",
            "node7.local",
            "node7.cluster.example:8000",
            "198.51.100.7:8000",
        ],
    )
    def test_names_and_addresses_of_this_machine(self, proxies, monkeypatch, host):
        proxies(http_proxy=PROXY)
        monkeypatch.setattr(socket, "gethostname", lambda: "node7")
        own_name, own_address = "node7.cluster.example", "198.51.100.7"
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, port: [(0, 0, 0, "", (own_address if host == own_name else "198.51.100.8", 0))],
        )

        class Socket(socket.socket):
            def bind(self, address):
                if address[0] != own_address:
                    raise OSError("Cannot assign requested address")

        monkeypatch.setattr(socket, "socket", Socket)
        assert proxy_for(f"http://{host}/v1") is None
        for other in (
            "198.51.100.8",
            "node7.elsewhere.example",
            "node71",
            "127.judge.invalid",
            "[fd00::1]:8000",
            "localhost.example",
        ):
            assert proxy_for(f"http://{other}/v1") == PROXY

    def test_an_address_that_this_machine_has(self, proxies):
        """Without anything faked."""
        proxies(http_proxy=PROXY)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect(("192.0.2.1", 9))  # sends nothing
            except OSError:
                pytest.skip("no network, so no address but loopback's")
            own = sock.getsockname()[0]
        assert proxy_for(f"http://{own}:8000/v1") is None
        assert proxy_for("http://192.0.2.1:8000/v1") == PROXY

    @pytest.mark.parametrize(
        ("no_proxy", "inside", "outside"),
        [
            # networks
            ("10.0.0.0/8", ["10.255.255.1:8000", "10.0.0.1"], ["11.0.0.1", "10.judge.invalid"]),
            (".internal, 10.0.0.0/8 ,192.168.0.0/16", ["192.168.3.4", "10.1.1.1", "a.internal"], ["192.169.0.1"]),
            ("10.1.2.3/8", ["10.9.9.9"], ["11.0.0.1"]),
            ("fd00::/8", ["[fd00::1]:8000"], ["[fe00::1]"]),
            ("10.0.0.0/8", ["[::ffff:10.0.0.1]"], ["[::ffff:11.0.0.1]"]),
            # one port of a host
            ("10.0.0.1:8000", ["10.0.0.1:8000"], ["10.0.0.1:8001", "10.0.0.1", "10.0.0.2:8000"]),
            ("judge.example:8000", ["judge.example:8000", "a.judge.example:8000"], ["judge.example:8001"]),
            ("judge.example:80", ["judge.example"], ["judge.example:8000"]),
            ("[fd00::1]:8000", ["[fd00::1]:8000"], ["[fd00::1]:8001"]),
            # hosts and suffixes of names
            ("fd00::1", ["[fd00::1]:8000"], ["[fd00::2]:8000"]),
            ("[fd00::1]", ["[fd00::1]:8000"], ["[fd00::2]:8000"]),
            (".internal", ["judge.internal:8000", "JUDGE.internal"], ["judge.internals"]),
            ("judge.example", ["judge.example", "a.judge.example:8000"], ["notjudge.example"]),
            ("*.example", ["judge.example:8000"], ["judge.invalid"]),
            # everything
            ("*", ["judge.example", "10.0.0.1", "[fd00::1]"], []),
            ("judge.example,*", ["judge.invalid", "10.0.0.1"], []),
            # what means nothing
            ("", [], ["judge.example", "10.0.0.1"]),
            (",, ,:80,/8,10.0.0.0/99", [], ["judge.example", "10.0.0.1"]),
        ],
    )
    @pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
    def test_no_proxy(self, proxies, monkeypatch, variable, no_proxy, inside, outside):
        monkeypatch.setattr(addresses, "_is_this_machine", lambda host: False)  # it may have any of these
        proxies(http_proxy=PROXY, **{variable: no_proxy})
        assert [proxy_for(f"http://{host}/v1") for host in inside] == [None] * len(inside)
        assert [proxy_for(f"http://{host}/v1") for host in outside] == [PROXY] * len(outside)

    def test_a_host_without_an_exemption_is_asked_through_the_proxy(self, serve, proxies):
        proxy = serve(lambda request: "FIRST_ERROR: 2")
        proxies(http_proxy=proxy.url.removesuffix("/v1"))
        judge = OpenAIJudge("m", "http://judge.invalid/v1", max_retries=0)
        assert judge.judge([ITEM])[0].first_error == 1
        proxies(no_proxy="*.invalid")
        assert OpenAIJudge("m", "http://judge.invalid/v1", max_retries=0).judge([ITEM])[0].status == "abstain"
        assert len(proxy.requests) == 1

    def test_a_proxy_without_a_scheme(self, serve, proxies):
        proxy = serve(lambda request: "FIRST_ERROR: 2")
        proxies(http_proxy=proxy.url.removeprefix("http://").removesuffix("/v1"))
        assert OpenAIJudge("m", "http://judge.invalid/v1", max_retries=0).judge([ITEM])[0].first_error == 1

    @pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4", "SOCKS", "ftp"])
    @pytest.mark.parametrize("variable", ["all_proxy", "ALL_PROXY", "http_proxy"])
    def test_a_proxy_that_cannot_be_used(self, proxies, scheme, variable):
        proxies(**{variable: f"{scheme}://name:secret@127.0.0.1:1080"})
        for make in (
            lambda: OpenAIJudge("m", "http://judge.example/v1"),
            lambda: pooling_judge("http://judge.example"),
        ):
            with pytest.raises(
                ValueError, match=rf"{variable.lower()}.*{scheme.lower()}.*no_proxy=judge.example"
            ) as error:
                make()
            assert "secret" not in str(error.value)
        OpenAIJudge("m", "http://localhost:8000/v1")  # asked itself
        if variable != "http_proxy":
            proxies(http_proxy=PROXY)
            OpenAIJudge("m", "http://judge.example/v1")  # the nearer variable counts
        proxies(no_proxy="judge.example")
        OpenAIJudge("m", "http://judge.example/v1")


class TestBaseUrl:
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ("http://host:1/v1", "http://host:1/v1"),
            ("http://host:1/v1/", "http://host:1/v1"),
            ("http://host:1", "http://host:1"),
            ("http://host:1/v1/chat/completions", "http://host:1/v1"),
            ("http://host:1/v1/chat/completions/", "http://host:1/v1"),
            ("http://host:1/v1/completions", "http://host:1/v1"),
            ("http://host:1/v1/responses", "http://host:1/v1"),
            ("http://host:1/v1/models", "http://host:1/v1"),
            ("http://host:1/v1/embeddings", "http://host:1/v1"),
            ("http://host:1/pooling", "http://host:1"),
            ("http://host:1/classify", "http://host:1"),
            (" http://host:1/v1\n", "http://host:1/v1"),
            # parts of an address that only look like a route
            ("https://host/models", "https://host/models"),
            ("https://host/api/completions-proxy", "https://host/api/completions-proxy"),
            ("https://pooling/v1", "https://pooling/v1"),
        ],
    )
    def test_a_route_at_its_end_is_left_out(self, given, meant):
        assert checked_urls(given) == (meant,)

    def test_it_is_asked_there(self, serve):
        server = serve()
        assert OpenAIJudge("m", f"{server.url}/chat/completions").judge([ITEM])[0].status == "error"
        assert server.requests[0].path == "/v1/chat/completions"
        pooling = serve(lambda request: Answer(body=sized(request, {"data": [{"data": [0.25] * 1000}]})))
        root = pooling.url.removesuffix("/v1")
        for end in ("", "/v1", "/pooling", "/v1/pooling", "/v1/chat/completions", "/classify"):
            assert pooling_judge(root + end).judge([ITEM])[0].status == "error"
        assert {request.path for request in pooling.requests} == {"/pooling"}

    def test_the_same_server_written_twice_is_one(self):
        assert checked_urls(["http://a/v1", "http://a/v1/chat/completions"]) == ("http://a/v1",)


def sized(request, rows):
    """As many scores as the request has tokens."""
    n = len(request.body["input"][0])
    return {"data": [{"data": rows["data"][0]["data"][:n]}]}
