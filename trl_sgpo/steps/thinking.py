"""The marks that common families of models put around their thinking, in a text and among special tokens."""

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from trl_sgpo.steps.tool_calls import CALL_TOKEN


class Mark(NamedTuple):
    """A mark of thinking in a text."""

    start: int
    end: int
    closes: bool


# `<think>`, `</thinking>`, `<thought>`, `<seed:think>`, `<|START_THINKING|>`, `<|end_of_thought|>`
_TAG = re.compile(
    r"<[|｜]?(?!/?no_?think)((?:[/\w:▁]{0,30}[/_:▁])?(?:think|thought)(?:ing|s)?(?:[_▁]\w{1,20})?)[|｜]?>",
    re.IGNORECASE,
)
_CLOSING_NAME = re.compile(r"/|(?:\b|[_▁])end(?:\b|[_▁])", re.IGNORECASE)
_MARK = re.compile(
    rf"(?P<tag>{_TAG.pattern})"
    r"|(?P<open>\[THINK\]|◁think▷|<\|inner_prefix\|>|<\|channel>thought\b|<\|channel\|>analysis<\|message\|>)"
    # Of the channels of gpt-oss, a commentary that is a call is neither thinking nor an answer
    r"|\[/THINK\]|◁/think▷|<\|inner_suffix\|>|<channel\|>"
    r"|(?:<\|end\|>)?(?:<\|start\|>)?(?:assistant)?<\|channel\|>(?:final|commentary)<\|message\|>",
    re.IGNORECASE,
)
# Every mark holds one of these, without regard to case. Most texts hold none, and looking for words costs a hundredth of
# what the pattern does. There is no `i` in them, because the pattern takes the dotless one for it too.
_IN_EVERY_MARK = ("nk", "ought", "channel", "nner_")
# Marks of words at the beginning of a text: gpt-oss without its special tokens, Granite. They count if both are there.
_OPENING_WORDS = re.compile(r"\s{0,9}(?:(?P<channel>analysis)|Here(?:'s| is) my thought process:)")
_CLOSING_WORDS = {
    True: re.compile(r"assistant(?:commentary)?final"),
    False: re.compile(r"Here(?:'s| is) my response:"),
}

# Tokens that are marks, or parts of one
_TOKEN = re.compile(
    rf"{_TAG.pattern}|\[/?THINK\]|◁/?think▷|<\|inner_(?:prefix|suffix)\|>|<\|?channel\|?>|<\|message\|>", re.IGNORECASE
)
_PERHAPS_A_TOKEN = re.compile(
    r"(?<!no)(?<!no_)think|thought|reason|reflect|scratch|channel|analysis|(?:\b|_)cot(?:\b|_)", re.IGNORECASE
)


def thinking_marks(text: str) -> Iterator[Mark]:
    """The marks of thinking in a text, in order. Those of words are there only if no other ones are."""
    mark, lowered = None, text.lower()
    for mark in _MARK.finditer(text) if any(part in lowered for part in _IN_EVERY_MARK) else ():
        name = mark["tag"] and mark[2]
        closes = _CLOSING_NAME.search(name) is not None if name else mark["open"] is None
        yield Mark(mark.start(), mark.end(), closes)
    if mark is None and (opening := _OPENING_WORDS.match(text)):
        closing = _CLOSING_WORDS[opening["channel"] is not None].finditer(text, opening.end())
        for last in deque(closing, maxlen=1):
            yield Mark(*opening.span(), False)
            yield Mark(*last.span(), True)


def start_of_answer(text: str, decoded: str) -> int:
    """
    Where the answer of a turn begins at the earliest in the text that its ids decode to: after the last mark that closes
    thinking, if the turn's text has no thinking, because a parser has dropped it.
    """
    if any(mark.closes for mark in thinking_marks(text)):
        return 0
    return max((mark.end for mark in thinking_marks(decoded) if mark.closes), default=0)


def is_mark(token: str) -> bool:
    """Whether a token is a mark of thinking or of tool calls, or a part of one."""
    return any(marks.fullmatch(token) for marks in (_TOKEN, CALL_TOKEN))


def may_be_thinking_token(token: str) -> bool:
    """Whether a token's name speaks of thinking, but it is no mark that is known here."""
    named = _PERHAPS_A_TOKEN.search(token) if token[:1] in "<[◁" else None
    return named is not None and not is_mark(token)


def restore_marks(text: str, decoded: str | None) -> str:
    """
    The decoded text instead of a completion's, if it is the same but for marks of thinking that the completion lacks.

    Example:

    ```python
    >>> restore_marks("Hm. It is 4.", "<think>Hm.</think> It is 4.")
    '<think>Hm.</think> It is 4.'
    ```
    """
    if decoded is None or len(_TOKEN.findall(decoded)) <= len(_TOKEN.findall(text)):
        return text
    same = _without_marks(text) == _without_marks(decoded)
    return decoded if same else text


def _without_marks(text: str) -> str:
    return "".join(CALL_TOKEN.sub("", _TOKEN.sub("", text)).split())
