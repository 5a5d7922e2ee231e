"""
From a completion to its steps: which text the policy wrote, which part of it is judged, where one step ends and the
next begins, and what share of the steps comes before the first wrong one (the reasoning trajectory score, RTS, of
Stepwise Guided Policy Optimization, https://huggingface.co/papers/2505.11595).

The paper leaves the cutting to the judge. Here it is a plain function of the text, so that every judge sees the same
steps and a verdict can be mapped back to characters and tokens. It knows the shapes in which models write solutions
and nothing of what they say: no model, no tokenizer, no language detection. `Step`, `Answer` and the abbreviations are
the English ones. A text of another kind wants a segmenter of its own: any function from a text to ordered, disjoint
`(start, end)` spans.

Left out on purpose: the mapping from RTS to a reward and from characters to tokens, and anything that needs torch.
Every function takes time linear in the text, also on text written to make it slow: a policy in training writes such.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from operator import index
from typing import Any


Span = tuple[int, int]
Segmenter = Callable[[str], Sequence[Span]]


# ---------------------------------------------------------------------------------------------------------------------
# Text -> steps. A cut is the position where a new step may begin. All patterns are anchored or bounded, or use
# possessive quantifiers (`++`), so that none can backtrack over more than a few characters.
# ---------------------------------------------------------------------------------------------------------------------

_CONTENT = re.compile(r"[^\W_]")
_VISIBLE = re.compile(r"\S")
_LINE = re.compile(r"^[^\S\n]*+\S", re.MULTILINE)
_BLANK_LINE = re.compile(r"\n[^\S\n]*+\n")

# A line that opens or closes a code fence; `\\` and `\$`, which are read first so that `\\[2pt]` opens nothing;
# delimiters of display maths; environments. Group 2 is the rest of a fence line.
_BLOCK_MARK = re.compile(
    r"^[ \t]*+(`{3,}+|~{3,}+)([^\n]*+)|(?:\\[\\$])++|\$\$|\\[\[\]]|\\(begin|end)\{([A-Za-z]{1,30}\*?)\}", re.MULTILINE
)
_TABLE_RULE = re.compile(r"^[ \t\r:|]*+-[ \t\r:|-]*+$", re.MULTILINE)
# These environments hold whole solutions: kept whole, a solution written in LaTeX would be a single step.
_PROSE_ENVIRONMENTS = frozenset({"document", "proof", "solution"})

# `### Step 3: ...`, `**Step 3** ...`, `3. ...`, `**3)** ...`, `## Title`. Whether an undecorated `Step 3` is a head
# ("Step 3: add") or a mention ("Step 3 shows") is told by the stop behind it.
_HEAD = re.compile(
    r"""^(?P<indent>[ \t]{0,8}+)
    (?: (?P<hashes>\#{1,6}+) [ \t]{1,8}+ (?=\S) )?
    (?:
        (?P<look>[*_]{0,3}+)
        (?: (?i:step) [ \t]{0,3}+ \#?+ (?P<step>\d{1,4}+) (?!\w|\.\d) (?P<stop>[ \t]{0,3}+(?:[:.)\]*_(–—-]|\r?$))?+
          | (?P<number>\d{1,4}+) (?P<dot>[.)]) (?=[\s*_]|$) )
      | (?(hashes)|(?!))
    )""",
    re.MULTILINE | re.VERBOSE,
)
# A jump of the number by more than this is a year or a result that happens to begin a line, not the next head.
_LARGEST_JUMP = 10
# Candidates of each kind (heads, lines, sentences, marks of blocks) that are looked at; what follows the last of them
# is cut by size alone. No solution has as many, but a text written to be slow has a million.
_MOST_CANDIDATES = 20_000

_BARE_NUMBER = re.compile(
    r"(?:#{1,6}[ \t]++)?[*_]{0,3}(?:step[ \t]{0,3}#?\d{1,4}|\d{1,4}[.)])[.):*_]{0,5}", re.IGNORECASE
)
_HEADING = re.compile(
    r"#{1,6}[ \t]++[^\n]++|(?:\d{1,4}[.)][ \t]++)?(?:\*\*[^*\n]++(?<![.!?])\*\*|__[^_\n]++(?<![.!?])__):?"
)
_ANSWER = re.compile(
    r"#{4}[ \t]{0,3}(?!\d{1,3}[.)]\s)[-+$€£(\\ ]{0,4}\d[^\n]*+"
    r"|[\W_]{0,12}\\boxed\s{0,3}\{[^\n]*\}[\W_]{0,12}"
    r"|[\W_]{0,12}(?:(?:so|and|thus|hence|then|therefore)\W{1,3})?(?:(?:the|our|my)\s)?(?:(?:final|correct)\s)?"
    r"answer(?:\s{1,3}is\b|[^\w\n:=*]{0,3}[:=*\n])[\s\S]*+",
    re.IGNORECASE,
)
_DISPLAYS = ("$$", r"\[", r"\begin{")
_LONGEST_HEADING = 200
_LONGEST_ANSWER = 160

_SENTENCE_END = re.compile(r"""[.!?][)\]}"'*_$\\”’»]{0,6}+\s++|[。！？][）」』”’]{0,3}+\s*+""")
# No sentence begins with one of these: what stands before is a decimal point, a factorial, an elision.
_CONTINUATIONS = frozenset(",;:.!?)]}=+<>/%&|^")
_ABBREVIATION = re.compile(r"\b(?:approx|cf|dr|etc|jr|mr|mrs|ms|prof|resp|sr|st|viz|vs)$", re.IGNORECASE)
_ABBREVIATION_OF_NUMBER = re.compile(r"\b(?:ch|chap|eqn?s?|ex|figs?|nos?|pp?|prop|ref|sec|thm|vol)$", re.IGNORECASE)
_INITIALS = re.compile(r"(?<![A-Za-z])(?:[A-Za-z]\.)++[A-Za-z]$")  # e.g, i.e, a.m, U.S
_ITEM_MARK = re.compile(r"(?:^|\n)\W{0,4}(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})$")
_LOOK_BEHIND = 12  # longer than every abbreviation and item mark


def segment(text: str, *, max_steps: int = 64, max_step_chars: int = 4000) -> list[Span]:
    r"""
    Cut a text into steps. The default [`Segmenter`].

    The first of these that gives at least two steps is used: explicit heads (`Step 1:`, `1.`, `1)`, `## Title`, if two
    or more rise in order; what stands before the first is a step too), blank lines, lines, sentences. A numbered list
    of few items among many paragraphs is no set of heads: it belongs to the step that holds it. Then

    - code fences, display maths (`$$..$$`, `\[..\]`), `\begin{x}..\end{x}` (but for those of prose: `proof`,
      `solution`, `document`) and pipe tables are never cut. An unclosed fence reaches to the end of the text, as in
      CommonMark; unclosed maths protects nothing, and `$$..$$` holds no blank line, as in TeX, so that one stray `$$`
      does not turn the whole text inside out;
    - a piece without a letter or digit (`---`) joins the step before it, and so does a bare final answer at the end
      (`#### 42`, `\boxed{42}`, `The answer is 42.`);
    - a heading alone, or a piece that ends in a colon or comma ("so we have:"), joins what it announces, and a piece
      that breaks off at a word joins the display that continues it;
    - steps longer than `max_step_chars` are cut at a line, else a sentence, else a space, else anywhere; then the
      shortest neighbours are merged until `max_steps` are left, even if the merged ones are longer.

    Args:
        text (`str`):
            Text to cut.
        max_steps (`int`, *optional*, defaults to `64`):
            Largest number of steps. Wins over `max_step_chars`.
        max_step_chars (`int`, *optional*, defaults to `4000`):
            Largest number of characters of a step, white space around it not counted. A protected block that is
            longer stays whole.

    Returns:
        `list[tuple[int, int]]`:
            Spans `(start, end)` of the steps in order. They tile the text: `"".join(text[start:end] ...) == text`.
            Empty for the empty text.

    Raises:
        `ValueError`: If `max_steps` or `max_step_chars` is less than 1.

    Example:

    ```python
    >>> text = "Step 1: 3 * 4 = 12.\nStep 2: 12 + 1 = 14.\n#### 14"
    >>> [text[start:end] for start, end in segment(text)]
    ['Step 1: 3 * 4 = 12.\n', 'Step 2: 12 + 1 = 14.\n#### 14']
    ```
    """
    for name, value in (("max_steps", max_steps), ("max_step_chars", max_step_chars)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}, but a text has at least one step: pass an integer of 1 or more.")
    if not text:
        return []

    blocks = _blocks(text)
    for cuts in _levels(text, blocks):
        starts = _join(text, cuts)
        if len(starts) > 1:
            break
    starts = _limit_size(text, starts, blocks, max_step_chars)
    starts = _limit_number(starts, len(text), max_steps)
    return list(pairwise([*starts, len(text)]))


def _levels(text: str, blocks: list[Span]) -> Iterator[list[int]]:
    """Cuts of the text from the coarsest and most explicit to the finest; each level is found only if asked for."""
    lines = _line_cuts(text)
    # A line follows a blank one if the line above it does not end right in front of it.
    paragraphs = _outside([line for above, line in pairwise(lines) if text.find("\n", above) + 1 != line], blocks)
    yield _head_cuts(text, blocks, n_paragraphs=len(paragraphs) + 1)
    yield paragraphs
    yield _outside(lines, blocks)
    yield _outside(_sentence_cuts(text), blocks)


def _blocks(text: str) -> list[Span]:
    """Code fences, display maths, environments and pipe tables: sorted, disjoint spans that are never cut."""
    blocks = []
    fence, fence_start, dollars = None, 0, None
    opened: dict[str, list[int]] = {}
    for mark in islice(_BLOCK_MARK.finditer(text), _MOST_CANDIDATES):
        ticks, rest, verb, name = mark.groups()
        if fence is not None:  # nothing counts inside a fence but its end
            if ticks and ticks.startswith(fence) and not rest.strip():
                blocks.append((fence_start, mark.end()))
                fence = None
        elif ticks:
            if ticks[0] == "~" or "`" not in rest:
                fence, fence_start, dollars = ticks, mark.start(), None
                opened.clear()
        elif mark[0] == "$$":
            if dollars is None or _BLANK_LINE.search(text, dollars, mark.start()):
                dollars = mark.start()
            else:
                blocks.append((dollars, mark.end()))
                dollars = None
        elif mark[0] == r"\[":
            opened["["] = [mark.start()]  # not nested in TeX: an earlier one was never closed
        elif verb == "begin":
            if name not in _PROSE_ENVIRONMENTS:
                opened.setdefault(name, []).append(mark.start())
        elif (mark[0] == r"\]" or verb == "end") and (starts := opened.get(name or "[")):
            blocks.append((starts.pop(), mark.end()))
    if fence is not None:
        blocks.append((fence_start, len(text)))

    end = 0
    for rule in islice(_TABLE_RULE.finditer(text), _MOST_CANDIDATES):
        if rule.start() <= end or "|" not in rule[0]:
            continue
        header = text.rfind("\n", 0, rule.start() - 1) + 1
        if text.find("|", header, rule.start()) < 0:
            continue
        end = rule.end()
        while end < len(text):
            row_end = text.find("\n", end + 1)
            row_end = len(text) if row_end < 0 else row_end
            if text.find("|", end + 1, row_end) < 0:
                break
            end = row_end
        blocks.append((header, end))

    merged: list[Span] = []
    for start, end in sorted(blocks):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _outside(cuts: list[int], blocks: list[Span]) -> list[int]:
    """The sorted cuts that do not fall inside a block."""
    if not blocks:
        return cuts
    kept, block = [], 0
    for cut in cuts:
        while block < len(blocks) and blocks[block][1] <= cut:
            block += 1
        if block == len(blocks) or cut <= blocks[block][0]:
            kept.append(cut)
    return kept


def _head_cuts(text: str, blocks: list[Span], n_paragraphs: int) -> list[int]:
    """Where explicit heads begin if two or more rise in order: `Step k`, else `k.` or `k)`, else headings alone."""
    found = {head.start(): head for head in islice(_HEAD.finditer(text), _MOST_CANDIDATES)}
    heads = [found[cut] for cut in _outside(list(found), blocks)]
    # "Step 3: add" and "**Step 3** Add" are heads; "Step 3 shows" is a mention.
    heads = [head for head in heads if not head["step"] or head["hashes"] or head["look"] or head["stop"] is not None]
    if cuts := _rising_cuts(heads, "step"):
        return cuts
    cuts = _rising_cuts(heads, "number")
    # A few items among many paragraphs ("the equations are 1. .. 2. ..") are a list inside a step, not the steps.
    if 2 * len(cuts) > n_paragraphs:
        return cuts
    headings = [head.start() for head in heads if head["hashes"]]
    return headings if len(headings) > 1 else []


def _rising_cuts(heads: list[re.Match[str]], kind: str) -> list[int]:
    """Cuts at the heads of one kind whose numbers rise, and at the headings among them; none if no two rise."""
    first = next((head for head in heads if head[kind]), None)
    if first is None:
        return []
    deepest = len(first["hashes"] or "") or 6  # `#### Check` below `### Step 2` is a part of that step
    cuts, last, rises, new_part = [], -1, False, False
    for head in heads:
        number = int(head[kind] or -1)
        if kind == "number" and (
            any(head[part] != first[part] for part in ("hashes", "look", "dot"))
            or len(head["indent"]) > len(first["indent"])
        ):
            number = -1  # an item that looks different or stands deeper belongs to a list inside an item
        if last < number <= last + _LARGEST_JUMP or (new_part and number == 1):
            rises = rises or 0 <= last < number
            last, new_part = number, False
            cuts.append(head.start())
        elif 0 < len(head["hashes"] or "") <= deepest:
            new_part = True  # where counting may begin again
            cuts.append(head.start())
    return cuts if rises else []


def _line_cuts(text: str) -> list[int]:
    """Starts of the lines that are not blank."""
    return [line.start() for line in islice(_LINE.finditer(text), _MOST_CANDIDATES)]


def _sentence_cuts(text: str) -> list[int]:
    """Starts of the sentences but the first."""
    cuts, start = [], 0
    for mark in islice(_SENTENCE_END.finditer(text), _MOST_CANDIDATES):
        stop, cut = mark.span()
        if cut == len(text):
            break
        follower = text[cut]
        if follower.islower() or follower in _CONTINUATIONS:
            continue
        if text[stop] == "." and _is_inner_dot(text[max(start, stop - _LOOK_BEHIND) : stop], follower):
            continue
        if text[stop] == "!" and not follower.isalpha():  # a factorial: $5! \cdot 4!$
            continue
        cuts.append(cut)
        start = cut
    return cuts


def _is_inner_dot(before: str, follower: str) -> bool:
    """Whether the dot behind `before` ends an ellipsis, the mark of a list item or an abbreviation, not a sentence."""
    if before.rstrip().endswith(".") or _ITEM_MARK.search(before) or _INITIALS.search(before):
        return True
    if (follower.isdigit() or follower in "([\\$#") and _ABBREVIATION_OF_NUMBER.search(before):
        return True
    return _ABBREVIATION.search(before) is not None


def _join(text: str, cuts: list[int]) -> list[int]:
    """Starts of the pieces that remain when crumbs, headings, lead-ins and final answers have joined a neighbour."""
    starts = [0]
    # The open piece takes the next one if it has no content yet or is a heading; if it is a lead-in, unless the next
    # has a number of its own ("Step by step:" before "1."); if it breaks off at a word, only a displayed formula.
    state = "heading"
    for start, end in pairwise([0, *cuts, len(text)]):
        piece = text[start:end].strip()
        if not _CONTENT.search(piece):
            continue
        if (
            state == "finished"
            or (state == "lead-in" and _is_numbered(text, start))
            or (state == "word" and not piece.startswith(_DISPLAYS))
        ):
            starts.append(start)
        if _BARE_NUMBER.fullmatch(piece):
            state = "heading"
        elif len(piece) <= _LONGEST_HEADING and _HEADING.fullmatch(piece):
            state = "lead-in" if _is_numbered(text, start) else "heading"
        elif piece.rstrip("*_")[-1] in ":,":
            state = "lead-in"
        else:
            state = "word" if piece[-1].isalnum() else "finished"
    if state == "heading" and len(starts) > 1:
        starts.pop()  # it announces nothing

    end = len(text)
    while len(starts) > 1 and _is_answer(text[starts[-1] : end]):
        end = starts.pop()
    return starts


def _is_numbered(text: str, start: int) -> bool:
    head = _HEAD.match(text, start)
    return head is not None and bool(head["step"] or head["number"])


def _is_answer(piece: str) -> bool:
    piece = piece.strip()
    return len(piece) <= _LONGEST_ANSWER and _ANSWER.fullmatch(piece) is not None


def _limit_size(text: str, starts: list[int], blocks: list[Span], limit: int) -> list[int]:
    """Cut pieces of more than `limit` characters at the last line, else sentence, else word that begins in time."""
    if all(len(text[start:end].strip()) <= limit for start, end in pairwise([*starts, len(text)])):
        return starts
    finer = (_outside(_line_cuts(text), blocks), _outside(_sentence_cuts(text), blocks))
    limited = []
    for start, end in pairwise([*starts, len(text)]):
        limited.append(start)
        stop = start + len(text[start:end].rstrip())
        start = _skip_space(text, start)
        while stop - start > limit:
            latest = _skip_space(text, start + limit)  # the space behind a piece is not counted
            before = (cuts[bisect_right(cuts, latest) - 1] for cuts in finer if cuts)
            cut = next((cut for cut in before if start < cut <= latest), None)
            if cut is None:
                window = text[start:latest]
                word = "" if window[-1].isspace() else window.rsplit(maxsplit=1)[-1]
                cut = latest - len(word) if len(word) < len(window) else latest
                block = bisect_left(blocks, (cut, 0)) - 1  # the last one that begins before the cut
                if block >= 0 and cut < blocks[block][1]:
                    block_start, block_end = blocks[block]
                    cut = block_start if block_start > start else _skip_space(text, block_end)
                if cut >= stop:
                    break
            limited.append(cut)
            start = _skip_space(text, cut)
    return limited


def _skip_space(text: str, position: int) -> int:
    visible = _VISIBLE.search(text, position)
    return visible.start() if visible else len(text)


def _limit_number(starts: list[int], length: int, max_steps: int) -> list[int]:
    """Merge neighbours until `max_steps` pieces are left, so that the longest merged piece is as short as can be."""
    if len(starts) <= max_steps:
        return starts
    bounds = [*starts, length]

    def merge(size: int) -> list[int]:
        merged: list[int] = []
        piece = 0
        while piece < len(starts) and len(merged) <= max_steps:
            merged.append(starts[piece])
            piece = max(piece + 1, bisect_right(bounds, starts[piece] + size) - 1)
        return merged

    # A larger size never gives more pieces, so the smallest that will do can be found by bisection.
    return merge(bisect_left(range(length), True, key=lambda size: len(merge(size)) <= max_steps))


def check_spans(text: str, spans: Sequence[Span], *, name: str = "segmenter") -> list[Span]:
    """
    Check the spans that a user's segmenter returned for a text.

    Args:
        text (`str`):
            Text that was cut.
        spans (`Sequence[tuple[int, int]]`):
            What the segmenter returned. Gaps between spans are allowed.
        name (`str`, *optional*, defaults to `"segmenter"`):
            Name of the argument through which the segmenter came, for the messages.

    Returns:
        `list[tuple[int, int]]`: The same spans as tuples of plain integers.

    Raises:
        `TypeError`: If `spans` is not a sequence of pairs of integers.
        `ValueError`: If a span is empty, reaches outside the text, overlaps the one before it or is out of order.

    Example:

    ```python
    >>> check_spans("ab cd", [[0, 2], [3, 5]])
    [(0, 2), (3, 5)]
    ```
    """
    remedy = (
        "Return the steps in order as a list of (start, end) character positions, end not included, for example "
        "[(0, 12), (12, 30)]."
    )
    if isinstance(spans, (str, bytes)) or not isinstance(spans, Sequence):
        raise TypeError(f"`{name}` returned {spans!r:.200}, which is not a sequence of spans. {remedy}")
    checked: list[Span] = []
    for number, span in enumerate(spans):
        try:
            start, end = (index(position) for position in span)
            is_pair = not any(isinstance(position, bool) for position in span)
        except (TypeError, ValueError):
            is_pair = False
        if not is_pair:
            raise TypeError(f"`{name}` returned {span!r:.200} as span {number}, which is not two integers. {remedy}")
        if not 0 <= start < end <= len(text):
            reason = "it is empty or reversed" if 0 <= end <= start <= len(text) else "it reaches outside the text"
            raise ValueError(
                f"`{name}` returned {(start, end)} as span {number} of a text of {len(text)} characters, but "
                f"{reason}. {remedy}"
            )
        if checked and start < checked[-1][1]:
            raise ValueError(
                f"`{name}` returned {(start, end)} as span {number} behind {checked[-1]}, but steps neither overlap "
                f"nor go back. {remedy}"
            )
        checked.append((start, end))
    return checked


# ---------------------------------------------------------------------------------------------------------------------
# Completion -> text
# ---------------------------------------------------------------------------------------------------------------------

_THINK_TAG = re.compile(r"<(/?)think(?:ing)?>")


@dataclass(frozen=True)
class Turn:
    """
    One message of a completion as text.

    Args:
        text (`str`):
            Thinking, content and tool calls of the message.
        by_policy (`bool`):
            Whether the policy wrote it. Tool results, for example, are not its work and are never judged.
        written (`tuple[tuple[int, int], ...]`):
            Spans of `text` that are word for word what the policy wrote: its thinking and its content. The marks around
            thinking may have stood in the prompt.
        calls (`tuple[tuple[tuple[int, int], str], ...]`):
            Spans of the tool calls in `text`, which the policy wrote in another form, each with the name of its function.
    """

    text: str
    by_policy: bool
    written: tuple[Span, ...] = field(default=(), repr=False, compare=False)
    calls: tuple[tuple[Span, str], ...] = field(default=(), repr=False, compare=False)


def completion_turns(completion: str | list[dict]) -> list[Turn]:
    r"""
    The turns of a completion as TRL hands it to reward functions.

    Thinking that a chat parser moved to a field of its own (`reasoning_content`, `reasoning` or `thinking`) is put
    back in front of the content between `<think>` tags, and tool calls behind it, each on a line of its own: that is
    all text that the policy wrote and that can be wrong. A message without a role is taken for the policy's.

    Args:
        completion (`str` or `list[dict]`):
            A string (standard format), or the messages of the completion (conversational format), several of them with
            tools.

    Returns:
        `list[Turn]`: One turn per message; a single one for a string.

    Raises:
        `TypeError`: If `completion` is neither a string nor a list of dicts.

    Example:

    ```python
    >>> call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    >>> completion_turns([{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}])
    [Turn(text='add({"a": 1, "b": 2})', by_policy=True), Turn(text='3', by_policy=False)]
    ```
    """
    if isinstance(completion, str):
        return [Turn(completion, by_policy=True, written=((0, len(completion)),))]
    if not isinstance(completion, list) or not all(isinstance(message, Mapping) for message in completion):
        raise TypeError(
            f"`completion` is {completion!r:.200} ({type(completion).__name__}), but a completion is a string or a "
            'list of messages, for example [{"role": "assistant", "content": "..."}]: pass one completion at a time, '
            "in the form in which TRL hands it to reward functions."
        )
    turns = []
    for message in completion:
        by_policy = message.get("role") in ("assistant", None)
        content = _content_text(message.get("content"))
        turns.append(_policy_turn(message, content) if by_policy else Turn(content, by_policy=False))
    return turns


def _policy_turn(message: Mapping[str, Any], content: str) -> Turn:
    thoughts = (_content_text(message.get(name)) for name in ("reasoning_content", "reasoning", "thinking"))
    thinking = next((thought for thought in thoughts if thought.strip()), None)
    text, written = "", []
    if thinking:
        text = "<think>\n"
        written.append((len(text), len(text) + len(thinking)))
        text += f"{thinking}\n</think>\n\n"
    written.append((len(text), len(text) + len(content)))
    text += content
    found = message.get("tool_calls") or []
    found = found if isinstance(found, (list, tuple)) else [found]
    rendered = [_call_text(call) for call in found]
    if any(rendered) and content and not content.endswith("\n"):
        text += "\n"
    calls = []
    for number, (call, shown) in enumerate(zip(found, rendered, strict=True)):
        text += "\n" if number else ""
        calls.append(((len(text), len(text) + len(shown)), _function_name(call)))
        text += shown
    return Turn(text, by_policy=True, written=tuple(written), calls=tuple(calls))


def _content_text(content: Any) -> str:
    """Text of a message's content: a string, a list of parts, nothing, or whatever else a data set may hold."""
    if content is None:
        return ""
    if isinstance(content, (list, tuple)):
        return "".join(map(_content_text, content))
    if isinstance(content, Mapping):
        return _content_text(content.get("text")) if (content.get("type") or "text") == "text" else ""
    return str(content)


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    return call["function"] if isinstance(call.get("function"), Mapping) else call


def _function_name(call: Any) -> str:
    return str(_function(call).get("name") or "") if isinstance(call, Mapping) else ""


def _call_text(call: Any) -> str:
    if not isinstance(call, Mapping):
        return str(call)
    call = _function(call)
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, default=str)
        except (TypeError, ValueError):  # keys that JSON does not know, circular references
            arguments = str(arguments)
    return f"{call.get('name') or ''}({arguments})"


def completion_to_text(completion: str | list[dict]) -> str:
    r"""
    The text of a completion that the policy wrote.

    Args:
        completion (`str` or `list[dict]`):
            Completion as TRL hands it to reward functions, see [`completion_turns`].

    Returns:
        `str`: The policy's turns, joined by a blank line. Tool results are left out, empty turns too.

    Example:

    ```python
    >>> completion_to_text([{"role": "assistant", "reasoning_content": "1 + 1 is 2.", "content": "2"}])
    '<think>\n1 + 1 is 2.\n</think>\n\n2'
    ```
    """
    return "\n\n".join(turn.text for turn in completion_turns(completion) if turn.by_policy and turn.text)


def judged_region(text: str, *, include_thinking: bool = False) -> Span:
    """
    Which part of a turn is cut into steps.

    Without thinking that is what follows the last `</think>`, or, if nothing does (a completion that ran out of
    tokens, say), the thinking itself. A `<think>` that the chat template put into the prompt may be missing.
    `<thinking>` is read the same way.

    Args:
        text (`str`):
            Text of the turn.
        include_thinking (`bool`, *optional*, defaults to `False`):
            Whether thinking is judged together with what follows it: the region is then the whole text, tags included.

    Returns:
        `tuple[int, int]`: Start and end of the region in characters.

    Example:

    ```python
    >>> judged_region("<think>Hm.</think>It is 4."), judged_region("<think>Hm.")
    ((18, 26), (7, 10))
    ```
    """
    whole = (0, len(text))
    first = _THINK_TAG.search(text)
    if include_thinking or first is None:
        return whole
    thoughts: list[Span] = []
    opened, closed = None, 0
    for tag in _THINK_TAG.finditer(text):
        if tag[1]:
            thoughts.append((closed if opened is None else opened, tag.start()))
            opened, closed = None, tag.end()
        elif opened is None:  # a tag that the thinking mentions opens nothing
            opened = tag.end()
    answer = (closed if opened is None or thoughts else opened, len(text))
    # What stands in front of the first tag comes last: it matters only if there is nothing else to judge.
    regions = [answer, *reversed(thoughts), (0, first.start())]
    return next((region for region in regions if text[slice(*region)].strip()), answer)


# ---------------------------------------------------------------------------------------------------------------------
# Completion -> steps
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CutCompletion:
    """
    A completion and its steps.

    Args:
        text (`str`):
            What the policy wrote, as [`completion_to_text`] returns it.
        spans (`tuple[tuple[int, int], ...]`):
            Spans of the steps in `text`, in order. Empty if there is nothing to judge, or the segmenter found no step.
        context (`dict[int, str]`):
            By index of a step: the text in front of it that the policy did not write (tool results).
        blank (`bool`):
            Whether there is nothing to judge: no text, or none but white space and the tags of thinking.
        turns (`tuple[tuple[int, Turn], ...]`):
            The policy's turns, empty ones too, each with the position in `text` at which it begins.
    """

    text: str
    spans: tuple[Span, ...]
    context: dict[int, str]
    blank: bool
    turns: tuple[tuple[int, Turn], ...] = field(default=(), repr=False, compare=False)

    @property
    def steps(self) -> tuple[str, ...]:
        """Texts of the steps."""
        return tuple(self.text[start:end] for start, end in self.spans)


def cut_completion(
    completion: str | list[dict], segmenter: Segmenter = segment, *, include_thinking: bool = False
) -> CutCompletion:
    r"""
    Cut what the policy wrote in a completion into steps.

    Each turn is cut on its own, so no step crosses a tool result, and limits of the segmenter hold for each turn.

    Args:
        completion (`str` or `list[dict]`):
            Completion as TRL hands it to reward functions, see [`completion_turns`].
        segmenter (`Callable[[str], Sequence[tuple[int, int]]]`, *optional*, defaults to [`segment`]):
            Function from a text to the spans of its steps. Called with the judged region of each turn.
        include_thinking (`bool`, *optional*, defaults to `False`):
            Whether thinking is cut too, see [`judged_region`].

    Returns:
        [`CutCompletion`]: Text, spans in it, and tool results by the step that follows them.

    Raises:
        `TypeError`, `ValueError`: If the completion or the spans of the segmenter have the wrong form.

    Example:

    ```python
    >>> cut = cut_completion("<think>Hm.</think>3 * 4 = 12.\n\n12 + 1 = 14.")
    >>> cut.spans, cut.steps
    (((18, 31), (31, 43)), ('3 * 4 = 12.\n\n', '12 + 1 = 14.'))
    ```
    """
    texts: list[str] = []
    spans: list[Span] = []
    context: dict[int, str] = {}
    turns: list[tuple[int, Turn]] = []
    offset, pending, blank = 0, [], True
    for turn in completion_turns(completion):
        if not turn.by_policy:
            pending.extend([turn.text] if turn.text.strip() else [])
            continue
        turns.append((offset, turn))
        if turn.text:
            start, end = judged_region(turn.text, include_thinking=include_thinking)
            region = turn.text[start:end]
            cut = check_spans(region, segmenter(region)) if region.strip() else []
            blank = blank and not region.strip()
            if cut and pending:
                context[len(spans)] = "\n\n".join(pending)
                pending = []
            spans.extend((offset + start + left, offset + start + right) for left, right in cut)
            texts.append(turn.text)
            offset += len(turn.text) + len("\n\n")
    return CutCompletion("\n\n".join(texts), tuple(spans), context, blank, tuple(turns))


# ---------------------------------------------------------------------------------------------------------------------
# First wrong step -> RTS
# ---------------------------------------------------------------------------------------------------------------------


def rts_by_steps(first_error: int, n_steps: int) -> float:
    """
    Reasoning trajectory score of [SGPO](https://huggingface.co/papers/2505.11595): steps before the first wrong one /
    all steps. It can be raised by writing more and smaller right steps, see [`rts_by_characters`].

    Args:
        first_error (`int`):
            Index of the first wrong step, from 0.
        n_steps (`int`):
            Number of steps. An empty completion, with 0 steps and `first_error=0`, scores 0.

    Returns:
        `float`: Score in [0, 1).

    Raises:
        `ValueError`: If there is no such step.

    Example:

    ```python
    >>> rts_by_steps(3, 5)  # five steps, the fourth is wrong
    0.6
    ```
    """
    if first_error == n_steps == 0:
        return 0.0
    _check_first_error(first_error, n_steps)
    return first_error / n_steps


def rts_by_characters(first_error: int, spans: Sequence[Span]) -> float:
    """
    Reasoning trajectory score ([SGPO](https://huggingface.co/papers/2505.11595)) in characters: those of the steps
    before the first wrong one / those of all steps. Splitting a step in two does not raise it.

    Args:
        first_error (`int`):
            Index of the first wrong step, from 0.
        spans (`Sequence[tuple[int, int]]`):
            Spans of all steps. An empty completion, with no steps and `first_error=0`, scores 0.

    Returns:
        `float`: Score in [0, 1).

    Raises:
        `ValueError`: If there is no such step.

    Example:

    ```python
    >>> rts_by_characters(1, [(0, 30), (30, 40)])  # two steps, the second and shorter one is wrong
    0.75
    ```
    """
    if first_error == len(spans) == 0:
        return 0.0
    _check_first_error(first_error, len(spans))
    lengths = [end - start for start, end in spans]
    return sum(lengths[:first_error]) / sum(lengths)


def _check_first_error(first_error: int, n_steps: int) -> None:
    if not 0 <= first_error < n_steps:
        raise ValueError(
            f"`first_error` is {first_error}, but there are {n_steps} steps: pass the index of the first wrong step, "
            "counted from 0. A completion without a wrong step has no RTS: decide on it before calling this."
        )
