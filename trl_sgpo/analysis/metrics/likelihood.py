"""From log-probabilities: how far the policy went from its base, and whether rewarded samples were likely already."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trl_sgpo.analysis.metrics.rates import UNDEFINED, Estimate, bootstrap


def perplexity(logps: ArrayLike, n_tokens: ArrayLike) -> float:
    """
    Perplexity of samples under a model: `exp(-(1 / T) sum log q)`, with T the number of all tokens; NaN without
    tokens. `logps` (shape (N,)) are in nats, each summed over the sample's tokens.
    """
    logps, tokens = _same_length(logps=logps, n_tokens=n_tokens)
    return float(np.exp(-logps.sum() / tokens.sum())) if tokens.sum() > 0 else math.nan


def kl_k1(policy_logps: ArrayLike, base_logps: ArrayLike) -> float:
    """
    KL(policy, base) per sample in nats, from N samples of the policy: the mean of `D = log pi(y|x) - log q(y|x)`, each
    summed over the tokens. The estimate is unbiased, and it may be negative.
    """
    policy, base = _same_length(policy_logps=policy_logps, base_logps=base_logps)
    return float((policy - base).mean()) if policy.size else math.nan


@dataclass(frozen=True)
class TiltFit:
    """
    How well the policy is an exponential tilt of the base, `pi(y|x) = q(y|x) exp(beta R) / Z(x)`. The standard
    deviations of `D` inside a prompt are what a tilt does not explain: both are 0 for a pure tilt.
    """

    beta: Estimate  # strength of the tilt in nats: `D` of correct minus `D` of incorrect samples
    sd_correct: float  # of `D` among the correct samples of a prompt
    sd_incorrect: float
    n_prompts: int  # with both kinds of samples: only these say something about beta


def tilt_fit(delta: ArrayLike, correct: ArrayLike, prompt: ArrayLike) -> TiltFit:
    """
    Fits the strength of the tilt: `beta_hat = mean over correct D - mean over incorrect D`.

    The means are compared inside each prompt (least squares with one constant per prompt), because `Z(x)` depends on
    the prompt. Pooled means would mix `Z(x)` into beta: hard prompts have both a small Z and few correct samples. If
    no prompt has both kinds of samples, beta is NaN.

    Args:
        delta, correct, prompt (`ArrayLike`, shape (N,)):
            Of each sample: `D = log pi(y|x) - log q(y|x)` in nats, summed over the tokens; whether it is correct; a
            label of its prompt.

    ```python
    >>> fit = tilt_fit([1.0, 1.0, -1.0, 2.0, 0.0], [1, 1, 0, 1, 0], prompt=[0, 0, 0, 1, 1])
    >>> fit.beta.value, fit.n_prompts
    (2.0, 2)
    ```
    """
    delta, right = _same_length(delta=delta, correct=np.asarray(correct, dtype=bool))
    labels = np.unique(np.asarray(prompt), return_inverse=True)[1]
    if labels.size != delta.size:
        raise ValueError(f"prompt has length {labels.size} and delta {delta.size}: there must be one per sample.")
    rows, deviations = [], {True: np.zeros(0), False: np.zeros(0)}
    for label in np.unique(labels):
        mine = labels == label
        a, b = delta[mine & (right == 1)], delta[mine & (right == 0)]
        for kind, values in ((True, a), (False, b)):
            if values.size > 1:
                scale = math.sqrt(values.size / (values.size - 1))
                deviations[kind] = np.append(deviations[kind], (values - values.mean()) * scale)
        if a.size and b.size:
            rows.append((a.size * b.size / (a.size + b.size), a.mean() - b.mean()))
    beta = UNDEFINED
    if rows:
        weight, difference = np.array(rows).T
        beta = bootstrap(lambda w, d: float((w * d).sum() / w.sum()), weight, difference)
    spread = {kind: float(np.sqrt(np.mean(v**2))) if v.size else math.nan for kind, v in deviations.items()}
    return TiltFit(beta, spread[True], spread[False], len(rows))


def normalised_ranks(logps: ArrayLike, prompt: ArrayLike) -> np.ndarray:
    """
    Rank of each sample among the samples of its prompt by log-probability: 0 for the least likely, 1 for the most
    likely. Equal samples share the middle of their ranks. NaN if a prompt has only one sample.
    """
    values, labels = np.asarray(logps, dtype=np.float64), np.asarray(prompt)
    ranks = np.full(values.size, np.nan)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if mine.size > 1:
            ordered = np.sort(values[mine])
            first, last = np.searchsorted(ordered, values[mine]), np.searchsorted(ordered, values[mine], side="right")
            ranks[mine] = (first + last - 1) / 2 / (mine.size - 1)
    return ranks


def rank_of_correct(logps: ArrayLike, correct: ArrayLike, prompt: ArrayLike) -> Estimate:
    """
    Mean [`normalised_ranks`] of the correct samples, over prompts with both correct and incorrect samples. Above 0.5
    the rewarded samples were likely already (arXiv 2506.02355); 0.5 means no such bias.
    """
    right, labels = np.asarray(correct, dtype=bool), np.asarray(prompt)
    ranks = normalised_ranks(logps, prompt)
    per_prompt = []
    for label in np.unique(labels):
        mine = labels == label
        if right[mine].any() and not right[mine].all():
            per_prompt.append((ranks[mine & right].sum(), (mine & right).sum()))
    if not per_prompt:
        return UNDEFINED
    total, count = np.array(per_prompt).T
    return bootstrap(lambda t, c: float(t.sum() / c.sum()), total, count)


def uplift_by_rank(
    before: ArrayLike, after: ArrayLike, correct: ArrayLike, prompt: ArrayLike, n_bins: int = 4
) -> np.ndarray:
    """
    Share of the correct samples whose log-probability rises with the update, by rank (arXiv 2506.02355): one share for
    each of `n_bins` equal bins of [`normalised_ranks`] before the update. NaN for a bin without samples.
    """
    before, after = _same_length(before=before, after=after)
    right, ranks = np.asarray(correct, dtype=bool), normalised_ranks(before, prompt)
    bins = np.minimum((ranks * n_bins).astype(int, copy=False), n_bins - 1) if ranks.size else ranks
    shares = np.full(n_bins, np.nan)
    for i in range(n_bins):
        mine = right & ~np.isnan(ranks) & (bins == i)
        if mine.any():
            shares[i] = (after[mine] > before[mine]).mean()
    return shares


def likelihood_displacement(before: ArrayLike, after: ArrayLike, correct: ArrayLike) -> float:
    """
    Mean change of the log-probability of correct samples in an update, in nats. If it is negative, rewarded samples
    became less likely, because similar wrong samples pulled them down (arXiv 2505.18830). NaN without correct samples.
    """
    before, after = _same_length(before=before, after=after)
    right = np.asarray(correct, dtype=bool)
    return float((after - before)[right].mean()) if right.any() else math.nan


def _same_length(**columns: ArrayLike) -> tuple[np.ndarray, ...]:
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    if len({array.shape for array in arrays.values()}) != 1:
        shapes = " and ".join(f"{name} has shape {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{shapes}: they must be equal, with one entry per sample.")
    return tuple(arrays.values())
