"""
Where a verdict's steps stand among the tokens of a completion: from spans of characters to ranges of tokens. Which
credit the tokens get is decided in `treatments/prefix.py`. Nothing here knows about TRL.
"""

from bisect import bisect, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from math import inf
from typing import NamedTuple

from trl_sgpo.steps import CutCompletion, Span, Turn
from trl_sgpo.steps.thinking import start_of_answer, thinking_marks
from trl_sgpo.steps.tool_calls import place_calls, visible


Decode = Callable[[Sequence[int]], str]

_CONTEXT = 16  # how many known ids are decoded again in front of others, see `_DecodedText`


class StepTokens(NamedTuple):
    """
    The tokens of a completion that a verdict speaks of, as half-open ranges of positions: the steps before the first
    wrong one (one range for those of a turn that follow each other), and the first wrong step. `steps` holds the index
    of the first step of each verified range.
    """

    verified: tuple[Span, ...]
    error: Span
    steps: tuple[int, ...] = ()


def locate_steps(
    decode: Decode,
    ids: Sequence[int],
    cut: CutCompletion,
    first_error: int,
    by_policy: Sequence[bool] | None = None,
    values: Sequence[float] | None = None,
) -> StepTokens | None:
    """
    Finds the verified steps and the first wrong one among a completion's own tokens. `None` if the wrong step is not
    in the decoded text. A verified step that is not there has no tokens.

    Steps are cut in the text of a completion's messages, which is not quite what the policy wrote: a chat parser moves
    thinking and tool calls, and strips marks and white space. So what each turn holds word for word is looked for in
    the text that the turn's own ids decode to. The steps lie in it where they lie in the turn. A tool call is known by
    its name and arguments.

    - A tool call begins at its own mark. Several calls of one function are told apart by their order.
    - Thinking that is not judged is part of no step, whatever it quotes. White space around a step is not part of it.
    - A token that holds the end of one step and the beginning of the next is the next one's.
    - A character that is spread over several tokens, as in byte-level vocabularies, takes all of them along.

    Args:
        ids (`Sequence[int]` of length T):
            The completion's ids, without padding.
        by_policy (`Sequence[bool]` of length T, *optional*):
            Which tokens the policy wrote. With several turns, each stretch of them is a turn.
        values (`Sequence[float]`, *optional*):
            What each step before the first wrong one earns. Only steps that earn the same share a range.
    """
    # One turn may hold what others wrote, if a rollout function has put it there: its text is that of all ids
    runs = [(0, len(ids))] if len(cut.turns) == 1 else _runs(by_policy, len(ids))
    verified: list[Span] = []
    steps: list[int] = []
    for (offset, turn), (first, last) in zip(cut.turns, runs, strict=False):
        mine = [i for i in range(first_error + 1) if offset <= cut.spans[i][0] < offset + len(turn.text)]
        if not mine:
            continue
        text = _DecodedText(decode, ids[first:last])
        blocks = _align(turn, text.text)
        found = {i: _place(turn.text, cut.spans[i][0] - offset, cut.spans[i][1] - offset, blocks) for i in mine}
        places = {i: place for i, place in found.items() if place is not None}
        # Joined as characters, because finding a token takes time
        for step, start, end in _join_verified(cut, places, first_error, offset + len(turn.text), values):
            stop = last if end is None else first + text.token_after(end)
            verified.append((first + text.token_at(start), stop))
            steps.append(step)
        if first_error in places:
            start, end = places[first_error]
            error = first + text.token_at(start)
            return StepTokens(tuple(verified), (error, max(first + text.token_after(end), error + 1)), tuple(steps))
    return None


class _Block(NamedTuple):
    """A span of a turn's text and the span of the decoded text that it stands for, letter by letter or as a whole."""

    turn: Span
    decoded: Span
    literal: bool


def _align(turn: Turn, decoded: str) -> list[_Block]:
    """Where the parts of a turn stand in the text that its ids decode to, in order. A part that is not there is left out."""
    blocks: list[_Block] = []
    # Thinking that the parser has dropped may hold the same words
    start = position = start_of_answer(turn.text, decoded)
    marks = [mark for mark in thinking_marks(decoded) if mark.closes]
    content: Span | None = None
    for span in turn.written:
        found = _find(turn.text, span, decoded, position) or list(_find_lines(turn.text, span, decoded, position))
        blocks += found
        if found:
            position = found[-1].decoded[1]
            after = (
                mark.end for mark in marks if mark.start >= position and not decoded[position : mark.start].strip()
            )
            position = next(after, position)
        if span != turn.written[-1]:
            start = position
        elif found:
            content = found[0].decoded[0], position
    places = place_calls(decoded, turn.calls, start, content)
    blocks += [
        _Block(call.span, place, literal=False) for call, place in zip(turn.calls, places, strict=True) if place
    ]
    return sorted(blocks)


def _find(text: str, span: Span, decoded: str, position: int) -> list[_Block]:
    """The block of a span that stands in `decoded` word for word, but for the white space around it; none if it does not."""
    start, end = visible(text, *span)
    at = decoded.find(text[start:end], position) if start < end else -1
    return [_Block((start, end), (at, at + end - start), literal=True)] if at >= 0 else []


def _find_lines(text: str, span: Span, decoded: str, position: int) -> Iterator[_Block]:
    """As `_find`, line by line: the parser has taken something out of the middle."""
    start = span[0]
    for line in text[slice(*span)].splitlines(keepends=True):
        for block in _find(text, (start, start + len(line)), decoded, position):
            yield block
            position = block.decoded[1]
        start += len(line)


def _place(text: str, start: int, end: int, blocks: Sequence[_Block]) -> Span | None:
    """The span of the decoded text that a span of the turn's text stands for; `None` if nothing of it is there."""
    start, end = visible(text, start, end)
    mine = [block for block in blocks if block.turn[0] < end and start < block.turn[1]]
    if not mine:
        return None
    first, last = mine[0], mine[-1]
    begin = first.decoded[0] + (max(start - first.turn[0], 0) if first.literal else 0)
    stop = last.decoded[1] - (max(last.turn[1] - end, 0) if last.literal else 0)
    if begin < stop:
        return begin, stop
    # The policy wrote the parts of this step in another order
    return min(block.decoded[0] for block in mine), max(block.decoded[1] for block in mine)


def _join_verified(
    cut: CutCompletion,
    places: Mapping[int, Span],
    first_error: int,
    turn_end: int,
    values: Sequence[float] | None = None,
) -> list[tuple[int, int, int | None]]:
    """
    The places of a turn's steps before the first wrong one, each with the index of its first step. Those that earn the
    same and have only white space between them are one. The end is `None` where the turn ends: that is verified with
    its last step.
    """
    joined: list[tuple[int, int, int | None]] = []
    for i, (start, end) in places.items():
        if i == first_error:
            break
        after = cut.spans[i][1]
        stop: int | None = end
        follows = i + 1 in places and places[i + 1][0] >= end
        if follows and not cut.text[after : cut.spans[i + 1][0]].strip():
            stop = places[i + 1][0]
        elif not cut.text[after:turn_end].strip():
            stop = None
        step, first, last = joined[-1] if joined else (i, start, None)
        if last == start and (values is None or values[step] == values[i]):
            joined[-1] = (step, first, stop)
        else:
            joined.append((i, start, stop))
    return joined


def _runs(by_policy: Sequence[bool] | None, length: int) -> list[tuple[int, int]]:
    """The stretches of tokens that the policy wrote."""
    if by_policy is None:
        return [(0, length)]
    runs: list[tuple[int, int]] = []
    for i, mine in enumerate(by_policy):
        if mine and runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        elif mine:
            runs.append((i, i + 1))
    return runs


class _DecodedText:
    """
    The text of a list of ids, and which id has part in which character. This shows in what the list's beginnings decode
    to. A completion may have many steps, so a beginning is not decoded from the first id on, but from shortly before the
    end of the longest known beginning that is not longer.
    """

    def __init__(self, decode: Decode, ids: Sequence[int]):
        self.decode, self.ids, self.text = decode, ids, decode(ids)
        self._beginnings: dict[int, tuple[int, bool]] = {}
        # (n, start, position): for every m from n on, `ids[start:m]` decode to what stands from `position` on
        self._anchors = [(0, 0, 0)]
        self._n_visible = len(ids)
        while self._n_visible and self._is_silent(self._n_visible - 1):
            self._n_visible -= 1

    def _is_silent(self, i: int) -> bool:
        """Whether an id never has text, as an end-of-text token. Twice, because a single space may be stripped."""
        return not self.decode([self.ids[i]] * 2)

    def _beginning(self, n: int) -> tuple[int, bool]:
        """
        How many characters of the text the first `n` ids give in full, which never falls as `n` grows, and whether
        they hold first bytes of the next one too. Such a character garbles itself and, in some vocabularies, bytes in
        front of it.
        """
        if n not in self._beginnings:
            _, start, position = self._anchors[bisect(self._anchors, (n, inf)) - 1]
            k, length = n, 0
            while not self.text.startswith(piece := self.decode(self.ids[start:k]), position):
                same = takewhile(lambda pair: pair[0] == pair[1], zip(piece, self.text[position:], strict=False))
                length = max(length, position + sum(1 for _ in same))
                k -= 1
            end = position + len(piece)
            self._beginnings[n] = max(length, end), k < n
            if k - start > 4 * _CONTEXT:
                self._add_anchor(k, end)
        return self._beginnings[n]

    def _add_anchor(self, n: int, end: int) -> None:
        """
        Lets beginnings from `n` ids on be decoded from shortly before id `n`, where the text has `end` characters. The ids
        in front of an id can change what it decodes to: the first bytes of a character, a run of bytes, spaces that the
        tokenizer puts in or takes out. None of this reaches across a letter or digit that stands where it should.
        """
        for start in range(n - _CONTEXT, n - _CONTEXT - 4, -1):  # a character has up to four bytes, each may be an id
            piece = self.decode(self.ids[start:n])
            if any(map(str.isalnum, piece)) and self.text.endswith(piece, 0, end):
                insort(self._anchors, (n, start, end - len(piece)))
                break

    def token_at(self, position: int) -> int:
        """The first id that has part in the character at `position`."""
        if position == 0:  # nearly every completion is asked for this one
            return next((i for i in range(len(self.ids)) if not self._is_silent(i)), 0)
        low, high = 0, len(self.ids)  # the first `low` ids end at or before `position`
        while high - low > 1:
            middle = (low + high) // 2
            if self._beginning(middle)[0] <= position:
                low = middle
            else:
                high = middle
        while low > 0:
            length, unfinished = self._beginning(low)
            if length < position or not unfinished:
                break
            low -= 1
        return low

    def token_after(self, position: int) -> int:
        """The first id that has no part in any character before `position`, or that it shares with those after it."""
        return self.token_at(position) if position < len(self.text) else self._n_visible
