"""
Several servers with the same model, as one judge asks them: [`Servers`].

Here are the connections of a process, the choice of a server, the deadline of a batch, the check of addresses and the choice
of a proxy. One request to one server is in `endpoint.py`.
"""

import asyncio
import ipaddress
import os
import urllib.request
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from trl_sgpo.judges.background import background_loop, close_in_background, in_background, own
from trl_sgpo.judges.endpoint import Endpoint, RequestFailed, log_once
from trl_sgpo.judges.server_settings import RequestFormat, ServerSettings, api_key, redact


if TYPE_CHECKING:
    from aiohttp import ClientSession

T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_LONGEST_REASON = 1000  # characters


@dataclass(frozen=True)
class Request(Generic[T]):
    """
    One request of a batch.

    Args:
        group (`Hashable`):
            Requests of the same group are sent one after the other and to the same server, so that it computes their common
            beginning once.
        write (`Callable`):
            Format -> something to remember, and the body of the request.
        read (`Callable`):
            What was remembered, and the server's answer -> the result.
    """

    group: Hashable
    write: Callable[[RequestFormat], tuple[Any, dict[str, Any]]]
    read: Callable[[Any, dict[str, Any]], T]


@dataclass(eq=False)
class _Connections:
    """What belongs to the event loop of one process."""

    loop: asyncio.AbstractEventLoop
    session: "ClientSession"
    endpoints: list[Endpoint]


class Servers:
    """
    One or several servers with the same model, which share the work and stand in for each other.

    Args:
        judge (`str`):
            Name of the judge, for the log.
        base_url (`str` or `Sequence[str]`):
            Their addresses.
        settings ([`ServerSettings`]):
            What is asked, and how.

    Attributes:
        usage (`Counter`): `requests` sent, repeated ones included; `retries`; `failures`, the requests without an answer.

    Raises:
        ImportError: If the package `aiohttp` is not installed.
        TypeError: If `base_url` is neither an address nor a list of addresses.
        ValueError: If `base_url` is no plain http(s) address.
    """

    def __init__(self, judge: str, base_url: str | Sequence[str], settings: ServerSettings) -> None:
        self.judge = judge
        self.base_urls = checked_urls(base_url)
        self.settings = settings
        self.usage: Counter[str] = Counter()
        self._connections: _Connections | None = None
        _require_aiohttp()  # so that a missing package is found before any training

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_connections": None, "usage": Counter()}

    @property
    def endpoints(self) -> list[Endpoint]:
        """The servers as this process knows them; none before the first request."""
        return [] if self._connections is None else self._connections.endpoints

    def ask(self, requests: Sequence[Request[T]]) -> list[T | RequestFailed]:
        """
        Sends a batch of requests, `max_concurrency` at a time and server.

        Returns:
            `list[T | RequestFailed]`: Per request, in order, what `read` gives, or why there is no answer.
        """
        if not requests:
            return []
        end = monotonic() + self.settings.batch_deadline
        loop = background_loop()
        batch = in_background(self._ask(list(requests), loop, end), loop)
        try:
            return batch.result(timeout=1.1 * self.settings.batch_deadline)
        except TimeoutError:
            # Something else keeps the loop busy
            batch.cancel()
            return [self._late() for _ in requests]
        except BaseException:  # an interrupt
            batch.cancel()
            raise

    async def _ask(
        self, requests: list[Request[T]], loop: asyncio.AbstractEventLoop, end: float
    ) -> list[T | RequestFailed]:
        endpoints = self._connected(loop).endpoints
        homes: dict[Hashable, Endpoint] = {}
        groups: dict[Hashable, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.group, []).append(i)
        waiting = deque(i for group in groups.values() for i in group)
        results: dict[int, T | RequestFailed] = {}

        async def work() -> None:
            while waiting:
                i = waiting.popleft()
                result = await self._result(requests[i], endpoints, homes, end)
                results[i] = result

        # As many workers as may ask at a time, and not a task per request: what lives long brings on full garbage
        # collections, which take 0.1 s each beside torch
        workers = [
            loop.create_task(work()) for _ in range(min(len(waiting), self.settings.max_concurrency * len(endpoints)))
        ]
        try:
            await asyncio.wait(workers, timeout=max(0.0, end - monotonic()))
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [results[i] if i in results else self._late() for i in range(len(requests))]

    def _late(self) -> RequestFailed:
        return self._logged(
            RequestFailed("deadline", f"not judged within batch_deadline={self.settings.batch_deadline:g} s")
        )

    async def _result(
        self, request: Request[T], endpoints: list[Endpoint], homes: dict[Hashable, Endpoint], end: float
    ) -> T | RequestFailed:
        try:
            return request.read(*await self._answer(request, endpoints, homes, end))
        except RequestFailed as failure:
            return self._logged(failure)
        except Exception as error:
            # The question cannot be asked, because its first step is too long, or a bug of ours: a verdict, not the training
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text = redact(f"{kind}{error}", api_key(self.settings.api_key_env))[:_LONGEST_REASON]
            return self._logged(RequestFailed(type(error).__name__, text))

    async def _answer(
        self, request: Request[T], endpoints: list[Endpoint], homes: dict[Hashable, Endpoint], end: float
    ) -> tuple[Any, dict[str, Any]]:
        """The answer of the first server that gives one: the group's own, then the others."""
        left = list(endpoints)
        while True:
            endpoint = self._chosen(left, request.group, homes)
            left.remove(endpoint)
            endpoint.outstanding += 1
            try:
                async with endpoint.slots:
                    retries = 0 if any(other.breaker.admits for other in left) else self.settings.max_retries
                    return await endpoint.ask(request.write, retries, end)
            except RequestFailed as failure:
                left = [other for other in left if other.breaker.admits]
                if not left or not failure.server:
                    raise
                self._logged(failure)
            finally:
                endpoint.outstanding -= 1

    def _chosen(self, left: list[Endpoint], group: Hashable, homes: dict[Hashable, Endpoint]) -> Endpoint:
        up = [endpoint for endpoint in left if endpoint.breaker.admits] or left
        home = homes.get(group)
        if home in up and (home.outstanding < self.settings.max_concurrency or len(up) == 1):
            return home
        chosen = min(up, key=lambda endpoint: endpoint.outstanding)
        if home not in up:
            homes[group] = chosen
        return chosen

    def _connected(self, loop: asyncio.AbstractEventLoop) -> _Connections:
        """The connections of this process. Runs in its loop, so that no two threads make them."""
        if self._connections is None or self._connections.loop is not loop:
            import aiohttp

            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),  # the slots are the limit
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            own(session)
            weakref.finalize(self, close_in_background, session, loop, os.getpid())
            endpoints = [Endpoint(url, session, self.settings, self.usage, _proxy(url)) for url in self.base_urls]
            self._connections = _Connections(loop, session, endpoints)
        return self._connections

    def _logged(self, failure: RequestFailed) -> RequestFailed:
        log_once(
            failure.kind,
            "The judge %s: %s. What nobody answers is an abstention; further ones of this kind are counted in the metric "
            "`sgpo/abstain_rate`, stand in the verdicts' reasons and are not shown.",
            self.judge,
            failure.text.rstrip("."),
        )
        return failure


def _require_aiohttp() -> None:
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A judge that asks a server needs the package `aiohttp`, which is not installed. Run `pip install "
            "trl-sgpo[api]`."
        ) from error


def checked_urls(base_url: Any) -> tuple[str, ...]:
    """The addresses, checked. No part of an address is printed before it is known to hold no credentials."""
    urls = [base_url] if isinstance(base_url, str) else base_url
    if not isinstance(urls, Sequence) or not urls or not all(isinstance(url, str) for url in urls):
        raise TypeError(
            f"base_url is of type {type(base_url).__name__}, or empty. Give an address, 'http://localhost:8000/v1', or a "
            "list of addresses."
        )
    for url in urls:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ValueError("base_url holds no valid address. Give 'http://localhost:8000/v1', say.") from None
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "base_url (not shown here) holds credentials or a query, which would end up in logs. Give the plain "
                "address, and the key in the environment variable that `api_key_env` names."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base_url={url!r} is no http(s) address. Give all of it, for instance 'http://localhost:8000/v1'."
            )
    return tuple(dict.fromkeys(url.rstrip("/") for url in urls))


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address; none for this machine itself."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_this_machine(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def _is_this_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
