"""
A world that is small enough to sum over all groups instead of sampling them. It gives the exact gradient of each method.

- A solution has H steps. At each step the policy makes one choice, right with probability `p_h = sigmoid(logit_h)`. The
  solution is right if all steps are.
- After the first error no choice matters, but the tokens are there and get advantages. They have logits of their own.
  Their expected gradient is 0, their variance is not.
- A group is G completions of one prompt. The advantages of a group depend only on how many of its completions are right,
  and on where the judge saw the first error of the others. There are few such multisets: 1287 for H = 5, G = 8.

The gradient of one group is the mean over its completions of `sum_h advantage_h * d log pi / d logit_h`. Left out: a neural
network, clipping, a KL term, lengths. Eq. 1 and Eq. 2 are those of `trl_sgpo.groups`.

Suffixes: `_H` steps, `_C` multisets of verdicts, `_G` completions of a group, `_M` verdicts (what is said about one
completion; the last one is "right"), `_T` right leading steps (0 to H), `_K` logits.

Two steps and groups of two are the setting of Theorem 3.3 of arXiv 2505.11595.
"""

from dataclasses import dataclass
from itertools import combinations
from math import comb, lgamma
from typing import NamedTuple

import numpy as np
import torch

from trl_sgpo.groups import group_advantages, rts_to_reward, value_range


ARMS = ("grpo", "grpo_live", "sgpo", "sgpo_all_incorrect", "prefix", "prefix_all_incorrect", "sign", "ngrpo")
JUDGED = ("sgpo", "sgpo_all_incorrect", "prefix", "prefix_all_incorrect")
NOISE_KINDS = ("uniform", "earlier", "later")


def sigmoid(logit: np.ndarray | float) -> np.ndarray:
    """`1 / (1 + exp(-logit))`, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logit, dtype=np.float64)))


def logit(probability: np.ndarray | float) -> np.ndarray:
    """`log(p / (1 - p))`."""
    probability = np.asarray(probability, dtype=np.float64)
    return np.log(probability) - np.log1p(-probability)


# The theorem


def two_step_gradient(p: float, q: float, arm: str) -> tuple[float, float]:
    """
    Theorem 3.3: what one iteration at a learning rate of 1 adds to the logits of p = P(right first step) and
    q = P(right second step | right first step). Groups of two, advantages of plus and minus 1, and rewards 0 / 1/2 / 1
    (`arm="sgpo"`) or 0 / 0 / 1 (`arm="grpo"`).

        SGPO   p (1 - p)      p^2 q (1 - q)
        GRPO   p (1 - p) q    p q (1 - q)

    ```python
    >>> two_step_gradient(0.5, 0.5, "sgpo"), two_step_gradient(0.5, 0.5, "grpo")
    ((0.25, 0.0625), (0.125, 0.125))
    ```
    """
    if arm == "sgpo":
        return p * (1 - p), p**2 * q * (1 - q)
    if arm == "grpo":
        return p * (1 - p) * q, p * q * (1 - q)
    raise ValueError(f"arm={arm!r} is not in the theorem: it must be 'sgpo' or 'grpo'. Other arms: `prepare`.")


def two_step_accuracy(start: float, arm: str, n_iterations: int) -> np.ndarray:
    """
    `p * q` before each of `n_iterations` iterations of Theorem 3.3 at a learning rate of 1, from `p = q = start`.

    ```python
    >>> two_step_accuracy(0.5, "grpo", 3).round(3)
    array([0.25 , 0.282, 0.318])
    ```
    """
    gaps, accuracy = [float(logit(start))] * 2, np.empty(n_iterations)
    for i in range(n_iterations):
        p, q = float(sigmoid(gaps[0])), float(sigmoid(gaps[1]))
        accuracy[i] = p * q
        dp, dq = two_step_gradient(p, q, arm)
        gaps = [gaps[0] + dp, gaps[1] + dq]
    return accuracy


# The world


def start_probability(share: float, n_steps: int, group_size: int, luck: float = 0.0) -> float:
    """
    The probability of a right step, the same at every step, at which a `share` of the groups fails. `luck` is the
    probability that a solution with an error has the right outcome. Raises `ValueError` if luck alone solves more groups.

    ```python
    >>> round(start_probability(0.95, n_steps=5, group_size=8), 3)
    0.364
    ```
    """
    right = (1 - share ** (1 / group_size) - luck) / (1 - luck)
    if not 0 < right < 1:
        most = (1 - luck) ** group_size
        raise ValueError(
            f"share={share} of failed groups is out of reach with luck={luck}: guesses alone leave at most {most:.3f} of "
            "the groups without a right outcome. Take a smaller share or less luck."
        )
    return right ** (1 / n_steps)


def verdict_matrix(n_steps: int, noise: float = 0.0, kind: str = "uniform") -> np.ndarray:
    """
    The verdicts of a noisy judge: entry `(t, r)` is the probability that it names step r if step t is the first wrong one.

    Args:
        n_steps (`int`):
            H.
        noise (`float`, *optional*, defaults to `0.0`):
            Probability that the verdict is replaced.
        kind (`str`, *optional*, defaults to `"uniform"`):
            What replaces it, each with equal probability: any step (`"uniform"`), a step before the true one (`"earlier"`)
            or a step after it (`"later"`). If there is no such step, the verdict stays right.

    Returns:
        `np.ndarray` of shape `(H, H)`: Rows sum to 1.

    Example:

    ```python
    >>> verdict_matrix(3, noise=0.4, kind="later")
    array([[0.6, 0.2, 0.2],
           [0. , 0.6, 0.4],
           [0. , 0. , 1. ]])
    ```
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"kind={kind!r} is unknown: it must be one of {list(NOISE_KINDS)}.")
    other = {
        "uniform": np.ones((n_steps, n_steps)),
        "earlier": np.tri(n_steps, k=-1),
        "later": np.tri(n_steps, k=-1).T,
    }[kind]
    total = other.sum(axis=1, keepdims=True)
    other = np.where(total > 0, other / np.maximum(total, 1), np.eye(n_steps))
    return (1 - noise) * np.eye(n_steps) + noise * other


def multisets(size: int, n_kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """
    All ways to draw `size` things of `n_kinds` kinds, without order: how many of each kind, shape `(C, n_kinds)`, and the
    logarithm of the number of orders, shape `(C,)`.

    ```python
    >>> counts, log_orders = multisets(2, 2)
    >>> counts.tolist(), np.exp(log_orders).round().tolist()
    ([[0, 2], [1, 1], [2, 0]], [1.0, 2.0, 1.0])
    ```
    """
    # Stars and bars: the bars stand at `n_kinds - 1` of `size + n_kinds - 1` places. The stars between them are counted.
    places = size + n_kinds - 1
    bars = np.array(list(combinations(range(places), n_kinds - 1)), dtype=np.int64).reshape(-1, n_kinds - 1)
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), places)], axis=1)
    counts = np.diff(edges, axis=1) - 1
    log_factorials = np.array([lgamma(n + 1) for n in range(size + 1)])
    return counts, log_factorials[size] - log_factorials[counts].sum(axis=1)


# The arms


def normalised(reward_M: np.ndarray, counts_CM: np.ndarray) -> np.ndarray:
    """
    Eq. 1 for every multiset: the advantage of each verdict in a group, shape `(C, M)`. It is exactly 0 if all rewards of
    the group are equal, and for verdicts that the group does not have.

    Args:
        reward_M (`np.ndarray` of shape `(M,)`):
            The reward of each verdict.
        counts_CM (`np.ndarray` of shape `(C, M)`):
            How many completions of the group have which verdict.

    Example:

    ```python
    >>> normalised(np.array([0.0, 1.0]), np.array([[2, 2], [4, 0]])).round(4)
    array([[-0.8659,  0.8659],
           [ 0.    ,  0.    ]])
    ```
    """
    n_groups, n_verdicts = counts_CM.shape
    verdict_CG = np.repeat(np.tile(np.arange(n_verdicts), n_groups), counts_CM.ravel()).reshape(n_groups, -1)
    reward_CG = torch.from_numpy(reward_M[verdict_CG])
    tied_C = value_range(reward_CG) == 0
    advantage_CM = np.zeros((n_groups, n_verdicts))
    advantage_CG = group_advantages(reward_CG).masked_fill(tied_C[:, None], 0.0)
    np.put_along_axis(advantage_CM, verdict_CG, advantage_CG.numpy(), axis=1)
    return advantage_CM


def advantages(
    arm: str,
    counts_CM: np.ndarray,
    n_steps: int,
    beta: float = 10.0,
    gamma: float = 0.5,
    prefix_reward: float = 0.3,
    error_penalty: float = 1.0,
) -> np.ndarray:
    """
    The advantage of each step of a completion, given its verdict and those of its group. Shape `(C, M, H)`.

    | arm | failed groups | mixed groups |
    |---|---|---|
    | `grpo`, `grpo_live` | 0 (`grpo_live` leaves groups without a gradient out of the denominator, see [`batch`]) | 0 / 1, normalised |
    | `sgpo` | Eq. 2 of RTS, normalised | as GRPO |
    | `sgpo_all_incorrect` | as SGPO | 1 for the right, Eq. 2 for the wrong ones, normalised |
    | `prefix` | prefix reward before the named step, minus the penalty on it, 0 after it | as GRPO |
    | `prefix_all_incorrect` | as prefix | as GRPO, but 0 before the named step of wrong completions |
    | `sign` | -1 | as GRPO |
    | `ngrpo` | `-1 / sqrt(G + 1)`: a right solution is imagined in the group | as GRPO |

    Two differences from the trainer: `prefix` acts in groups without any right step too, and the defaults of its
    coefficients are those of the first trials. The predictions were made with both.

    Args:
        arm (`str`):
            One of `ARMS`.
        counts_CM (`np.ndarray` of shape `(C, M)`):
            Every group: how many completions have which verdict. M is H + 1 for the judged arms (step 0 .. step H - 1
            named, right), else 2 (wrong, right).
        n_steps (`int`):
            H.
        beta, gamma (`float`, *optional*, default to `10.0`, `0.5`):
            Of Eq. 2.
        prefix_reward, error_penalty (`float`, *optional*, default to `0.3`, `1.0`):
            Of prefix credit.

    Example:

    ```python
    >>> advantages("prefix", np.array([[0, 1, 1, 0]]), n_steps=3)[0, 1:3]  # second step named, third step named
    array([[ 0.3, -1. ,  0. ],
           [ 0.3,  0.3, -1. ]])
    ```
    """
    if arm not in ARMS:
        raise ValueError(f"arm={arm!r} is unknown: it must be one of {list(ARMS)}.")
    n_verdicts, size = counts_CM.shape[1], int(counts_CM[0].sum())
    failed_C = counts_CM[:, -1] == 0
    outcome_M = np.append(np.zeros(n_verdicts - 1), 1.0)
    sequence_CM = normalised(outcome_M, counts_CM)
    if arm.startswith("sgpo"):
        rts_H = torch.arange(n_steps, dtype=torch.float64) / n_steps
        graded_M = np.append(rts_to_reward(rts_H, beta, gamma).numpy(), 1.0)
        judged_C = failed_C if arm == "sgpo" else np.ones_like(failed_C)
        sequence_CM = np.where(judged_C[:, None], normalised(graded_M, counts_CM), sequence_CM)
    elif arm in ("sign", "ngrpo"):
        sequence_CM = np.where(failed_C[:, None], -1.0 if arm == "sign" else -1 / np.sqrt(size + 1), sequence_CM)
    paid_CMH = np.repeat(sequence_CM[:, :, None], n_steps, axis=2)
    if arm.startswith("prefix"):
        before_MH = np.append(np.tri(n_steps, k=-1), np.zeros((1, n_steps)), axis=0)
        at_MH = np.append(np.eye(n_steps), np.zeros((1, n_steps)), axis=0)
        credit_MH = prefix_reward * before_MH - error_penalty * at_MH
        paid_CMH = np.where(failed_C[:, None, None], credit_MH, paid_CMH)
        if arm == "prefix_all_incorrect":
            spared_CMH = ~failed_C[:, None, None] & (before_MH > 0) & (paid_CMH < 0)
            paid_CMH = np.where(spared_CMH, 0.0, paid_CMH)
    return paid_CMH


@dataclass(frozen=True)
class Arm:
    """
    An arm with its judge, made by [`prepare`]: everything that does not change with the policy.

    Args:
        name (`str`):
            One of `ARMS`.
        verdicts_TM (`np.ndarray` of shape `(H + 1, M)`):
            P(verdict | right leading steps).
        counts_CM (`np.ndarray` of shape `(C, M)`):
            Every group: how many completions have which verdict.
        log_orders_C (`np.ndarray` of shape `(C,)`):
            Logarithm of the number of orders of each group.
        paid_CMH (`np.ndarray` of shape `(C, M, H)`):
            See [`advantages`].
    """

    name: str
    verdicts_TM: np.ndarray
    counts_CM: np.ndarray
    log_orders_C: np.ndarray
    paid_CMH: np.ndarray

    @property
    def group_size(self) -> int:
        return int(self.counts_CM[0].sum())

    @property
    def n_steps(self) -> int:
        return self.paid_CMH.shape[2]


def prepare(
    arm: str,
    n_steps: int = 5,
    group_size: int = 8,
    noise: float = 0.0,
    noise_kind: str = "uniform",
    luck: float = 0.0,
    **settings: float,
) -> Arm:
    """
    Enumerates the groups of an arm.

    Args:
        arm (`str`):
            One of `ARMS`.
        n_steps, group_size (`int`, *optional*, default to `5`, `8`):
            H and G.
        noise, noise_kind (*optional*, default to `0.0`, `"uniform"`):
            The judge's errors, see [`verdict_matrix`]. Arms without a judge do not see them.
        luck (`float`, *optional*, defaults to `0.0`):
            Probability that a solution with an error has the right outcome.
        settings (`float`):
            `beta`, `gamma`, `prefix_reward`, `error_penalty` of [`advantages`].

    Example:

    ```python
    >>> prepare("sgpo").counts_CM.shape, prepare("grpo").counts_CM.shape
    ((1287, 6), (9, 2))
    ```
    """
    named_HM = verdict_matrix(n_steps, noise, noise_kind) if arm in JUDGED else np.ones((n_steps, 1))
    wrong_HM = np.append((1 - luck) * named_HM, np.full((n_steps, 1), luck), axis=1)
    verdicts_TM = np.append(wrong_HM, np.eye(wrong_HM.shape[1])[-1:], axis=0)
    counts_CM, log_orders_C = multisets(group_size, wrong_HM.shape[1])
    return Arm(arm, verdicts_TM, counts_CM, log_orders_C, advantages(arm, counts_CM, n_steps, **settings))


# The gradient


class Moments(NamedTuple):
    """
    A random gradient. It has 2H logits: the first H for the steps up to the first error, the other H for the steps after
    it. [`one_skill`] makes one logit of them all.

    Args:
        mean_K (`np.ndarray` of shape `(K,)`):
            Population gradient.
        covariance_KK (`np.ndarray` of shape `(K, K)`):
            Covariance of the sampled gradient.
        live (`float`):
            Share of groups (or batches) with an advantage other than 0.
    """

    mean_K: np.ndarray
    covariance_KK: np.ndarray
    live: float

    @property
    def square_K(self) -> np.ndarray:
        """Mean square of each logit's gradient."""
        return self.mean_K**2 + np.diagonal(self.covariance_KK)

    @property
    def signal(self) -> float:
        """Length of the population gradient."""
        return float(np.linalg.norm(self.mean_K))

    @property
    def noise(self) -> float:
        """Root of the variance, summed over the logits."""
        return float(np.sqrt(np.trace(self.covariance_KK)))

    @property
    def snr(self) -> float:
        """Signal to noise ratio. That of n groups is `sqrt(n)` times that of one."""
        return self.signal / self.noise if self.noise > 0 else 0.0


def prefix_lengths(p_H: np.ndarray) -> np.ndarray:
    """
    P(t right leading steps), t = 0 .. H.

    ```python
    >>> prefix_lengths(np.array([0.5, 0.8]))
    array([0.5, 0.1, 0.4])
    ```
    """
    reached = np.append(1.0, np.cumprod(p_H))
    return reached * np.append(1 - p_H, 1.0)


def scores(p_H: np.ndarray) -> np.ndarray:
    """
    d log pi / d logit of a completion with t right leading steps, shape `(H + 1, H)`: `1 - p` at right steps, `-p` at the
    first wrong one, 0 after it.

    ```python
    >>> scores(np.array([0.5, 0.8])).round(2)
    array([[-0.5,  0. ],
           [ 0.5, -0.8],
           [ 0.5,  0.2]])
    ```
    """
    n_steps = len(p_H)
    right = np.tri(n_steps + 1, n_steps, k=-1)
    return right * (1 - p_H) - np.eye(n_steps + 1, n_steps) * p_H


def _verdict_table(arm: Arm, p_H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(verdict), shape `(M,)`, and P(right leading steps | verdict), shape `(M, H + 1)`."""
    joint_MT = (prefix_lengths(p_H)[:, None] * arm.verdicts_TM).T
    probability_M = joint_MT.sum(axis=1)
    return probability_M, joint_MT / np.where(probability_M > 0, probability_M, 1)[:, None]


def _group_probability(arm: Arm, probability_M: np.ndarray) -> np.ndarray:
    """P(multiset of verdicts), shape `(C,)`."""
    log_M = np.log(np.maximum(probability_M, 1e-300))
    return np.exp(arm.log_orders_C + arm.counts_CM @ log_M)


def moments(arm: Arm, p_H: np.ndarray, behind_H: np.ndarray | None = None) -> Moments:
    """
    Mean and variance of the gradient of one group, exact.

    A verdict decides the advantage of a completion. What the completion did is only known up to P(t | verdict). Given the
    verdicts of the group its completions are independent. So, with n_m completions of verdict m,

        E[g_h | group]        = sum_m n_m A_mh E[score_h | m] / G
        Cov[g_h, g_k | group] = sum_m n_m A_mh A_mk Cov[score_h, score_k | m] / G^2

    Args:
        arm ([`Arm`]):
            Gives the advantages.
        p_H (`np.ndarray` of shape `(H,)`):
            P(right step | all steps before it right).
        behind_H (`np.ndarray` of shape `(H,)`, *optional*):
            The probabilities of the choices after an error; `p_H` if left out.

    Example: the theorem, whose advantages are larger by the square root of 2

    ```python
    >>> arm = prepare("sgpo", n_steps=2, group_size=2)
    >>> (moments(arm, np.array([0.5, 0.5])).mean_K[:2] * 2**0.5).round(2)
    array([0.25, 0.06])
    ```
    """
    p_H = np.asarray(p_H, dtype=np.float64)
    behind_H = p_H if behind_H is None else np.asarray(behind_H, dtype=np.float64)
    probability_M, given_MT = _verdict_table(arm, p_H)
    weight_C = _group_probability(arm, probability_M)
    size = arm.group_size
    score_TH = scores(p_H)
    mean_MH = given_MT @ score_TH
    passed_MH = given_MT @ np.triu(np.ones_like(score_TH), k=1)  # P(error before step h | verdict)
    share_CMH = arm.paid_CMH * (arm.counts_CM[:, :, None] / size)

    mean_CH = np.einsum("cmh,mh->ch", share_CMH, mean_MH)
    mean_H = weight_C @ mean_CH
    between_HH = (weight_C[:, None] * mean_CH).T @ mean_CH - np.outer(mean_H, mean_H)
    # sum over groups of n_m A_mh A_mk / G^2, one matrix per verdict
    paid_MHH = np.stack(
        [(weight_C[:, None] * share_CMH[:, m]).T @ arm.paid_CMH[:, m] / size for m in range(len(mean_MH))]
    )
    score_MHH = np.einsum("mt,th,tk->mhk", given_MT, score_TH, score_TH) - mean_MH[:, :, None] * mean_MH[:, None]
    behind_variance_H = np.einsum("mhh,mh->h", paid_MHH, passed_MH) * behind_H * (1 - behind_H)

    n_steps = arm.n_steps
    covariance_KK = np.zeros((2 * n_steps, 2 * n_steps))
    covariance_KK[:n_steps, :n_steps] = between_HH + (paid_MHH * score_MHH).sum(axis=0)
    covariance_KK[n_steps:, n_steps:] = np.diag(behind_variance_H)
    live_C = ((arm.paid_CMH != 0) & (arm.counts_CM[:, :, None] > 0)).any(axis=(1, 2))
    return Moments(np.append(mean_H, np.zeros(n_steps)), covariance_KK, float(weight_C @ live_C))


def one_skill(of_steps: Moments) -> Moments:
    """
    The gradient if all steps were the same skill, before and after an error: one logit, whose gradient is the sum of theirs.

    ```python
    >>> steps = moments(prepare("grpo"), np.full(5, 0.5))
    >>> one_skill(steps).mean_K.round(3) == steps.mean_K.sum().round(3)
    array([ True])
    ```
    """
    return Moments(of_steps.mean_K.sum(keepdims=True), of_steps.covariance_KK.sum(keepdims=True), of_steps.live)


def noise_behind(of_steps: Moments) -> float:
    """Share of the variance that lies on the tokens after the first error."""
    variance_K = np.diagonal(of_steps.covariance_KK)
    return float(variance_K[len(variance_K) // 2 :].sum() / variance_K.sum())


def batch(arm: Arm, group: Moments, n_groups: int | None) -> Moments:
    """
    The gradient of a batch: the mean over its `n_groups` groups (None: infinitely many) or, for `grpo_live`, over those of
    them that have a gradient. Its `live` is P(some group of the batch has a gradient).

    ```python
    >>> grpo, live = prepare("grpo"), prepare("grpo_live")
    >>> group = moments(grpo, np.full(5, 0.3))
    >>> round(float(batch(live, group, None).mean_K[0] / batch(grpo, group, None).mean_K[0] * group.live), 6)
    1.0
    ```
    """
    some = 1.0 if n_groups is None else 1 - (1 - group.live) ** n_groups
    if arm.name != "grpo_live":
        return Moments(group.mean_K, group.covariance_KK / (n_groups or np.inf), some)
    mean_if_live_K = group.mean_K / group.live
    if n_groups is None:
        return Moments(mean_if_live_K, np.zeros_like(group.covariance_KK), some)
    outer_KK = np.outer(mean_if_live_K, mean_if_live_K)
    covariance_if_live_KK = (group.covariance_KK + np.outer(group.mean_K, group.mean_K)) / group.live - outer_KK
    k = np.arange(1, n_groups + 1)
    chance_k = np.array([comb(n_groups, int(i)) for i in k]) * group.live**k * (1 - group.live) ** (n_groups - k)
    covariance_KK = some * (1 - some) * outer_KK + (chance_k / k).sum() * covariance_if_live_KK
    return Moments(some * mean_if_live_K, covariance_KK, some)


def false_credit(arm: Arm, p_H: np.ndarray) -> float:
    """
    Share of the positive advantage in failed groups that goes to completions with a wrong verdict.

    ```python
    >>> false_credit(prepare("sgpo", noise=1.0), np.full(5, 0.5)) > 0.5
    True
    ```
    """
    probability_M, given_MT = _verdict_table(arm, np.asarray(p_H, dtype=np.float64))
    failed_C = arm.counts_CM[:, -1] == 0
    weight_C = _group_probability(arm, probability_M) * failed_C
    gained_M = weight_C @ (np.maximum(arm.paid_CMH, 0).mean(axis=2) * arm.counts_CM)
    wrong_M = 1 - np.diagonal(given_MT)
    total = gained_M[:-1].sum()
    return float((gained_M[:-1] * wrong_M[:-1]).sum() / total) if total > 0 else 0.0
