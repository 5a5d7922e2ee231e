"""From a completion to its answer, by text matching: good enough to count distinct answers, not to grade them."""

import re
from collections.abc import Callable, Hashable


Extractor = Callable[[str], Hashable | None]

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# Numbers are searched in the tail first: a completion has thousands of characters, and its answer is at the end
_TAIL = 256
_LONGEST_ANSWER = 200


def extract_answer(text: str) -> str | None:
    r"""
    The default extractor. It takes the first of these that exists: the content of the last `\boxed{..}`; the text
    after the last `####`; the last number; the last line that is not empty. Of that line it takes the text after the
    last `;`, so the answer of a chain of blocks is its last block. White space and thousands separators are
    normalised; an empty text gives `None`.

    ```python
    >>> extract_answer("3 + 4 = 7, so \\boxed{7}."), extract_answer("It is 1,234.0"), extract_answer("b c [V] ; c b")
    ('7', '1234', 'c b')
    ```
    """
    start = text.rfind("\\boxed{")
    if start >= 0:
        return _normalised(_braced(text, start + len("\\boxed{")))
    start = text.rfind("####")
    if start >= 0:
        after = text[start + 4 :].strip()
        if after:
            return _normalised(after.splitlines()[0])
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
    answer = " ".join(answer.split())[:_LONGEST_ANSWER].rstrip(".").strip("$ ")
    if _NUMBER.fullmatch(answer):
        answer = answer.replace(",", "")
        if "." in answer:
            answer = answer.rstrip("0").rstrip(".")
    return answer or None
