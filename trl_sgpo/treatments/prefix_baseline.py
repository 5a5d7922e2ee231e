"""
The baseline of credit per token, `prefix_baseline="group"`: how many completions of the group get a step right. Without
it a verified step earns the same whatever the others did. A step that all get right is then pushed up again and again,
which teaches nothing and lowers the entropy. Shape suffixes: `_P` groups, `_G` completions of a group, `_K` steps of a
completion. NaN means "no verdict". Nothing here knows about TRL.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from trl_sgpo.judges.stepwise import StepScore
from trl_sgpo.rounds import Judged


def verified_extent(judged: Judged, unit: str) -> Tensor:
    """
    How far each completion is verified, shape `(P, G)`: the number of its steps before the first wrong one, or with
    `unit="characters"` their share of its characters. Nothing more has to be gathered for it.
    """
    if unit == "characters":
        return judged.rts_characters_PG
    return (judged.rts_steps_PG * judged.n_steps_PG).round()  # exact up to four million steps


def step_starts(score: StepScore, unit: str) -> list[float]:
    """Where each verified step of a completion starts, and then its first wrong one, counted as [`verified_extent`]."""
    if score.cut is None or score.first_error is None:  # an empty completion: ending at once is its error
        return [0.0]
    if unit == "steps":
        return [float(k) for k in range(score.first_error + 1)]
    lengths = [end - start for start, end in score.cut.spans]
    return [before / sum(lengths) for before in accumulate(lengths[: score.first_error], initial=0)]


def centred_credit(
    verified_G: Tensor, starts: Sequence[float], prefix_reward: float = 1.0, error_penalty: float = 1.0
) -> Tensor:
    """
    What each verified step of a completion earns against its group, and then the first wrong one, shape `(K,)`. Among
    the completions that are right up to where a step starts, a share p is still right where it ends:

    - A verified step earns `prefix_reward * (1 - p)`.
    - The first wrong step earns `-error_penalty * p`. It ends where it starts: p is the share that gets beyond its start.

    So a step that all get right, or nobody, earns exactly 0. If both factors are 1 and steps are counted, the credit of
    the k-th steps of a group sums to 0.

    Args:
        verified_G (`torch.Tensor` of shape `(G,)`):
            How far each completion of the group is verified, this one's among them; NaN without a verdict, infinite for
            a right completion. In steps, or in shares of the characters.
        starts (`Sequence[float]` of length K):
            Where each verified step starts, and then the first wrong one, in the same unit.

    Example:

    ```python
    >>> verified = torch.tensor([1.0, 0.0, 3.0, 2.0])  # 3 of 4 get step 1 right, 2 of 3 step 2, 1 of 2 step 3
    >>> centred_credit(verified, [0, 1, 2])  # of the fourth completion, whose third step is wrong
    tensor([ 0.2500,  0.3333, -0.5000])
    ```
    """
    starts_K = torch.tensor(starts, dtype=verified_G.dtype, device=verified_G.device).unsqueeze(1)
    reached_K = (verified_G >= starts_K).sum(dim=1)  # NaN compares false
    right_K = torch.cat([reached_K[1:], (verified_G > starts_K[-1]).sum(dim=0, keepdim=True)])
    # Whole numbers are subtracted, so that nothing is left of equal ones
    credit_K = prefix_reward * (reached_K - right_K) / reached_K
    credit_K[-1] = -error_penalty * right_K[-1] / reached_K[-1]
    return credit_K
