"""
From a text to its steps: the default segmenter, and the check of any other one. The segmenter knows the forms in which
models write solutions, not what they say: no model, no tokenizer, no language detection (`Step`, `Answer` and the
abbreviations are the English ones). A *cut* is a position where a new step may begin. All patterns are anchored or
bounded, or use possessive quantifiers (`++`), so no pattern can backtrack over more than a few characters.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from operator import index


Span = tuple[int, int]
Segmenter = Callable[[str], Sequence[Span]]

_CONTENT = re.compile(r"[^\W_]")
_VISIBLE = re.compile(r"\S")
_LINE = re.compile(r"^[^\S\n]*+\S", re.MULTILINE)
_BLANK_LINE = re.compile(r"\n[^\S\n]*+\n")

# A line that opens or closes a code fence, the escapes `\\` and `\$`, the delimiters of display maths, environments.
# The escapes are read first, so that `\\[2pt]` opens nothing. Group 2 is the rest of a fence line.
_BLOCK_MARK = re.compile(
    r"^[ \t]*+(`{3,}+|~{3,}+)([^\n]*+)|(?:\\[\\$])++|\$\$|\\[\[\]]|\\(begin|end)\{([A-Za-z]{1,30}\*?)\}", re.MULTILINE
)
_TABLE_RULE = re.compile(r"^[ \t\r:|]*+-[ \t\r:|-]*+$", re.MULTILINE)
# These environments hold whole solutions. If they were protected, a solution in LaTeX would be a single step.
_PROSE_ENVIRONMENTS = frozenset({"document", "proof", "solution"})
_LIST = r"\{(?:enumerate|itemize|description)\*?\}"
_LIST_BEGINS = re.compile(r"\\begin" + _LIST)
_LIST_MARK = re.compile(rf"\\(?:(begin|end){_LIST}|item(?![A-Za-z]))")

# `<reasoning>`, `</step>`, `<step id="2">`, `<|im_end|>`, `[/THINK]`, `\end{proof}`. A comma makes it a vector: `<a, b>`.
_TAG = re.compile(
    r"</?[|｜]?[A-Za-z_][\w.:-]{0,40}(?:[ ][^<>,\n]{0,60})?[|｜/]?>|\[/?[A-Z][A-Z_]{3,30}\]"
    r"|\\(?:begin|end)\{[A-Za-z]{1,30}\*?\}(?:\[[^\]\n]{0,60}\])?"
)
# Those that close something, or stand between two things: they belong to what is before them.
_CLOSING_TAG = re.compile(
    r"[<\[]/|\\end|<[^>]*/>|<[|｜]?(?:[A-Za-z]{1,20}[_▁])?(?:end|eo[dst]|return|pad|br|hr)(?![a-df-np-z])",
    re.IGNORECASE,
)
_LONGEST_TAGS = 200
_STEP_TAG = re.compile(r"(?:^|(?<=>))[ \t]{0,8}+<step(?=[\s_>\d-])[^<>\n]{0,60}>", re.MULTILINE | re.IGNORECASE)

# `### Step 3: ...`, `**Step 3** ...`, `3. ...`, `**3)** ...`, `## Title`. An undecorated `Step 3` is a head if a stop
# follows it ("Step 3: add"), else a mention ("Step 3 shows").
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
# If the number jumps by more than this, it is not the next head. It is a year or a result at the start of a line.
_LARGEST_JUMP = 10
# Most candidates of each kind (heads, lines, sentences, marks of blocks). The text after the last of them is cut by
# size alone. No solution has so many, but a text that is made to be slow has a million.
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
_TAGGED_ANSWER = re.compile(
    r"(?:</[\w-]{1,40}>\s{0,3})?<((?:final[ _-]?)?(?:answer|result|solution))>[^<>]*+(?:</\1>)?(?:\s*+</?[^<>\s]{1,40}+>)*+\s*+\Z",
    re.IGNORECASE,
)
# What a solution says before it counts from 1 again
_STARTS_OVER = re.compile(
    r"\b(?:start(?:ing)?\s(?:over|again|afresh|anew)|from\sscratch|scratch\sthat|restart|wait|mistake"
    r"|re-?(?:do|try|work|check|consider|calculate|compute|examine)|try(?:ing)?\s(?:again|another)"
    r"|(?:second|new|next|another|different)\s(?:attempt|try|approach|method|way)|alternative(?:ly)?)\b",
    re.IGNORECASE,
)
_DISPLAYS = ("$$", r"\[", r"\begin{")
_LONGEST_HEADING = 200
_LONGEST_ANSWER = 160
_LONGEST_RETURN = 300  # from the words that say that a solution starts over to its first step

_SENTENCE_END = re.compile(r"""[.!?][)\]}"'*_$\\”’»]{0,6}+\s++|[。！？][）」』”’]{0,3}+\s*+""")
# No sentence begins with one of these: the mark before it is a decimal point, a factorial or an ellipsis.
_CONTINUATIONS = frozenset(",;:.!?)]}=+<>/%&|^")
_ABBREVIATION = re.compile(r"\b(?:approx|cf|dr|etc|jr|mr|mrs|ms|prof|resp|sr|st|viz|vs)$", re.IGNORECASE)
_ABBREVIATION_OF_NUMBER = re.compile(r"\b(?:ch|chap|eqn?s?|ex|figs?|nos?|pp?|prop|ref|sec|thm|vol)$", re.IGNORECASE)
_INITIALS = re.compile(r"(?<![A-Za-z])(?:[A-Za-z]\.)++[A-Za-z]$")  # e.g, i.e, a.m, U.S
_ITEM_MARK = re.compile(r"(?:^|\n)\W{0,4}(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})$")
_LOOK_BEHIND = 12  # longer than every abbreviation and item mark


def segment(text: str, *, max_steps: int = 64, max_step_chars: int = 4000) -> list[Span]:
    r"""
    Cuts a text into steps. The default [`Segmenter`].

    Four kinds of cuts are tried in this order, and the first kind that gives at least two steps is used: explicit
    heads (`<step>`, `Step 1:`, `1.`, `1)`, `## Title`, the items of a list in LaTeX), blank lines, lines, sentences.
    Heads count if at least two rise in order. `Step 2:` after `Step 3:` is a new step, because solutions go back; `1.`
    after `3.` is one if the text before it says that the solution starts over. The text before the first head is a
    step too. A list of few items among many paragraphs is not a set of heads: it belongs to the step that holds it.
    Then these rules apply:

    - Code fences, display maths (`$$..$$`, `\[..\]`), environments (`\begin{x}..\end{x}`) and pipe tables are never
      cut. The environments of prose (`proof`, `solution`, `document`) may be cut. An unclosed fence reaches to the end
      of the text, as in CommonMark. Unclosed maths protects nothing. `$$..$$` holds no blank line, as in TeX, so that
      a single `$$` does not turn the rest of the text into maths.
    - A piece without a letter or digit (`---`) joins the step before it. A bare tag does the same (`</reasoning>`,
      `<|im_end|>`), but a tag that opens something (`<reasoning>`, `\begin{proof}`) joins what follows.
    - A bare final answer at the end joins the step before it (`#### 42`, `\boxed{42}`, `The answer is 42.`,
      `<answer>42</answer>`).
    - A heading alone, or a piece that ends in a colon or comma ("so we have:"), joins what it announces. A piece that
      ends in a word joins the display that continues it.
    - Steps longer than `max_step_chars` are cut at a line, else a sentence, else a space, else anywhere. Then the
      shortest neighbours are merged until `max_steps` are left, even if the merged steps are longer.

    Args:
        max_steps (`int`, *optional*, defaults to `64`):
            Largest number of steps. It has priority over `max_step_chars`.
        max_step_chars (`int`, *optional*, defaults to `4000`):
            Largest number of characters of a step, without the white space around it. A longer protected block stays
            whole.

    Returns:
        `list[tuple[int, int]]`: Spans `(start, end)` of the steps in order. They tile the text:
        `"".join(text[start:end] ...) == text`. Empty for the empty text.

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
    """The kinds of cuts, from the most explicit to the finest. A generator: most texts need the first few only."""
    lines = _line_cuts(text)
    # A line follows a blank one if the line above it does not end directly before it.
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
        if fence is not None:  # inside a fence only its end counts
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
            opened["["] = [mark.start()]  # TeX does not nest these: an earlier one was never closed
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
    """
    Where explicit heads begin, if two or more rise in order: `<step>`, else `Step k`, else `k.` or `k)`, else headings
    alone, else the items of lists in LaTeX.
    """
    tags = _outside([tag.start() for tag in islice(_STEP_TAG.finditer(text), _MOST_CANDIDATES)], blocks)
    if len(tags) > 1:
        return tags
    found = {head.start(): head for head in islice(_HEAD.finditer(text), _MOST_CANDIDATES)}
    heads = [found[cut] for cut in _outside(list(found), blocks)]
    # "Step 3: add" and "**Step 3** Add" are heads; "Step 3 shows" is a mention.
    heads = [head for head in heads if not head["step"] or head["hashes"] or head["look"] or head["stop"] is not None]
    if cuts := _rising_cuts(heads, "step"):
        return cuts
    cuts = _rising_cuts(heads, "number")
    # A few items among many paragraphs ("the equations are 1. .. 2. ..") are a list inside a step.
    if 2 * len(cuts) > n_paragraphs:
        return cuts
    headings = [head.start() for head in heads if head["hashes"]]
    if len(headings) > 1:
        return headings
    items, ends = _item_cuts(text, blocks)
    return sorted([*items, *ends]) if len(items) > 1 and 2 * len(items) > n_paragraphs else []


def _item_cuts(text: str, blocks: list[Span]) -> tuple[list[int], list[int]]:
    """Where the items of LaTeX lists begin, and where what follows a list does. A list inside an item is part of it."""
    items, ends, depth = [], [], 0
    for mark in islice(_LIST_MARK.finditer(text), _MOST_CANDIDATES):
        block = bisect_right(blocks, mark.start(), key=lambda span: span[0]) - 1
        if block >= 0 and mark.end() <= blocks[block][1] and not _LIST_BEGINS.match(text, blocks[block][0]):
            continue  # in a code fence
        if mark[1] == "begin":
            depth += 1
        elif mark[1] == "end":
            depth = max(depth - 1, 0)
            follower = _skip_space(text, mark.end())
            if depth == 0 and follower < len(text):
                ends.append(follower)
        elif depth == 1:
            items.append(mark.start())
    return items, ends


def _rising_cuts(heads: list[re.Match[str]], kind: str) -> list[int]:
    """
    Cuts at the heads of one kind whose numbers rise, and at the headings between them. Empty if no two rise. A number
    may also go back: a solution corrects a step, or starts over.
    """
    first = next((head for head in heads if head[kind]), None)
    if first is None:
        return []
    deepest = len(first["hashes"] or "") or 6  # `#### Check` below `### Step 2` is a part of that step
    cuts, last, rises, new_part = [], -1, False, False
    for before, head in zip([None, *heads], heads, strict=False):
        number = int(head[kind] or -1)
        if kind == "number" and (
            any(head[part] != first[part] for part in ("hashes", "look", "dot"))
            or len(head["indent"]) > len(first["indent"])
        ):
            number = -1  # an item that looks different or is indented deeper belongs to a list inside an item
        goes_back = 0 <= number <= last and (
            all(head[part] == first[part] for part in ("indent", "hashes", "look"))
            if kind == "step"
            else number <= 1 and _starts_over(before, head)
        )
        if last < number <= last + _LARGEST_JUMP or (new_part and number == 1) or goes_back:
            rises = rises or 0 <= last < number
            last, new_part = number, False
            cuts.append(head.start())
        elif 0 < len(head["hashes"] or "") <= deepest:
            new_part = True  # where counting may begin again
            cuts.append(head.start())
    return cuts if rises else []


def _starts_over(before: re.Match[str] | None, head: re.Match[str]) -> bool:
    """Whether the text between two heads says that the solution starts over."""
    start = max(before.end() if before else 0, head.start() - _LONGEST_RETURN)
    return _STARTS_OVER.search(head.string, start, head.start()) is not None


def _line_cuts(text: str) -> list[int]:
    """Starts of the lines that are not blank."""
    return [line.start() for line in islice(_LINE.finditer(text), _MOST_CANDIDATES)]


def _sentence_cuts(text: str) -> list[int]:
    """Starts of the sentences, without the first."""
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
    """Whether the dot after `before` ends an ellipsis, the mark of a list item or an abbreviation, not a sentence."""
    if before.rstrip().endswith(".") or _ITEM_MARK.search(before) or _INITIALS.search(before):
        return True
    if (follower.isdigit() or follower in "([\\$#") and _ABBREVIATION_OF_NUMBER.search(before):
        return True
    return _ABBREVIATION.search(before) is not None


def _join(text: str, cuts: list[int]) -> list[int]:
    """Starts of the pieces after crumbs, headings, lead-ins and final answers have joined a neighbour."""
    starts = [0]
    # When the open piece takes the next one. "heading" (also: no content yet): always. "lead-in": if the next piece
    # has no number of its own ("Step by step:" before "1."). "word" (it ends in a word): if the next piece is display
    # maths.
    state = "heading"
    for start, end in pairwise([0, *cuts, len(text)]):
        piece = text[start:end].strip()
        if not _CONTENT.search(piece):
            continue
        if _is_tags(piece):
            if state in ("finished", "word") and not _CLOSING_TAG.match(piece):
                starts.append(start)
                state = "heading"
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
    tagged = _TAGGED_ANSWER.search(text, max(end - 2 * _LONGEST_ANSWER, 0))
    if tagged and len(tagged[0]) <= _LONGEST_ANSWER and text[: tagged.start()].strip():
        end = tagged.start()
        del starts[max(bisect_left(starts, end), 1) :]
    while len(starts) > 1 and _is_answer(text[starts[-1] : end]):
        end = starts.pop()
    return starts


def _is_tags(piece: str) -> bool:
    """Whether a piece holds tags and nothing else."""
    return len(piece) <= _LONGEST_TAGS and not _CONTENT.search(_TAG.sub("", piece))


def _is_numbered(text: str, start: int) -> bool:
    head = _HEAD.match(text, start)
    return head is not None and bool(head["step"] or head["number"])


def _is_answer(piece: str) -> bool:
    piece = piece.strip()
    return len(piece) <= _LONGEST_ANSWER and _ANSWER.fullmatch(piece) is not None


def _limit_size(text: str, starts: list[int], blocks: list[Span], limit: int) -> list[int]:
    """Cut pieces of more than `limit` characters at the last line that begins in time, else sentence, else word."""
    if all(len(text[start:end].strip()) <= limit for start, end in pairwise([*starts, len(text)])):
        return starts
    finer = (_outside(_line_cuts(text), blocks), _outside(_sentence_cuts(text), blocks))
    limited = []
    for start, end in pairwise([*starts, len(text)]):
        limited.append(start)
        stop = start + len(text[start:end].rstrip())
        start = _skip_space(text, start)
        while stop - start > limit:
            latest = _skip_space(text, start + limit)  # the space after a piece is not counted
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
    """Merge neighbours until `max_steps` pieces are left, so that the longest piece is as short as possible."""
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

    # A larger size never gives more pieces, so bisection finds the smallest size that is enough.
    return merge(bisect_left(range(length), True, key=lambda size: len(merge(size)) <= max_steps))


def check_spans(text: str, spans: Sequence[Span], *, name: str = "segmenter") -> list[Span]:
    """
    Checks the spans that a user's segmenter returned for a text, and returns them as tuples of plain integers. Gaps
    between them are allowed. `name` is the argument that held the segmenter, for the messages.

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
    last = 0
    for number, span in enumerate(spans):
        try:
            first, second = span
            start, end = index(first), index(second)
            is_pair = bool not in (type(first), type(second))
        except (TypeError, ValueError):
            is_pair = False
        if not is_pair:
            raise TypeError(f"`{name}` returned {span!r:.200} as span {number}, which is not two integers. {remedy}")
        if not last <= start < end <= len(text):
            if not 0 <= start < end <= len(text):
                reason = "it is empty or reversed" if 0 <= end <= start <= len(text) else "it reaches outside the text"
                where = f"of a text of {len(text)} characters, but {reason}"
            else:
                where = f"after {checked[-1]}, but steps neither overlap nor go back"
            raise ValueError(f"`{name}` returned {(start, end)} as span {number} {where}. {remedy}")
        checked.append((start, end))
        last = end
    return checked
