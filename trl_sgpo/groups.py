"""
Groups as pure tensor functions (arXiv 2505.11595): which of them failed (`group_kinds`), what a reasoning trajectory
score is worth (Eq. 2, `rts_to_reward`), and the advantages inside a group (Eq. 1, `group_advantages`). Shape suffixes:
`_P` prompts (groups), `_G` completions of a group, `_F` reward functions. NaN means "no value": an outcome reward that
is None, a completion that nobody judged. Nothing here knows about TRL's trainer, judges or processes.
"""

from dataclasses import dataclass
from math import comb
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
    Sorts groups by their outcome rewards: solved (all correct), mixed (some correct), failed (none correct; the
    paper's all-negative-sample groups). A group counts only if at least two of its completions have an outcome. A
    completion is correct when its outcome reward reaches the threshold.

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


@dataclass
class SortedGroups:
    """
    What the verdicts make of the failed groups: those that teach now, and those that were judged and teach nothing all
    the same, both boolean of shape `(P,)`. Failed groups with too few verdicts are neither.
    """

    rescued_P: Tensor
    tied_P: Tensor


def group_pass_at_k(outcome_PG: Tensor, success_threshold: float) -> dict[int, float]:
    """
    Mean pass@k over the groups, for k = 1, 2, 4, ... and G: `1 - C(n - c, k) / C(n, k)` for a group with n outcomes of
    which c are correct (arXiv 2107.03374). A group with fewer than k outcomes does not count, and a k without any
    group is left out.

    Example:

    ```python
    >>> group_pass_at_k(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), success_threshold=0.5)
    {1: 0.25, 2: 0.5}
    ```
    """
    size = outcome_PG.shape[1]
    n_scored = (~torch.isnan(outcome_PG)).sum(dim=1).tolist()
    n_correct = (outcome_PG >= success_threshold).sum(dim=1).tolist()
    found = {}
    for k in sorted({2**i for i in range(size.bit_length()) if 2**i <= size} | {size}):
        estimates = [1 - comb(n - c, k) / comb(n, k) for n, c in zip(n_scored, n_correct, strict=True) if n >= k]
        if estimates:
            found[k] = sum(estimates) / len(estimates)
    return found


def rts_to_reward(rts: Tensor, beta: float = 10.0, gamma: float = 0.5, transform: str = "logistic") -> Tensor:
    """
    The reward of a wrong completion (Eq. 2), which increases with RTS: `1 / (1 + exp(-beta * (RTS - gamma)))`, or the
    RTS itself with `transform="identity"`, the paper's ablation. NaN stays NaN.

    The paper's text gives "gamma and beta, taken as 10 and 0.5". Read literally that is gamma=10, beta=0.5, and every
    reward lies between 0.007 and 0.011. The sensible reading, and the default here, is beta=10, gamma=0.5.

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


def enough_verdicts(outcome_PG: Tensor, rts_PG: Tensor) -> Tensor:
    """
    Which groups have verdicts for at least half of their completions with an outcome, shape `(P,)`, boolean. If the
    judge abstains on most of a group, for example because its votes disagree, the few verdicts left are unreliable.
    """
    n_judged_P = (~torch.isnan(rts_PG)).sum(dim=1)
    return (n_judged_P > 0) & (2 * n_judged_P >= (~torch.isnan(outcome_PG)).sum(dim=1))


def value_range(values_PG: Tensor) -> Tensor:
    """Largest minus smallest value of each group, shape `(P,)`, NaN left out; 0 where a group has no value."""
    low_P = values_PG.nan_to_num(nan=torch.inf).amin(dim=1)
    high_P = values_PG.nan_to_num(nan=-torch.inf).amax(dim=1)
    return torch.where(low_P <= high_P, high_P - low_P, 0.0)


def weighted_sum(rewards_PGF: Tensor, weights_F: Tensor) -> Tensor:
    """
    The reward of each completion, shape `(P, G)`: the weighted sum of its rewards. None (NaN) ones are left out. NaN
    if all are None.
    """
    total_PG = (rewards_PGF * weights_F).nansum(dim=-1)
    return total_PG.masked_fill(torch.isnan(rewards_PGF).all(dim=-1), torch.nan)


def nanstd(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """
    Unbiased standard deviation, NaN left out and the dimension kept; NaN where fewer than two values are left. The
    operations are those of TRL's function, in its order, so that equal rewards give advantages that are equal bit for
    bit.
    """
    n = (~torch.isnan(values)).sum(dim=dim, keepdim=True)
    variance = torch.nanmean((values - torch.nanmean(values, dim=dim, keepdim=True)) ** 2, dim=dim, keepdim=True)
    return (variance * (n / (n - 1)).masked_fill(n < 2, torch.nan)).sqrt()


def group_advantages(reward_PG: Tensor, scale_rewards: str = "group", scale_PG: Tensor | None = None) -> Tensor:
    """
    Advantages inside each group (Eq. 1): `A_i = (r_i - mean(r)) / (std(r) + 1e-4)`, 0 where the reward is NaN.

    Args:
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What to divide by, as in `GRPOConfig`: the standard deviation of the group, that of the whole `"batch"`, or
            `"none"`.
        scale_PG (`torch.Tensor` of shape `(P, G)`, *optional*):
            The rewards to take the standard deviation of `"batch"` from, when they are not `reward_PG` itself.

    Example:

    ```python
    >>> group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    tensor([[-0.8659, -0.8659,  0.8659,  0.8659]])
    ```
    """
    advantage_PG = reward_PG - torch.nanmean(reward_PG, dim=1, keepdim=True)
    if scale_rewards == "group":
        advantage_PG = advantage_PG / (nanstd(reward_PG, dim=1) + STD_EPSILON)
    elif scale_rewards == "batch":
        advantage_PG = advantage_PG / (nanstd(reward_PG if scale_PG is None else scale_PG, dim=(0, 1)) + STD_EPSILON)
    return advantage_PG.nan_to_num(nan=0.0)


def grpo_advantages(
    rewards_PGF: Tensor, weights_F: Tensor, scale_rewards: str = "group", aggregation: str = "sum_then_normalize"
) -> Tensor:
    """
    The advantages that GRPOTrainer makes of a reward matrix, shape `(P, G)`, 0 for a completion without any reward. A
    treatment needs them for a matrix that TRL has not seen. `aggregation` is `multi_objective_aggregation` of
    `GRPOConfig`:

    - `"sum_then_normalize"`: Eq. 1 of the weighted sum of the rewards.
    - `"normalize_then_sum"`: Eq. 1 of each reward by itself, their weighted sum, and that sum normalised over the
      batch. It does not look at `scale_rewards`.

    Example:

    ```python
    >>> grpo_advantages(torch.tensor([[[0.0, 1.0], [1.0, 1.0]]]), torch.tensor([1.0, 0.5]))
    tensor([[-0.7070,  0.7070]])
    ```
    """
    if aggregation == "sum_then_normalize":
        return group_advantages(weighted_sum(rewards_PGF, weights_F), scale_rewards)
    normalised_PGF = torch.stack([group_advantages(column_PG) for column_PG in rewards_PGF.unbind(dim=-1)], dim=-1)
    total_PG = weighted_sum(normalised_PGF.masked_fill(torch.isnan(rewards_PGF), torch.nan), weights_F)
    advantage_PG = (total_PG - torch.nanmean(total_PG)) / (nanstd(total_PG, dim=(0, 1)) + STD_EPSILON)
    return advantage_PG.nan_to_num(nan=0.0)
