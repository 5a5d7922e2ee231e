"""
A judge that needs a reference solution and no model: a step is wrong if its result is not in the reference. It suits
references that spell out their calculations, as GSM8K's do, with `#### answer` at the end.

Each expression here has possessive or bounded repetitions, so the time is linear, because a policy may write anything.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from trl_sgpo.judges.arithmetic import MAX_CHARS
from trl_sgpo.judges.arithmetic.tokens import MAX_DIGITS, Number, read_number
from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict


ANSWER_MARK = "####"

_NUMBER = r"[0-9]++(?:[.,][0-9]++)*+|\.[0-9]++"
_MARK = re.compile(r"<<([^<>=\n]{0,150}+=[^<>\n]{0,60}+)>>")
_ANSWER = re.compile(rf"\s*+[$€£]?+\s*+(?P<sign>-?+)\s*+[$€£]?+\s*+(?P<number>{_NUMBER})")
# What stands right of an equals sign: a number, perhaps money or a percentage
_RESULT = re.compile(rf"\s*+(?P<sign>-?+)[ \t]*+[$€£]?+[ \t]*+(?P<number>{_NUMBER})(?:[ \t]*+(?P<percent>%))?+")
# ... after which the calculation goes on, perhaps after a unit: "= 12 apples * 3". Then the number is no result
_GOES_ON = re.compile(
    r"(?:[ \t]*+(?!(?:times|plus|minus)\b)[A-Za-z]{2,}+){0,4}+[ \t]*+"
    r"(?:[-–−+*/×÷:^]|[xX](?![A-Za-z])|(?:times|plus|minus)\b)[ \t]*+[(]*+[$€£]?+\.?+[0-9]"
)
_ENDLESS = Fraction(10**MAX_DIGITS)  # a number of more digits is no result of anything
_ATTACHED = re.compile(r"[A-Za-z](?![A-Za-z])")  # = 4S
_SENTENCE_END = re.compile(r"[.!?;:][ \t]|,[ \t]")
_OPERATOR = re.compile(
    r"[+*/×÷]|[\s\d)]-|[–−]|(?<=[\s\d)])[xX](?=[\s\d(])|\b(?:times|plus|minus|multiplied|divided|of)\b"
)
# A letter that stands for a number, but not "x" between two numbers and the words "a" and "I"
_UNKNOWN = re.compile(r"(?<![A-Za-z'’])(?![aAI](?![A-Za-z]))[A-Za-z](?![A-Za-z])")
_TIMES = re.compile(r"(?<=[\d)$ ])[xX](?=[ ]*+[$€£(\d.])")


class Equation(NamedTuple):
    """The result of one equals sign, and whether its left side is a calculation with numbers alone."""

    results: tuple[Number, ...]  # a percentage is two numbers: 50 % is 50 and 0.5
    computed: bool


class ReferenceJudge(StepJudge):
    """
    Finds the first step that computes a result which the reference solution does not have. It needs no model, does no
    algebra and reads no LaTeX.

    The results of a reference are the numbers right of its equals signs and its final answer. A step is wrong if

    - it has an equation of numbers (`3 * 4 = 12`) whose result is none of these;
    - it computes a result more often than the reference has it: a policy that is paid for right steps would otherwise
      write the first one again and again;
    - it gives a final answer (`#### 12`) that is not the reference's.

    Other steps are not checked: words, an unknown (`2x + 5 = 25`), an assignment (`x = 5`), a calculation that goes on
    (`= 12 * 2`). Results agree if they are equal, or if one is the other one rounded to one decimal or more. The
    verdict is an abstention without a reference, and if no step has anything to check.

    A solution that reaches the answer by another way is called wrong at the step that leaves the reference's way. So
    ask this judge only about solutions that are known to be wrong. Measured on ProcessBench gsm8k, with GSM8K's
    solutions as references: it finds 0.396 of the first errors exactly ([`ArithmeticJudge`] 0.101, both in
    [`EarliestError`] 0.420), and it blames 0.254 of the right solutions ([`ArithmeticJudge`] none).

    Example:

    ```python
    >>> judge = ReferenceJudge()
    >>> item = JudgeItem("...", ("3 * 4 = 12", "12 - 4 = 8"), reference="3*4=<<3*4=12>>12, 12/2=<<12/2=6>>6\\n#### 6")
    >>> judge.judge([item])[0].reason
    '8 is no result of the reference'
    ```
    """

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [_judge_one(item) for item in items]


class _Reference:
    """The results of a reference, and which of them a solution has computed so far."""

    def __init__(self, text: str) -> None:
        self.known = [equation.results for equation in equations(text)]
        self.answer = final_answer(text)
        self.written: Counter[Fraction] = Counter()

    def check(self, step: str) -> tuple[int, str | None]:
        """How many results of a step are right, up to the first one that is not, and what is wrong with that."""
        final = () if self.answer is None else (self.answer,)
        right = 0
        for equation in equations(step):
            if not equation.computed:
                continue
            value = equation.results[0].value
            times = sum(_agree(equation.results, results) for results in self.known)
            if not times and not _agree(equation.results, final):
                return right, f"{_shown(value)} is no result of the reference"
            self.written[value] += 1
            if self.written[value] > max(times, 1):
                return right, f"{_shown(value)} was computed before"
            right += 1
        given = final_answer(step)
        if given is not None and self.answer is not None:
            if given.value != self.answer.value:
                return right, f"{_shown(given.value)} is not the reference's answer"
            right += 1
        return right, None


def _judge_one(item: JudgeItem) -> Verdict:
    if not item.reference or not isinstance(item.reference, str):
        return Verdict.abstain("no reference solution")
    reference = _Reference(item.reference)
    if not reference.known and reference.answer is None:
        return Verdict.abstain("the reference has no result")
    n_steps = len(item.steps)
    n_right = 0
    checked: list[int] = []
    budget = MAX_CHARS
    for index, step in enumerate(item.steps):
        if "=" not in step and ANSWER_MARK not in step:
            continue
        if len(step) > budget:
            return Verdict.abstain(f"more than {MAX_CHARS} characters of arithmetic")
        budget -= len(step)
        right, wrong = reference.check(step)
        if wrong is not None:
            return Verdict.error(index, n_steps, reason=wrong, checked=tuple(checked))
        if right:
            checked.append(index)
        n_right += right
    if not n_right:
        return Verdict.abstain("no result to check")
    return Verdict.no_error(n_steps, reason=f"{n_right} results are the reference's", checked=tuple(checked))


def plain_text(solution: str) -> str:
    """
    A GSM8K solution with its calculator marks as plain equations. A mark takes the place of the bare result, and is
    left out if the text has the equation already.

    ```python
    >>> plain_text("48/2 = <<48/2=24>>24 clips, 5 dozen are <<5*12=60>>60 eggs")
    '48/2 = 24 clips, 5 dozen are 5*12=60 eggs'
    ```
    """
    pieces, end = [], 0
    for mark in _MARK.finditer(solution):
        pieces.append(solution[end : mark.start()])
        end = mark.end()
        left, _, result = mark[1].rpartition("=")
        spelled_out = pieces[-1].rstrip(" $€£%").endswith("=") or not _OPERATOR.search(left)
        if not spelled_out and result and solution.startswith(result, end):
            pieces.append(f"{left}=")
    return "".join([*pieces, solution[end:]])


def final_answer(text: str) -> Number | None:
    """The number after `####`. `None` if there is not exactly one such mark with a number: nobody may answer twice."""
    parts = text.split(ANSWER_MARK)
    found = _ANSWER.match(parts[1]) if len(parts) == 2 else None
    return None if found is None else _number(found)


def equations(text: str) -> list[Equation]:
    """The equations of a text whose right side is a number, without what is not surely understood."""
    found = []
    for line in plain_text(text).splitlines():
        for left, right in pairwise(line.split("=")):
            if not left.strip() or left.endswith(("<", ">", "!")):
                continue
            match = _RESULT.match(right)
            if match is None or _GOES_ON.match(right, match.end()) or _ATTACHED.match(right, match.end()):
                continue
            number = _number(match)
            if number is not None:
                hundredth = Number(Fraction(number.value) / 100, number.decimals + 2)
                found.append(Equation((number, hundredth) if match["percent"] else (number,), _is_calculation(left)))
    return found


def _number(match: re.Match[str]) -> Number | None:
    text = match["number"]
    number = Number(_ENDLESS) if len(text) > MAX_DIGITS and text.isdecimal() else read_number(text)
    return number._replace(value=-number.value) if number and match["sign"] else number


def _is_calculation(left: str) -> bool:
    """Whether the left side of an equals sign, from the last sentence's end on, combines numbers and nothing unknown."""
    end = max((match.end() for match in _SENTENCE_END.finditer(left)), default=0)
    left = left[end:]
    if _OPERATOR.search(left) is None or len(re.findall(_NUMBER, left)) < 2:
        return False
    return _UNKNOWN.search(_TIMES.sub("*", left)) is None


def _agree(left: tuple[Number, ...], right: tuple[Number, ...]) -> bool:
    return any(_same(a, b) for a in left for b in right)


def _same(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    decimals = min(a.decimals, b.decimals)
    return decimals >= 1 and abs(a.value - b.value) <= Fraction(1, 2 * 10**decimals)


def _shown(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
