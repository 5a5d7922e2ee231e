"""
The judge of the experiment, its outcome, and the text they read: GSM8K's solutions, one step per line, ending in `#### answer`.

A GSM8K solution spells out its calculations, so a reference solution is a list of intermediate results.
[`ReferenceJudge`] calls a step wrong if it computes something that the reference never does; whether the calculation
itself is right is [`ArithmeticJudge`]'s part, and [`make_judge`] asks both. Neither solves the problem.

Left out on purpose: algebra, LaTeX, and solutions that reach the answer by another way than the reference: these are
called wrong where they leave it. As only completions with a wrong answer are judged, that costs less than it seems.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

from trl_sgpo import StepJudge, Verdict
from trl_sgpo.judges import ArithmeticJudge, EarliestError, JudgeItem


ANSWER_MARK = "####"

_NUMBER = r"(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++"
_MARK = re.compile(r"<<([^<>=\n]{0,150}+=[^<>\n]{0,60}+)>>")
_ANSWER = re.compile(rf"\s*[$€£]?\s*(?P<sign>-?)\s*[$€£]?\s*(?P<number>{_NUMBER})")
# What stands right of an equals sign: a number, perhaps money or a percentage. Quantifiers are possessive or bounded, for
# the text comes from a policy that may write anything
_RESULT = re.compile(rf"\s*+(?P<sign>-?)[ \t]*+[$€£]?[ \t]*+(?P<number>{_NUMBER})(?:[ \t]*+(?P<percent>%))?")
# ... after which the calculation goes on, perhaps behind a unit: "= 12 apples * 3". Then the number is no result
_GOES_ON = re.compile(
    r"(?:[ \t]*+(?!(?:times|plus|minus)\b)[A-Za-z]{2,}+){0,4}+[ \t]*+"
    r"(?:[-–−+*/×÷:^]|[xX](?![A-Za-z])|(?:times|plus|minus)\b)[ \t]*+[(]*+[$€£]?\.?\d"
)
_ATTACHED = re.compile(r"[A-Za-z](?![A-Za-z])")  # = 4S
_SENTENCE_END = re.compile(r"[.!?;:][ \t]|,[ \t]")
_OPERATOR = re.compile(
    r"[+*/×÷]|[\s\d)]-|[–−]|(?<=[\s\d)])[xX](?=[\s\d(])|\b(?:times|plus|minus|multiplied|divided|of)\b"
)
# A letter that stands for a number, save for "x" between two numbers and the words "a" and "I"
_UNKNOWN = re.compile(r"(?<![A-Za-z'’])(?![aAI](?![A-Za-z]))[A-Za-z](?![A-Za-z])")
_TIMES = re.compile(r"(?<=[\d)$ ])[xX](?=[ ]*+[$€£(\d.])")


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction
    decimals: int = 0


class Equation(NamedTuple):
    """The result of one equals sign, and whether its left side is a calculation with numbers alone."""

    results: tuple[Number, ...]  # a percentage is two numbers: 50 % is 50 and 0.5
    computed: bool


def plain_text(solution: str) -> str:
    """
    A GSM8K solution with its calculator marks as plain equations: left out where the text has the equation already, in the
    place of the bare result where it has not.

    ```python
    >>> plain_text("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    >>> plain_text("5 dozen are <<5*12=60>>60 eggs")
    '5 dozen are 5*12=60 eggs'
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


def final_answer(text: str) -> str | None:
    """
    The number after `####`, without separators, sign of money and trailing zeros; `None` unless there is exactly one such
    mark with a number behind it, so that nobody answers twice.

    ```python
    >>> final_answer("48+24 = 72 clips\\n#### 1,072.50"), final_answer("The answer is 72.")
    ('1072.5', None)
    ```
    """
    parts = text.split(ANSWER_MARK)
    found = _ANSWER.match(parts[1]) if len(parts) == 2 else None
    if found is None:
        return None
    value = _number(found).value
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def exact_answer(
    prompts: Sequence[str], completions: Sequence[str], solution: Sequence[str], **kwargs: Any
) -> list[float]:
    """The outcome reward: 1.0 if the number after `####` is the reference's, else 0.0."""
    return [
        float((answer := final_answer(completion)) is not None and answer == final_answer(reference))
        for completion, reference in zip(completions, solution, strict=True)
    ]


def equations(text: str) -> list[Equation]:
    """
    The equations of a text whose right side is a number, line by line. What cannot be read with certainty is left out.

    ```python
    >>> [(str(e.results[0].value), e.computed) for e in equations("So 3 bags x 4 = 12 apples, and x = 5.")]
    [('12', True), ('5', False)]
    ```
    """
    found = []
    for line in plain_text(text).splitlines():
        sides = line.split("=")
        for left, right in pairwise(sides):
            if not left.strip() or left.endswith(("<", ">", "!")):
                continue
            number = _RESULT.match(right)
            if number is None or _GOES_ON.match(right, number.end()) or _ATTACHED.match(right, number.end()):
                continue
            read = _number(number)
            results = (read, Number(read.value / 100, read.decimals + 2)) if number["percent"] else (read,)
            found.append(Equation(results, _is_calculation(left)))
    return found


class ReferenceJudge(StepJudge):
    """
    Finds the first step that computes a result which the reference solution does not have.

    The results of a reference are the numbers right of its equals signs and its final answer. A step is wrong if

    - it has an equation of numbers (`3 * 4 = 12`) whose result is none of these;
    - it computes a result once more, though the reference has it no more often: a policy that is paid for right steps would
      otherwise write the first one again and again;
    - it gives a final answer (`#### 12`) that is not the reference's.

    A step without any of these is not wrong: words, a number that is only named, an unknown (`2x + 5 = 25`), an assignment
    (`x = 5`), a calculation that goes on (`= 12 * 2`). Results agree if they are equal, or if one is the other one rounded to
    one decimal or more.

    The verdict abstains without a reference, and where no step has anything to check.
    """

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [_judge_one(item) for item in items]


def make_judge() -> StepJudge:
    """What the experiment's arms ask: wrong arithmetic, or a result that the reference does not have, whichever is first."""
    return EarliestError([ArithmeticJudge(), ReferenceJudge()])


def _judge_one(item: JudgeItem) -> Verdict:
    if not item.reference:
        return Verdict.abstain("no reference solution")
    known = [equation.results for equation in equations(item.reference)]
    answer = final_answer(item.reference)
    final = () if answer is None else (Number(Fraction(answer), len(answer.partition(".")[2])),)
    if not known and answer is None:
        return Verdict.abstain("the reference has no result")
    written: Counter[Fraction] = Counter()
    checked = 0
    for index, step in enumerate(item.steps):
        for equation in equations(step):
            if not equation.computed:
                continue
            checked += 1
            value = equation.results[0].value
            times = sum(_agree(equation.results, results) for results in known)
            if not times and not _agree(equation.results, final):
                return Verdict.error(index, len(item.steps), reason=f"{_shown(value)} is no result of the reference")
            written[value] += 1
            if written[value] > max(times, 1):
                return Verdict.error(index, len(item.steps), reason=f"{_shown(value)} was computed before")
        given = final_answer(step)
        if given is not None and answer is not None:
            checked += 1
            if given != answer:
                return Verdict.error(index, len(item.steps), reason=f"{given} is not the reference's answer")
    if not checked:
        return Verdict.abstain("no result to check")
    return Verdict.no_error(len(item.steps), reason=f"{checked} results are the reference's")


def _number(match: re.Match[str]) -> Number:
    text = match["number"].replace(",", "")
    value = Fraction(text if len(text) <= 40 else "1e40")  # a number without end is no result of anything
    return Number(-value if match["sign"] else value, len(text.partition(".")[2]))


def _is_calculation(left: str) -> bool:
    """Whether the left side of an equals sign, from the last sentence's end on, combines numbers and nothing unknown."""
    ends = [end.end() for end in _SENTENCE_END.finditer(left)]
    left = left[ends[-1] :] if ends else left
    operator = _OPERATOR.search(left)
    numbers = sum(1 for _ in re.finditer(_NUMBER, left))
    return operator is not None and numbers >= 2 and _UNKNOWN.search(_TIMES.sub("*", left)) is None


def _agree(left: tuple[Number, ...], right: tuple[Number, ...]) -> bool:
    return any(_same(a, b) for a in left for b in right)


def _same(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    decimals = min(a.decimals, b.decimals)
    return decimals >= 1 and abs(a.value - b.value) <= Fraction(1, 2 * 10**decimals)


def _shown(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
