"""The links of the chains `a = b = c` in one step: where their sides begin and end, and whether they agree."""

from fractions import Fraction
from itertools import takewhile

from trl_sgpo.judges.arithmetic.expression import MAX_TOKENS, MAX_UNIT_WORDS, ZERO, Memory, Reader
from trl_sgpo.judges.arithmetic.tokens import CONNECTORS, END, SCALES, TAKES_PART, UNITS, Token, stem, tokenize, vocab


_FACTORS = {3, 4, 7, 8, 10, 12, 16, 24, 30, 36, 52, 60, 100, 365, 1000, 1440, 1760, 2000, 3600, 5280}
_TOTALS = vocab("sum total result value cost equation product difference")
_ARTICLES = vocab("the a an these those all that first remaining other")
# Around a link these say that it is not meant as an equality of numbers
_DOUBT = vocab(
    "mod modulo remainder rem r base not false contradiction impossible incorrect wrong incorrectly contradicts mistake "
    "isn't doesn't unequal binary octal hexadecimal rounded rounding equiv pmod bmod ne neq ≡ ≠"
)


def check_step(text: str, memory: Memory) -> str:
    """The first link of a step that does not hold, in words; empty if there is none."""
    text = text.replace("{,}", ",").replace(",\\!", ",")
    tokens, marks = tokenize(text)
    for mark in marks:
        wrong = _check_tokens(mark, tokenize(mark)[0], memory)
        if wrong:
            return wrong
    return _check_tokens(text, tokens, memory)


def _check_tokens(text: str, tokens: list[Token], memory: Memory) -> str:
    cuts = [-1]  # the places where one side ends and the next begins
    for i, token in enumerate(tokens):
        if token.kind in "=~bs":
            cuts.append(i)
        elif token.kind == "v" and token.text in "xX":
            follow = tokens[i + 1] if i + 1 < len(tokens) else END
            product = i and tokens[i - 1].kind in "n)" and (follow.kind in ("n", "(") or follow.text == "-")
            memory.x_is_unknown |= not product
    cuts.append(len(tokens))
    listed = False
    right: Reader | None = None
    name = ""
    said: tuple[list[str], Reader] | None = None  # "Total = 3 + 4", which a next "Total = 8" contradicts
    for before, here, after in zip(cuts, cuts[1:], cuts[2:], strict=False):
        kind = tokens[here].kind
        if kind not in "=~":
            name = ""
            # "(3 - 2), (5 - 2) = 1, 3"
            listed = tokens[here].text == "," and here > 0 and tokens[here - 1].kind in "n)" and right is None
            right = None
            continue
        first = before < 0 or tokens[before].kind not in "=~"
        if first:
            name = _defined_name(tokens, before + 1, here)
            memory.names.pop(name, None)
        if not first and right is not None and right.end == here:
            plain = not (right.named or right.words)
            left = right if right.operations or plain else None
        else:
            left = None if first and (name or listed) else _read_left(tokens, before, here, memory)
        right = _read_right(tokens, here + 1, after, memory)
        if right is None:
            memory.names.pop(name, None)
            name = ""
        elif name:
            last = after == len(tokens) or tokens[after].kind not in "=~"
            if last and not first and right.literal is not None and right.literal.decimals == 0:
                memory.names[name] = right.number.value
        subject = [token.text for token in tokens[before + 1 : here]] if first and here - before < 16 else []
        if right is not None and tokens[here - 1].kind == "w" and subject:
            if left is None and said is not None and said[0] == subject and not right.operations:
                left = said[1]
            said = (subject, right) if right.operations else None
        else:
            said = None
        if left is None or right is None:
            continue
        if first and not left.operations and not right.operations:
            continue  # "0 = 5" is how a contradiction or a failed trial is written
        holds = _holds(text, left, right, kind == "~", memory)
        if holds is None or (not holds and _doubtful(tokens, left.start, right.end)):
            continue
        memory.checked += 1
        if not holds:
            return _reason(text, left, right)
    return ""


def _defined_name(tokens: list[Token], start: int, stop: int) -> str:
    """The capital letter that an equality sets, if its first side is that alone, perhaps after some words."""
    if start == stop or tokens[stop - 1].kind != "v" or not tokens[stop - 1].text.isupper():
        return ""
    return tokens[stop - 1].text if stop - 2 < start or tokens[stop - 2].kind == "w" else ""


def _read_left(tokens: list[Token], before: int, stop: int, memory: Memory) -> Reader | None:
    """The longest expression that ends at token `stop`."""
    start = stop
    depth = 0
    while start - 1 > before and stop - start <= MAX_TOKENS:
        kind, word = tokens[start - 1][:2]
        follow = tokens[start]
        if kind == ")":
            depth += 1
        elif kind == "(":
            if not depth:
                break
            depth -= 1
        elif kind == "u" or (kind == "v" and word not in "xX" and word not in memory.names):
            break
        elif kind == "w" and not depth and start < stop and not (word == "of" and tokens[start - 2].text == "%"):
            # A word before an operand ends the expression, a word before an operator is a unit
            remark = follow.kind == "(" and tokens[start + 1].kind == "w"
            touching = (
                follow.text == "-" and tokens[start + 1].start == follow.end and follow.start > tokens[start - 1].end
            )
            if (follow.kind in "nfv(" and not remark) or (touching and word.lower() in CONNECTORS):
                break
        start -= 1
    if depth or start == stop:
        return None
    first, previous = tokens[start], tokens[start - 1] if start else END
    if first.kind == "o" and (first.text != "-" or tokens[start + 1].start > first.end):
        return None  # "price - 5 + 3"
    if start - 1 > before:
        if previous.kind == "w":
            if previous.end == first.start or not _free_standing(tokens, start - 1, before):
                return None
        elif previous.kind != "(" or (
            start > 1 and (tokens[start - 2].kind in "fuov" or tokens[start - 2].end == previous.start)
        ):
            return None
    elif previous.kind == "s" and (
        (first.kind == "o" and previous.text != "\n") or (start > 1 and tokens[start - 2].kind == "o")
    ):
        return None  # the line before belongs to it
    elif previous.text == "," and start > 1 and tokens[start - 2].kind == "n" and len(first.text) == 3:
        return None  # 14, 400
    side = Reader(tokens, start, stop, memory).read()
    if side is None or side.end != stop:
        return None
    if not side.operations and (previous.kind == "w" or side.named or side.words or side.percent):
        return None  # "3 apples = 2 * 3 = 6 dollars" says what they cost
    if len(tokens[start:stop]) == 3 and side.number.value < 0:
        side.uncertain |= previous.kind == "w" and first.end == tokens[start + 1].start  # pages 10-20
    return side


def _free_standing(tokens: list[Token], i: int, before: int) -> bool:
    """Whether the words that end at `i`, right before an expression, leave it alone."""
    word = tokens[i].text.lower()
    behind = tokens[i - 1].text.lower() if i - 1 > before else ""
    if word in TAKES_PART and not (word == "of" and behind in _TOTALS):
        return False
    if word in _ARTICLES and behind in TAKES_PART:
        return False
    for _ in range(MAX_UNIT_WORDS + 1):
        if i <= before or tokens[i].text.lower() in CONNECTORS:
            return True
        if tokens[i].kind != "w":
            return tokens[i].kind not in ("n", ")")  # 2 hours and 30 + 5
        i -= 1
    return True


def _read_right(tokens: list[Token], start: int, stop: int, memory: Memory) -> Reader | None:
    """The longest expression that begins at token `start`."""
    if start == stop:
        return None
    side = Reader(tokens, start, min(stop, start + MAX_TOKENS), memory).read()
    if side is None:
        return None
    end = side.end
    if end == stop:
        ahead = tokens[end : end + 2]
        goes_on = len(ahead) == 2 and ahead[0].kind == "s" and ahead[1].kind == "o" and ahead[1].text in "+*/"
        return None if goes_on else side
    if tokens[end].kind == ")":
        return side
    if tokens[end].kind != "w":
        return None
    words: list[str] = []
    while end < stop and len(words) < 10 and tokens[end].kind == "w":
        words.append(tokens[end].text.lower())
        end += 1
    if words[0] in TAKES_PART or (len(words) > 1 and words[0] not in CONNECTORS and words[1] in SCALES):
        return None
    if CONNECTORS.isdisjoint(words) and end < stop and tokens[end].kind in "on":
        return None  # 3 hours 30 minutes, 1 and 1/3
    side.words += map(stem, takewhile(lambda word: word not in CONNECTORS and word != "and", words))
    return side


def _doubtful(tokens: list[Token], start: int, end: int) -> bool:
    """Whether the sentence says that the link is not meant as an equality of plain numbers."""
    if any(token.text.lower() in _DOUBT for token in tokens[start:end]):
        return True
    for nearby, question in ((tokens[end : end + 12], True), (tokens[max(start - 12, 0) : start][::-1], False)):
        for token in nearby:
            if token.text == "?":
                return question
            if token.text in (".", ";"):
                break
            if token.text.lower().lstrip("\\") in _DOUBT:
                return True
    return False


def _holds(text: str, left: Reader, right: Reader, approximate: bool, memory: Memory) -> bool | None:
    """Whether the two sides agree; `None` if they do not but might be meant to."""
    if _agree(left, right, approximate, memory):
        return True
    if left.uncertain or right.uncertain or left.number.value in right.prefixes:
        return None  # "3 * 4 = 12 + 5 = 17" goes on calculating with the result
    if _other_units(text[left.tokens[left.start].start : right.tokens[right.end - 1].end], left, right):
        return None
    other = left.again(european=True), right.again(european=True)
    if other[0] and other[1] and _agree(other[0], other[1], approximate, memory):
        return None  # 1.000 - 1 = 999
    previous = left.tokens[left.start - 1] if left.start else END
    if previous.kind == "b" and previous.text == "-":
        negated = left.again(negate=True)
        if negated and _agree(negated, right, approximate, memory):
            return None  # "- 5 + 3 = -2" may be no item of a list
    return False


def _other_units(text: str, left: Reader, right: Reader) -> bool:
    """Whether the sides may be in different units."""
    cancelled = {*left.rates} & {*left.units} | {*right.rates} & {*right.units}
    units = {*left.units, *left.rates} - cancelled
    words = {*left.words, *right.words}
    if (
        len(units) > 1
        or {*left.rates, *right.rates} - cancelled
        or (units and right.words and units.isdisjoint(right.words))
        or (right.operations and len({*right.units} - cancelled) > 1)
        or ("$" in text and not words.isdisjoint(("cent", "penny", "pennie", "nickel", "dime", "quarter")))
        or len(convertible := (words & UNITS) - cancelled) > 1
    ):
        return True
    small, large = sorted((abs(left.number.value), abs(right.number.value)))
    factor = Fraction(large) / small if small else ZERO
    return (bool(convertible) and factor in _FACTORS) or ("$" in text and factor == 100)


def _agree(left: Reader, right: Reader, approximate: bool, memory: Memory) -> bool:
    a, b = left.number, right.number
    percent = left.percent or right.percent
    slack = a.slack + b.slack
    if approximate:
        slack += Fraction(abs(a.value)) / 200  # who writes "about" does not claim the last digit
    if abs(a.value - b.value) <= slack or (percent and (a.value * 100 == b.value or a.value == b.value * 100)):
        return True
    literal = right.literal or left.literal
    if literal is None:
        # 1/3 * 30 = 0.33 * 30: the fractions of the second side may be rounded
        return (approximate or right.coarse) and 100 * abs(a.value - b.value) <= abs(a.value)
    exact, written = (b.value, a.value) if right.literal is None else (a.value, b.value)
    shown = literal.value if written >= 0 else -literal.value
    for scale in (1, 100) if percent else (1,):
        target = exact * scale
        unit = Fraction(1, 10**literal.decimals)
        if approximate and not literal.decimals:
            value = literal.value
            while value and value % 10 == 0:
                value = Fraction(value) / 10
                unit = unit * 10
        gap = abs(target - shown)
        if not literal.decimals and not slack and not approximate and gap * 10 > abs(target):
            continue  # 7 / 2 = 3 is no rounding
        truncated = abs(shown) <= abs(target) or approximate
        if gap <= unit / 2 + slack * scale or (truncated and gap < unit + slack * scale):
            memory.rounded.add(literal.value)
            return True
    return False


def _reason(text: str, left: Reader, right: Reader) -> str:
    """The wrong link and what its left side comes to."""
    tokens = left.tokens
    ends = [(left.start, right.end)]
    if any(token.kind in "bs" for token in tokens[left.end : right.start]):  # they stand in different sentences
        ends = [(left.start, left.end), (right.start, right.end)]
    pieces = [text[tokens[a].start : tokens[b - 1].end][:200] for a, b in ends]
    written = " ".join(" = ".join(pieces).split())
    value = left.number.value
    shown = str(value) if value.denominator == 1 or abs(value) >= 10**15 else f"{float(value):.6g}"
    return f"{written} (is {shown[:60]})"
