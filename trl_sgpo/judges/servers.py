"""
Several servers with the same model, as one judge asks them: [`Servers`]. Here are the connections of a process, the
choice of a server and the deadline of a batch. One request to one server is in `endpoint.py`, and how fast a server is
asked in `pace.py`.
"""

import asyncio
import os
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, TypeVar

from trl_sgpo.judges.addresses import checked_urls, proxy_for
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
        self._waiting: dict[asyncio.Future[None], None] = {}  # for a place at a server, in order
        for url in self.base_urls:
            proxy_for(url)  # raises for a proxy that cannot be used. It may hold a password, so it is not kept
        try:  # so that a missing package is found before any training
            import aiohttp  # noqa: F401
        except ImportError as error:
            raise ImportError("A judge that asks a server needs `aiohttp`: `pip install trl-sgpo[api]`.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "endpoints": [], "_loop": None, "_waiting": {}, "usage": Counter()}

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
        begin = monotonic() - self.settings.batch_deadline
        for endpoint in self.endpoints:
            if endpoint.pace.refused_at > begin:
                reason += f". The server limits the rate of requests: {endpoint.pace.refusal}"
                break
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
            endpoint = await self._place(left, request.group, homes, end)
            endpoint.pace.under_way += 1
            try:
                stand_ins = any(other.breaker.admits for other in left if other is not endpoint)
                return await endpoint.ask(request.write, 0 if stand_ins else self.settings.max_retries, end)
            except RequestFailed as failure:
                if failure.too_fast and endpoint.pace.is_worth_waiting(end):
                    self.usage["retries"] += 1
                    continue
                left = [other for other in left if other is not endpoint and other.breaker.admits]
                if not left or not failure.server:
                    raise
                self._logged(failure)
            finally:
                endpoint.pace.under_way -= 1
                self._wake()

    async def _place(
        self, left: list[Endpoint], group: Hashable, homes: dict[Hashable, Endpoint], end: float
    ) -> Endpoint:
        """The server that gets a request, as soon as one has a place. Raises [`RequestFailed`] if none will in time."""
        home = homes.get(group)
        if self._waiting:
            await asyncio.sleep(0)  # who waits already comes first
        elif home in left and home.breaker.admits and home.pace.is_ready:
            return home
        while True:
            up = [endpoint for endpoint in left if endpoint.breaker.admits] or left
            ready = [endpoint for endpoint in up if endpoint.pace.is_ready]
            home = homes.get(group)
            if ready:
                chosen = home if home in ready else min(ready, key=lambda endpoint: endpoint.pace.under_way)
                assert chosen is not None
                if home not in up:
                    homes[group] = chosen
                return chosen
            now = monotonic()
            if not any(endpoint.pace.is_worth_waiting(end) for endpoint in up):
                raise RequestFailed("rate", up[0].pace.refusal)
            pauses = [endpoint.pace.resume - now for endpoint in up if endpoint.pace.resume > now]
            await self._wait(min(pauses, default=None))

    async def _wait(self, seconds: float | None) -> None:
        """Waits until a request has ended, `seconds` at most."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = None
        try:
            async with asyncio.timeout(seconds):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiting.pop(waiter, None)

    def _wake(self) -> None:
        """Lets everyone look again who waits for a place. Nobody does unless a server limits the rate of requests."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

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
        self.endpoints = [Endpoint(url, session, self.settings, self.usage, proxy_for(url)) for url in self.base_urls]
        self._loop = loop

    def _logged(self, failure: RequestFailed) -> RequestFailed:
        if failure.kind != "breaker":  # that the server is down was said when it was found
            log_once(
                failure.kind,
                f"{self.settings.asker} {self.judge}: {failure.text.rstrip('.')}. {self.settings.if_unanswered}",
            )
        return failure
