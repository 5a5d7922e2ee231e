"""
One server that judges ask: whether it is up ([`Breaker`]), and how one request is brought to an answer or to a
[`RequestFailed`] ([`Endpoint`]). What is asked is in `server_settings.py`, several servers are in `servers.py`.

The client is aiohttp and not the package `openai`, because a judged round takes longer with that one
(`benchmarks/judge_throughput`). Its retries could not be used: they depend on the deadline and the breaker here.
"""

import asyncio
import email.utils
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from trl_sgpo.judges.log_once import LogOnce
from trl_sgpo.judges.pace import FIRST_BACKOFF, LONGEST_BACKOFF, LONGEST_WAIT, Pace
from trl_sgpo.judges.server_settings import RequestFormat, ServerSettings, api_key, redact


if TYPE_CHECKING:
    from aiohttp import ClientSession

# From the format of a request: something to remember, and the body of the request
Write = Callable[[RequestFormat], tuple[Any, dict[str, Any]]]

logger = logging.getLogger(__name__)
log_once = LogOnce(logger)  # one for all servers of the process

_LONGEST_TEXT = 200  # characters of a server's message that a reason keeps
_LONGEST_MESSAGE = 4000  # characters of it that are looked through for what was refused
_WALKS = 8  # of the whole ladder in vain, before an unexplained refusal is taken for the request's fault
_EMPTY = 4  # empty answers in a row, before the output constraint is taken for their cause
_EMPTY_AGAIN = 64  # further empty answers, after which it is tried again whether the constraint is their cause
_RECENT = 5.0  # seconds: a server that has answered within them is not down, if it says that it is busy
_LONGEST_PAUSE = 10  # times the first pause of the breaker

# As OpenAI, vLLM, SGLang, llama.cpp, TGI and Anthropic's adapter say that a prompt is too long
_TOO_LONG = re.compile(
    r"context.{0,20}(?:length|window|size|limit)|maximum.{0,20}(?:length|context)|(?:prompt|input|request).{0,40}too (?:long|"
    r"large)|too many tokens|max_model_len|max_seq_len|reduce the length|exceeds?.{0,40}(?:tokens|length|context)|"
    r"longer than the (?:model|maximum)|tokens. must be <=",
    re.IGNORECASE,
)


# As Google, GitHub, AWS, SGLang, TGI and routers say it with a status that can mean something else
_TOO_FAST = re.compile(
    r"rate.?limit|too many (?:concurrent )?requests|throttl|overloaded|queue is full|slow down", re.IGNORECASE
)
_NO_CREDIT = re.compile(r"insufficient_quota|insufficient.balance|credit balance", re.IGNORECASE)


def is_too_long(message: str) -> bool:
    """Whether a server refuses a request because of the length of its text, and not for a key that it does not know."""
    return _TOO_LONG.search(message) is not None and not re.search("response_format|schema", message)


@dataclass(eq=False)
class RequestFailed(Exception):
    """Why a request has no answer."""

    kind: str  # of failure: the first of each kind is logged
    text: str  # the reason of the abstention, without any key
    server: bool = True  # whether the server is to blame: the breaker counts it, and another server is asked
    retry: bool = False  # whether the same server may be asked again
    delay: float | None = None  # seconds after which it wants to be asked again
    silent: bool = False  # no answer in time, which is no fault of a server that answers others meanwhile
    too_fast: bool = False  # whether the server answers, and only limits the rate of requests
    refusal: str | None = None  # what the server said, if it may have refused an optional key of the request

    def __str__(self) -> str:
        return self.text


class Breaker:
    """
    Keeps requests from a server that is down. After `failures` failed requests in a row none is sent for `seconds`.
    Then one request tries, and the others wait for its result. Each failed trial doubles the pause, up to tenfold.
    Used in the event loop only.
    """

    def __init__(self, label: str, settings: ServerSettings) -> None:
        self.label = label
        self.failures = settings.breaker_failures
        self.seconds = settings.breaker_seconds
        self.words = settings
        self._in_a_row = 0
        self._last = ""
        self._pause = self.seconds
        self._until: float | None = None
        self._trial: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server is taken to be down."""
        return self._until is not None

    @property
    def admits(self) -> bool:
        """Whether a request would be sent at once."""
        return self._until is None or (self._trial is None and monotonic() >= self._until)

    async def admission(self) -> bool:
        """Returns when a request may be sent, and whether it is the trial. Raises [`RequestFailed`] if it may not."""
        while self._until is not None:
            if monotonic() < self._until:
                raise self.failure()
            if self._trial is None:
                self._trial = asyncio.get_running_loop().create_future()
                return True
            await asyncio.shield(self._trial)
        return False

    def failure(self) -> RequestFailed:
        """What becomes of a request that is not sent."""
        wait = max(0.0, (self._until or 0.0) - monotonic())
        return RequestFailed(
            "breaker",
            f"{self.label} failed {self._in_a_row} times in a row and is not asked for {wait:.0f} s more; the last failure "
            f"was: {self._last}",
        )

    def succeeded(self, trial: bool) -> None:
        self._in_a_row = 0
        if self._until is not None:
            self._until, self._pause = None, self.seconds
            logger.warning("%s's server %s answers again.", self.words.asker, self.label)
        self.ended(trial)

    def failed(self, text: str, trial: bool) -> None:
        self._in_a_row += 1
        self._last = text
        if trial and self._until is not None:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE * self.seconds)
            self._until = monotonic() + self._pause
        elif self._until is None and self._in_a_row >= self.failures:
            self._until = monotonic() + self._pause
            logger.warning(
                f"{self.words.asker.upper()}'S SERVER {self.label} IS DOWN: {self._in_a_row} requests failed in a row, "
                f"the last one with: {text}. For {self._pause:g} s it is not asked; {self.words.if_down}. Then it is tried again, at "
                "growing intervals."
            )
        self.ended(trial)

    def ended(self, trial: bool) -> None:
        """A request ended. By itself this tells nothing about the server."""
        if trial and self._trial is not None:
            waiting, self._trial = self._trial, None
            if not waiting.done():
                waiting.set_result(None)


@dataclass(eq=False)
class Endpoint:
    """One server, used in the background event loop only. The key is read for every request and kept nowhere."""

    url: str  # the base URL, without credentials
    session: "ClientSession"
    settings: ServerSettings
    usage: "Counter[str]"  # to be added to
    proxy: str | None = None

    def __post_init__(self) -> None:
        self.request_format = self.settings.request_format
        self.pace = Pace(self.settings.max_concurrency, self.settings.breaker_seconds)
        self.breaker = Breaker(self.url, self.settings)
        self._ladder = asyncio.Lock()
        self._is_proven = False  # whether a request in `request_format` was answered
        self._walks_left = _WALKS
        self._empty = 0  # answers in a row
        self._last_answer = float("-inf")

    async def ask(self, write: Write, retries: int, end: float) -> tuple[Any, dict[str, Any]]:
        """
        What `write` gave to remember, and the server's answer. The caller cancels at `end`, on the clock of
        `time.monotonic`. Raises [`RequestFailed`] if there is no answer.
        """
        trial = await self.breaker.admission()
        started, period = monotonic(), self.pace.period
        try:
            answer = await self._retried(write, retries, end, trial)
        except RequestFailed as failure:
            if failure.too_fast:
                self._slow_down(period, failure)
                self.breaker.ended(trial)
            elif failure.kind == "breaker" or (failure.silent and self._last_sign > started):
                self.breaker.ended(trial)
            elif failure.server:
                self.breaker.failed(failure.text, trial)
            else:
                self.breaker.succeeded(trial)
            raise
        except BaseException:
            # Cancelled. A server that said nothing until the deadline of the batch counts as one that timed out, but not
            # because of a request that began shortly before
            now, patience = monotonic(), min(self.settings.timeout, self.settings.batch_deadline) / 2
            if now > end - 0.01 and self._last_sign < started < now - patience:
                self.breaker.failed("no answer before batch_deadline", trial)
            else:
                self.breaker.ended(trial)
            raise
        self.breaker.succeeded(trial)
        self.pace.answered(period)
        return answer

    @property
    def _last_sign(self) -> float:
        """When the server last showed that it is up, be it by a refusal for the rate."""
        return max(self._last_answer, self.pace.refused_at)

    def _slow_down(self, period: int, failure: RequestFailed) -> None:
        self.pace.refused(period, failure.delay, failure.text)
        log_once(
            f"rate {self.url}",
            f"{self.settings.asker}'s server {self.url} limits the rate of requests ({failure.text}). It is asked more "
            "slowly, as far as batch_deadline allows.",
        )

    async def _retried(self, write: Write, retries: int, end: float, trial: bool) -> tuple[Any, dict[str, Any]]:
        backoff = FIRST_BACKOFF
        while True:
            try:
                return await self._understood(write)
            except RequestFailed as failure:
                delay = failure.delay if failure.delay is not None else backoff * random.uniform(0.75, 1)
                if failure.too_fast or not failure.retry or retries == 0 or monotonic() + delay >= end:
                    raise
            retries -= 1
            backoff = min(2 * backoff, LONGEST_BACKOFF)
            self.usage["retries"] += 1
            await asyncio.sleep(delay)
            if self.breaker.is_open and not trial:
                raise self.breaker.failure()

    async def _understood(self, write: Write) -> tuple[Any, dict[str, Any]]:
        """Sends a request, with fewer and fewer optional keys if the server refuses it."""
        request_format = self.request_format
        try:
            answer = await self._send(*write(request_format))
        except RequestFailed as failure:
            if not _blames_a_key(failure, request_format):
                raise
            refusal = failure
        else:
            has_text = self.settings.has_text(answer[1])
            self._empty = 0 if has_text else self._empty + 1
            if self._empty < _EMPTY or not request_format.may_lower_output:
                self._is_proven = self._is_proven or (has_text and request_format == self.request_format)
                return answer
            refusal = RequestFailed("empty", "the judge's answer is empty", server=False, refusal="response_format")
        async with self._ladder:  # one request climbs down, and the others that were refused follow it
            lower: RequestFormat | None = self.request_format
            named = True
            if request_format == self.request_format:
                if refusal.kind == "empty" and self._empty < _EMPTY:
                    raise refusal  # others have found that the constraint is not the cause
                lower, named = request_format.without_one(refusal.refusal or "")
            # A refusal without an explanation is the request's own fault if others were understood
            while lower is not None and (named or not (self._is_proven or self._walks_left == 0)):
                try:
                    answer = await self._send(*write(lower))
                except RequestFailed as failure:
                    if not _blames_a_key(failure, lower):
                        raise
                    lower, named = lower.without_one(failure.refusal or "")
                    continue
                if refusal.kind == "empty" and not self.settings.has_text(answer[1]):
                    lower = lower.without_one("response_format")[0] if lower.may_lower_output else None
                    continue
                if lower != self.request_format:
                    self._remember(lower)
                self._is_proven, self._empty = True, 0
                return answer
            if refusal.kind == "empty":
                self._empty = -_EMPTY_AGAIN
            else:
                self._walks_left -= self._walks_left > 0 and not self._is_proven
            raise refusal

    def _remember(self, request_format: RequestFormat) -> None:
        before = self.request_format
        difference = before.difference(request_format)
        lost = (before.temperature and not request_format.temperature) or before.extra != request_format.extra
        log_once(
            f"format {self.url} {difference}",
            f"{self.settings.asker}'s server {self.url} refuses a part of what it is sent. From now on: {difference}.",
            level=logging.WARNING if lost else logging.INFO,
        )
        self.request_format = request_format

    async def _send(self, remembered: Any, body: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        key = api_key(self.settings.api_key_env)
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.usage["requests"] += 1
        try:
            # Around everything, because a server that sends a byte now and then keeps a read timeout from running out
            async with asyncio.timeout(self.settings.timeout):
                status, answer_headers, data = await self._post(json.dumps(body).encode(), headers)
            answer = self._checked(status, data, _retry_after(answer_headers), key)
            self._last_answer = monotonic()
            return remembered, answer
        except RequestFailed as failure:
            if not failure.server:
                self._last_answer = monotonic()
            self.usage["failures"] += failure.server or failure.refusal is None
            raise
        except Exception as error:
            self.usage["failures"] += 1
            # The original error may hold the request with its headers
            raise self._failure(error, key) from None

    async def _post(self, question: bytes, headers: dict[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        async with self.session.post(
            self.url + self.settings.path,
            data=question,
            headers=headers,
            proxy=self.proxy,
            allow_redirects=False,  # one would turn the POST into a GET, or carry the key elsewhere
        ) as response:
            data = bytearray()
            async for part in response.content.iter_any():
                data += part
                if len(data) > self.settings.longest_answer:
                    response.close()
                    raise RequestFailed("no answer", f"the answer is longer than {self.settings.longest_answer} bytes")
            return response.status, response.headers, bytes(data)

    def _failure(self, error: Exception, key: str) -> RequestFailed:
        """What is said of an exception of the client."""
        import aiohttp

        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return RequestFailed("connection", f"{self.url} could not be reached in time", retry=True, silent=True)
        if isinstance(error, TimeoutError):
            text = f"no answer within timeout={self.settings.timeout:g} s from {self.url}"
            return RequestFailed("timeout", text, silent=True)
        if isinstance(error, aiohttp.ClientConnectorError):
            why = _shortened(redact(str(error.os_error), key))
            text = f"{self.url} cannot be reached ({why}). Check the address, and whether the server is up"
            return RequestFailed("connection", text, retry=True)
        text = _shortened(redact(f"{self.url}: {type(error).__name__}: {error}", key))
        if isinstance(error, aiohttp.ClientError | OSError):
            return RequestFailed("connection", text, retry=True)
        return RequestFailed(type(error).__name__, text)

    def _checked(self, status: int, data: bytes, delay: float | None, key: str) -> dict[str, Any]:
        """The answer of a server, if it is one."""
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if 200 <= status < 300:
            if isinstance(answer, dict) and isinstance(answer.get(self.settings.field), list):
                return answer
            if not isinstance(answer, dict) or not answer.get("error"):
                what = "no JSON" if answer is None else f"JSON without a list of {self.settings.field}"
                text = _shortened(redact(data.decode(errors="replace"), key))
                raise RequestFailed("no answer", f"{self.url} answered with {what}: {text}")
            # Routers report what a provider said in an answer of status 200
            error = answer["error"]
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 502
        message = redact(_message(answer, data), key)
        text = f"HTTP {status} from {self.url}: {_shortened(message)}"
        refusal = message[:_LONGEST_MESSAGE]
        if status == 413 or (status in (400, 422, 501) and is_too_long(refusal)):
            raise RequestFailed("too long", f"{self.settings.if_too_long} {text}", server=False)
        if status == 429 and _NO_CREDIT.search(refusal):
            raise RequestFailed("no credit", f"{text}. The account of this key has nothing left. No retry helps.")
        if self._is_too_fast(status, message[:_LONGEST_TEXT], delay):
            after = "" if delay is None else f" (Retry-After: {delay:.0f} s)"
            raise RequestFailed("rate", text + after, delay=delay, too_fast=True)
        if status in (400, 422, 501):
            raise RequestFailed("refused", text, server=False, refusal=refusal)
        if status in (401, 403):
            hint = f"Check the key in the environment variable {self.settings.api_key_env}"
            hint += "." if key else ", which is not set."
            raise RequestFailed("key", f"{text}. {hint}")
        if status == 404:
            raise RequestFailed("not found", f"{text}. {self.settings.if_not_found}")
        if status in (408, 409, 425) or status >= 500:
            if delay is not None and delay > LONGEST_WAIT:
                raise RequestFailed(f"HTTP {status}", f"{text} (Retry-After: {delay:.0f} s)")
            raise RequestFailed(f"HTTP {status}", text, retry=True, delay=delay, refusal=refusal)
        raise RequestFailed(f"HTTP {status}", text)

    def _is_too_fast(self, status: int, message: str, delay: float | None) -> bool:
        """
        Whether an answer means: ask more slowly. 429 and 529 (overloaded) always do. 503 does if it says when to come
        again, or if the server has just answered: nginx limits rates with a bare 503.
        """
        if status in (429, 529):
            return True
        if status == 503 and (delay is not None or monotonic() - self._last_answer < _RECENT):
            return True
        return (status in (400, 403) or status >= 500) and _TOO_FAST.search(message) is not None


def _blames_a_key(failure: RequestFailed, request_format: RequestFormat) -> bool:
    """Whether it may help to leave an optional key out. A server that breaks down (5xx) has to name the key."""
    if failure.refusal is None:
        return False
    return not failure.server or request_format.without_one(failure.refusal)[1]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds after which the server wants to be asked again, if it says so."""
    milliseconds = headers.get("retry-after-ms", "")  # OpenAI's
    if milliseconds.strip().isdecimal():
        return float(milliseconds) / 1000
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        delay = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        delay = email.utils.mktime_tz(date) - time.time() if date else -1.0
    return delay if delay >= 0 else None


def _message(answer: Any, data: bytes) -> str:
    """What an error response says, without what it repeats of the request."""
    error = answer.get("error", answer.get("detail", answer.get("message"))) if isinstance(answer, dict) else None
    if isinstance(error, dict):
        parts = [error.get("message"), error.get("param"), error.get("code")]
        return " ".join(str(part) for part in parts if part)
    if isinstance(error, list):  # pydantic's, which quote the whole input
        return "; ".join(f"{item.get('loc')} {item.get('msg')}" for item in error[:9] if isinstance(item, dict))
    return error if isinstance(error, str) else data.decode(errors="replace")


def _shortened(text: str) -> str:
    return " ".join(text[: 10 * _LONGEST_TEXT].split())[:_LONGEST_TEXT]
