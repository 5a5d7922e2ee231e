r"""
A judge that needs no model: it recomputes the arithmetic that the steps spell out.

Numbers, depth, length and exponents are bounded, and each pass is linear, because a policy may write anything. The
expression for tokens has possessive or bounded repetitions only: it never goes back in the text.
"""

from collections.abc import Sequence

from trl_sgpo.judges.arithmetic.expression import Memory
from trl_sgpo.judges.arithmetic.links import check_step
from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict


MAX_CHARS = 60_000  # of one completion, counting the steps that hold an equals sign


class ArithmeticJudge(StepJudge):
    r"""
    Finds the first step in which a spelled-out calculation is wrong. It has no parameters and needs no model.

    It is a strict reader. Each link of each chain `a = b = c` is checked with exact rationals, if both sides are
    surely understood. Anything else ends the link: a variable, an unknown word, another unit, a function, a mixed
    number. The judge finds few errors in prose, and what it names is an error. It does not read the problem, does no
    algebra, and does not ask whether the right quantities were combined.

    It reads `+ - * / × · ÷ ^ **`, brackets, `2(3)`, fractions, percentages, money, thousands separators, the LaTeX of
    fractions and products (`\frac`, `\times`, `\cdot`, `\div`, `\text`, `\boxed`), the same unit word after each
    number and GSM8K's calculator marks `<<48/2=24>>24`. A right-hand side holds if it is the exact value, or the value
    rounded or truncated at its last digit. A capital letter that an earlier step set to a computed number, as in
    `A = 3 + 4 = 7`, may be used later.

    A step without a calculation that was checked is not among the verdict's `checked`, and neither is one that says
    again word for word what an earlier step says.

    The verdict is "no error" if at least one link was checked and all hold, and an abstention if there was nothing to
    check. "No error" says that the arithmetic is right, not that the solution is.

    Example:

    ```python
    >>> judge = ArithmeticJudge()
    >>> judge.judge([JudgeItem("...", ("There are 3 * 4 = 12 apples.", "Each gets 12 / 2 = 5."))])[0].reason
    '12 / 2 = 5 (is 6)'
    ```
    """

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [_judge_one(item.steps) for item in items]


def _judge_one(steps: Sequence[str]) -> Verdict:
    memory = Memory()
    budget = MAX_CHARS
    checked: list[int] = []
    known: set[str] = set()
    for index, step in enumerate(steps):
        if not any(sign in step for sign in ("=", "≈", "\\approx")):
            continue
        if len(step) > budget:
            return Verdict.abstain(f"more than {MAX_CHARS} characters of arithmetic")
        budget -= len(step)
        before = memory.checked
        wrong = check_step(step, memory)
        if wrong:
            return Verdict.error(index, len(steps), reason=wrong, checked=tuple(checked))
        if memory.checked > before and step.strip() not in known:
            checked.append(index)
            known.add(step.strip())
    if not memory.checked:
        return Verdict.abstain("no arithmetic to check")
    return Verdict.no_error(len(steps), reason=f"{memory.checked} calculations hold", checked=tuple(checked))
