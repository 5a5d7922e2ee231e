"""
Several servers with the same model, as one judge asks them: [`Servers`]. Here are the connections of a process, the
choice of a server, the deadline of a batch, the check of addresses and the choice of a proxy. One request to one
server is in `endpoint.py`.
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
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from trl_sgpo.judges.background import background_loop, close_in_background, own
from trl_sgpo.judges.endpoint import Endpoint, RequestFailed, Write, log_once
from trl_sgpo.judges.server_settings import ServerSettings, api_key, redact


T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_LONGEST_REASON = 1000  # characters


@dataclass(frozen=True)
class Request(Generic[T]):
    """One request of a batch."""

    # Requests of one group go to the same server, one after the other, so that it computes their common beginning once
    group: Hashable
    write: Write
    read: Callable[[Any, dict[str, Any]], T]  # what was remembered, and the server's answer -> the result


class Servers:
    """One or several servers with the same model, which share the work and stand in for each other, for one judge."""

    def __init__(self, judge: str, base_url: str | Sequence[str], settings: ServerSettings) -> None:
        self.judge = judge
        self.base_urls = checked_urls(base_url)
        self.settings = settings
        self.usage: Counter[str] = Counter()
        self.endpoints: list[Endpoint] = []  # of this process; none before the first request
        self._loop: asyncio.AbstractEventLoop | None = None  # to which the endpoints belong
        try:  # so that a missing package is found before any training
            import aiohttp  # noqa: F401
        except ImportError as error:
            raise ImportError("A judge that asks a server needs `aiohttp`: `pip install trl-sgpo[api]`.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "endpoints": [], "_loop": None, "usage": Counter()}

    def ask(self, requests: Sequence[Request[T]]) -> list[T | RequestFailed]:
        """Per request, in order, what `read` gives, or why there is no answer. Sends `max_concurrency` per server."""
        if not requests:
            return []
        end = monotonic() + self.settings.batch_deadline
        loop = background_loop()
        batch = asyncio.run_coroutine_threadsafe(self._ask(list(requests), loop, end), loop)
        try:
            return batch.result(timeout=1.1 * self.settings.batch_deadline)
        except TimeoutError:  # something else keeps the loop busy
            batch.cancel()
            return [self._late() for _ in requests]
        except BaseException:  # an interrupt
            batch.cancel()
            raise

    async def _ask(
        self, requests: list[Request[T]], loop: asyncio.AbstractEventLoop, end: float
    ) -> list[T | RequestFailed]:
        self._connect(loop)
        homes: dict[Hashable, Endpoint] = {}
        groups: dict[Hashable, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.group, []).append(i)
        waiting = deque(i for group in groups.values() for i in group)
        results: dict[int, T | RequestFailed] = {}

        async def work() -> None:
            while waiting:
                i = waiting.popleft()
                result = await self._result(requests[i], homes, end)
                results[i] = result

        # As many workers as may ask at a time, and not a task per request: what lives long brings on full garbage
        # collections, which take 0.1 s each beside torch
        n_workers = min(len(waiting), self.settings.max_concurrency * len(self.endpoints))
        workers = [loop.create_task(work()) for _ in range(n_workers)]
        try:
            await asyncio.wait(workers, timeout=max(0.0, end - monotonic()))
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [results[i] if i in results else self._late() for i in range(len(requests))]

    def _late(self) -> RequestFailed:
        reason = f"not judged within batch_deadline={self.settings.batch_deadline:g} s"
        return self._logged(RequestFailed("deadline", reason))

    async def _result(self, request: Request[T], homes: dict[Hashable, Endpoint], end: float) -> T | RequestFailed:
        try:
            return request.read(*await self._answer(request, homes, end))
        except RequestFailed as failure:
            return self._logged(failure)
        except Exception as error:
            # The question cannot be asked, because its first step is too long, or a bug of ours: it costs a verdict
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text = redact(f"{kind}{error}", api_key(self.settings.api_key_env))[:_LONGEST_REASON]
            return self._logged(RequestFailed(type(error).__name__, text))

    async def _answer(
        self, request: Request[T], homes: dict[Hashable, Endpoint], end: float
    ) -> tuple[Any, dict[str, Any]]:
        """The answer of the first server that gives one: the group's own, then the others."""
        left = list(self.endpoints)
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

    def _connect(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes the connections of this process. Runs in its loop, so that no two threads make them."""
        if self._loop is loop:
            return
        import aiohttp

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),  # the slots are the limit
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        own(session)
        weakref.finalize(self, close_in_background, session, loop, os.getpid())
        self.endpoints = [Endpoint(url, session, self.settings, self.usage, _proxy(url)) for url in self.base_urls]
        self._loop = loop

    def _logged(self, failure: RequestFailed) -> RequestFailed:
        log_once(
            failure.kind,
            f"The judge {self.judge}: {failure.text.rstrip('.')}. What nobody answers is an abstention; further ones "
            "of this kind are counted in the metric `sgpo/abstain_rate` and not shown.",
        )
        return failure


def checked_urls(base_url: Any) -> tuple[str, ...]:
    """The addresses, checked. No part of an address is printed before it is known to hold no credentials."""
    urls = [base_url] if isinstance(base_url, str) else base_url
    if not isinstance(urls, Sequence) or not urls or not all(isinstance(url, str) for url in urls):
        raise TypeError(f"base_url is of type {type(base_url).__name__}, or empty. Give an address or a list of them.")
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
            raise ValueError(f"base_url={url!r} is no http(s) address, such as 'http://localhost:8000/v1'.")
    return tuple(dict.fromkeys(url.rstrip("/") for url in urls))


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address; none for this machine itself."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        address = ipaddress.ip_address(host)
        is_this_machine = address.is_loopback or address.is_unspecified
    except ValueError:
        is_this_machine = host == "localhost" or host.endswith(".localhost")
    if is_this_machine or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
