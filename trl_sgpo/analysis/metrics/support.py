"""From counts: which prompts base and policy solve, where the gain is, and whether a tilt explains it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from trl_sgpo.analysis.metrics.rates import UNDEFINED, Estimate, bootstrap, checked_counts, mean_estimate, pass_at_k


@dataclass(frozen=True)
class SupportTable:
    """
    Which prompts base and policy solve, after "The Invisible Leash" (arXiv 2507.14843). A prompt is solved if at least
    one of its samples is correct. The null: policy and base have the same pass@1 on every prompt.
    """

    preserved: int  # P: solved by both
    expanded: int  # E: only by the policy
    shrunk: int  # S: only by the base
    out_of_reach: int  # O: by neither
    srr: Estimate  # support retention rate P / (P + S); each ratio is NaN if its denominator is 0
    ndr: Estimate  # net discovery rate E / (P + E)
    nscr: Estimate  # net support change rate (E - S) / (P + E + S)
    expanded_null: float  # mean number under the null
    shrunk_null: float
    p_expanded: float  # probability of at least as many under the null
    p_shrunk: float
    unseen_rate: float  # upper 95 % limit of the base's pass@1 on a prompt it never solved, 1 - 0.05 ** (1 / n)

    def changes(self, level: float = 0.95) -> list[str]:
        """
        Which of `"expanded"` and `"shrunk"` chance does not explain. Each is tested at half of `1 - level`, so base
        against base gives no change in at least a share `level` of all cases.
        """
        alpha = (1 - level) / 2
        return [name for name in ("expanded", "shrunk") if getattr(self, f"p_{name}") <= alpha]


def support_table(
    base_c: ArrayLike, policy_c: ArrayLike, base_n: ArrayLike, policy_n: ArrayLike | None = None
) -> SupportTable:
    """
    Compares the prompts that base and policy solve with what chance gives.

    Under the null, the correct samples of a prompt are split between base and policy like balls from one urn (a
    hypergeometric law), whatever the prompt's difficulty. The numbers of expanded and of shrunk prompts are compared
    with the exact law of their sum over prompts. So "expanded" means: the policy solves prompts that the base did not
    solve *in this many samples*; see `unseen_rate`.

    Args:
        base_c, policy_c (`ArrayLike` of integers, shape (P,)):
            Correct samples per prompt.
        base_n, policy_n (`ArrayLike` of integers, shape (P,), or `int`):
            Samples per prompt; `policy_n` defaults to `base_n`. With unequal numbers the side with more samples solves
            more prompts: the test accounts for that, the four counts do not.

    ```python
    >>> table = support_table(base_c=[0, 0, 3, 8], policy_c=[0, 5, 8, 0], base_n=8)
    >>> table.preserved, table.expanded, table.shrunk, table.out_of_reach
    (1, 1, 1, 1)
    ```
    """
    if np.shape(base_c) != np.shape(policy_c) or np.ndim(base_c) != 1:
        shapes = f"base_c has shape {np.shape(base_c)} and policy_c {np.shape(policy_c)}"
        raise ValueError(f"{shapes}: both must be (prompts,), with the same prompts in the same order.")
    base_n = np.broadcast_to(np.asarray(base_n), np.shape(base_c))
    policy_n = base_n if policy_n is None else np.broadcast_to(np.asarray(policy_n), np.shape(policy_c))
    base_n, base = checked_counts(base_n, base_c)
    policy_n, policy = checked_counts(policy_n, policy_c)
    by_base, by_policy = base > 0, policy > 0
    chance_expanded, chance_shrunk = [], []
    for nb, cb, npi, cpi in zip(base_n, base, policy_n, policy, strict=True):
        # How many of the pooled correct samples are the base's
        split = _hypergeometric(int(nb + npi), int(cb + cpi), int(nb))
        k = np.arange(split.size)
        of_base, of_policy = k > 0, cb + cpi - k > 0
        chance_expanded.append(float(split[~of_base & of_policy].sum()))
        chance_shrunk.append(float(split[of_base & ~of_policy].sum()))
    expanded, shrunk = int((~by_base & by_policy).sum()), int((by_base & ~by_policy).sum())
    solved = by_base.astype(float), by_policy.astype(float)
    ratios: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "srr": lambda b, p: _ratio((b * p).sum(), b.sum()),
        "ndr": lambda b, p: _ratio(((1 - b) * p).sum(), p.sum()),
        "nscr": lambda b, p: _ratio((p - b).sum(), np.maximum(b, p).sum()),
    }
    return SupportTable(
        preserved=int((by_base & by_policy).sum()),
        expanded=expanded,
        shrunk=shrunk,
        out_of_reach=int((~by_base & ~by_policy).sum()),
        **{name: bootstrap(ratio, *solved) for name, ratio in ratios.items()},
        expanded_null=float(sum(chance_expanded)),
        shrunk_null=float(sum(chance_shrunk)),
        p_expanded=_at_least(chance_expanded, expanded),
        p_shrunk=_at_least(chance_shrunk, shrunk),
        unseen_rate=1 - 0.05 ** (1 / float(base_n.min())) if base_n.size and base_n.min() > 0 else math.nan,
    )


def sampling_efficiency_gap(
    base_n: ArrayLike, base_c: ArrayLike, policy_n: ArrayLike, policy_c: ArrayLike, k: int
) -> Estimate:
    """
    Mean pass@k of the base minus mean pass@1 of the policy, over the same prompts: what the base finds in `k` samples
    and the policy does not yet find in one.
    """
    return mean_estimate(pass_at_k(base_n, base_c, k) - pass_at_k(policy_n, policy_c, 1))


@dataclass(frozen=True)
class TiltLine:
    """
    The line `logit pass@1(pi) = intercept + slope * logit pass@1(q)` over prompts. A pure tilt has slope 1 and
    intercept beta. A smaller slope means that hard prompts gained more than a tilt gives them, as in an expansion. NaN
    if the base's pass@1 hardly differs between prompts, or if the policy solves all or no samples.
    """

    slope: Estimate
    intercept: Estimate
    n_prompts: int


def tilt_line(base_n: ArrayLike, base_c: ArrayLike, policy_n: ArrayLike, policy_c: ArrayLike) -> TiltLine:
    """
    Fits the line between the logits of pass@1 under base and policy, from samples and correct samples per prompt.

    A line through the points `logit(c / n)` is no alternative: the noise of the base's counts flattens it, so it finds
    a slope below 1 for every tilt, and prompts with c = 0 or c = n have no point. So the counts are modelled:
    `c_q ~ Bin(n_q, sigmoid(t))` and `c_pi ~ Bin(n_pi, sigmoid(intercept + slope t))` with `t ~ Normal(mu, s^2)` over
    prompts. The fit is by maximum likelihood (Gauss-Hermite quadrature over t). The intervals are Wald's, at 95 %.
    """
    base_n, base_c = checked_counts(base_n, base_c)
    policy_n, policy_c = checked_counts(policy_n, policy_c)
    # There is no line if all prompts have one base rate, or if the policy solves all or nothing
    share = policy_c.sum() / max(policy_n.sum(), 1)
    if base_c.size < 8 or len(np.unique(base_c / np.maximum(base_n, 1))) < 3 or not 0 < share < 1:
        return TiltLine(UNDEFINED, UNDEFINED, int(base_c.size))
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    log_weights = np.log(weights / math.sqrt(2 * math.pi))
    nb, cb, npi, cpi = (x.astype(np.float64)[:, None] for x in (base_n, base_c, policy_n, policy_c))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log-likelihood and its gradient in (intercept, slope, mean, log of the standard deviation)."""
        intercept, slope, mean, log_sd = parameters
        t = mean + math.exp(log_sd) * nodes
        u = intercept + slope * t
        # log sigmoid(x) = -log(1 + e^-x), and log sigmoid(-x) is less by x
        log_p = nb * -np.logaddexp(0, t) + cb * t + npi * -np.logaddexp(0, u) + cpi * u + log_weights
        top = log_p.max(axis=1, keepdims=True)
        posterior = np.exp(log_p - top)
        total = posterior.sum(axis=1, keepdims=True)
        posterior /= total
        by_u = cpi - npi * _sigmoid(u)
        by_t = cb - nb * _sigmoid(t) + slope * by_u
        parts = (by_u, by_u * t, by_t, by_t * (t - mean))
        return -float((np.log(total) + top).sum()), -np.array([(posterior * part).sum() for part in parts])

    rate = np.clip(base_c.sum() / base_n.sum(), 0.01, 0.99)
    parameters, hessian = _minimise(loss, np.array([0.0, 1.0, math.log(rate / (1 - rate)), 0.3]))
    covariance = np.linalg.pinv(hessian)
    z = NormalDist().inv_cdf(0.975)
    intercept, slope = (
        Estimate(float(value), float(value - z * sd), float(value + z * sd))
        for value, sd in zip(parameters[:2], np.sqrt(np.maximum(covariance.diagonal()[:2], 0)), strict=True)
    )
    return TiltLine(slope, intercept, int(base_c.size))


def tilt_gain(base_pass: ArrayLike, beta: float) -> np.ndarray:
    """
    What an exponential tilt by `beta` adds to a pass@1 of Q: `Q(1-Q)(e^beta - 1) / (1 + Q(e^beta - 1))`. The curve is
    a hump: zero at Q = 0 (no support) and at Q = 1 (saturated).
    """
    q, more = np.asarray(base_pass, dtype=np.float64), math.expm1(beta)
    return q * (1 - q) * more / (1 + q * more)


@dataclass(frozen=True)
class SaturationBucket:
    """
    Gain of the policy over the base among prompts with a base pass@1 in `[low, high)` (the last bucket: `[low, 1]`),
    and the mean pass@1 of the base there.
    """

    low: float
    high: float
    n_prompts: float
    base: float
    gain: Estimate


def saturation(
    base_n: ArrayLike,
    base_c: ArrayLike,
    policy_n: ArrayLike,
    policy_c: ArrayLike,
    edges: Sequence[float] = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0),
) -> list[SaturationBucket]:
    """
    Gain in pass@1 per bucket of the base's pass@1. The buckets lie between `edges`, which rise from 0 to 1. The tilt
    predicts a hump ([`tilt_gain`]).

    One half of a prompt's base samples chooses its bucket, the other half measures the base there, so the base needs
    two samples or more. With the same samples for both, every low bucket would show a gain and every high bucket a
    loss, even for base against base. The result is the average over all halvings, so a prompt can lie in several
    buckets with a share in each (`n_prompts` is their sum).
    """
    edges_B = np.asarray(edges, dtype=np.float64)
    if edges_B.size < 2 or edges_B[0] != 0 or edges_B[-1] != 1 or (np.diff(edges_B) <= 0).any():
        raise ValueError(f"edges={list(edges)} must rise from 0 to 1: they are limits of pass@1.")
    base_n, base_c = checked_counts(base_n, base_c)
    policy_n, policy_c = checked_counts(policy_n, policy_c)
    if base_n.size and base_n.min() < 2:
        raise ValueError(
            f"base_n={int(base_n.min())} is too small: the base's samples are halved, so there must be at least two."
        )
    share_PB = np.zeros((base_c.size, edges_B.size - 1))
    base_PB, gain_PB = np.zeros_like(share_PB), np.zeros_like(share_PB)  # times share
    for i, (n, c) in enumerate(zip(base_n.tolist(), base_c.tolist(), strict=True)):
        half = n // 2
        split = _hypergeometric(n, c, half)
        taken = np.arange(split.size)
        bucket = np.minimum(np.searchsorted(edges_B, taken / half, side="right") - 1, edges_B.size - 2)
        measured = (c - taken) / (n - half)
        np.add.at(share_PB[i], bucket, split)
        np.add.at(base_PB[i], bucket, split * measured)
        np.add.at(gain_PB[i], bucket, split * (policy_c[i] / policy_n[i] - measured))
    return [
        SaturationBucket(
            float(edges_B[b]),
            float(edges_B[b + 1]),
            float(share_PB[:, b].sum()),
            _ratio(base_PB[:, b].sum(), share_PB[:, b].sum()),
            bootstrap(lambda g, s: _ratio(g.sum(), s.sum()), gain_PB[:, b], share_PB[:, b]),
        )
        for b in range(edges_B.size - 1)
    ]


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def _hypergeometric(population: int, marked: int, drawn: int) -> np.ndarray:
    """Probabilities of 0, 1, ..., min(marked, drawn) marked ones among `drawn` of `population`."""
    ways = [comb(marked, k) * comb(population - marked, drawn - k) for k in range(min(marked, drawn) + 1)]
    return np.array([way / comb(population, drawn) for way in ways])


def _at_least(probabilities: Sequence[float], count: int) -> float:
    """Probability that at least `count` of independent events with these probabilities happen."""
    law = np.array([1.0])
    for p in probabilities:
        law = np.convolve(law, [1 - p, p])
    return float(min(1.0, law[count:].sum()))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _minimise(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, max_steps: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method with halved steps, for a few parameters. Returns the minimum and the Hessian there."""

    def hessian(x: np.ndarray) -> np.ndarray:
        shifts = 1e-5 * np.eye(x.size)
        columns = [(loss(x + shift)[1] - loss(x - shift)[1]) / 2e-5 for shift in shifts]
        return (np.array(columns) + np.array(columns).T) / 2

    value, gradient = loss(x)
    for _ in range(max_steps):
        # If the loss is not convex here, the absolute eigenvalues still give a direction downwards
        eigenvalues, vectors = np.linalg.eigh(hessian(x))
        step = vectors @ ((vectors.T @ gradient) / np.maximum(np.abs(eigenvalues), 1e-8))
        step *= min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        scale = 1.0
        while scale > 1e-6 and not loss(x - scale * step)[0] < value:
            scale /= 2
        if scale <= 1e-6:
            break
        x = x - scale * step
        previous, (value, gradient) = value, loss(x)
        if previous - value < 1e-9:
            break
    return x, hessian(x)
