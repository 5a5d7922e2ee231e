"""
What a judge asks its servers, and how: the optional keys of a request ([`RequestFormat`]), all other settings
([`ServerSettings`]), and the key, which is read from the environment and kept nowhere.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


OUTPUTS = ("json_schema", "json_object", "text")

_KEY_FORMS = re.compile(r"\b(?:sk|pk|hf|gsk|xai|nvapi)[-_][\w*.-]{4,}|(?<=Bearer )[^\s\"',]+", re.IGNORECASE)
_KEY_PROVIDED = re.compile(r"(api[ _-]?key[^:\n]{0,30}:\s*)[^\s,]+", re.IGNORECASE)


def api_key(name: str) -> str:
    """The key in an environment variable, empty if there is none. Read where it is needed, and kept nowhere."""
    return (os.environ.get(name) or "").strip()


def check_whole(name: str, number: Any, least: int) -> None:
    """Raises a `ValueError` if an argument is no whole number of at least `least`."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name}={number!r} must be a whole number of at least {least}.")


def redact(text: str, key: str) -> str:
    """A text without the key, and without what looks like one: servers quote it in their error messages."""
    if len(key) > 3:
        text = text.replace(key, "[key]")
    return _KEY_PROVIDED.sub(r"\1[key]", _KEY_FORMS.sub("[key]", text))


@dataclass(frozen=True)
class RequestFormat:
    """
    Which optional keys a request has. If a server refuses a request, it is asked again with one of them less: the one
    that its message names, else the output constraint, the temperature, the extra keys, the name of the length limit
    and the system message, in this order. Without a system message the rules stand in the user's.
    """

    output: str = "json_schema"  # or "json_object" or "text"
    output_is_fixed: bool = False
    temperature: bool = True  # whether one is sent
    extra: tuple[str, ...] = ()  # the keys of `extra_body` that are sent
    length_key: str = "max_tokens"  # OpenAI's newer models want "max_completion_tokens"
    system: bool = True  # whether there is a system message, which Gemma, o1-mini and others refuse

    @property
    def may_lower_output(self) -> bool:
        """Whether there is an output constraint, and the judge may do without."""
        return self.output != "text" and not self.output_is_fixed

    def without_one(self, message: str) -> tuple["RequestFormat | None", bool]:
        """The next format to try after a refusal, `None` if there is none, and whether the message named the key."""
        options: list[tuple[str, RequestFormat]] = []
        if self.may_lower_output:
            lower = replace(self, output=OUTPUTS[OUTPUTS.index(self.output) + 1])
            options.append(("(?i:response_format|json.?object|json.?mode|schema|grammar|guided|structured)", lower))
        if self.temperature:
            options.append(("temperature", replace(self, temperature=False)))
        for name in self.extra:
            options.append((re.escape(name), replace(self, extra=tuple(x for x in self.extra if x != name))))
        if self.length_key == "max_tokens":
            options.append(("max_tokens|max_completion_tokens", replace(self, length_key="max_completion_tokens")))
        if self.system:
            options.append((r"(?i:\bsystem\b|\bdeveloper\b|\broles?\b)", replace(self, system=False)))
        for pattern, request_format in options:
            if re.search(pattern, message):
                return request_format, True
        return (options[0][1] if options else None), False

    def difference(self, other: "RequestFormat") -> str:
        """What the other format does not send, in words."""
        parts = []
        if self.output != other.output:
            parts.append(f"output is {other.output!r}, not {self.output!r}")
        if self.temperature and not other.temperature:
            parts.append("no temperature is sent")
        parts += [f"extra_body[{name!r}] is not sent" for name in self.extra if name not in other.extra]
        if self.length_key != other.length_key:
            parts.append(f"the length limit is sent as {other.length_key!r}")
        if self.system and not other.system:
            parts.append("the rules stand in the user's message and not in a system message")
        return ", ".join(parts)


def _always(answer: dict[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class ServerSettings:
    """What a judge asks its servers, and how. What has no comment is an argument of [`OpenAIJudge`]."""

    path: str  # what follows the base URL
    field: str  # name of the list that every answer holds
    longest_answer: int  # bytes that are read at most
    if_too_long: str  # what to do if a server refuses a request because of its length
    if_not_found: str  # what to do if a server does not know the path or the model
    request_format: RequestFormat  # what a request holds, unless a server refuses it
    api_key_env: str
    max_concurrency: int
    timeout: float
    batch_deadline: float
    max_retries: int
    breaker_failures: int
    breaker_seconds: float
    has_text: Callable[[dict[str, Any]], bool] = _always  # whether a server's answer says anything
    # The words of the log: who asks, and what becomes of a request that nobody answers
    asker: str = "The judge"
    if_down: str = "what no other server answers is abstained on, and training goes on as GRPO"
    if_unanswered: str = (
        "What nobody answers is an abstention; further ones of this kind are counted in the metric `sgpo/abstain_rate` and "
        "not shown."
    )

    def __post_init__(self) -> None:
        for name, least in (("max_concurrency", 1), ("max_retries", 0), ("breaker_failures", 1)):
            check_whole(name, getattr(self, name), least)
        for name in ("timeout", "batch_deadline", "breaker_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7:
                raise ValueError(f"{name}={value!r} must be positive: it is the most seconds to wait.")
        name = self.api_key_env
        if not isinstance(name, str) or not (name in os.environ or re.fullmatch(r"[A-Z][A-Z0-9_]*", name)):
            raise ValueError(
                "api_key_env (not shown here, because it may be a key) is not the name of an environment variable. "
                "Put the key into one, `export JUDGE_API_KEY=...`, and give its name: api_key_env='JUDGE_API_KEY'."
            )
        key = api_key(name)
        if not (key.isascii() and key.isprintable()):
            # Otherwise the HTTP library would say so, and might show the key
            raise ValueError(
                f"the value of api_key_env={name!r} has characters that no HTTP header may have. Set it anew."
            )
