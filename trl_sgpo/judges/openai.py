"""
A prompted model behind any OpenAI-compatible server: vLLM, SGLang, `transformers serve`, hosted ones. Needs
`pip install trl-sgpo[api]`. The question and how its answer is read are in `prompt.py`, the servers in `servers.py`.

Left out: streaming, several choices per request (`n`, which some servers ignore), log-probabilities, batch APIs.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.combinators import check_min_agreement, plurality
from trl_sgpo.judges.endpoint import RequestFailed
from trl_sgpo.judges.prompt import JudgePrompt, Question
from trl_sgpo.judges.server_settings import OUTPUTS, RequestFormat, ServerSettings, api_key, check_whole, redact
from trl_sgpo.judges.servers import Request, Servers


_OPENAI = "https://api.openai.com/v1"
_NOT_OURS = ("messages", "model", "n", "stream")  # keys of a request that the judge has to write itself
_UNFINISHED = {
    "content_filter": "the server's content filter stopped the judge's answer",
    "abort": "the server broke the judge's answer off",
    "error": "the server broke the judge's answer off",
}


class OpenAIJudge(StepJudge):
    """
    Judge that asks a model behind one or several OpenAI-compatible servers for the first wrong step.

    Servers may understand only a part of the protocol. The judge asks for an answer of a JSON schema. If the server
    refuses that, it asks for a JSON object, then for a line of text, and remembers what was understood. Other optional
    keys are left out the same way. An answer that does not come, is cut off or cannot be parsed is an abstention with
    its reason. A server that fails `breaker_failures` times in a row is not asked for a while: training goes on as
    GRPO, with a loud warning.

    The completions of a problem are sent one after the other and to the same server, so that it computes their common
    beginning once.

    Args:
        model (`str`):
            Name of the model, as the server knows it.
        base_url (`str` or `Sequence[str]`, *optional*):
            Address of the server, such as `"http://localhost:8000/v1"`. Several servers with the same model share the
            work and stand in for each other. Defaults to the variable `OPENAI_BASE_URL`, else to OpenAI.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Name of the environment variable that holds the key, if there is one. It is sent to every server. The key
            itself is never an argument, so that it appears in no config, log or model card.
        prompt ([`JudgePrompt`], *optional*):
            The texts of the question.
        votes, min_agreement (`int` and `float`, *optional*, default to `1` and `0.5`):
            How often each completion is judged, and the share of all votes that the winner needs. See
            [`~trl_sgpo.judges.combinators.plurality`].
        max_concurrency (`int`, *optional*, defaults to `128`):
            Requests under way at the same time, per server and process.
        timeout, batch_deadline (`float`, *optional*, default to `120.0` and `300.0`):
            Seconds that one request and one batch may take. A completion that is not judged by then is an abstention.
            Keep them below the process group's timeout.
        max_retries (`int`, *optional*, defaults to `2`):
            How often a request is repeated after a lost connection, a status 408, 409, 425, 429 or 5xx, with growing
            pauses or when the server says (Retry-After), if the deadline allows.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Tokens the judge may write per answer. Reasoning models need more.
        max_characters (`int`, *optional*):
            Room for the problem, the reference and the steps (three to four characters make a token). Steps that do
            not fit are not shown. No limit by default.
        temperature (`float`, *optional*):
            Sampling temperature. Defaults to 0 for one vote and to 0.7 for several.
        output (`str`, *optional*, defaults to `"auto"`):
            Form of the answer: `"json_schema"`, `"json_object"`, `"text"`, or `"auto"`, the first that is not refused.
        extra_body (`Mapping[str, Any]`, *optional*):
            Further keys of the request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`. `transformers
            serve` samples only with `{"generation_config": '{"do_sample": true}'}`.
        breaker_failures, breaker_seconds (`int` and `float`, *optional*, default to `8` and `30.0`):
            Failed requests in a row, retries included, after which a server counts as down, and seconds until it is
            tried again. The pause doubles with every failed trial, up to tenfold.

    Raises:
        ImportError: If the package `aiohttp` is not installed.
        TypeError, ValueError: If an argument is of a wrong type or out of its range, `base_url` is no plain http(s)
            address, or `api_key_env` is no name of a variable whose value can be sent.

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
        check_whole("votes", votes, 1)
        check_whole("max_tokens", max_tokens, 1)
        if max_characters is not None:
            check_whole("max_characters", max_characters, 1)
        check_min_agreement(min_agreement)
        if temperature is None:
            temperature = 0.0 if votes == 1 else 0.7
        if not isinstance(temperature, int | float) or not 0 <= temperature < 100:
            raise ValueError(f"temperature={temperature!r} must be a number of at least 0, the default for one vote.")
        if votes > 1 and temperature == 0:
            raise ValueError(
                f"votes={votes} with temperature=0 would ask the same thing {votes} times: set temperature=0.7."
            )
        if output not in ("auto", *OUTPUTS):
            raise ValueError(f"output={output!r} is unknown: it must be one of {['auto', *OUTPUTS]}.")
        # Its values stay out of all messages, because they may be secrets
        extra_body = dict(extra_body or {})
        taken = [name for name in _NOT_OURS if name in extra_body]
        if taken:
            raise ValueError(f"extra_body holds {taken[0]!r}, which the judge writes itself. Leave it out.")
        try:
            json.dumps(extra_body)
        except (TypeError, ValueError):
            raise TypeError("extra_body cannot be written as JSON. Give strings, numbers, lists and dicts.") from None
        self.model = model
        self.prompt = prompt or JudgePrompt()
        self.votes = votes
        self.min_agreement = min_agreement
        self.max_tokens = max_tokens
        self.max_characters = max_characters
        self.temperature = temperature
        self.output = output
        self.extra_body = extra_body
        if base_url is None:
            base_url = os.environ.get("OPENAI_BASE_URL") or _OPENAI
        self.servers = Servers(
            self.name,
            base_url,
            ServerSettings(
                path="/chat/completions",
                field="choices",
                longest_answer=4_000_000,
                if_too_long="The question is too long for the server: give the judge a smaller `max_characters`.",
                if_not_found=f"Check base_url, which mostly ends in /v1, and model={model!r}.",
                request_format=RequestFormat(
                    output="json_schema" if output == "auto" else output,
                    output_is_fixed=output != "auto",
                    extra=tuple(extra_body),
                ),
                api_key_env=api_key_env,
                max_concurrency=max_concurrency,
                timeout=timeout,
                batch_deadline=batch_deadline,
                max_retries=max_retries,
                breaker_failures=breaker_failures,
                breaker_seconds=breaker_seconds,
            ),
        )

    @property
    def name(self) -> str:
        return f"OpenAIJudge({self.model})"

    @property
    def cache_key(self) -> str:
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
        return {name: self.servers.usage[name] for name in names}

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        answers = self.servers.ask([self._request(item) for item in items for _ in range(self.votes)])
        votes = [Verdict.abstain(answer.text) if isinstance(answer, RequestFailed) else answer for answer in answers]
        groups = [votes[i : i + self.votes] for i in range(0, len(votes), self.votes)]
        return votes if self.votes == 1 else [plurality(group, self.min_agreement) for group in groups]

    def _request(self, item: JudgeItem) -> Request[Verdict]:
        def write(request_format: RequestFormat) -> tuple[Question, dict[str, Any]]:
            question = self.prompt.ask(item, request_format.output != "text", self.max_characters)
            body: dict[str, Any] = {"model": self.model, "messages": question.messages}
            body[request_format.length_key] = self.max_tokens
            if request_format.temperature:
                body["temperature"] = self.temperature
            if request_format.output == "json_schema":
                schema = {"name": "verdict", "strict": True, "schema": question.schema}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            elif request_format.output == "json_object":
                body["response_format"] = {"type": "json_object"}
            return question, {**body, **{name: self.extra_body[name] for name in request_format.extra}}

        return Request((item.problem, item.reference), write, self._read)

    def _read(self, question: Question, answer: dict[str, Any]) -> Verdict:
        """The verdict in a server's answer, which may hold anything."""
        usage = answer.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name) if isinstance(usage, dict) else None
            self.servers.usage[name] += count if isinstance(count, int) else 0
        choice = answer["choices"][0] if answer["choices"] else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            return Verdict.abstain("the server's answer holds no message")
        reason = choice.get("finish_reason")
        if reason == "length":
            return Verdict.abstain(f"the judge was cut off at max_tokens={self.max_tokens}")
        if isinstance(reason, str) and reason in _UNFINISHED:
            return Verdict.abstain(_UNFINISHED[reason])
        # Some servers' parsers leave the content empty and put everything into `reasoning`
        texts = [_text(message.get(field)) for field in ("content", "reasoning", "reasoning_content")]
        text = next((text for text in texts if text.strip()), "")
        refusal = _text(message.get("refusal"))
        # A server may repeat anything, the headers too
        key = api_key(self.servers.settings.api_key_env)
        if refusal.strip() and not texts[0].strip():
            return Verdict.abstain(f"the judge refused to answer: {redact(refusal, key)[:200]}")
        if not text:
            return Verdict.abstain("the judge's answer is empty")
        return question.verdict(redact(text, key))


def _text(value: Any) -> str:
    """The text in a field of a message: a string, or a list of parts."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        return "".join(part for part in parts if isinstance(part, str))
    return value if isinstance(value, str) else ""
