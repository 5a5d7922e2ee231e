"""Rates of correct samples, answers of a group, and a number with its bootstrap interval."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


_EXACT_FLIPS = 13  # differences whose sign flips are all tried
_FLIPS_AT_A_TIME = 500  # which bounds the memory for many prompts


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> np.ndarray:
    """
    Unbiased estimate of pass@k from `n` samples of which `c` are correct: `1 - C(n - c, k) / C(n, k)` (arXiv
    2107.03374). It is the probability that at least one of `k` samples, drawn without replacement, is correct. `n` and
    `c` hold one integer per prompt, in any shape; the result has the same shape, with NaN if `n < k`. Raises
    `ValueError` for counts that no sampling gives.

    ```python
    >>> pass_at_k(n=[4, 4, 4], c=[0, 1, 4], k=2)
    array([0. , 0.5, 1. ])
    ```
    """
    n, c = checked_counts(n, c, k)
    values = [
        1 - comb(int(ni - ci), k) / comb(int(ni), k) if ni >= k else np.nan
        for ni, ci in zip(n.ravel(), c.ravel(), strict=True)
    ]
    return np.array(values, dtype=np.float64).reshape(n.shape)


def usual_ks(n: int) -> list[int]:
    """
    The powers of two up to `n`, and `n`.

    ```python
    >>> usual_ks(12), usual_ks(0)
    ([1, 2, 4, 8, 12], [])
    ```
    """
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n}) if n > 0 else []


def cover_at(n: ArrayLike, c: ArrayLike, tau: float) -> np.ndarray:
    """
    Cover@tau (arXiv 2510.08325): 1 for a prompt if at least a share `tau` of its samples is correct, else 0. pass@k
    counts one lucky guess among many samples; Cover@tau asks for reliability. NaN if `n` is 0.

    ```python
    >>> cover_at(n=[8, 8, 8], c=[1, 4, 8], tau=0.5)
    array([0., 1., 1.])
    ```
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau={tau} must lie in (0, 1]: it is the share of a prompt's samples that is correct.")
    n, c = checked_counts(n, c)
    # The small number keeps 3 >= 0.3 * 10 true in floating point
    return np.where(n > 0, (c >= tau * n - 1e-9).astype(np.float64), np.nan)


def maj_at_k(answers: Sequence[Hashable], correct: ArrayLike, k: int) -> float:
    """
    maj@k of one prompt: the exact probability that the most frequent of `k` answers, drawn without replacement, is
    correct; NaN if there are fewer than `k`. A tie for the first place is broken at random. All correct answers count
    as one answer, however they are spelled. `None` (no answer) never wins a vote.

    ```python
    >>> maj_at_k(["4", "4", "5"], [True, True, False], k=3), round(maj_at_k(["4", "4", "5"], [True, True, False], 1), 3)
    (1.0, 0.667)
    ```
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: it is a number of samples.")
    right = np.asarray(correct, dtype=bool)
    if len(answers) != right.size:
        raise ValueError(f"answers has length {len(answers)} and correct {right.size}: there must be one per sample.")
    n, n_right = len(answers), int(right.sum())
    if n < k:
        return float("nan")
    wrong = Counter(answer for answer, is_right in zip(answers, right, strict=True) if not is_right)
    silent = wrong.pop(None, 0)
    total = 0.0
    for votes in range(1, min(k, n_right) + 1):
        # ways[m, t]: the ways in which m votes go to wrong answers, if none gets more than `votes` and t get just that
        ways = np.zeros((k - votes + 1, k + 2))
        ways[0, 0] = 1
        for count in wrong.values():
            new = np.zeros_like(ways)
            for drawn in range(min(count, votes, k - votes) + 1):
                ties = drawn == votes
                moved = ways[: ways.shape[0] - drawn, : ways.shape[1] - ties] * comb(count, drawn)
                new[drawn:, ties:] += moved
            ways = new
        for m in range(k - votes + 1):
            empty = k - votes - m
            if empty <= silent:
                wins = float((ways[m] / np.arange(1, ways.shape[1] + 1)).sum())
                total += comb(n_right, votes) * comb(silent, empty) * wins
    return total / comb(n, k)


def chance_pass_at_k(guess: float, k: int) -> float:
    """
    The pass@k of guessing, if one guess is correct with probability `guess`: `1 - (1 - guess) ** k`. At large `k` a
    policy that knows nothing "solves" a multiple-choice task.
    """
    if not 0 <= guess <= 1:
        raise ValueError(f"guess={guess} must lie in [0, 1]: it is the probability that one guess is correct.")
    return 1 - (1 - guess) ** k


def answer_entropy(answers: Sequence[Hashable]) -> float:
    """
    Entropy of a group's answers in nats: `-sum p_j log p_j` over the distinct answers, each with its share `p_j`. It
    is 0 if all are equal, `log(N)` if all differ, and NaN without answers.

    ```python
    >>> round(answer_entropy(["4", "4", "5", "5"]), 4)
    0.6931
    ```
    """
    if not answers:
        return float("nan")
    p = np.array(list(Counter(answers).values())) / len(answers)
    return max(0.0, float(-(p * np.log(p)).sum()))


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval. Without enough prompts only the interval is NaN."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


def bootstrap(
    statistic: Callable[..., float],
    *columns_P: ArrayLike,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """
    A statistic over prompts with its bootstrap interval. Prompts are drawn with replacement, never single samples,
    because the samples of a prompt belong together. Fewer than three prompts have no interval.

    The interval is the expanded percentile interval: percentiles a little outside `level`, by as much as Student's t
    is wider than the normal. The plain percentile interval is too short for a few dozen prompts.

    Args:
        statistic (`Callable`):
            `f(*columns) -> float`.
        columns_P (`ArrayLike`, each with P rows):
            The arguments of the statistic, one row per prompt. Rows are drawn together.

    ```python
    >>> str(bootstrap(np.mean, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0], seed=0))
    '0.625 [0.250, 1.000]'
    ```
    """
    columns = [np.asarray(column) for column in columns_P]
    sizes = {len(column) for column in columns}
    if len(sizes) != 1:
        raise ValueError(f"The columns have {sorted(sizes)} rows: there must be one row per prompt in each.")
    n = sizes.pop()
    value = float(statistic(*columns)) if n else math.nan
    if n < 3:
        return Estimate(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(n_resamples):
        rows = rng.integers(n, size=n)
        values.append(statistic(*(column[rows] for column in columns)))
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _t_quantile(0.5 + level / 2, n - 1))
    return Estimate(value, *percentile_interval(values, tail))


def percentile_interval(values: ArrayLike, tail: float) -> tuple[float, float]:
    """The quantiles `tail` and `1 - tail` of resampled values. Undefined values are left out; NaN if all are."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    low, high = np.quantile(finite, [tail, 1 - tail]) if finite.size else (math.nan, math.nan)
    return float(low), float(high)


def mean_estimate(values_P: ArrayLike, **options: Any) -> Estimate:
    """The mean over prompts, NaN left out, with its [`bootstrap`] interval: for pass@k, Cover@tau and the like."""
    values = np.asarray(values_P, dtype=np.float64)
    return bootstrap(lambda v: float(v.mean()), values[~np.isnan(values)], **options)


def sign_flip_p(difference_P: ArrayLike, n_flips: int = 10_000, seed: int = 0) -> float:
    """
    Two-sided p-value of the sign-flip permutation test: how often a mean at least as far from 0 comes about if every
    prompt's difference has either sign with probability 1/2. With up to 13 differences that are not 0 it is exact, else an
    estimate from `n_flips` draws, which is never 0. 1 if no prompt differs.

    It is the test for pairs: two models on the same prompts. With differences of 1, 0 and -1 it is McNemar's exact test.

    ```python
    >>> sign_flip_p([1, 1, 1, 1, 0, 0])
    0.125
    ```
    """
    difference = np.asarray(difference_P, dtype=np.float64)
    difference = difference[difference != 0]
    n = difference.size
    if not n:
        return 1.0
    least = abs(difference.sum()) - 1e-9  # sums of the same numbers in another order may differ in the last digit
    if n <= _EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((abs(signs @ difference) >= least).mean())
    rng = np.random.default_rng(seed)
    as_far = 0
    for start in range(0, n_flips, _FLIPS_AT_A_TIME):
        size = min(_FLIPS_AT_A_TIME, n_flips - start)
        signs = 1 - 2 * rng.integers(2, size=(size, n), dtype=np.int8)
        as_far += int((abs(signs @ difference) >= least).sum())
    return (as_far + 1) / (n_flips + 1)


def checked_counts(n: ArrayLike, c: ArrayLike, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Samples and correct samples as arrays of one shape; raises `ValueError` if they cannot be counts."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: it is a number of samples.")
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if ((c < 0) | (c > n)).any():
        raise ValueError(f"c={c.tolist()} must lie between 0 and n={n.tolist()}: it counts the correct samples.")
    return n, c


def _t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t by its expansion around the normal; good to 1 % from three degrees of freedom on."""
    z = NormalDist().inv_cdf(p)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
