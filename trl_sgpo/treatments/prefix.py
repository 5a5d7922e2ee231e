"""
Per-token credit, `failed_groups="prefix"` (SGPO's paper has none; VPPO, arXiv 2601.18984, is a similar thought). A
reward for the whole completion pays the tokens after the error too. The verdict says more: the steps before the first
wrong one are verified, that step is wrong, and nobody has judged what follows. So the verified tokens get
`prefix_reward`, those of the wrong step `-error_penalty`, and the rest 0. No group normalisation is involved.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trl_sgpo.credit import StepTokens, locate_steps
from trl_sgpo.groups import SortedGroups, enough_verdicts
from trl_sgpo.policy import Policy
from trl_sgpo.rounds import Round
from trl_sgpo.treatments.base import Treatment


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig


class PrefixCredit(Treatment):
    """Rewards the verified steps of a wrong completion, blames its first wrong step, and leaves the rest alone."""

    name = "prefix"
    asks_judge = True
    per_token = True

    def setup(self, args: "SGPOConfig") -> None:
        super().setup(args)
        self.weight = args.failed_group_weight
        self.prefix_reward, self.error_penalty = args.prefix_reward, args.error_penalty

    def sort(self, round: Round) -> SortedGroups:
        assert round.judged is not None, "a round that nobody judged cannot be sorted"
        return credited_groups(round.askable_PG, round.judged.rts_PG, round.kinds.failed_P)

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        plain_B, length = round.advantages_B, round.own_BT.shape[1]
        places = self._locate(round, policy)
        credit_BT = prefix_credit(places, length, self.prefix_reward, self.error_penalty).to(plain_B)
        credit_BT = self.weight * credit_BT * round.local((round.groups or self.sort(round)).rescued_P).unsqueeze(1)
        plain_BT = advantages_BT = plain_B.unsqueeze(1).expand(-1, length)
        # In a mixed group GRPO blames the whole of a wrong completion: what was verified is spared
        in_failed = round.local(round.kinds.failed_P).tolist()
        elsewhere = [None if failed else place for failed, place in zip(in_failed, places, strict=True)]
        if any(elsewhere):
            spared_BT = prefix_credit(elsewhere, length, 1.0, 0.0).to(plain_B) > 0
            advantages_BT = advantages_BT.masked_fill(spared_BT & (plain_BT < 0), 0.0)
        advantages_BT = advantages_BT + credit_BT
        return advantages_BT if (advantages_BT != plain_BT).any() else plain_B

    @staticmethod
    def _locate(round: Round, policy: Policy) -> list[StepTokens | None]:
        """Where the verdicts of this rank's completions stand among their tokens. Every rank joins the gather in it."""
        assert round.judged is not None, "it treats judged rounds only"
        own_BT, tool_mask = round.own_BT, round.tool_mask_BT
        has_loss = own_BT.any(dim=1).tolist()  # none if it was truncated and masked
        places: list[StepTokens | None] = []
        found = []  # 1, 0, or NaN where there is no error to be found
        for i, (score, ids) in enumerate(zip(round.judged.scores, round.completion_ids, strict=True)):
            place, looked_for = None, False
            if score is not None and has_loss[i] and (score.first_error is not None or score.status == "error"):
                looked_for = True
                if score.first_error is None or score.cut is None:  # an empty completion: ending at once is its error
                    place = StepTokens((), (0, len(ids)))
                else:
                    by_policy = None if tool_mask is None else tool_mask[i, : len(ids)].bool().tolist()
                    place = locate_steps(policy.decode, ids, score.cut, score.first_error, by_policy)
            places.append(place)
            found.append(float(place is not None) if looked_for else torch.nan)
        found_PG = policy.gather(torch.tensor(found, device=own_BT.device))
        if not torch.isnan(found_PG).all():
            round.metrics["sgpo/credit/unlocated"] = 1 - torch.nanmean(found_PG).item()
        return places


def credited_groups(outcome_PG: Tensor, rts_PG: Tensor, failed_P: Tensor) -> SortedGroups:
    """
    The failed groups whose verdicts pay tokens. What a token earns is not relative to the group, so equal scores teach
    too. Two kinds of groups do not:

    - Groups with verdicts for fewer than half of their completions, which are neither rescued nor tied.
    - Groups in which no completion has a right step. They would only be punished. Punishment does not say what to
      write instead, and it makes a policy that cannot solve the task forget what it knows.

    Example:

    ```python
    >>> nan = float("nan")
    >>> rts = torch.tensor([[0.4, 0.4], [0.0, 0.0], [nan, nan]])
    >>> credited_groups(torch.zeros(3, 2), rts, torch.tensor([True, True, True]))
    SortedGroups(rescued_P=tensor([ True, False, False]), tied_P=tensor([False,  True, False]))
    ```
    """
    enough_P = failed_P & enough_verdicts(outcome_PG, rts_PG)
    right_step_P = rts_PG.nan_to_num(nan=0.0).amax(dim=1) > 0
    rescued_P = enough_P & right_step_P
    return SortedGroups(rescued_P, enough_P & ~rescued_P)


def prefix_credit(
    tokens: Sequence[StepTokens | None], length: int, prefix_reward: float, error_penalty: float
) -> Tensor:
    """
    The advantages per token that the verdicts give, shape `(N, T)` with T = `length`: `prefix_reward` on the verified
    steps, `-error_penalty` on the first wrong one, 0 elsewhere and where there is no verdict.

    Example:

    ```python
    >>> prefix_credit([StepTokens(((0, 2),), (2, 3)), None], length=5, prefix_reward=0.5, error_penalty=1.0)
    tensor([[ 0.5000,  0.5000, -1.0000,  0.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000,  0.0000,  0.0000]])
    ```
    """
    credit_NT = torch.zeros(len(tokens), length)
    for row_T, place in zip(credit_NT, tokens, strict=True):
        if place is not None:
            for start, end in place.verified:
                row_T[start:end] = prefix_reward
            row_T[place.error[0] : place.error[1]] = -error_penalty
    return credit_NT
