"""
The exclusion of dead groups (AGPO, arXiv 2503.15952): groups without any advantage are left out of what the loss
divides by. It is no treatment but a control that comes after any of them, `exclude_dead_groups=True`.
"""

import torch
from torch import Tensor

from trl_sgpo.groups import value_range
from trl_sgpo.policy import Policy
from trl_sgpo.rounds import Round


# By what each of TRL's losses divides
LOSS_DENOMINATORS = {
    **dict.fromkeys(("dapo", "cispo", "vespo", "bnpo"), "tokens"),
    **dict.fromkeys(("grpo", "sapo", "dr_grpo", "luspo"), "rows"),
}


def check_loss_type(loss_type: str, option: str) -> None:
    """Raises a `ValueError` for a loss of which it is not known what it divides by, as the `option` has to know."""
    if loss_type not in LOSS_DENOMINATORS:
        raise ValueError(
            f"{option}=True cannot be combined with loss_type={loss_type!r}: it is not known what that loss divides by. Use "
            f"one of {sorted(LOSS_DENOMINATORS)}, or leave {option} out."
        )


def rounding_residue(round: Round, aggregation: str) -> Tensor:
    """
    GRPO's advantages of this rank's completions in groups of equal rewards, where taking the mean leaves a rounding
    residue, and 0 in all other groups, shape `(B,)`.
    """
    if aggregation == "sum_then_normalize":
        equal_P = value_range(round.others_PG) == 0
    else:
        equal_P = torch.stack([value_range(reward_PG) == 0 for reward_PG in round.rewards_PGF.unbind(dim=2)]).all(
            dim=0
        )
    return round.advantages_B.masked_fill(~round.local(equal_P), 0.0)


def without_dead_groups(advantages: Tensor, round: Round, policy: Policy, loss_type: str) -> Tensor:
    """
    The advantages that the treatment gives, multiplied so that the loss is as if the rows of groups without any
    advantage were not in its denominator. Every rank joins the gather in it. The loss's policy term is linear in a
    positive factor on the advantages, whatever its type. The terms of KL and entropy do not see it. What the log has
    to show is put into the round.
    """
    own_BT = round.own_BT
    advantages_BT = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    alive_B = (advantages_BT * own_BT != 0).any(dim=1)  # a completion whose tokens are masked has no loss
    n_tokens_B = own_BT.sum(dim=1)
    alive_PG, n_tokens_PG, shown_PG = policy.gather(
        torch.stack([alive_B.float(), n_tokens_B.float(), round.per_completion(advantages).float()], dim=1)
    ).unbind(dim=2)
    live_P = alive_PG.bool().any(dim=1)
    round.metrics["sgpo/groups/dead"] = 1 - live_P.float().mean().item()
    per_token = LOSS_DENOMINATORS[loss_type] == "tokens"
    factor = exclusion_factor(live_P, n_tokens_PG if per_token else torch.ones_like(n_tokens_PG))
    round.advantages_PG = factor * shown_PG.masked_fill(~live_P.unsqueeze(1), 0.0)
    return advantages if live_P.all() else factor * advantages


def exclusion_factor(live_P: Tensor, size_PG: Tensor) -> float:
    """
    What the advantages of the live groups are multiplied by so that groups without any advantage do not dilute them. A
    loss that divides by the size of all groups, dead ones included, then equals one that divides by the size of the
    live ones. 1 if no group is dead, or none is live. `size_PG` is what each completion adds to the loss's
    denominator: its number of tokens, or 1.

    Example:

    ```python
    >>> exclusion_factor(torch.tensor([True, False]), torch.tensor([[10.0, 20.0], [30.0, 60.0]]))
    4.0
    ```
    """
    size_P = size_PG.cpu().double().sum(dim=1)  # some accelerators have no float64
    live_size = size_P[live_P.cpu()].sum().item()
    return size_P.sum().item() / live_size if live_size > 0 else 1.0
