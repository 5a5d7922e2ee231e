"""
The baseline of credit per token, `prefix_baseline="group"`: how many completions of the group get a step right. Without
it a verified step earns the same whatever the others did. A step that all get right is then pushed up again and again,
which teaches nothing and lowers the entropy. Shape suffixes: `_P` groups, `_G` completions of a group, `_K` steps of a
completion. NaN means "no verdict". Nothing here knows about TRL.
"""

import torch
from torch import Tensor


def centred_credit(
    verified_G: Tensor, n_verified: int, prefix_reward: float = 1.0, error_penalty: float = 1.0
) -> Tensor:
    """
    What each of the `n_verified` verified steps of a completion earns against its group, and then the first wrong one,
    shape `(K,)` with K = `n_verified` + 1. Among the completions that are right up to step k, a share p_k gets it right:

    - A verified step earns `prefix_reward * (1 - p_k)`.
    - The first wrong step earns `-error_penalty * p_k`.

    So a step that all get right, or nobody, earns exactly 0. If both factors are 1, the credit of the k-th steps of a
    group sums to 0.

    Args:
        verified_G (`torch.Tensor` of shape `(G,)`):
            The number of verified steps of each completion of the group, this one's among them; NaN without a verdict,
            infinite for a right completion.
        n_verified (`int`):
            The number of verified steps of this completion.

    Example:

    ```python
    >>> verified = torch.tensor([1.0, 0.0, 3.0, 2.0])  # 3 of 4 get step 1 right, 2 of 3 step 2, 1 of 2 step 3
    >>> centred_credit(verified, 2)  # of the fourth completion, whose third step is wrong
    tensor([ 0.2500,  0.3333, -0.5000])
    ```
    """
    step_K = torch.arange(n_verified + 1, device=verified_G.device).unsqueeze(1)
    reached_K, right_K = (verified_G >= step_K).sum(dim=1), (verified_G > step_K).sum(dim=1)  # NaN compares false
    # Whole numbers are subtracted, so that nothing is left of equal ones
    credit_K = prefix_reward * (reached_K - right_K) / reached_K
    credit_K[-1] = -error_penalty * right_K[-1] / reached_K[-1]
    return credit_K
