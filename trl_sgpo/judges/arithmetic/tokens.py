"""From the text of a step to numbers, operators, words and ends of sentences."""

import re
from fractions import Fraction
from typing import NamedTuple, cast


MAX_DIGITS = 30


class Number(NamedTuple):
    """A number as it was written. A whole one is an `int`: it is faster, and has all that is used of a `Fraction`."""

    value: Fraction
    decimals: int = 0


_SWAPPED = str.maketrans(",.", ".,")


def read_number(text: str, european: bool = False) -> Number | None:
    """The number that digits, points and commas mean, or `None`. `european` reads `1.234,5` instead of `1,234.5`."""
    if len(text) > MAX_DIGITS + MAX_DIGITS // 3:
        return None
    whole, point, decimals = (text.translate(_SWAPPED) if european else text).partition(".")
    first, *groups = whole.split(",")
    if groups and (not 1 <= len(first) <= 3 or first[0] == "0" or any(len(group) != 3 for group in groups)):
        return None  # a list such as 1,2,3
    if (len(first) > 1 and first[0] == "0") or (point and not decimals.isdecimal()):
        return None  # a time such as 0930, a version such as 1.2.3
    value = int(first + "".join(groups) + decimals)
    return Number(Fraction(value, 10 ** len(decimals)) if decimals else cast(Fraction, value), len(decimals))


class Token(NamedTuple):
    # "n" number, "o" operator, "(" and ")", "=" equality, "~" approximation, "w" word, "v" letter, "f" fraction,
    # "s" end of a line, "b" another break, "u" anything else, "" the end
    kind: str
    text: str
    start: int
    end: int


END = Token("", "", 0, 0)
_SCAN = re.compile(
    r"""
    (?P<n>[0-9]++(?:[.,][0-9]++)*+|\.[0-9]++)
    |(?P<prose>(?:[A-Za-z]{2,}+[ ])++)
    |(?P<w>[^\W\d_]++(?:['’-][^\W\d_]++)*+)
    |(?P<silent>\^(?:\\circ(?![A-Za-z])|\{\\circ\})|\\(?:[,;:! $()]|(?:left|right|big|Big|bigg|Bigg|
        boxed|fbox|mathbf|textbf|displaystyle)(?![A-Za-z])))
    |(?P<plain>[(){}\[\]+/^%-](?!=)|=(?![=><~])|\*(?![*=]))
    |(?P<s>\n|\$\$|&|\\[\\\[\]])
    |(?P<environment>\\(?:begin|end)[ ]?\{(?P<name>[^{}\n]{0,40}+)\})
    |(?P<text>\\(?:text|textrm|mathrm|mbox)[ ]?\{(?P<inner>[^{}]{0,200}+)\})
    |(?P<command>\\(?:[A-Za-z]++|%))
    |(?P<mark><<(?P<inside>[^<>\n]{0,200}+)>>)
    |(?P<b>[<>!:+*/-]=|=[=><~]|[:,;.?<>≤≥≠→⇒∴—](?!\.))
    |(?P<stars>\*\*)
    |(?P<other>[^ \t\r\f\v\u00a0\u2009\u202f\u200b$€£¥°`"“”])
    """,
    re.VERBOSE | re.DOTALL,
)
_OTHER = {sign: ("o", sign) for sign in "+-*/^%"} | dict.fromkeys("×·⋅∗✕✖", ("o", "*"))
_OTHER |= {"−": ("o", "-"), "÷": ("o", "/"), "⁄": ("o", "/"), "=": ("=", "="), "≈": ("~", "~")}
_OTHER |= dict.fromkeys("([{", ("(", "(")) | dict.fromkeys(")]}", (")", ")"))
_COMMANDS = {"times": ("o", "*"), "cdot": ("o", "*"), "ast": ("o", "*"), "div": ("o", "/"), "%": ("o", "%")}
_COMMANDS |= dict.fromkeys(("frac", "dfrac", "tfrac", "cfrac"), ("f", "frac")) | {"approx": ("~", "~")}
_COMMANDS |= dict.fromkeys(("quad", "qquad", "Rightarrow", "implies", "rightarrow", "to", "therefore"), ("b", ""))

_ENVIRONMENTS = ("align", "equation", "gather", "split", "multline", "eqnarray", "document", "center")


def vocab(words: str) -> frozenset[str]:
    return frozenset(words.split())


# With two of these in a link, or with one and sides that differ by a factor, the numbers need not agree
UNITS = vocab(
    "second sec minute min hour hr h day week weekday weekend month year decade century mm cm dm km nm m inch inche foot "
    "feet ft yard yd mile mi meter metre centimeter centimetre millimeter millimetre kilometer kilometre mg kg g gram "
    "kilogram milligram pound lb ounce oz ton tonne ml cl liter litre milliliter millilitre cup pint quart gallon "
    "teaspoon tablespoon tsp tbsp dollar cent penny pennie nickel dime quarter buck usd"
)
_ATTACHED = UNITS | vocab("lbs hrs mins mph kph")
# These end what stands before them
CONNECTORS = vocab(
    "or is are was were be so then thus hence therefore which that this because since when where if but as we she he they "
    "it i you gives equals equal makes leaves has have get gets calculate"
)
# A number before one of these is only a part of what it says
SCALES = vocab(
    "dozen dozens hundred hundreds thousand thousands million millions billion billions trillion pair pairs"
)
# Right before or after an expression these take part in the calculation
TAKES_PART = SCALES | vocab(
    "of to from by with than between times plus minus twice thrice half double triple quarter third negative mod modulo "
    "log ln sin cos tan sec csc cot arcsin arccos arctan sqrt root gcd lcm max min floor ceil ceiling abs det exp choose "
    "remainder average mean median base square squared cube cubed on least or more less percent divided multiplied"
)


def tokenize(text: str) -> tuple[list[Token], list[str]]:
    """The tokens of a step, and the contents of its `<<...>>` marks."""
    tokens: list[Token] = []
    marks: list[str] = []
    last = END
    unknown = ""  # the unknown environment that is open, such as a matrix
    for match in _SCAN.finditer(text):
        kind = match.lastgroup
        word = match.group()
        start, end = match.span()
        if kind == "prose":
            for part in word[:-1].split(" "):  # the most frequent case by far
                end = start + len(part)
                kind = "w"
                if unknown or (last.end == start and last.kind):
                    kind = "u" if unknown else _word_kind(text, part, end, last)
                last = Token(kind, part, start, end)
                tokens.append(last)
                start = end + 1
            continue
        if kind == "w":
            if len(word) == 1 or last.end == start or text[end : end + 1] != " " or "-" in word or not word.isascii():
                kind = _word_kind(text, word, end, last if last.end == start else END)
        elif kind == "n":
            kind = "u" if last.end == start and last.kind in ("v", "w", "u") else "n"
        elif kind == "silent":
            continue
        elif kind in ("plain", "other"):
            kind, word = _OTHER.get(word, ("u", word))
            if word in ("-", "*") and text[end : end + 1] == " " and last.kind in ("", "s"):
                kind = "b"  # an item of a list
        elif kind == "b":
            if (word == ":" and _in_ratio(text, start)) or (
                word == "." and text[end : end + 1] == "\\" and last.kind == "n"
            ):
                kind = "u"  # 12:30, 0.\overline{3}
        elif kind == "environment":
            kind = "s" if match["name"].startswith(_ENVIRONMENTS) else "u"
            if kind == "u":
                unknown = match["name"] if word[1] == "b" else ""
        elif kind == "command":
            kind, word = _COMMANDS.get(word[1:], ("u", word))
        elif kind == "mark":
            marks.append(match["inside"])
            continue
        elif kind == "stars":
            before, after = text[start - 1 : start], text[end : end + 2]
            if last.kind not in ("n", ")") or (before == " ") != (after[:1] == " ") or not after.strip()[:1].isdigit():
                continue  # bold
            kind, word = "o", "^"
        elif kind == "text":
            for part in match["inner"].split():
                bare = part.strip("()[].,:;'\"/$-")
                if bare:
                    tokens.append(Token("w" if bare.replace("-", "").isalpha() else "u", bare, start, end))
            last = tokens[-1] if tokens else END
            continue
        if unknown:
            kind = "u"
        if kind in ("=", "~"):
            while tokens and tokens[-1].kind == "s":  # a line that begins with "=" goes on with the last one
                tokens.pop()
        elif kind == "s" and last.kind in ("=", "~"):
            continue
        last = Token(kind, word, start, end)  # type: ignore[arg-type]
        tokens.append(last)
    return tokens, marks


def _word_kind(text: str, word: str, end: int, touching: Token) -> str:
    after = text[end : end + 1]
    if after in ("(", "_") and after:
        return "u"  # a function, "apple(s)", an index
    if touching.kind in ("n", ")", "u") and (len(word) == 1 or word.lower() not in _ATTACHED):
        return "u"  # 2xy, 10th, 1e5
    base = word.rstrip("⁰¹²³⁴⁵⁶⁷⁸⁹")
    if base != word and base.lower() not in _ATTACHED:
        return "u"  # x², but m² is a unit
    if len(word) == 1:
        return "w" if word in "aAI" and after == " " and text[end + 1 : end + 2].isalpha() else "v"
    if "-" in word and any(len(part) == 1 for part in word.split("-")):
        return "u"  # x-y
    return "w"


def _in_ratio(text: str, i: int) -> bool:
    """Whether the colon at `i` stands between two numbers: a time or a ratio."""
    near = text[max(i - 2, 0) : i + 3]
    return (text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit()) or (
        len(near) == 5 and near[1::2] == "  " and near[0].isdigit() and near[4].isdigit()
    )


def stem(word: str) -> str:
    word = word.lower()
    return word[:-1] if len(word) > 3 and word.endswith("s") else word
