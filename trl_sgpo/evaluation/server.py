"""A model behind an OpenAI-compatible server, asked by the client of the judges. Needs `pip install trl-sgpo[api]`."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from trl_sgpo.evaluation.engines import Decoding, Engine, Question, Sample
from trl_sgpo.judges.endpoint import RequestFailed
from trl_sgpo.judges.server_settings import RequestFormat, ServerSettings
from trl_sgpo.judges.servers import Request, Servers


_NOT_OURS = ("messages", "prompt", "model", "n", "stream")
_FIELDS = ("reasoning_content", "reasoning")  # of a message: thinking that the server's parser took out of the text


class ServerEngine(Engine):
    """
    A model behind one or several servers. Each sample is one request. `extra` are further keys of the requests. If a server
    refuses the length limit's name, the system message or `seed`, it is asked in another way; temperature and top-p are
    never left out.
    """

    def __init__(
        self,
        model: str,
        decoding: Decoding,
        base_url: str,
        api_key_env: str,
        timeout: float,
        extra: Mapping[str, Any],
    ) -> None:
        taken = [name for name in _NOT_OURS if name in extra]
        if taken:
            raise ValueError(f"engine_args holds {taken[0]!r}, which every request has already. Leave it out.")
        self.model = model
        self.decoding = decoding
        self.extra = dict(extra)
        if decoding.chat_template_kwargs:
            self.extra["chat_template_kwargs"] = dict(decoding.chat_template_kwargs)
        self.is_chat = decoding.chat != "off"
        self.servers = Servers(
            model,
            base_url or os.environ.get("OPENAI_BASE_URL", ""),
            ServerSettings(
                path="/chat/completions" if self.is_chat else "/completions",
                field="choices",
                longest_answer=16_000_000,
                if_too_long="The problem and max_new_tokens are too long for the server: make max_new_tokens smaller.",
                if_not_found=f"Check base_url, which mostly ends in /v1, and the model's name {model!r}.",
                # Without a temperature that could be left out: another one would be another evaluation
                request_format=RequestFormat("text", True, False, ("seed",), system=bool(decoding.system_prompt)),
                api_key_env=api_key_env,
                max_concurrency=128,
                timeout=timeout,
                batch_deadline=9e6,  # the timeout of each request is enough
                max_retries=4,
                breaker_failures=8,
                breaker_seconds=30.0,
                asker="The model",
                if_down="what no other server answers is missing from this run",
                if_unanswered="What nobody answers is missing; further ones of this kind are not shown.",
            ),
        )

    def answer(self, questions: Sequence[Question], n: int) -> list[list[Sample] | str]:
        answers = self.servers.ask(
            [
                Request((i, question.problem), partial(self._write, question, number, n), _read)
                for i, question in enumerate(questions)
                for number in range(n or 1)
            ]
        )
        grouped = [answers[i : i + (n or 1)] for i in range(0, len(answers), n or 1)]
        return [_samples(group) for group in grouped]

    def _write(
        self, question: Question, number: int, n: int, request_format: RequestFormat
    ) -> tuple[None, dict[str, Any]]:
        body: dict[str, Any] = {"model": self.model}
        if not self.is_chat:
            body["prompt"] = self.decoding.plain(question.problem)
        elif request_format.system or not self.decoding.system_prompt:
            body["messages"] = self.decoding.messages(question.problem)
        else:  # the server's model knows no system message
            body["messages"] = [{"role": "user", "content": self.decoding.plain(question.problem).strip()}]
        body[request_format.length_key] = self.decoding.max_new_tokens
        body |= {"temperature": self.decoding.temperature, "top_p": self.decoding.top_p} if n else {"temperature": 0.0}
        if n and "seed" in request_format.extra:
            body["seed"] = question.seed + number
        return None, {**body, **self.extra}


def _samples(answers: Sequence[Sample | RequestFailed]) -> list[Sample] | str:
    samples = [answer for answer in answers if isinstance(answer, Sample)]
    return samples if len(samples) == len(answers) else next(str(a) for a in answers if isinstance(a, RequestFailed))


def _read(_: None, answer: dict[str, Any]) -> Sample:
    """The sample in a server's answer, which may hold anything."""
    choice = answer["choices"][0] if answer["choices"] else None
    if not isinstance(choice, dict):
        raise ValueError("the server's answer holds no choice")
    message = choice.get("message")
    if isinstance(message, dict):
        thinking = next((message[name] for name in _FIELDS if isinstance(message.get(name), str)), "")
        content = message.get("content")
        content = content if isinstance(content, str) else ""
        text: Any = f"<think>\n{thinking}\n</think>\n\n{content}" if thinking else content
    else:
        text = choice.get("text")
    if not isinstance(text, str):
        raise ValueError("the server's answer holds no text")
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Sample(text, tokens if isinstance(tokens, int) else None, choice.get("finish_reason") == "length")
