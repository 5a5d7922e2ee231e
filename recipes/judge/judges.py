"""The trained judge of RewriteChain, and a rule for what it cannot see because it reads from left to right."""

from collections.abc import Sequence
from typing import Any

from trl_sgpo.judges import EarliestError
from trl_sgpo.judges.prm import PRMJudge
from trl_sgpo.tasks.rewrite_chain import SEPARATOR, Problem


def unfinished(problem: str, steps: Sequence[str], **row: Any) -> int | None:
    """
    Names the first block of a solution that does not have one block per operation, because it has no answer. The rule
    counts blocks and computes nothing.

    Without it a policy gets credit for stopping early: in a shorter solution the right steps are a larger share.
    """
    finished = len(steps) == len(Problem.from_prompt(problem).operations)
    return None if finished and not steps[-1].rstrip().endswith(SEPARATOR) else 0


class FinishedPRMJudge(EarliestError):
    """The earlier error of `PRMJudge(model, ...)` and [`unfinished`]."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__([unfinished, PRMJudge(model, **kwargs)])
