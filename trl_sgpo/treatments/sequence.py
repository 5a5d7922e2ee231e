"""
The method of the paper (arXiv 2505.11595), `failed_groups="sgpo"`: one reward for each completion of a failed group,
by Eq. 2. The judge's rewards are put into a copy of the reward matrix, and a treated group gets the advantages that
TRL's own formula makes of that copy. All other groups keep TRL's advantages, bit for bit. What the paper leaves open,
abstentions and tied groups, is in [`fill_failed_groups`].
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trl_sgpo.groups import SortedGroups, enough_verdicts, group_advantages, grpo_advantages, value_range, weighted_sum
from trl_sgpo.policy import Policy
from trl_sgpo.rounds import Round
from trl_sgpo.treatments.base import Treatment


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig


class SequenceReward(Treatment):
    """SGPO as in the paper: a wrong completion earns the reward of its correct prefix (Eq. 2)."""

    name = "sgpo"
    asks_judge = True

    def setup(self, args: "SGPOConfig") -> None:
        super().setup(args)
        if args.judge_scope == "all_incorrect" and args.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "judge_scope='all_incorrect' cannot be combined with multi_objective_aggregation="
                "'normalize_then_sum': each reward is normalised by itself there, so the judge could lift a wrong "
                "completion above a correct one. Use 'sum_then_normalize', or judge_scope='failed_groups'."
            )
        self.warn_of_unused(
            args,
            ["prefix_reward", "error_penalty", "prefix_baseline"],
            "which gives one reward for the whole completion. Set failed_groups='prefix' for credit per token, or leave it out.",
        )
        self.weight = args.failed_group_weight
        self.scale_rewards = args.scale_rewards
        self.aggregation = args.multi_objective_aggregation

    def to_judge(self, round: Round) -> Tensor:
        """
        As usual, but nothing of an uneven group. A completion without an outcome would be compared with rewards that hold
        the judge's while its own does not, so such a group stays as GRPO leaves it.
        """
        return super().to_judge(round) & ~round.uneven_P.unsqueeze(1)

    def sort(self, round: Round) -> "JudgedGroups":
        judged = round.judged
        assert judged is not None, "a round that nobody judged cannot be sorted"
        failed_P = round.kinds.failed_P & ~round.uneven_P
        return fill_failed_groups(round.outcome_PG, judged.rts_PG, judged.reward_PG, failed_P, judged.masked_PG)

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        assert round.judged is not None, "it treats judged rounds only"
        assert round.judge_index is not None, "a judged round has a judge"
        groups = round.groups if isinstance(round.groups, JudgedGroups) else self.sort(round)
        column_PG = groups.column_PG
        if self.judge_scope == "all_incorrect":
            mixed_PG = fill_mixed_groups(
                round.outcome_PG,
                round.judged.reward_PG,
                round.others_PG,
                round.kinds.mixed_P & ~round.uneven_P,
                round.success_threshold,
                float(round.weights_F[round.judge_index]),
                round.judged.masked_PG,
            )
            column_PG = torch.where(torch.isnan(column_PG), mixed_PG, column_PG)
        sums_first = self.aggregation == "sum_then_normalize"
        if not sums_first:
            # Each column is normalised over its own values there, so an abstention needs no filling in
            column_PG = column_PG.masked_fill(torch.isnan(round.judged.rts_PG), torch.nan)
        rewards_PGF = round.rewards_PGF.clone()
        rewards_PGF[..., round.judge_index] = column_PG
        advantage_PG = grpo_advantages(rewards_PGF, round.weights_F, self.scale_rewards, self.aggregation)

        factor_P = torch.where(groups.rescued_P, self.weight, 1.0).to(advantage_PG.dtype)
        if sums_first and self.scale_rewards == "group":
            factor_P = factor_P * groups.spread_factor_P
        if (factor_P != 1).any():
            if sums_first:
                total_PG = weighted_sum(rewards_PGF, round.weights_F)
                without_judge_PG = group_advantages(round.others_PG, self.scale_rewards, scale_PG=total_PG)
            else:
                without_judge_PG = grpo_advantages(round.rewards_PGF, round.weights_F, aggregation=self.aggregation)
            advantage_PG = blend_advantages(advantage_PG, without_judge_PG, factor_P)

        treated_P = (~torch.isnan(column_PG)).any(dim=1)
        round.judge_rewards_PG = column_PG
        round.advantages_PG = advantage_PG.masked_fill(~treated_P.unsqueeze(1), torch.nan)
        return torch.where(round.local(treated_P), round.local(advantage_PG), round.advantages_B)


@dataclass
class JudgedGroups(SortedGroups):
    """
    What the verdicts make of the failed groups.

    Args:
        rescued_P, tied_P (`torch.Tensor` of shape `(P,)`):
            Failed groups that have a gradient now, and those whose scores are equal. Those with too few verdicts are
            neither.
        column_PG (`torch.Tensor` of shape `(P, G)`):
            The judge's column of the reward matrix, NaN wherever GRPO's reward stays as it is.
        spread_factor_P (`torch.Tensor` of shape `(P,)`):
            `sqrt((J - 1) / (n - 1))` for rescued groups with J verdicts among n completions, else 1.
    """

    column_PG: Tensor
    spread_factor_P: Tensor


def fill_failed_groups(
    outcome_PG: Tensor, rts_PG: Tensor, reward_PG: Tensor, failed_P: Tensor, masked_PG: Tensor | None = None
) -> JudgedGroups:
    """
    The judge's column for the failed groups, from outcomes, reasoning trajectory scores and their rewards by
    [`rts_to_reward`].

    - A group with verdicts for fewer than half of its completions, or fewer than two, stays empty.
    - A tied group stays empty. Writing equal rewards would not be the same: the mean of eight times 0.0067 leaves a
      rounding residue, and an optimizer that normalises its steps turns the residue into a full-size one.
    - Elsewhere a judged completion gets its reward, and one the judge abstained on gets the mean of its group's judged
      rewards: its advantage is 0 and the others' mean does not move. But the group's standard deviation shrinks by
      `sqrt((J - 1) / (n - 1))`. Advantages that are divided by it must be multiplied by this factor
      (`spread_factor_P`), else two verdicts among eight rows would earn advantages of 1.87 instead of 0.71.
    - A completion in `masked_PG` has no loss, so nobody was asked about it. It is treated as an abstention, but does
      not count among the completions of which half need a verdict.
    - A completion without an outcome stays empty: it stays unscorable.

    Example:

    ```python
    >>> nan = float("nan")
    >>> rts = torch.tensor([[0.2, 0.6, nan, 0.4], [0.0, 0.0, 0.0, 0.0]])
    >>> fill_failed_groups(torch.zeros(2, 4), rts, rts, torch.tensor([True, True])).column_PG
    tensor([[0.2000, 0.6000, 0.4000, 0.4000],
            [   nan,    nan,    nan,    nan]])
    ```
    """
    scored_PG = ~torch.isnan(outcome_PG) & failed_P.unsqueeze(1)
    judged_PG = scored_PG & ~torch.isnan(rts_PG)
    rts_PG, reward_PG = rts_PG.masked_fill(~judged_PG, torch.nan), reward_PG.masked_fill(~judged_PG, torch.nan)
    n_scored_P, n_judged_P = scored_PG.sum(dim=1), judged_PG.sum(dim=1)

    askable_PG = outcome_PG if masked_PG is None else outcome_PG.masked_fill(masked_PG, torch.nan)
    enough_P = failed_P & (n_judged_P >= 2) & enough_verdicts(askable_PG, rts_PG)
    # Different scores may still earn equal rewards, where the logistic is flat to machine precision
    flat_P = value_range(reward_PG) == 0
    rescued_P = enough_P & ~flat_P

    mean_P = torch.nanmean(reward_PG, dim=1)
    filled_PG = torch.where(judged_PG, reward_PG, mean_P.unsqueeze(1))
    column_PG = filled_PG.masked_fill(~(scored_PG & rescued_P.unsqueeze(1)), torch.nan)

    factor_P = ((n_judged_P - 1).clamp(min=0) / (n_scored_P - 1).clamp(min=1)).sqrt()
    spread_factor_P = torch.where(rescued_P, factor_P, 1.0).to(reward_PG.dtype)
    return JudgedGroups(rescued_P, enough_P & flat_P, column_PG, spread_factor_P)


def fill_mixed_groups(
    outcome_PG: Tensor,
    reward_PG: Tensor,
    other_reward_PG: Tensor,
    mixed_P: Tensor,
    success_threshold: float,
    judge_weight: float,
    masked_PG: Tensor | None = None,
) -> Tensor:
    """
    The judge's column for the wrong completions of mixed groups, NaN wherever GRPO's reward stays as it is (Eq. 2 read
    literally: every wrong completion earns the reward of its correct prefix; a correct one keeps its outcome reward).

    The judge's reward is scaled down where, with `judge_weight`, it would lift a wrong completion above the least
    correct one of its group, whatever the scale of the outcome. A completion that the judge abstained on gets the mean
    of its group's judged ones, and so does one in `masked_PG`, about which nobody was asked. A group with verdicts for
    fewer than half of its other wrong completions stays empty.
    `other_reward_PG` is the weighted sum of all other rewards.
    """
    wrong_PG = (outcome_PG < success_threshold) & mixed_P.unsqueeze(1)
    correct_PG = (outcome_PG >= success_threshold) & mixed_P.unsqueeze(1)
    reward_PG = reward_PG.masked_fill(~wrong_PG, torch.nan)
    judged_PG = ~torch.isnan(reward_PG)
    n_judged_P = judged_PG.sum(dim=1)
    askable_PG = wrong_PG if masked_PG is None else wrong_PG & ~masked_PG
    enough_P = (n_judged_P >= 1) & (2 * n_judged_P >= askable_PG.sum(dim=1))
    mean_P = torch.nanmean(reward_PG, dim=1)
    filled_PG = torch.where(judged_PG, reward_PG, mean_P.unsqueeze(1))

    least_correct_P = other_reward_PG.masked_fill(~correct_PG, torch.inf).amin(dim=1)
    room_PG = (least_correct_P.unsqueeze(1) - other_reward_PG).clamp(min=0)
    share_PG = (room_PG / judge_weight).clamp(max=1) if judge_weight > 0 else torch.zeros_like(room_PG)
    keep_PG = wrong_PG & enough_P.unsqueeze(1) & (share_PG > 0)
    return (filled_PG * share_PG).masked_fill(~keep_PG, torch.nan)


def blend_advantages(advantage_PG: Tensor, without_judge_PG: Tensor, factor_P: Tensor) -> Tensor:
    """
    Scales the judge's part of the advantages, which is what they are more than they would be without the judge:
    `A = A_without + factor * (A_with - A_without)`. A factor of 1 leaves the values as they are, bit for bit; a factor
    of 0 gives GRPO's.
    """
    factor_PG = factor_P.unsqueeze(1).expand_as(advantage_PG)
    blended_PG = without_judge_PG + factor_PG * (advantage_PG - without_judge_PG)
    return torch.where(factor_PG == 1, advantage_PG, blended_PG)
