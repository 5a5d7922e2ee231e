"""
Treatments of failed groups that need no judge, the controls of a comparison with a step-wise judge. Each adds its
advantages to those that the rewards of a failed group give (0 if the outcome is the only reward). Shape suffixes: `_P`
groups, `_G` completions of a group, `_N` completions, `_T` tokens; NaN means "no value". Left out on purpose: whatever
the papers change besides failed groups. NGRPO calibrates mixed groups too and clips asymmetrically, RL-ZVP rewards
solved groups, LENS penalises the wrong completions of mixed groups and estimates its difficulty `D` per prompt.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trl_sgpo.groups import group_advantages, value_range
from trl_sgpo.policy import Policy
from trl_sgpo.rounds import Round
from trl_sgpo.treatments.base import Treatment


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig


# RL-ZVP's scale of entropies to advantages
ZVP_ALPHA = 0.1

# LENS' estimate of a prompt's difficulty, at its most cautious: the penalty is then the odds of the completion
LENS_DIFFICULTY = 1.0

# A likelihood comes no closer than this share to LENS' pole at `D`
LENS_MARGIN = 1e-3

# Rewards that differ by less come from likelihoods that are equal but for rounding: normalising would turn it into a signal
LENS_TIE = 1e-6


class _WithoutJudge(Treatment):
    """What these treatments share: their weight, and which completions they speak of."""

    def setup(self, args: "SGPOConfig") -> None:
        super().setup(args)
        self.weight = args.failed_group_weight

    @staticmethod
    def _failed_outcome(round: Round) -> Tensor:
        """The outcomes of failed groups, shape `(P, G)`; NaN elsewhere."""
        return round.outcome_PG.masked_fill(~round.kinds.failed_P.unsqueeze(1), torch.nan)

    def _add(self, round: Round, added_PG: Tensor) -> Tensor:
        return round.advantages_B + round.local(self.weight * added_PG).to(round.advantages_B)


class NSR(_WithoutJudge):
    """Negative sample reinforcement: -1 for every wrong completion of a failed group."""

    name = "nsr"

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        return self._add(round, nsr_advantages(self._failed_outcome(round)))


class NGRPO(_WithoutJudge):
    """Eq. 1 over the group's outcome rewards and one virtual success."""

    name = "ngrpo"

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        # A success earns at least the threshold; the usual outcome reward of one is 1
        return self._add(round, ngrpo_advantages(self._failed_outcome(round), max(1.0, round.success_threshold)))


class ZVP(_WithoutJudge):
    """RL-ZVP: blame per token, the larger the surer the policy was. One more forward pass in rounds with a failed group."""

    name = "zvp"
    per_token = True

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        _, entropy_BT = policy.score(round)
        failed_B = round.local(~torch.isnan(self._failed_outcome(round)))
        plain_B = round.advantages_B
        blame_BT = self.weight * zvp_advantages(entropy_BT, round.own_BT & failed_B.unsqueeze(1)).to(plain_B)
        return plain_B.unsqueeze(1) + blame_BT if failed_B.any() else plain_B


class LENS(_WithoutJudge):
    """The surer the policy was of a wrong completion, the lower its reward, which is then normalised inside the group."""

    name = "lens"

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        logps_BT = round.old_logps_BT
        if logps_BT is None:
            logps_BT, _ = policy.score(round)
        likelihood_PG = policy.gather(sequence_likelihood(logps_BT.float(), round.own_BT))
        failed_PG = ~torch.isnan(self._failed_outcome(round))
        return self._add(round, lens_advantages(likelihood_PG.masked_fill(~failed_PG, torch.nan)))


def nsr_advantages(outcome_PG: Tensor) -> Tensor:
    """
    Negative sample reinforcement (NSR, arXiv 2506.01347; also arXiv 2605.07689): `A = -1` for a wrong completion,
    whatever the others of its group are, and 0 where there is no outcome.

    Example:

    ```python
    >>> nsr_advantages(torch.tensor([[0.0, 0.0, float("nan")]]))
    tensor([[-1., -1.,  0.]])
    ```
    """
    return torch.where(torch.isnan(outcome_PG), 0.0, -1.0).to(outcome_PG.dtype)


def ngrpo_advantages(outcome_PG: Tensor, max_reward: float = 1.0) -> Tensor:
    """
    The advantage calibration of NGRPO (arXiv 2509.18851): Eq. 1 with the mean and the standard deviation taken over
    the rewards of the group and one virtual completion that has the largest reward there is,
    `A_i = (r_i - mean(r, r_max)) / (std(r, r_max) + 1e-4)`. For n equal rewards that is `-1 / sqrt(n + 1)`, whatever
    `r_max` is. 0 where there is no outcome.

    The paper calibrates every group in this way; here the formula is meant for failed groups only. The paper's other
    half, asymmetric clipping, is `epsilon=0.16, epsilon_high=0.24` of `GRPOConfig`.

    Example:

    ```python
    >>> ngrpo_advantages(torch.zeros(1, 3))
    tensor([[-0.4999, -0.4999, -0.4999]])
    ```
    """
    virtual_P1 = outcome_PG.new_full((len(outcome_PG), 1), max_reward)
    return group_advantages(torch.cat([outcome_PG, virtual_P1], dim=1))[:, :-1]


def zvp_advantages(entropy_NT: Tensor, mask_NT: Tensor, alpha: float = ZVP_ALPHA) -> Tensor:
    """
    The advantages per token of a wrong completion in RL-ZVP (arXiv 2509.21880): `A_t = -alpha * (max_k H_k - H_t)`,
    with `H_t` the entropy of the policy where it wrote token t. Where the policy was surest it is blamed most; where
    it was least sure, that is, where it was exploring, not at all. Tokens outside the mask, which the policy did not
    write, get 0 and take no part in the maximum.

    Example:

    ```python
    >>> zvp_advantages(torch.tensor([[1.0, 3.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]]))
    tensor([[-0.2000,  0.0000, -0.1000,  0.0000]])
    ```
    """
    highest_N1 = entropy_NT.masked_fill(~mask_NT, -torch.inf).amax(dim=1, keepdim=True)
    return (alpha * (entropy_NT - highest_N1)).masked_fill(~mask_NT, 0.0)


def sequence_likelihood(logps_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """
    The length-normalised likelihood of each completion, `exp(mean_t log pi(y_t))`, the confidence that LENS goes by:
    shape `(N,)`, in (0, 1], NaN for a completion without a token in the mask.

    Example:

    ```python
    >>> sequence_likelihood(torch.tensor([[0.5, 0.125, 0.9]]).log(), torch.tensor([[True, True, False]]))
    tensor([0.2500])
    ```
    """
    return (logps_NT.masked_fill(~mask_NT, 0.0).sum(dim=1) / mask_NT.sum(dim=1)).exp()


def lens_rewards(likelihood_PG: Tensor, difficulty: float = LENS_DIFFICULTY) -> Tensor:
    """
    The rewards of wrong completions in LENS (arXiv 2510.08696): `r = -pi / (D - pi)`, so the surer the policy was of a
    wrong completion, the more it costs. NaN stays NaN. The difficulty `D` is in (0, 1]. A likelihood that reaches it
    is taken to lie just below, where the reward is -999.

    Example:

    ```python
    >>> lens_rewards(torch.tensor([[0.2, 0.5, 0.75]]))
    tensor([[-0.2500, -1.0000, -3.0000]])
    ```
    """
    below_PG = likelihood_PG.clamp(max=difficulty * (1 - LENS_MARGIN))
    return -below_PG / (difficulty - below_PG)


def lens_advantages(likelihood_PG: Tensor, difficulty: float = LENS_DIFFICULTY) -> Tensor:
    """
    The advantages that LENS' rewards (see [`lens_rewards`]) give inside a failed group by Eq. 1, 0 where there is no
    likelihood. A group of equal likelihoods gets exactly 0: what rounding leaves of such a group is no signal.

    Example:

    ```python
    >>> lens_advantages(torch.tensor([[0.2, 0.5, 0.75], [0.3, 0.3, 0.3]]))
    tensor([[ 0.8206,  0.2931, -1.1137],
            [ 0.0000,  0.0000,  0.0000]])
    ```
    """
    reward_PG = lens_rewards(likelihood_PG, difficulty)
    tied_P = value_range(reward_PG) <= LENS_TIE
    return group_advantages(reward_PG).masked_fill(tied_P.unsqueeze(1), 0.0)
