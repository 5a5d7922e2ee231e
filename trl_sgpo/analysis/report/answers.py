"""From a completion to its answer, by text matching: good enough to count distinct answers, not to grade them."""

import re
from collections.abc import Callable, Hashable


Extractor = Callable[[str], Hashable | None]

# Groups of digits may stand between commas (LaTeX: `{,}` or `\,`) and dots. A whole number before a fraction belongs to it.
# A sign after a letter, a digit or a bracket is a hyphen or an operator ("pages 3-5"). The look ahead changes no match: most
# characters are letters, and it passes over them four times as fast.
_DIGITS = r"\d++(?:(?:,|\{,\}|\\,|\.)\d++)*+"
_NUMBER = re.compile(rf"(?=[-+\d])(?:(?<![\w)}}])[-+])?(?:\d++ (?=\d+/\d))?{_DIGITS}(?:/{_DIGITS})?")
_COMMAS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DOTS = re.compile(r"[-+]?\d{1,3}(?:\.\d{3}){2,}")
_DECIMAL = re.compile(r"[-+]?\d+\.\d+")
_BOX = re.compile(r"\\(?:fbox|boxed)(?:\s*\{|\s+(?=[\w\\$-]))")
_HEADING = re.compile(r"(?:step|part|case)\b|\d+[.)]\s|\D*$", re.IGNORECASE)
_MINUS = str.maketrans("−－–", "---")
# Numbers are searched in the tail first: a completion has thousands of characters, and its answer is at the end
_TAIL = 256
_LONGEST_ANSWER = 200
_MOST_MARKS = 64  # boxes or `####` that are looked at, from the end


def extract_answer(text: str) -> str | None:
    r"""
    The default extractor. It takes the first of these that exists: the content of the last `\boxed{..}` that is not
    empty; the text after the last `####` that is no heading; the last number; the last line that is not empty. Of that
    line it takes the text after the last `;`, so the answer of a chain of blocks is its last block. White space, minus
    signs and thousands separators are normalised; an empty text gives `None`.

    ```python
    >>> extract_answer("3 + 4 = 7, so \\boxed{7}."), extract_answer("It is 1,234.0"), extract_answer("b c [V] ; c b")
    ('7', '1234', 'c b')
    ```
    """
    text = text.translate(_MINUS)
    for box in reversed(list(_BOX.finditer(text))[-_MOST_MARKS:]):
        inside = _braced(text, box.end()) if box[0].endswith("{") else text[box.end() :].split(maxsplit=1)[0]
        if answer := _normalised(inside):
            return answer
    for mark in reversed(list(re.finditer("####", text))[-_MOST_MARKS:]):
        line, _, rest = text[mark.end() :].strip().partition("\n")
        if line and not (rest.strip() and _HEADING.match(line)):
            return _normalised(line)
    # A search from the front would be slow on long texts. A number at the start of the tail may be cut, so it does not count
    for tail in (text[-_TAIL:], text):
        numbers = list(_NUMBER.finditer(tail))
        if numbers and (numbers[-1].start() > 0 or tail is text or len(tail) == len(text)):
            return _normalised(numbers[-1].group())
    lines = text.strip().splitlines()
    return _normalised(lines[-1].rsplit(";", 1)[-1]) if lines else None


def _braced(text: str, start: int) -> str:
    """The text between the brace that opens before `start` and the brace that closes it (or the end of the text)."""
    depth = 1
    for i in range(start, min(len(text), start + _LONGEST_ANSWER)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return text[start : start + _LONGEST_ANSWER]


def _normalised(answer: str) -> str | None:
    answer = " ".join(answer.split())[:_LONGEST_ANSWER].strip("*").rstrip(".").strip("$ *")
    if _NUMBER.fullmatch(answer):
        answer = answer.removeprefix("+").replace("{,}", ",").replace("\\,", ",")
        if _COMMAS.fullmatch(answer):
            answer = answer.replace(",", "")
        elif _DOTS.fullmatch(answer):
            answer = answer.replace(".", "")
        if _DECIMAL.fullmatch(answer):
            answer = answer.rstrip("0").rstrip(".")
    return answer or None
