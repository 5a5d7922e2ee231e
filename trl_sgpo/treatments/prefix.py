"""
Per-token credit, `failed_groups="prefix"` (SGPO's paper has none; VPPO, arXiv 2601.18984, is a similar thought). A
reward for the whole completion pays the tokens after the error too. The verdict says more: the steps before the first
wrong one are verified (but for those that the judge did not check), that step is wrong, and nobody has judged what
follows. So the verified tokens get `prefix_reward`, those of the wrong step `-error_penalty`, and the rest 0. No group
normalisation is involved, unless `prefix_baseline="group"` compares each step with what the group makes of it
(`prefix_baseline.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trl_sgpo.credit import StepTokens, locate_steps
from trl_sgpo.groups import SortedGroups, enough_verdicts, value_range
from trl_sgpo.policy import Policy
from trl_sgpo.rounds import Judged, Round, verified_steps
from trl_sgpo.treatments.base import Treatment
from trl_sgpo.treatments.prefix_baseline import centred_credit


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig


class PrefixCredit(Treatment):
    """
    Rewards the verified steps of a wrong completion, blames its first wrong step, and leaves the rest alone; with
    `prefix_baseline="group"` as far as the completion does better or worse than its group.
    """

    name = "prefix"
    asks_judge = True
    per_token = True

    def setup(self, args: "SGPOConfig") -> None:
        super().setup(args)
        self.warn_of_unused(args, ["rts_share_of"], "whose credit is per step and no share of anything. Leave it out.")
        self.weight, self.prefix_reward = args.failed_group_weight, args.prefix_reward
        self.centred = args.prefix_baseline == "group"
        usual = 1.0 if self.centred else 0.5
        self.error_penalty = usual if args.error_penalty is None else args.error_penalty

    def sort(self, round: Round) -> SortedGroups:
        assert round.judged is not None, "a round that nobody judged cannot be sorted"
        verified_PG = verified_steps(round.judged)
        return credited_groups(round.askable_PG, verified_PG, round.kinds.failed_P, relative=self.centred)

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        assert round.judged is not None, "it treats judged rounds only"
        plain_B, length = round.advantages_B, round.own_BT.shape[1]
        earned = self._earned(round, round.judged)
        places = self._locate(round, round.judged, policy, earned)
        is_verified = [[1.0] * (len(values) - 1) + [0.0] for values in earned]
        verified_BT = prefix_credit(places, is_verified, length).to(plain_B) > 0
        weight_P = self.weight * (round.groups or self.sort(round)).rescued_P
        if self.centred:
            # In a mixed group, whose wrong completions may be judged too, the credit takes the place of GRPO's blame
            wrong_PG = round.askable_PG.masked_fill(~round.wrong_PG, torch.nan)
            paid_P = round.kinds.mixed_P & enough_verdicts(wrong_PG, round.judged.rts_PG)
            weight_P = weight_P + paid_P
            located_B = torch.tensor([place is not None for place in places], device=plain_B.device)
            spared_BT = (located_B & round.local(paid_P)).unsqueeze(1)
        else:
            # There GRPO blames the whole of a wrong completion: what was verified is spared
            spared_BT = verified_BT & ~round.local(round.kinds.failed_P).unsqueeze(1)
        credit_BT = prefix_credit(places, earned, length).to(plain_B) * round.local(weight_P).unsqueeze(1)
        plain_BT = plain_B.unsqueeze(1).expand(-1, length)
        advantages_BT = plain_BT.masked_fill(spared_BT & (plain_BT < 0), 0.0) + credit_BT
        self._log(round, policy, places, earned, verified_BT, credit_BT)
        return advantages_BT if (advantages_BT != plain_BT).any() else plain_B

    def _log(
        self,
        round: Round,
        policy: Policy,
        places: Sequence[StepTokens | None],
        earned: Sequence[Sequence[float]],
        verified_BT: Tensor,
        credit_BT: Tensor,
    ) -> None:
        """What became of the verdicts, and of the credit in failed groups. One gather, which every rank joins."""
        own_BT = round.own_BT
        looked_for = [bool(values) and loss for values, loss in zip(earned, own_BT.any(dim=1).tolist(), strict=True)]
        lost = [sought and place is None for sought, place in zip(looked_for, places, strict=True)]
        rescued_BT = own_BT & round.local((round.groups or self.sort(round)).rescued_P).unsqueeze(1)
        verified_BT = own_BT & verified_BT & round.local(round.kinds.failed_P).unsqueeze(1)
        parts_and_wholes = (
            torch.tensor(lost, device=own_BT.device),
            torch.tensor(looked_for, device=own_BT.device),
            (credit_BT.abs() * rescued_BT).sum(dim=1),
            rescued_BT.sum(dim=1),
            (verified_BT & (credit_BT == 0)).sum(dim=1),
            verified_BT.sum(dim=1),
        )
        sums_PG6 = policy.gather(torch.stack([numbers_B.float() for numbers_B in parts_and_wholes], dim=1))
        sums = sums_PG6.sum(dim=(0, 1)).tolist()
        for name, part, whole in zip(("unlocated", "size", "silent"), sums[::2], sums[1::2], strict=True):
            if whole:
                round.metrics[f"sgpo/credit/{name}"] = part / whole

    def _earned(self, round: Round, judged: Judged) -> list[list[float]]:
        """
        What each verified step of this rank's completions earns, and then the first wrong one; nothing where no wrong
        step is named.
        """
        # A right completion of a mixed group has every step right, however many it has
        right_PG = round.outcome_PG >= round.success_threshold
        verified_PG = verified_steps(judged).masked_fill(right_PG, torch.inf).cpu()
        earned: list[list[float]] = []
        for row, score in enumerate(judged.scores, start=round.rows.start):
            values: list[float] = []
            if score is not None and (score.first_error is not None or score.status == "error"):
                n_verified = score.n_right or 0  # an empty completion has none: ending at once is its error
                values = [self.prefix_reward] * n_verified + [-self.error_penalty]
                if self.centred:
                    verified_G = verified_PG[row // verified_PG.shape[1]]
                    values = centred_credit(verified_G, n_verified, self.prefix_reward, self.error_penalty).tolist()
            earned.append(values)
        return earned

    @staticmethod
    def _locate(
        round: Round, judged: Judged, policy: Policy, earned: Sequence[Sequence[float]]
    ) -> list[StepTokens | None]:
        """Where the verdicts of this rank's completions stand among their tokens; `None` where there is nothing to pay."""
        tool_mask = round.tool_mask_BT
        has_loss = round.own_BT.any(dim=1).tolist()  # none if it was truncated and masked
        places: list[StepTokens | None] = []
        for i, (score, ids) in enumerate(zip(judged.scores, round.completion_ids, strict=True)):
            place = None
            if score is not None and earned[i] and has_loss[i]:
                if score.n_right is None or score.cut is None:  # an empty completion: ending at once is its error
                    place = StepTokens((), (0, len(ids)))
                else:
                    by_policy = None if tool_mask is None else tool_mask[i, : len(ids)].bool().tolist()
                    place = locate_steps(policy.decode, ids, score.cut, score.n_right, by_policy, earned[i])
            places.append(place)
        return places


def credited_groups(outcome_PG: Tensor, verified_PG: Tensor, failed_P: Tensor, relative: bool = False) -> SortedGroups:
    """
    The failed groups whose verdicts pay tokens. `verified_PG` holds the number of verified steps of each completion; NaN
    without a verdict. What a token earns is not relative to the group, so equal scores teach too. Two kinds of groups do
    not:

    - Groups with verdicts for fewer than half of their completions, which are neither rescued nor tied.
    - Groups in which no completion has a right step. They would only be punished. Punishment does not say what to
      write instead, and it makes a policy that cannot solve the task forget what it knows.

    If it is `relative` to the group, groups in which all get equally far do not teach either.

    Example:

    ```python
    >>> nan = float("nan")
    >>> verified = torch.tensor([[2.0, 2.0], [0.0, 0.0], [nan, nan]])
    >>> credited_groups(torch.zeros(3, 2), verified, torch.tensor([True, True, True]))
    SortedGroups(rescued_P=tensor([ True, False, False]), tied_P=tensor([False,  True, False]))
    ```
    """
    enough_P = failed_P & enough_verdicts(outcome_PG, verified_PG)
    size_P = value_range(verified_PG) if relative else verified_PG.nan_to_num(nan=0.0).amax(dim=1)
    rescued_P = enough_P & (size_P > 0)
    return SortedGroups(rescued_P, enough_P & ~rescued_P)


def prefix_credit(tokens: Sequence[StepTokens | None], earned: Sequence[Sequence[float]], length: int) -> Tensor:
    """
    The advantages per token that the verdicts give, shape `(N, T)` with T = `length`. `earned` says for each completion
    what its verified steps earn, and then the first wrong one. 0 elsewhere and where there is no verdict.

    Example:

    ```python
    >>> prefix_credit([StepTokens(((0, 2),), (2, 3), (0,)), None], [[0.5, -1.0], []], length=5)
    tensor([[ 0.5000,  0.5000, -1.0000,  0.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000,  0.0000,  0.0000]])
    ```
    """
    credit_NT = torch.zeros(len(tokens), length)
    for row_T, place, values in zip(credit_NT, tokens, earned, strict=True):
        if place is not None:
            for step, (start, end) in zip(place.steps, place.verified, strict=True):
                row_T[start:end] = values[step]
            row_T[place.error[0] : place.error[1]] = values[-1]
    return credit_NT
