"""
Tool calls: what a message says of them, and where they stand in the text that a turn's ids decode to. Every family of
models writes them in a form of its own, and some marks of that form are special tokens, which the decoded text lacks.
So a call is known by the name of its function, and what belongs to it by its arguments.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

from trl_sgpo.steps.segmenter import Span


# Tokens that are marks of calls
CALL_TOKEN = re.compile(
    r"<[|｜]?/?tool[_▁]calls?(?:[_▁][\w▁]{1,30})?[|｜]?>|\[/?TOOL_CALLS\]|<[|｜]python_tag[|｜]>|<\|call\|>"
)
# What stands directly before the name of a function in the forms of common models
_BEFORE_NAME = re.compile(
    r'(?:"(?:name|function|tool)"\s{0,3}:\s{0,3}"|<function=|<invoke name="|functions\.|call:|<[|｜]?tool_call[|｜]?>\s{0,3})\Z'
)
_LONGEST_BEFORE_NAME = 24
_WORD = re.compile(r"[\w-]+")
# The mark that opens a call, and what closes the call before it
_OPENS = re.compile(
    r"<[|｜]?tool[_▁]calls?(?:[_▁](?:begin|start))?[|｜]?>|\[TOOL_CALLS\]|<[|｜]python_tag[|｜]>|<function[=_]|<invoke\b"
    r'|(?:<\|channel\|>commentary)?[ ]?to=functions\.|\[?\{\s{0,9}"(?:type|id|name|function|tool|arguments|parameters)"'
)
_CLOSES = re.compile(
    r"</[^<>\n]{1,40}>|<\|call\|>|<[^<>|\n]{1,40}[|｜]>|<[|｜][^<>|｜\n]{0,40}end[^<>|｜\n]{0,40}[|｜]>|[)}]|(?<![A-Z])\]"
)
_ARGUMENTS_FIRST = re.compile(r'\{\s{0,9}"(?:arguments|parameters)"\s{0,9}:')
_BETWEEN = re.compile(r"[\s,;`]*+")
_LONGEST_BEFORE_ARGUMENTS = 60
_MOST_PER_VALUE, _MOST_PER_CHARACTER = 200, 6  # characters of the text, with marks and escapes
_DECODER = json.JSONDecoder()


class ToolCall(NamedTuple):
    """A tool call as a turn's text shows it."""

    span: Span
    name: str
    values: tuple[str, ...]  # texts that its arguments are made of


def shown_call(call: Any) -> tuple[str, str, tuple[str, ...]]:
    """The name of a tool call's function, the call as text, and the texts that its arguments are made of."""
    if not isinstance(call, Mapping):
        return "", str(call), ()
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    name, arguments = str(function.get("name") or ""), function.get("arguments")
    read: Any = arguments
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            read = json.loads(arguments)
    values = tuple(_values(read))
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):  # keys that JSON does not have, circular or deep references
            arguments = str(arguments)
            values = ()
    return name, f"{name}({arguments})", values


def _values(arguments: Any, depth: int = 0) -> Iterator[str]:
    """Keys and values, down to a depth at which circular references end."""
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            yield str(key)
            yield from _values(value, depth + 1) if depth < 9 else ()
    elif isinstance(arguments, (list, tuple)):
        for value in arguments:
            yield from _values(value, depth + 1) if depth < 9 else ()
    elif isinstance(arguments, str):
        yield arguments
    elif arguments is not None:
        yield str(arguments)


def place_calls(text: str, calls: Sequence[ToolCall], start: int, content: Span | None) -> list[Span | None]:
    """
    Where the calls of a turn stand in the text that its ids decode to, each from its own mark on. `content` is where
    the turn's content stands, and nothing before `start` counts. They follow the content. If they do not, they are
    looked for before it. `None` for a call that is not there.
    """
    names = _Names(text, {call.name for call in calls})
    if content is None:
        return _find_calls(names, calls, start, len(text))
    after = _find_calls(names, calls, content[1], len(text))
    if all(named is not None for named, _ in names.of(calls, content[1], len(text))):
        return after
    before = _find_calls(names, calls, start, content[0], take_rest=False)
    n_before = next((i for i, span in enumerate(before) if span is None), len(before))
    if not n_before:
        return after
    return before[:n_before] + _find_calls(names, calls[n_before:], content[1], len(text), take_rest=False)


def _find_calls(
    names: "_Names", calls: Sequence[ToolCall], start: int, end: int, take_rest: bool = True
) -> list[Span | None]:
    """The calls between two positions, in order. With `take_rest` the first one takes what it may, if it has no name."""
    begins: list[int | None] = []
    last = start
    for number, (named, done) in enumerate(names.of(calls, start, end)):
        if named is None:
            begins.append(start if number == 0 and take_rest else None)
        else:
            begins.append(_own_mark(names.text, last, named, is_first=number == 0))
            last = done
    known = [begin for begin in begins if begin is not None]
    ends = dict(pairwise([*known, end]))
    places = (None if begin is None else visible(names.text, begin, ends[begin]) for begin in begins)
    return [place if place and place[0] < place[1] else None for place in places]


class _Names:
    """Where the names of functions stand in a text, found in one pass, however many calls there are."""

    def __init__(self, text: str, names: set[str]) -> None:
        self.text = text
        by_word: dict[str, list[str]] = {}
        for name in names:
            if word := _WORD.match(name):
                by_word.setdefault(word[0], []).append(name)
        self._anywhere: dict[str, list[int]] = {name: [] for name in names}
        self._after_a_mark: dict[str, list[int]] = {name: [] for name in names}
        for word in _WORD.finditer(text) if by_word else ():
            for name in by_word.get(word[0], ()):
                if text.startswith(name, word.start()):
                    self._anywhere[name].append(word.start())
                    if _BEFORE_NAME.search(text, max(word.start() - _LONGEST_BEFORE_NAME, 0), word.start()):
                        self._after_a_mark[name].append(word.start())

    def of(self, calls: Sequence[ToolCall], start: int, end: int) -> Iterator[tuple[int | None, int]]:
        """For each call where its name stands, and where its arguments end at the earliest."""
        for call in calls:
            named = None
            for places in (self._after_a_mark[call.name], self._anywhere[call.name]):
                number = bisect_left(places, start)
                if named is None and number < len(places) and places[number] + len(call.name) <= end:
                    named = places[number]
            if named is not None and (around := _arguments_first(self.text, call, start, named, end)):
                named, start = around
            elif named is not None:
                start = _arguments_end(self.text, call, named + len(call.name), end)
            yield named, start


def _longest(call: ToolCall) -> int:
    """Characters of the text that a call may take at most, with marks and escapes."""
    return sum(_MOST_PER_VALUE + _MOST_PER_CHARACTER * len(value) for value in (call.name, *call.values))


def _arguments_first(text: str, call: ToolCall, start: int, named: int, end: int) -> Span | None:
    """The JSON object of a call whose arguments stand before its name; `None` for a call of another form."""
    opens = _ARGUMENTS_FIRST.search(text, start, named)
    if opens is None:
        return None
    try:
        found, length = _DECODER.raw_decode(text[opens.start() : min(end, named + _longest(call))])
    except (ValueError, RecursionError):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    same = found.get("name") == call.name and sorted(_values(arguments)) == sorted(call.values)
    return (opens.start(), opens.start() + length) if same else None


def _arguments_end(text: str, call: ToolCall, start: int, end: int) -> int:
    """Where the arguments end that follow a name: exactly if they are JSON, else after the texts they are made of."""
    end = min(end, start + _longest(call))
    brace = text.find("{", start, min(start + _LONGEST_BEFORE_ARGUMENTS, end))
    if brace >= 0:
        try:
            arguments, length = _DECODER.raw_decode(text[brace:end])
            if sorted(_values(arguments)) == sorted(call.values):
                return brace + length
        except (ValueError, RecursionError):
            pass
    latest = start
    for value in call.values:
        forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
        found = [(at, form) for form in forms if form and (at := text.find(form, start, end)) >= 0]
        latest = max([latest, *(at + len(form) for at, form in found[:1])])
    return latest


def _own_mark(text: str, last: int, named: int, is_first: bool) -> int:
    """Where a call begins, between the end of what is before it and the name of its function."""
    closed = last
    if not is_first:
        closed = max((mark.end() for mark in _CLOSES.finditer(text, last, named)), default=last)
        between = _BETWEEN.match(text, closed, named)
        closed = between.end() if between else closed
    opens = _OPENS.search(text, closed, named)
    return opens.start() if opens else closed


def visible(text: str, start: int, end: int) -> Span:
    """A span without the white space at its ends."""
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
