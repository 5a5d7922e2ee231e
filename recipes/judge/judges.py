"""The trained judge of RewriteChain, together with a rule that a judge cannot know if it reads from left to right."""

from collections.abc import Sequence
from typing import Any

from trl_sgpo.judges import EarliestError
from trl_sgpo.judges.prm import PRMJudge
from trl_sgpo.tasks.rewrite_chain import SEPARATOR, Problem


def unfinished(problem: str, steps: Sequence[str], **row: Any) -> int | None:
    """
    A solution that does not have one block per operation is wrong from its first block on, because it has no answer. This rule
    counts blocks and computes nothing. Without it a policy is rewarded for stopping early: if there are fewer steps, the right
    ones are a larger share.
    """
    finished = len(steps) == len(Problem.from_prompt(problem).operations)
    return None if finished and not steps[-1].rstrip().endswith(SEPARATOR) else 0


class FinishedPRMJudge(EarliestError):
    """`PRMJudge(model, ...)`, and [`unfinished`]."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__([unfinished, PRMJudge(model, **kwargs)])
