"""
A prompted model behind any OpenAI-compatible server: vLLM, SGLang, `transformers serve`, hosted ones.

One request per completion and vote, a bounded number at a time, in the background loop of the process. Whatever the server
or the network does costs a verdict at most: what does not come back, is cut off or cannot be parsed is an abstention with
its reason. The question and the way an answer is read are in `prompt.py`, a single server in `endpoint.py`. Needs
`pip install trl-sgpo[api]`.

Left out on purpose: streaming, several choices per request (`n`, which some servers ignore), log-probabilities, batch APIs.
"""

import asyncio
import hashlib
import json
import os
import re
import time
import urllib.request
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trl_sgpo.judges.background import background_loop, close_in_background, in_background, own
from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.combinators import plurality
from trl_sgpo.judges.endpoint import OUTPUTS, Dialect, Endpoint, Trouble, api_key, redact, show_once
from trl_sgpo.judges.prompt import JudgePrompt, Question


if TYPE_CHECKING:
    from aiohttp import ClientSession

_OPENAI = "https://api.openai.com/v1"
_CONNECT_SECONDS = 10.0
_NOT_OURS = ("messages", "model", "n", "stream")  # keys of a request that the judge has to write itself
_UNFINISHED = {
    "content_filter": "the server's content filter stopped the judge's answer",
    "abort": "the server broke the judge's answer off",
    "error": "the server broke the judge's answer off",
}


@dataclass(eq=False)
class _Connections:
    """What belongs to the event loop of one process."""

    loop: asyncio.AbstractEventLoop
    session: "ClientSession"
    endpoints: list[Endpoint]


class OpenAIJudge(StepJudge):
    """
    Judge that asks a model behind one or several OpenAI-compatible servers for the first wrong step.

    The servers may understand little of the protocol. The judge asks for an answer of a JSON schema; if the server refuses
    that, for a JSON object, else for a line of text, and remembers what was understood. Other optional keys are left out
    the same way. A server that fails `breaker_failures` times in a row is not asked for a while, and training goes on as
    GRPO, with a loud warning.

    The completions of a problem are sent one after the other and to the same server, so that it computes their common
    beginning once.

    Args:
        model (`str`):
            Name of the model, as the server knows it.
        base_url (`str` or `Sequence[str]`, *optional*):
            Address of the server, for instance `"http://localhost:8000/v1"`, or those of several servers with the same
            model, which share the work and stand in for each other. Defaults to the environment variable
            `OPENAI_BASE_URL`, else to OpenAI.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Name of the environment variable that holds the key. The key itself is never an argument, so that it appears
            in no config, log or model card. It is sent to every server in `base_url`. Servers without keys need none.
        prompt ([`JudgePrompt`], *optional*):
            The texts of the question.
        votes (`int`, *optional*, defaults to `1`):
            How often each completion is judged; the answer given most often wins (see
            [`~trl_sgpo.judges.combinators.plurality`]).
        min_agreement (`float`, *optional*, defaults to `0.5`):
            Share of all votes that the winner needs.
        max_concurrency (`int`, *optional*, defaults to `128`):
            Requests under way at the same time, per server and process. More than a server works on at once keep it busy.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that one request may take.
        batch_deadline (`float`, *optional*, defaults to `300.0`):
            Seconds that one batch may take; the rest is abstained on. Keep it below the process group's timeout.
        max_retries (`int`, *optional*, defaults to `2`):
            How often a request is repeated after a lost connection, a status 408, 409, 425, 429 or 5xx, with growing
            pauses or when the server says (Retry-After), if the deadline allows.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Tokens the judge may write per answer. An answer that is cut off is an abstention: reasoning models need more.
        max_characters (`int`, *optional*):
            Room for the problem, the reference and the steps, in characters (three to four of them make a token). Steps
            that do not fit are not shown. No limit by default.
        temperature (`float`, *optional*):
            Sampling temperature. Defaults to 0 for one vote and to 0.7 for several.
        output (`str`, *optional*, defaults to `"auto"`):
            Form of the answer: `"json_schema"`, `"json_object"`, `"text"`, or `"auto"` for the first of these that the
            server does not refuse.
        extra_body (`Mapping[str, Any]`, *optional*):
            Further keys of the request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`. `transformers
            serve` samples only with `{"generation_config": '{"do_sample": true}'}`.
        breaker_failures (`int`, *optional*, defaults to `8`):
            Failed requests in a row, retries included, after which a server counts as down.
        breaker_seconds (`float`, *optional*, defaults to `30.0`):
            Seconds until it is tried again. The pause doubles with every failed trial, up to tenfold.

    Attributes:
        usage (`dict[str, int]`): What the judge has used in this process; see [`OpenAIJudge.usage`].

    Raises:
        ImportError: If the package `aiohttp` is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of its range, `base_url` is no plain http(s) address, or `api_key_env` no name.

    Example:

    ```python
    >>> judge = OpenAIJudge("Qwen/QwQ-32B", "http://localhost:8000/v1", max_tokens=8192, timeout=240)  # doctest: +SKIP
    >>> trainer = SGPOTrainer(..., reward_funcs=[accuracy_reward, StepwiseJudge(judge)])  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        prompt: JudgePrompt | None = None,
        votes: int = 1,
        min_agreement: float = 0.5,
        max_concurrency: int = 128,
        timeout: float = 120.0,
        batch_deadline: float = 300.0,
        max_retries: int = 2,
        max_tokens: int = 1024,
        max_characters: int | None = None,
        temperature: float | None = None,
        output: str = "auto",
        extra_body: Mapping[str, Any] | None = None,
        breaker_failures: int = 8,
        breaker_seconds: float = 30.0,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise TypeError(f"model={model!r} is no name. Give the model's name as the server knows it, a string.")
        if prompt is not None and not isinstance(prompt, JudgePrompt):
            raise TypeError(f"prompt={prompt!r} is no `JudgePrompt`. Give `JudgePrompt(rules=...)`.")
        whole = {
            "votes": (votes, 1),
            "max_concurrency": (max_concurrency, 1),
            "max_retries": (max_retries, 0),
            "max_tokens": (max_tokens, 1),
            "max_characters": (1 if max_characters is None else max_characters, 1),
            "breaker_failures": (breaker_failures, 1),
        }
        for name, (number, least) in whole.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name}={number!r} must be a whole number of at least {least}.")
        seconds = {"timeout": timeout, "batch_deadline": batch_deadline, "breaker_seconds": breaker_seconds}
        for name, value in seconds.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7:
                raise ValueError(
                    f"{name}={value!r} must be positive: it is the number of seconds that is waited at most."
                )
        if not isinstance(min_agreement, int | float) or not 0 <= min_agreement <= 1:
            raise ValueError(
                f"min_agreement={min_agreement!r} must lie in [0, 1]: it is the share of all votes that the winner needs."
            )
        if temperature is None:
            temperature = 0.0 if votes == 1 else 0.7
        if not isinstance(temperature, int | float) or not 0 <= temperature < 100:
            raise ValueError(
                f"temperature={temperature!r} must be a number of at least 0. The default for one vote is 0."
            )
        if votes > 1 and temperature == 0:
            raise ValueError(
                f"votes={votes} with temperature=0 would ask the same thing {votes} times and get the same answer. Set "
                "temperature=0.7, or leave votes at 1."
            )
        if output not in ("auto", *OUTPUTS):
            raise ValueError(f"output={output!r} is unknown: it must be one of {['auto', *OUTPUTS]}.")
        # Its values stay out of all messages: what a server wants in a body may be a secret
        extra_body = dict(extra_body or {})
        taken = [name for name in _NOT_OURS if name in extra_body]
        if taken:
            raise ValueError(f"extra_body holds {taken[0]!r}, which the judge writes itself. Leave it out.")
        try:
            json.dumps(extra_body)
        except (TypeError, ValueError):
            raise TypeError("extra_body cannot be written as JSON. Give strings, numbers, lists and dicts.") from None
        self.model = model
        self.base_urls = _base_urls(base_url)
        self.api_key_env = _variable_name(api_key_env)
        self.prompt = prompt or JudgePrompt()
        self.votes = votes
        self.min_agreement = min_agreement
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.batch_deadline = batch_deadline
        self.max_retries = max_retries
        self.max_tokens = max_tokens
        self.max_characters = max_characters
        self.temperature = temperature
        self.output = output
        self.extra_body = extra_body
        self.breaker_failures = breaker_failures
        self.breaker_seconds = breaker_seconds
        self._usage: Counter[str] = Counter()
        self._connections: _Connections | None = None
        _require_aiohttp()  # so that a missing package is found before any training

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_connections": None, "_usage": Counter()}

    @property
    def name(self) -> str:
        return f"OpenAIJudge({self.model})"

    @property
    def cache_key(self) -> str:
        """What a cache knows this judge by: all that its verdicts depend on, and not where the model runs."""
        parts: dict[str, Any] = {
            "prompt": self.prompt.fingerprint,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "max_characters": self.max_characters,
            "output": self.output,
        }
        if self.votes > 1:
            parts |= {"votes": self.votes, "min_agreement": self.min_agreement}
        if self.extra_body:
            text = json.dumps(self.extra_body, sort_keys=True)
            parts["extra_body"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{self.name} {json.dumps(parts)}"

    @property
    def usage(self) -> dict[str, int]:
        """
        What this judge has used in this process: `requests` sent, repeated ones included; `prompt_tokens` and
        `completion_tokens` as the servers count them; `retries`; `failures`, the requests that brought no answer.
        """
        names = ("requests", "prompt_tokens", "completion_tokens", "retries", "failures")
        return {name: self._usage[name] for name in names}

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        if not items:
            return []
        end = time.monotonic() + self.batch_deadline
        loop = background_loop()
        batch = in_background(self._judge(list(items), loop, end), loop)
        try:
            return batch.result(timeout=1.1 * self.batch_deadline)
        except TimeoutError:
            # Something else keeps the loop busy
            batch.cancel()
            return [self._late()] * len(items)
        except BaseException:  # an interrupt
            batch.cancel()
            raise

    async def _judge(self, items: list[JudgeItem], loop: asyncio.AbstractEventLoop, end: float) -> list[Verdict]:
        endpoints = self._connected(loop).endpoints
        homes: dict[Any, Endpoint] = {}
        problems: dict[Any, list[int]] = {}
        for i, item in enumerate(items):
            problems.setdefault((item.problem, item.reference), []).append(i)
        waiting = deque(
            (i, problem) for problem, indices in problems.items() for i in indices for _ in range(self.votes)
        )
        votes: list[list[Verdict]] = [[] for _ in items]

        async def work() -> None:
            while waiting:
                i, problem = waiting.popleft()
                votes[i].append(await self._judge_one(items[i], endpoints, problem, homes, end))

        # As many workers as may ask at a time, and not a task per request: what lives long brings on full garbage
        # collections, which take 0.1 s each beside torch
        workers = [loop.create_task(work()) for _ in range(min(len(waiting), self.max_concurrency * len(endpoints)))]
        try:
            await asyncio.wait(workers, timeout=max(0.0, end - time.monotonic()))
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        for given in votes:
            given += [self._late() for _ in range(self.votes - len(given))]
        return [self._counted(given) for given in votes]

    def _counted(self, votes: list[Verdict]) -> Verdict:
        return votes[0] if self.votes == 1 else plurality(votes, self.min_agreement)

    def _late(self) -> Verdict:
        text = f"not judged within batch_deadline={self.batch_deadline:g} s"
        self._show(Trouble("deadline", text))
        return Verdict.abstain(text)

    async def _judge_one(
        self, item: JudgeItem, endpoints: list[Endpoint], problem: Any, homes: dict[Any, Endpoint], end: float
    ) -> Verdict:
        def write(dialect: Dialect) -> tuple[Question, dict[str, Any]]:
            question = self.prompt.ask(item, dialect.output != "text", self.max_characters)
            return question, self._body(question, dialect)

        try:
            question, answer = await self._answer(write, endpoints, problem, homes, end)
            return self._read(question, answer)
        except Trouble as trouble:
            self._show(trouble)
            return Verdict.abstain(trouble.text)
        except Exception as error:
            # The question cannot be asked, for its first step is too long, or a bug of ours: a verdict, not the training
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text = redact(f"{kind}{error}", api_key(self.api_key_env))
            self._show(Trouble(type(error).__name__, text))
            return Verdict.abstain(text)

    async def _answer(
        self, write: Any, endpoints: list[Endpoint], problem: Any, homes: dict[Any, Endpoint], end: float
    ) -> tuple[Question, dict[str, Any]]:
        """The answer of the first server that gives one: the problem's own, then the others."""
        left = list(endpoints)
        while True:
            endpoint = self._chosen(left, problem, homes)
            left.remove(endpoint)
            endpoint.outstanding += 1
            try:
                async with endpoint.slots:
                    retries = 0 if any(other.breaker.admits for other in left) else self.max_retries
                    return await endpoint.ask(write, retries, end)
            except Trouble as trouble:
                left = [other for other in left if other.breaker.admits]
                if not left or not trouble.server:
                    raise
                self._show(trouble)
            finally:
                endpoint.outstanding -= 1

    def _chosen(self, left: list[Endpoint], problem: Any, homes: dict[Any, Endpoint]) -> Endpoint:
        up = [endpoint for endpoint in left if endpoint.breaker.admits] or left
        home = homes.get(problem)
        if home in up and (home.outstanding < self.max_concurrency or len(up) == 1):
            return home
        chosen = min(up, key=lambda endpoint: endpoint.outstanding)
        if home not in up:
            homes[problem] = chosen
        return chosen

    def _body(self, question: Question, dialect: Dialect) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": question.messages,
            dialect.length_key: self.max_tokens,
        }
        if dialect.temperature:
            body["temperature"] = self.temperature
        if dialect.output == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif dialect.output == "json_object":
            body["response_format"] = {"type": "json_object"}
        return {**body, **{name: self.extra_body[name] for name in dialect.extra}}

    def _read(self, question: Question, answer: dict[str, Any]) -> Verdict:
        """The verdict in a server's answer, of whose inside nothing can be relied on."""
        usage = answer.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name) if isinstance(usage, dict) else None
            self._usage[name] += count if isinstance(count, int) else 0
        choice = answer["choices"][0] if answer["choices"] else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            return Verdict.abstain("the server's answer holds no message")
        reason = choice.get("finish_reason")
        if reason == "length":
            return Verdict.abstain(f"the judge was cut off at max_tokens={self.max_tokens}")
        if isinstance(reason, str) and reason in _UNFINISHED:
            return Verdict.abstain(_UNFINISHED[reason])
        # What is in `reasoning` may be all: some servers' parsers leave the content empty
        texts = [_text(message.get(field)) for field in ("content", "reasoning", "reasoning_content")]
        text = next((text for text in texts if text.strip()), "")
        refusal = _text(message.get("refusal"))
        # A server may repeat anything, the headers too
        key = api_key(self.api_key_env)
        if refusal.strip() and not texts[0].strip():
            return Verdict.abstain(f"the judge refused to answer: {redact(refusal, key)[:200]}")
        if not text:
            return Verdict.abstain("the judge's answer is empty")
        return question.verdict(redact(text, key))

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
            dialect = Dialect(
                output="json_schema" if self.output == "auto" else self.output,
                output_is_fixed=self.output != "auto",
                extra=tuple(self.extra_body),
            )
            endpoints = [
                Endpoint(
                    url,
                    session,
                    api_key_env=self.api_key_env,
                    model=self.model,
                    dialect=dialect,
                    max_concurrency=self.max_concurrency,
                    timeout=self.timeout,
                    breaker_failures=self.breaker_failures,
                    breaker_seconds=self.breaker_seconds,
                    usage=self._usage,
                    proxy=_proxy(url),
                )
                for url in self.base_urls
            ]
            self._connections = _Connections(loop, session, endpoints)
        return self._connections

    def _show(self, trouble: Trouble) -> None:
        show_once(
            trouble.kind,
            "The judge %s: %s. What nobody answers is an abstention; further ones of this kind are counted in the metric "
            "`sgpo/abstain_rate`, stand in the verdicts' reasons and are not shown.",
            self.name,
            trouble.text.rstrip("."),
        )


def _require_aiohttp() -> None:
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "OpenAIJudge needs the package `aiohttp`, which is not installed. Run `pip install trl-sgpo[api]`."
        ) from error


def _base_urls(base_url: Any) -> tuple[str, ...]:
    """The addresses, checked. What an address is made of is not printed before it is known to hold no credentials."""
    if base_url is None:
        base_url = os.environ.get("OPENAI_BASE_URL") or _OPENAI
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


def _variable_name(api_key_env: Any) -> str:
    """The name of an environment variable. A key that was given instead is not printed."""
    if isinstance(api_key_env, str) and (api_key_env in os.environ or re.fullmatch(r"[A-Z][A-Z0-9_]*", api_key_env)):
        return api_key_env
    raise ValueError(
        "api_key_env (not shown here, for it may be a key) is not the name of an environment variable. Put the key into a "
        "variable, `export JUDGE_API_KEY=...`, and give its name: api_key_env='JUDGE_API_KEY'."
    )


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address; none for this machine itself."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1" or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def _text(value: Any) -> str:
    """The text in a field of a message: a string, or a list of parts."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        return "".join(part for part in parts if isinstance(part, str))
    return value if isinstance(value, str) else ""
