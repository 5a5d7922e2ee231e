"""
How fast each way of paying completions learns, from exact population gradients: a world small enough to sum over all
groups instead of sampling them.

A solution has H steps. At each step the policy makes one choice, right with probability `p_h = sigmoid(logit_h)`. The
solution is right if every step is. Behind the first error no choice matters any more, but the tokens are there and are
paid: they have logits of their own, whose expected gradient is 0 and whose variance is not. A group is G completions of
one prompt, and what an arm makes of it depends only on how many completions are right and where the judge saw the first
error of the others: few enough multisets to enumerate (1287 for H = 5, G = 8).

The gradient of one group is the mean over its completions of `sum_h advantage_h * d log pi / d logit_h`. The world has no
neural network, no clipping, no KL term and no lengths. Suffixes: `_H` steps, `_C` multisets of verdicts, `_M` verdicts
(what is said of one completion; the last one is "right"), `_T` right leading steps, 0 to H. numpy alone.

Two steps and groups of two are the setting of Theorem 3.3 of arXiv 2505.11595.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import comb, lgamma
from typing import NamedTuple

import numpy as np


ARMS = ("grpo", "grpo_live", "sgpo", "sgpo_all_incorrect", "prefix", "prefix_all_incorrect", "sign", "ngrpo")
JUDGED = ("sgpo", "sgpo_all_incorrect", "prefix", "prefix_all_incorrect")
NOISE_KINDS = ("uniform", "earlier", "later")
# What GRPOTrainer adds to the standard deviation before it divides by it
STD_EPSILON = 1e-4


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
    Theorem 3.3: what one iteration adds to the logits of p = P(right first step) and q = P(right second step | right first
    step), for groups of two, rewards 0 / 1/2 / 1 (SGPO) or 0 / 0 / 1 (GRPO), and advantages of plus and minus 1.

        SGPO   p (1 - p)      p^2 q (1 - q)
        GRPO   p (1 - p) q    p q (1 - q)

    Args:
        p, q (`float`):
            The two probabilities.
        arm (`str`):
            `"sgpo"` or `"grpo"`.

    Returns:
        `tuple[float, float]`: The two increments at a learning rate of 1.

    Example:

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


def accuracy_of(p_H: np.ndarray, luck: float = 0.0) -> float:
    """P(outcome right): every step right, or, with probability `luck`, in spite of an error."""
    right = float(np.prod(p_H))
    return right + luck * (1 - right)


def failed_share(p_H: np.ndarray, group_size: int, luck: float = 0.0) -> float:
    """
    The share of groups in which no outcome is right: `(1 - P)^G`.

    ```python
    >>> round(failed_share(np.full(5, 0.5), group_size=8), 3)
    0.776
    ```
    """
    return (1 - accuracy_of(p_H, luck)) ** group_size


def start_probability(share: float, n_steps: int, group_size: int, luck: float = 0.0) -> float:
    """
    The probability of a right step, the same at every step, at which `share` of the groups fail. The inverse of
    [`failed_share`].

    Args:
        share (`float`):
            The share of failed groups, in (0, 1).
        n_steps, group_size (`int`):
            H and G.
        luck (`float`, *optional*, defaults to `0.0`):
            Probability that a solution with an error has the right outcome.

    Raises:
        ValueError: If luck alone solves more groups than that.

    Example:

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
    What a noisy judge says: entry `(t, r)` is the probability that it names step r where step t is the first wrong one.

    Args:
        n_steps (`int`):
            H.
        noise (`float`, *optional*, defaults to `0.0`):
            Probability that the verdict is replaced.
        kind (`str`, *optional*, defaults to `"uniform"`):
            By what: any step (`"uniform"`), one before the true one (`"earlier"`), one behind it (`"later"`), each with
            equal probability. Where there is none the verdict stays right.

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
    All ways to draw `size` things of `n_kinds` kinds, order left aside.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: How many of each kind, shape `(C, n_kinds)`, and the logarithm of the number of
        orders, shape `(C,)`.

    Example:

    ```python
    >>> counts, log_orders = multisets(2, 2)
    >>> counts.tolist(), np.exp(log_orders).round().tolist()
    ([[0, 2], [1, 1], [2, 0]], [1.0, 2.0, 1.0])
    ```
    """
    # Stars and bars: the bars stand at `n_kinds - 1` of `size + n_kinds - 1` places, the stars between them are counted
    places = size + n_kinds - 1
    bars = np.array(list(combinations(range(places), n_kinds - 1)), dtype=np.int64).reshape(-1, n_kinds - 1)
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), places)], axis=1)
    counts = np.diff(edges, axis=1) - 1
    log_factorials = np.array([lgamma(n + 1) for n in range(size + 1)])
    return counts, log_factorials[size] - log_factorials[counts].sum(axis=1)


# The arms


def normalised(reward_M: np.ndarray, counts_CM: np.ndarray) -> np.ndarray:
    """
    Advantages inside each group: `(r - mean(r)) / (std(r) + 1e-4)` with the unbiased standard deviation, exactly 0 where
    all rewards are equal.

    Args:
        reward_M (`np.ndarray` of shape `(M,)`):
            The reward of each verdict.
        counts_CM (`np.ndarray` of shape `(C, M)`):
            How many completions of the group have which verdict.

    Returns:
        `np.ndarray` of shape `(C, M)`.

    Example:

    ```python
    >>> normalised(np.array([0.0, 1.0]), np.array([[2, 2], [4, 0]])).round(4)
    array([[-0.8659,  0.8659],
           [ 0.    ,  0.    ]])
    ```
    """
    size = counts_CM[0].sum()
    deviation_CM = reward_M - (counts_CM @ reward_M / size)[:, None]
    std_C = np.sqrt((counts_CM * deviation_CM**2).sum(axis=1) / (size - 1))
    reward_CM = np.where(counts_CM > 0, reward_M, np.nan)
    tied_C = np.nanmax(reward_CM, axis=1) == np.nanmin(reward_CM, axis=1)
    return np.where(tied_C[:, None], 0.0, deviation_CM / (std_C + STD_EPSILON)[:, None])


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
    What an arm pays at each step of a completion, given its verdict and those of its group.

    | arm | failed groups | mixed groups |
    |---|---|---|
    | `grpo`, `grpo_live` | 0 (`grpo_live` leaves groups without a gradient out of the denominator, see [`batch`]) | 0 / 1, normalised |
    | `sgpo` | Eq. 2 of RTS, normalised | as GRPO |
    | `sgpo_all_incorrect` | as SGPO | 1 for the right, Eq. 2 for the wrong ones, normalised |
    | `prefix` | prefix reward before the step named, minus the penalty on it, 0 behind | as GRPO |
    | `prefix_all_incorrect` | as prefix | as GRPO, but 0 before the step named in wrong completions |
    | `sign` | -1 | as GRPO |
    | `ngrpo` | `-1 / sqrt(G + 1)`: a right solution is imagined in the group | as GRPO |

    Unlike the trainer, `prefix` pays in groups without any right step too, and its coefficients are by default those of the
    first trials: the predictions were made with both.

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
            Of the prefix credit.

    Returns:
        `np.ndarray` of shape `(C, M, H)`.

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
        graded_M = np.append(sigmoid(beta * (np.arange(n_steps) / n_steps - gamma)), 1.0)
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
    An arm with its judge, made by [`prepare`]: all that does not change as the policy does.

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
        luck (`float`):
            P(outcome right | some step wrong).
    """

    name: str
    verdicts_TM: np.ndarray
    counts_CM: np.ndarray
    log_orders_C: np.ndarray
    paid_CMH: np.ndarray
    luck: float

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

    Returns:
        [`Arm`]

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
    paid_CMH = advantages(arm, counts_CM, n_steps, **settings)
    return Arm(arm, verdicts_TM, counts_CM, log_orders_C, paid_CMH, luck)


# The gradient


class Moments(NamedTuple):
    """
    A random gradient. Of its 2H logits the first H belong to the steps before and at the first error, the other H to those
    behind it; [`one_skill`] makes one of them all.

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
    first wrong one, 0 behind it.

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

    A verdict decides what a completion is paid, and what it did is only known up to P(t | verdict). Given the verdicts of
    the group its completions are independent, so, with n_m completions of verdict m,

        E[g_h | group]        = sum_m n_m A_mh E[score_h | m] / G
        Cov[g_h, g_k | group] = sum_m n_m A_mh A_mk Cov[score_h, score_k | m] / G^2

    Args:
        arm ([`Arm`]):
            What is paid.
        p_H (`np.ndarray` of shape `(H,)`):
            P(right step | all before it right).
        behind_H (`np.ndarray` of shape `(H,)`, *optional*):
            The probabilities of the choices behind an error; `p_H` if left out.

    Returns:
        [`Moments`]

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
    The gradient if all steps were one and the same skill, before and behind an error: a single logit, whose gradient is the
    sum of theirs.

    ```python
    >>> steps = moments(prepare("grpo"), np.full(5, 0.5))
    >>> one_skill(steps).mean_K.round(3) == steps.mean_K.sum().round(3)
    array([ True])
    ```
    """
    return Moments(of_steps.mean_K.sum(keepdims=True), of_steps.covariance_KK.sum(keepdims=True), of_steps.live)


def noise_behind(of_steps: Moments) -> float:
    """Share of the variance that lies on the tokens behind the first error."""
    variance_K = np.diagonal(of_steps.covariance_KK)
    return float(variance_K[len(variance_K) // 2 :].sum() / variance_K.sum())


def batch(arm: Arm, group: Moments, n_groups: int | None) -> Moments:
    """
    The gradient of a batch: the mean over its groups, or, for `grpo_live`, over those of them that have a gradient.

    Args:
        arm ([`Arm`]):
            What is paid.
        group ([`Moments`]):
            Of one group.
        n_groups (`int`, *optional*):
            Groups per update; None for infinitely many.

    Returns:
        [`Moments`]: `live` is P(some group of the batch has a gradient).

    Example:

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
    Share of the positive advantage in failed groups that goes to completions whose verdict is not the true one.

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


# Learning


def sgd_step(of_batch: Moments) -> np.ndarray:
    """The theorem's step, at a learning rate of 1: the gradient itself. Shape `(K,)`."""
    return of_batch.mean_K


def adam_step(of_batch: Moments) -> np.ndarray:
    """
    The mean step of Adam at a small learning rate of 1: the gradient's mean over the root of its mean square,

        E[g] / sqrt(sum over logits of E[g^2])         length s / sqrt(1 + s^2), s the signal to noise ratio of the batch

    with one scale for all logits, since every weight of a network touches all of them. A gradient that is there in a share L
    of the updates only counts sqrt(L), not L. Shape `(K,)`.
    """
    return of_batch.mean_K / max(np.sqrt(of_batch.square_K.sum()), 1e-300)


def noise_limited_step(of_batch: Moments) -> np.ndarray:
    """
    [`adam_step`] where noise is all there is in the mean square: few groups per update, or a network in which most of what a
    gradient holds belongs to other prompts. Its length is the signal to noise ratio of the batch. Shape `(K,)`.
    """
    return of_batch.mean_K / max(of_batch.noise, 1e-300)


def adam_step_per_logit(of_batch: Moments) -> np.ndarray:
    """As [`adam_step`], with a scale for each logit: with infinitely large batches the gradient's sign. Shape `(K,)`."""
    return of_batch.mean_K / np.maximum(np.sqrt(of_batch.square_K), 1e-300)


def learn(
    arm: Arm,
    start_H: np.ndarray,
    n_groups: int | None = None,
    step: Callable[[Moments], np.ndarray] = sgd_step,
    learning_rate: float = 1.0,
    until: float = 0.9,
    most: int = 20_000,
    shared: bool = False,
) -> np.ndarray:
    """
    The accuracy of the policy before each update and after the last one, moved by the mean step.

    Args:
        arm ([`Arm`]):
            What is paid.
        start_H (`np.ndarray` of shape `(H,)`):
            P(right step) at the start, before and behind an error.
        n_groups (`int`, *optional*):
            Groups per update; None for infinitely many.
        step (`Callable`, *optional*, defaults to [`sgd_step`]):
            From the moments of the batch to the step.
        learning_rate (`float`, *optional*, defaults to `1.0`):
            Factor on the step.
        until (`float`, *optional*, defaults to `0.9`):
            Stops when P(every step right) reaches this.
        most (`int`, *optional*, defaults to `20_000`):
            Stops after so many updates.
        shared (`bool`, *optional*, defaults to `False`):
            Whether all steps are [`one_skill`].

    Returns:
        `np.ndarray`: P(every step right), luck left out.

    Example:

    ```python
    >>> learn(prepare("grpo"), np.full(5, 0.8), until=0.5).round(2)
    array([0.33, 0.37, 0.41, 0.45, 0.48, 0.52])
    ```
    """
    start_H = np.asarray(start_H, dtype=np.float64)
    logits_H, accuracy = logit(start_H), [float(np.prod(start_H))]
    while accuracy[-1] < until and len(accuracy) <= most:
        p_H = sigmoid(logits_H)
        group = one_skill(moments(arm, p_H, p_H)) if shared else moments(arm, p_H, start_H)
        move_K = step(batch(arm, group, n_groups))
        logits_H = logits_H + learning_rate * (move_K if shared else move_K[: arm.n_steps])
        accuracy.append(accuracy_of(sigmoid(logits_H)))
    return np.array(accuracy)


def updates_until(accuracy: np.ndarray, target: float) -> float:
    """
    After how many updates `accuracy` first reaches `target`, linear between updates; NaN if never.

    ```python
    >>> updates_until(np.array([0.1, 0.3, 0.5]), 0.4)
    1.5
    ```
    """
    above = np.flatnonzero(np.asarray(accuracy) >= target)
    if len(above) == 0:
        return float("nan")
    i = int(above[0])
    return 0.0 if i == 0 else float(i - 1 + (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1]))


def mean_until(accuracy: np.ndarray, n_updates: float) -> float:
    """
    Area under the curve from 0 to `n_updates`, over `n_updates`; a curve that ends before stays where it ended.

    ```python
    >>> mean_until(np.array([0.0, 1.0]), 2)
    0.75
    ```
    """
    n_whole = int(np.ceil(n_updates))
    at = np.append(np.arange(n_whole), n_updates)
    values = np.interp(at, np.arange(len(accuracy)), accuracy)
    return float(np.trapezoid(values, at) / n_updates)


def sample_gradients(
    arm: Arm, p_NH: np.ndarray, behind_NH: np.ndarray, n_groups: int, rng: np.random.Generator
) -> np.ndarray:
    """
    Sampled gradients of N policies, each of one batch of `n_groups` groups, shape `(N, 2H)`.

    Args:
        arm ([`Arm`]):
            What is paid.
        p_NH, behind_NH (`np.ndarray` of shape `(N, H)`):
            P(right step) before and behind an error.
        n_groups (`int`):
            Groups per batch.
        rng (`np.random.Generator`):
            Source of the completions and the verdicts.
    """
    size, n_steps = arm.group_size, arm.n_steps
    n_verdicts = arm.counts_CM.shape[1]
    p, behind = p_NH[:, None, None, :], behind_NH[:, None, None, :]
    draws = rng.random((len(p_NH), n_groups, size, n_steps))  # policies, groups, completions, steps
    right = draws < p
    t = np.cumprod(right, axis=-1).sum(axis=-1)
    verdict = (rng.random(t.shape)[..., None] > np.cumsum(arm.verdicts_TM, axis=1)[t][..., :-1]).sum(axis=-1)
    counts = (verdict[..., None] == np.arange(n_verdicts)).sum(axis=2)
    code = (size + 1) ** np.arange(n_verdicts)
    codes_C = arm.counts_CM @ code
    order = np.argsort(codes_C)
    group = order[np.searchsorted(codes_C[order], counts @ code)]
    paid = arm.paid_CMH[group[..., None], verdict]
    step = np.arange(n_steps)
    before = (step <= t[..., None]) * (right - p)
    after = (step > t[..., None]) * ((draws < behind) - behind)
    gradient = np.concatenate([paid * before, paid * after], axis=-1).mean(axis=2)
    if arm.name == "grpo_live":
        live = ((paid != 0).any(axis=(2, 3))).sum(axis=1)
        return gradient.sum(axis=1) / np.maximum(live, 1)[:, None]
    return gradient.mean(axis=1)


def simulate(
    arm: Arm,
    start_H: np.ndarray,
    n_groups: int,
    n_updates: int,
    learning_rate: float,
    n_runs: int = 16,
    n_weights: int = 256,
    betas: tuple[float, float] = (0.9, 0.999),
    shared: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """
    Adam on sampled batches, as a check on [`adam_step`]. Every logit is a sum of `n_weights` weights with random signs,
    so that every weight touches every logit, and Adam moves the weights.

    Args:
        arm ([`Arm`]):
            What is paid.
        start_H (`np.ndarray` of shape `(H,)`):
            P(right step) at the start, before and behind an error.
        n_groups, n_updates (`int`):
            Groups per update, and updates.
        learning_rate (`float`):
            Length of a step of the logits if every update had the same gradient, as in [`learn`].
        n_runs (`int`, *optional*, defaults to `16`):
            Independent runs.
        n_weights (`int`, *optional*, defaults to `256`):
            Weights of each.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Of Adam.
        shared (`bool`, *optional*, defaults to `False`):
            Whether all steps are [`one_skill`].
        seed (`int`, *optional*, defaults to `0`):
            Of everything.

    Returns:
        `np.ndarray` of shape `(n_runs, n_updates + 1)`: P(every step right).
    """
    rng = np.random.default_rng(seed)
    start = np.tile(logit(start_H), 2)
    touch = rng.choice([-1.0, 1.0], size=(n_runs, n_weights, 1 if shared else 2 * arm.n_steps)) / np.sqrt(n_weights)
    touch = np.broadcast_to(touch, (n_runs, n_weights, 2 * arm.n_steps))
    weights, first, second = (np.zeros((n_runs, n_weights)) for _ in range(3))
    accuracy = np.empty((n_runs, n_updates + 1))
    for update in range(n_updates + 1):
        p = sigmoid(start + np.einsum("nw,nwh->nh", weights, touch))
        accuracy[:, update] = p[:, : arm.n_steps].prod(axis=1)
        if update == n_updates:
            break
        gradient = sample_gradients(arm, p[:, : arm.n_steps], p[:, arm.n_steps :], n_groups, rng)
        of_weights = np.einsum("nh,nwh->nw", gradient, touch)
        first = betas[0] * first + (1 - betas[0]) * of_weights
        second = betas[1] * second + (1 - betas[1]) * of_weights**2
        corrected = first / (1 - betas[0] ** (update + 1))
        scale = np.sqrt(second / (1 - betas[1] ** (update + 1))) + 1e-12
        weights = weights + learning_rate / np.sqrt(n_weights) * corrected / scale
    return accuracy
