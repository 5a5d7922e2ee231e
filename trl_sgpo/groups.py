"""
The method as pure tensor functions: which groups failed, what a reasoning trajectory score (RTS) is worth, what is
written into the judge's column of the reward matrix, and what becomes of the advantages.

Shape suffixes: `_P` prompts (groups), `_G` completions of a group. NaN means "no value": an outcome reward that is
None, a completion that nobody judged, a cell of the judge's column that stays empty. Nothing here knows about TRL,
judges or processes. Per-token advantages are in `credit.py`.

Paper: Stepwise Guided Policy Optimization, arXiv 2505.11595.
"""

from typing import NamedTuple

import torch
from torch import Tensor


TRANSFORMS = ("logistic", "identity")

# What GRPOTrainer adds to the standard deviation before it divides by it
STD_EPSILON = 1e-4


class GroupKinds(NamedTuple):
    """Which groups are what, each of shape `(P,)` and boolean. A group with too few outcomes is none of the three."""

    solved_P: Tensor
    mixed_P: Tensor
    failed_P: Tensor


def group_kinds(outcome_PG: Tensor, success_threshold: float) -> GroupKinds:
    """
    Sorts groups by their outcome rewards. A group counts only if at least two of its completions have an outcome.

    Args:
        outcome_PG (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards, NaN where a completion has none.
        success_threshold (`float`):
            A completion is correct when its outcome reward reaches this value.

    Returns:
        [`GroupKinds`]: solved (all correct), mixed (some correct), failed (none correct; the paper's all-negative-sample
        groups).

    Example:

    ```python
    >>> nan = float("nan")
    >>> group_kinds(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.2], [0.0, nan]]), success_threshold=0.5).failed_P
    tensor([False, False,  True, False])
    ```
    """
    scored_PG = ~torch.isnan(outcome_PG)
    n_scored_P = scored_PG.sum(dim=1)
    n_correct_P = (outcome_PG >= success_threshold).sum(dim=1)  # NaN compares false
    counts_P = n_scored_P >= 2
    solved_P = counts_P & (n_correct_P == n_scored_P)
    failed_P = counts_P & (n_correct_P == 0)
    return GroupKinds(solved_P, counts_P & ~solved_P & ~failed_P, failed_P)


def rts_to_reward(rts: Tensor, beta: float = 10.0, gamma: float = 0.5, transform: str = "logistic") -> Tensor:
    """
    The reward of a wrong completion (Eq. 2): `1 / (1 + exp(-beta * (RTS - gamma)))`, which increases with RTS.

    The paper's text gives "gamma and beta, taken as 10 and 0.5". Read literally that is gamma=10, beta=0.5, and every
    reward lies between 0.007 and 0.011; the sensible reading, and the default here, is beta=10, gamma=0.5.

    Args:
        rts (`torch.Tensor`):
            Reasoning trajectory scores in [0, 1], any shape, NaN where there is none.
        beta (`float`, *optional*, defaults to `10.0`):
            Steepness of the logistic.
        gamma (`float`, *optional*, defaults to `0.5`):
            The RTS that earns a reward of one half.
        transform (`str`, *optional*, defaults to `"logistic"`):
            `"logistic"` (Eq. 2) or `"identity"`: the reward is the RTS itself, the paper's ablation.

    Returns:
        `torch.Tensor`: Rewards in [0, 1] of the same shape, NaN where `rts` is.

    Example:

    ```python
    >>> rts_to_reward(torch.tensor([0.0, 0.5, 0.6]))
    tensor([0.0067, 0.5000, 0.7311])
    ```
    """
    if transform == "logistic":
        return torch.sigmoid(beta * (rts - gamma))
    if transform == "identity":
        return rts.clone()
    raise ValueError(f"transform={transform!r} is unknown: it must be one of {list(TRANSFORMS)}.")


def value_range(values_PG: Tensor) -> Tensor:
    """Largest minus smallest value of each group, shape `(P,)`, NaN left out; 0 where a group has no value."""
    low_P = values_PG.nan_to_num(nan=torch.inf).amin(dim=1)
    high_P = values_PG.nan_to_num(nan=-torch.inf).amax(dim=1)
    return torch.where(low_P <= high_P, high_P - low_P, 0.0)


class JudgedGroups(NamedTuple):
    """
    What the verdicts make of the failed groups.

    Args:
        column_PG (`torch.Tensor` of shape `(P, G)`):
            The judge's column of the reward matrix, NaN wherever GRPO's reward stays as it is.
        rescued_P, tied_P (`torch.Tensor` of shape `(P,)`):
            Failed groups that have a gradient now; failed groups whose scores are equal, or span less than allowed.
            Failed groups with too few verdicts are neither.
        spread_factor_P (`torch.Tensor` of shape `(P,)`):
            `sqrt((J - 1) / (n - 1))` for rescued groups with J verdicts among n completions, else 1. See
            [`fill_failed_groups`].
    """

    column_PG: Tensor
    rescued_P: Tensor
    tied_P: Tensor
    spread_factor_P: Tensor


def fill_failed_groups(
    outcome_PG: Tensor, rts_PG: Tensor, reward_PG: Tensor, failed_P: Tensor, min_rts_spread: float = 0.0
) -> JudgedGroups:
    """
    The judge's column for the failed groups.

    - A group with verdicts for fewer than half of its completions, or fewer than two, stays empty.
    - A tied group stays empty. Writing equal rewards would not be the same: the mean of eight times 0.0067 leaves a
      rounding residue, and an optimizer that normalises its steps turns the residue into a full-size one.
    - Elsewhere a judged completion gets its reward, and one the judge abstained on gets the mean of its group's judged
      rewards: its advantage is 0 and the others' mean does not move. The group's standard deviation shrinks,
      however, by `sqrt((J - 1) / (n - 1))`; where advantages are divided by it they must be multiplied by this factor
      (`spread_factor_P`), else two verdicts among eight rows would earn advantages of 1.87 instead of 0.71.
    - A completion without an outcome stays empty: it stays unscorable.

    Args:
        outcome_PG (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards, NaN where a completion has none.
        rts_PG (`torch.Tensor` of shape `(P, G)`):
            Reasoning trajectory scores, NaN where there is no verdict.
        reward_PG (`torch.Tensor` of shape `(P, G)`):
            Their rewards (see [`rts_to_reward`]), NaN where there is no verdict.
        failed_P (`torch.Tensor` of shape `(P,)`):
            Which groups failed.
        min_rts_spread (`float`, *optional*, defaults to `0.0`):
            A group whose RTS range is smaller counts as tied.

    Returns:
        [`JudgedGroups`]

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

    enough_P = failed_P & (n_judged_P >= 2) & (2 * n_judged_P >= n_scored_P)
    range_P = value_range(rts_PG)
    # Different scores may still earn equal rewards, where the logistic is flat to machine precision
    flat_P = (range_P == 0) | (value_range(reward_PG) == 0) | (range_P < min_rts_spread)
    rescued_P = enough_P & ~flat_P

    mean_P = torch.nanmean(reward_PG, dim=1)
    filled_PG = torch.where(judged_PG, reward_PG, mean_P.unsqueeze(1))
    column_PG = filled_PG.masked_fill(~(scored_PG & rescued_P.unsqueeze(1)), torch.nan)

    factor_P = ((n_judged_P - 1).clamp(min=0) / (n_scored_P - 1).clamp(min=1)).sqrt()
    spread_factor_P = torch.where(rescued_P, factor_P, 1.0).to(reward_PG.dtype)
    return JudgedGroups(column_PG, rescued_P, enough_P & flat_P, spread_factor_P)


class CreditedGroups(NamedTuple):
    """Failed groups whose verdicts pay tokens; those that were judged and pay none. Each of shape `(P,)` and boolean."""

    rescued_P: Tensor
    tied_P: Tensor


def credited_groups(
    outcome_PG: Tensor, rts_PG: Tensor, failed_P: Tensor, min_rts_spread: float = 0.0
) -> CreditedGroups:
    """
    The failed groups whose verdicts pay tokens. What a token earns is not relative to the group, so equal scores teach too;
    these groups do not:

    - One with verdicts for fewer than half of its completions. A judge that mostly abstains, as a vote of judges that do not
      agree does, is one whose remaining verdicts are luck.
    - One in which no completion has a right step. There is blame alone, and it says what not to write, of nearly everything: a
      policy that cannot do the task at all is driven to whatever is not blamed, and forgets what it could do.
    - One whose RTS span less than `min_rts_spread`.

    Args:
        outcome_PG (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards, NaN where a completion has none.
        rts_PG (`torch.Tensor` of shape `(P, G)`):
            Reasoning trajectory scores, NaN where there is no verdict.
        failed_P (`torch.Tensor` of shape `(P,)`):
            Which groups failed.
        min_rts_spread (`float`, *optional*, defaults to `0.0`):
            The RTS range that a group needs.

    Returns:
        [`CreditedGroups`]: Failed groups with too few verdicts are neither.

    Example:

    ```python
    >>> nan = float("nan")
    >>> rts = torch.tensor([[0.4, 0.4], [0.0, 0.0], [nan, nan]])
    >>> credited_groups(torch.zeros(3, 2), rts, torch.tensor([True, True, True]))
    CreditedGroups(rescued_P=tensor([ True, False, False]), tied_P=tensor([False,  True, False]))
    ```
    """
    judged_PG = ~torch.isnan(rts_PG)
    enough_P = failed_P & (2 * judged_PG.sum(dim=1) >= (~torch.isnan(outcome_PG)).sum(dim=1))
    right_step_P = rts_PG.nan_to_num(nan=0.0).amax(dim=1) > 0
    rescued_P = enough_P & right_step_P & (value_range(rts_PG) >= min_rts_spread)
    return CreditedGroups(rescued_P, enough_P & ~rescued_P)


def fill_mixed_groups(
    outcome_PG: Tensor,
    reward_PG: Tensor,
    other_reward_PG: Tensor,
    mixed_P: Tensor,
    success_threshold: float,
    judge_weight: float,
) -> Tensor:
    """
    The judge's column for the wrong completions of mixed groups (Eq. 2 read literally: every wrong completion earns the
    reward of its correct prefix; a correct one keeps its outcome reward).

    The judge's reward of a wrong completion is scaled down where, with its weight, it would lift that completion above
    the least correct one of its group, whatever the scale of the outcome. A completion that the judge abstained on gets
    the mean of its group's judged ones; a group with verdicts for fewer than half of its wrong completions stays empty.

    Args:
        outcome_PG (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards, NaN where a completion has none.
        reward_PG (`torch.Tensor` of shape `(P, G)`):
            Rewards of the judged completions in [0, 1], NaN where there is no verdict.
        other_reward_PG (`torch.Tensor` of shape `(P, G)`):
            The weighted sum of all other rewards.
        mixed_P (`torch.Tensor` of shape `(P,)`):
            Which groups are mixed.
        success_threshold (`float`):
            A completion is correct when its outcome reward reaches this value.
        judge_weight (`float`):
            The weight of the judge's column.

    Returns:
        `torch.Tensor` of shape `(P, G)`: The judge's column, NaN wherever GRPO's reward stays as it is.
    """
    wrong_PG = (outcome_PG < success_threshold) & mixed_P.unsqueeze(1)
    correct_PG = (outcome_PG >= success_threshold) & mixed_P.unsqueeze(1)
    reward_PG = reward_PG.masked_fill(~wrong_PG, torch.nan)
    judged_PG = ~torch.isnan(reward_PG)
    n_judged_P = judged_PG.sum(dim=1)
    enough_P = (n_judged_P >= 1) & (2 * n_judged_P >= wrong_PG.sum(dim=1))
    mean_P = torch.nanmean(reward_PG, dim=1)
    filled_PG = torch.where(judged_PG, reward_PG, mean_P.unsqueeze(1))

    least_correct_P = other_reward_PG.masked_fill(~correct_PG, torch.inf).amin(dim=1)
    room_PG = (least_correct_P.unsqueeze(1) - other_reward_PG).clamp(min=0)
    share_PG = (room_PG / judge_weight).clamp(max=1) if judge_weight > 0 else torch.zeros_like(room_PG)
    keep_PG = wrong_PG & enough_P.unsqueeze(1) & (share_PG > 0)
    return (filled_PG * share_PG).masked_fill(~keep_PG, torch.nan)


def weighted_sum(rewards_PGF: Tensor, weights_F: Tensor) -> Tensor:
    """
    The reward of each completion, shape `(P, G)`: the weighted sum of its rewards, None (NaN) ones left out; NaN if all
    are.
    """
    total_PG = (rewards_PGF * weights_F).nansum(dim=-1)
    return total_PG.masked_fill(torch.isnan(rewards_PGF).all(dim=-1), torch.nan)


def _nanstd(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Unbiased standard deviation, NaN left out and the dimension kept; NaN where fewer than two values are left."""
    n = (~torch.isnan(values)).sum(dim=dim, keepdim=True)
    mean = values.nansum(dim=dim, keepdim=True) / n
    return (((values - mean) ** 2).nansum(dim=dim, keepdim=True) / (n - 1)).sqrt().masked_fill(n < 2, torch.nan)


def group_advantages(reward_PG: Tensor, scale_rewards: str = "group", scale_PG: Tensor | None = None) -> Tensor:
    """
    Advantages inside each group (Eq. 1): `A_i = (r_i - mean(r)) / (std(r) + 1e-4)`.

    Args:
        reward_PG (`torch.Tensor` of shape `(P, G)`):
            Rewards, NaN where a completion is unscorable.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What to divide by, as in `GRPOConfig`: the standard deviation of the group, that of the whole `"batch"`, or
            `"none"`.
        scale_PG (`torch.Tensor` of shape `(P, G)`, *optional*):
            The rewards to take the standard deviation of `"batch"` from, when they are not `reward_PG` itself.

    Returns:
        `torch.Tensor` of shape `(P, G)`: The advantages, 0 for unscorable completions.

    Example:

    ```python
    >>> group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    tensor([[-0.8659, -0.8659,  0.8659,  0.8659]])
    ```
    """
    advantage_PG = reward_PG - torch.nanmean(reward_PG, dim=1, keepdim=True)
    if scale_rewards == "group":
        advantage_PG = advantage_PG / (_nanstd(reward_PG, dim=1) + STD_EPSILON)
    elif scale_rewards == "batch":
        advantage_PG = advantage_PG / (_nanstd(reward_PG if scale_PG is None else scale_PG, dim=(0, 1)) + STD_EPSILON)
    return advantage_PG.nan_to_num(nan=0.0)


def blend_advantages(advantage_PG: Tensor, without_judge_PG: Tensor, factor_P: Tensor) -> Tensor:
    """
    Scales the judge's part of the advantages, which is what they are more than they would be without the judge:
    `A = A_without + factor * (A_with - A_without)`. A factor of 1 leaves the values as they are, bit for bit; a factor
    of 0 gives GRPO's.
    """
    factor_PG = factor_P.unsqueeze(1).expand_as(advantage_PG)
    blended_PG = without_judge_PG + factor_PG * (advantage_PG - without_judge_PG)
    return torch.where(factor_PG == 1, advantage_PG, blended_PG)
