"""
Metrics as pure functions of rewards, counts, answers and log-probabilities. Nothing here knows about trainers, models or
files.

Throughout, q is the base model, pi the policy, x a prompt, y a sample, and `n` samples of a prompt of which `c` are correct.
An average over prompts comes with a prompt-level bootstrap interval ([`bootstrap`]); what is undefined is NaN.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> np.ndarray:
    """
    Unbiased estimate of pass@k from `n` samples of which `c` are correct: `1 - C(n - c, k) / C(n, k)` (arXiv
    2107.03374), the probability that at least one of `k` samples drawn without replacement is correct.

    Args:
        n (`ArrayLike` of integers):
            Samples per prompt, any shape.
        c (`ArrayLike` of integers):
            Correct ones among them, same shape, `0 <= c <= n`.
        k (`int`):
            How many samples one attempt may draw, at least 1.

    Returns:
        `np.ndarray`: Estimates in [0, 1], one per prompt; NaN where `n < k`.

    Raises:
        ValueError: If `k < 1`, or `c` does not lie between 0 and `n`.

    Example:

    ```python
    >>> pass_at_k(n=[4, 4, 4], c=[0, 1, 4], k=2)
    array([0. , 0.5, 1. ])
    ```
    """
    n, c = _counts(n, c, k)
    values = [
        1 - comb(int(ni - ci), k) / comb(int(ni), k) if ni >= k else np.nan
        for ni, ci in zip(n.ravel(), c.ravel(), strict=True)
    ]
    return np.array(values, dtype=np.float64).reshape(n.shape)


def pass_power_k(n: ArrayLike, c: ArrayLike, k: int) -> np.ndarray:
    """
    Unbiased estimate of pass^k, the probability that `k` samples are *all* correct: `C(c, k) / C(n, k)`.

    Arguments, errors and NaN are those of [`pass_at_k`].

    Example:

    ```python
    >>> pass_power_k(n=[4, 4, 4], c=[0, 2, 4], k=2).round(3)
    array([0.   , 0.167, 1.   ])
    ```
    """
    n, c = _counts(n, c, k)
    values = [
        comb(int(ci), k) / comb(int(ni), k) if ni >= k else np.nan for ni, ci in zip(n.ravel(), c.ravel(), strict=True)
    ]
    return np.array(values, dtype=np.float64).reshape(n.shape)


def cover_at(n: ArrayLike, c: ArrayLike, tau: float) -> np.ndarray:
    """
    Cover@tau (arXiv 2510.08325): 1 for a prompt of whose samples at least a share `tau` is correct, else 0. Where pass@k
    counts one lucky guess among many, this asks for reliability.

    Args:
        n, c (`ArrayLike` of integers):
            Samples per prompt and correct ones among them.
        tau (`float`):
            The share to reach, in (0, 1].

    Returns:
        `np.ndarray`: 0.0 or 1.0 per prompt; NaN where `n` is 0.

    Example:

    ```python
    >>> cover_at(n=[8, 8, 8], c=[1, 4, 8], tau=0.5)
    array([0., 1., 1.])
    ```
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau={tau} must lie in (0, 1]: it is the share of a prompt's samples that is correct.")
    n, c = _counts(n, c)
    # Compared as integers times tau, with a hair's breadth for 0.3 * 10
    return np.where(n > 0, (c >= tau * n - 1e-9).astype(np.float64), np.nan)


def maj_at_k(answers: Sequence[Hashable], correct: ArrayLike, k: int) -> float:
    """
    maj@k of one prompt: the probability that the most frequent of `k` answers, drawn without replacement, is correct. A
    tie for the first place is broken at random. Correct answers count as one answer, however they are spelled.

    Args:
        answers (`Sequence[Hashable]` of length N):
            The extracted answers of the samples. `None`, no answer, never wins a vote.
        correct (`ArrayLike` of booleans, shape (N,)):
            Which samples are correct.
        k (`int`):
            Number of voters, at least 1.

    Returns:
        `float`: The exact probability; NaN where `N < k`.

    Example:

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
        # ways[m, t]: how to draw m votes for wrong answers, none with more than `votes` of them and t with just as many
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
    What pass@k guessing reaches: `1 - (1 - guess) ** k`, with `guess` the probability that one guess is correct. At large
    `k` a multiple-choice task is "solved" by a policy that knows nothing.
    """
    if not 0 <= guess <= 1:
        raise ValueError(f"guess={guess} must lie in [0, 1]: it is the probability that one guess is correct.")
    return 1 - (1 - guess) ** k


def group_split(outcome_PG: ArrayLike, success_threshold: float = 0.5) -> dict[str, float]:
    """
    Shares of groups that are solved (all scored completions correct), mixed and failed (at least two scored, none
    correct). NaN is no score; groups with fewer than two scored completions are counted in none of the three.

    Args:
        outcome_PG (`ArrayLike`, shape (P, G)):
            Outcome rewards of P groups of G completions.
        success_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct when its outcome reaches this.

    Returns:
        `dict[str, float]`: `"solved"`, `"mixed"` and `"failed"`, NaN without any group.

    Example:

    ```python
    >>> group_split([[1, 1], [1, 0], [0, 0], [0, 0]])
    {'solved': 0.25, 'mixed': 0.25, 'failed': 0.5}
    ```
    """
    outcome = np.asarray(outcome_PG, dtype=np.float64)
    if outcome.ndim != 2:
        raise ValueError(f"outcome_PG has shape {outcome.shape}: it must be (groups, completions of a group).")
    if outcome.shape[0] == 0:
        return dict.fromkeys(("solved", "mixed", "failed"), float("nan"))
    n_scored = (~np.isnan(outcome)).sum(axis=1)
    n_correct = (outcome >= success_threshold).sum(axis=1)  # NaN compares as False
    judged = n_scored >= 2
    return {
        "solved": float((judged & (n_correct == n_scored)).mean()),
        "mixed": float((judged & (n_correct > 0) & (n_correct < n_scored)).mean()),
        "failed": float((judged & (n_correct == 0)).mean()),
    }


def answer_entropy(answers: Sequence[Hashable]) -> float:
    """
    Entropy of a group's answers in nats: `-sum p_j log p_j` over the distinct answers, each with its share `p_j`. From 0
    (all alike) to `log(N)` (all different). NaN without answers.

    Example:

    ```python
    >>> round(answer_entropy(["4", "4", "5", "5"]), 4)
    0.6931
    ```
    """
    if not answers:
        return float("nan")
    p = np.array(list(Counter(answers).values())) / len(answers)
    return max(0.0, float(-(p * np.log(p)).sum()))


def perplexity(logps: ArrayLike, n_tokens: ArrayLike) -> float:
    """
    Perplexity of samples under a model: `exp(-(1 / T) sum log q)` with T all tokens together. NaN without tokens.

    Args:
        logps (`ArrayLike`, shape (N,)):
            Log-probability of each sample, in nats, summed over its tokens.
        n_tokens (`ArrayLike` of integers, shape (N,)):
            Tokens of each sample.
    """
    logps, tokens = _same_length(logps=logps, n_tokens=n_tokens)
    return float(np.exp(-logps.sum() / tokens.sum())) if tokens.sum() > 0 else float("nan")


def kl_k1(policy_logps: ArrayLike, base_logps: ArrayLike) -> float:
    """
    KL(policy, base) per sample in nats, from samples of the policy: the mean of `D = log pi(y|x) - log q(y|x)`. Unbiased,
    and may come out negative.

    Args:
        policy_logps, base_logps (`ArrayLike`, shape (N,)):
            Log-probabilities of the samples, summed over their tokens.
    """
    policy, base = _same_length(policy_logps=policy_logps, base_logps=base_logps)
    return float((policy - base).mean()) if policy.size else float("nan")


def kl_k3(policy_logps: ArrayLike, base_logps: ArrayLike, mask: ArrayLike | None = None) -> float:
    """
    KL(policy, base) per token in nats, from tokens sampled by the policy: the mean of `exp(-d) - 1 + d` with
    `d = log pi - log q` of a token. Never negative; unbiased while the base gives every sampled token some mass.

    Args:
        policy_logps, base_logps (`ArrayLike`, shape (N, T)):
            Log-probabilities per token.
        mask (`ArrayLike` of booleans, shape (N, T), *optional*):
            Which of them are tokens of the completion.
    """
    d = np.asarray(policy_logps, dtype=np.float64) - np.asarray(base_logps, dtype=np.float64)
    terms = np.exp(-d) - 1 + d
    if mask is not None:
        terms = terms[np.asarray(mask, dtype=bool)]
    return float(terms.mean()) if terms.size else float("nan")


def effective_tokens(advantages: ArrayLike, n_tokens: ArrayLike) -> float:
    """
    Share of the completion tokens that carry a gradient: those of completions whose advantage is not zero.

    Args:
        advantages (`ArrayLike`, shape (N,)):
            Advantages of the completions. NaN counts as zero.
        n_tokens (`ArrayLike` of integers, shape (N,)):
            Their lengths.

    Example:

    ```python
    >>> effective_tokens([0.0, 1.0, -1.0], [10, 20, 10])
    0.75
    ```
    """
    advantages, tokens = _same_length(advantages=advantages, n_tokens=n_tokens)
    return float(tokens[np.nan_to_num(advantages) != 0].sum() / tokens.sum()) if tokens.sum() > 0 else float("nan")


@dataclass(frozen=True)
class Estimate:
    """
    A number with its confidence interval.

    Args:
        value (`float`):
            The estimate; NaN where it is undefined.
        low, high (`float`):
            Ends of the interval; NaN where there are too few prompts for one.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Callable[..., float],
    *columns_P: ArrayLike,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """
    A statistic of prompts with its prompt-level bootstrap interval: prompts are drawn with replacement, never samples,
    for the samples of a prompt belong together.

    The interval is the expanded percentile interval: percentiles a little outside `level`, by as much as Student's t is
    wider than the normal, without which it is too short for a few dozen prompts.

    Args:
        statistic (`Callable`):
            `f(*columns) -> float`.
        columns_P (`ArrayLike`, each with P rows):
            What the statistic takes, one row per prompt. Rows are drawn together.
        level (`float`, *optional*, defaults to `0.95`):
            Nominal coverage.
        n_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Estimate`]: Without an interval for fewer than three prompts.

    Example:

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
    value = float(statistic(*columns)) if n else float("nan")
    if n < 3:
        return Estimate(value, float("nan"), float("nan"))
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


@dataclass(frozen=True)
class SupportTable:
    """
    Which prompts base and policy solve, after "The Invisible Leash" (arXiv 2507.14843). A prompt counts as solved if at
    least `min_correct` of its samples are correct.

    Args:
        preserved, expanded, shrunk, out_of_reach (`int`):
            Prompts solved by both, by the policy only, by the base only, by neither (P, E, S, O).
        srr, ndr, nscr ([`Estimate`]):
            Support retention rate `P / (P + S)`, net discovery rate `E / (P + E)` and net support change rate
            `(E - S) / (P + E + S)`, with prompt-level intervals; NaN where the denominator is 0.
        expanded_null, shrunk_null (`float`):
            How many expanded and shrunk prompts chance alone gives on average if policy and base have the same pass@1
            on every prompt: the base-against-base null.
        p_expanded, p_shrunk (`float`):
            Probability of at least as many under that null.
        unseen_rate (`float`):
            Upper 95 % limit of the base's pass@1 on a prompt that it never solved, `1 - 0.05 ** (1 / n)`: what "not
            solved by the base" can mean at this number of samples.
    """

    preserved: int
    expanded: int
    shrunk: int
    out_of_reach: int
    srr: Estimate
    ndr: Estimate
    nscr: Estimate
    expanded_null: float
    shrunk_null: float
    p_expanded: float
    p_shrunk: float
    unseen_rate: float

    def changes(self, level: float = 0.95) -> list[str]:
        """
        Which of `"expanded"` and `"shrunk"` chance does not explain: each is tested at half of `1 - level`, so that
        base against base comes out as "no change" in at least a share `level` of all cases.
        """
        alpha = (1 - level) / 2
        return [name for name in ("expanded", "shrunk") if getattr(self, f"p_{name}") <= alpha]


def support_table(
    base_c: ArrayLike,
    policy_c: ArrayLike,
    base_n: ArrayLike,
    policy_n: ArrayLike | None = None,
    min_correct: int = 1,
    seed: int = 0,
) -> SupportTable:
    """
    Compares the prompts that base and policy solve, against what chance gives.

    Given how often base and policy together solved a prompt, chance splits these correct samples between the two sets of
    samples like balls from one urn (a hypergeometric law), whatever the prompt's difficulty. The numbers of expanded and
    of shrunk prompts are compared with the exact law of their sum over prompts. "Expanded" therefore says that the
    policy solves more of what the base did not solve *in this many samples*; see `unseen_rate`.

    Args:
        base_c, policy_c (`ArrayLike` of integers, shape (P,)):
            Correct samples per prompt.
        base_n (`int` or `ArrayLike` of integers, shape (P,)):
            The base's samples per prompt.
        policy_n (`int` or `ArrayLike` of integers, shape (P,), *optional*):
            The policy's. Defaults to `base_n`. With unequal numbers the larger side finds more by drawing more: the test
            accounts for it, the four counts do not.
        min_correct (`int`, *optional*, defaults to `1`):
            Correct samples that make a prompt solved.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        [`SupportTable`]

    Example:

    ```python
    >>> table = support_table(base_c=[0, 0, 3, 8], policy_c=[0, 5, 8, 0], base_n=8)
    >>> table.preserved, table.expanded, table.shrunk, table.out_of_reach
    (1, 1, 1, 1)
    ```
    """
    if min_correct < 1:
        raise ValueError(f"min_correct={min_correct} must be at least 1: it is a number of correct samples.")
    if np.shape(base_c) != np.shape(policy_c) or np.ndim(base_c) != 1:
        shapes = f"base_c has shape {np.shape(base_c)} and policy_c {np.shape(policy_c)}"
        raise ValueError(f"{shapes}: both must be (prompts,), with the same prompts in the same order.")
    base_n = np.broadcast_to(np.asarray(base_n), np.shape(base_c))
    policy_n = base_n if policy_n is None else np.broadcast_to(np.asarray(policy_n), np.shape(policy_c))
    base_n, base = _counts(base_n, base_c)
    policy_n, policy = _counts(policy_n, policy_c)
    by_base, by_policy = base >= min_correct, policy >= min_correct
    chance_expanded, chance_shrunk = [], []
    for nb, cb, npi, cpi in zip(base_n, base, policy_n, policy, strict=True):
        # How many of the pooled correct samples are the base's
        split = _hypergeometric(int(nb + npi), int(cb + cpi), int(nb))
        k = np.arange(split.size)
        of_base, of_policy = k >= min_correct, (cb + cpi - k) >= min_correct
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
        **{name: bootstrap(ratio, *solved, seed=seed) for name, ratio in ratios.items()},
        expanded_null=float(sum(chance_expanded)),
        shrunk_null=float(sum(chance_shrunk)),
        p_expanded=_at_least(chance_expanded, expanded),
        p_shrunk=_at_least(chance_shrunk, shrunk),
        unseen_rate=1 - 0.05 ** (1 / float(base_n.min())) if base_n.size and base_n.min() > 0 else float("nan"),
    )


def sampling_efficiency_gap(
    base_n: ArrayLike, base_c: ArrayLike, policy_n: ArrayLike, policy_c: ArrayLike, k: int, seed: int = 0
) -> Estimate:
    """
    Mean pass@k of the base minus mean pass@1 of the policy, over the same prompts: what the base finds within `k` samples
    and the policy not yet at the first.
    """
    gap = pass_at_k(base_n, base_c, k) - pass_at_k(policy_n, policy_c, 1)
    return mean_estimate(gap, seed=seed)


def tilt_gain(base_pass: ArrayLike, beta: float) -> np.ndarray:
    """
    What an exponential tilt by `beta` adds to a pass@1 of Q: `Q(1-Q)(e^beta - 1) / (1 + Q(e^beta - 1))`. A hump, zero at
    Q = 0 (no support) and at Q = 1 (saturated).
    """
    q, more = np.asarray(base_pass, dtype=np.float64), math.expm1(beta)
    return q * (1 - q) * more / (1 + q * more)


@dataclass(frozen=True)
class TiltFit:
    """
    How well the policy is an exponential tilt of the base, `pi(y|x) = q(y|x) exp(beta R) / Z(x)`.

    Args:
        beta ([`Estimate`]):
            The strength of the tilt in nats; the difference of `D` between correct and incorrect samples.
        sd_correct, sd_incorrect (`float`):
            What a tilt does not explain: standard deviation of `D` inside either class of a prompt. Zero for a pure tilt.
        n_prompts (`int`):
            Prompts with both kinds of samples, which alone tell of beta.
    """

    beta: Estimate
    sd_correct: float
    sd_incorrect: float
    n_prompts: int


def tilt_fit(delta: ArrayLike, correct: ArrayLike, prompt: ArrayLike | None = None, seed: int = 0) -> TiltFit:
    """
    Fits the strength of the tilt: `beta_hat = mean over correct D - mean over incorrect D`.

    With `prompt` the means are compared inside each prompt (least squares with one constant per prompt), since `Z(x)`
    depends on the prompt and would otherwise leak into beta: hard prompts have both a small Z and few correct samples.

    Args:
        delta (`ArrayLike`, shape (N,)):
            `D = log pi(y|x) - log q(y|x)` per sample, in nats, summed over the tokens.
        correct (`ArrayLike` of booleans, shape (N,)):
            Which samples are correct.
        prompt (`ArrayLike`, shape (N,), *optional*):
            Which prompt a sample belongs to, any labels. Without it all samples count as one prompt's, and there is no
            interval.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap over prompts.

    Returns:
        [`TiltFit`]: beta is NaN if no prompt has both correct and incorrect samples.

    Example:

    ```python
    >>> fit = tilt_fit([1.0, 1.0, -1.0, 2.0, 0.0], [1, 1, 0, 1, 0], prompt=[0, 0, 0, 1, 1])
    >>> fit.beta.value, fit.n_prompts
    (2.0, 2)
    ```
    """
    delta, right = _same_length(delta=delta, correct=np.asarray(correct, dtype=bool))
    labels = (
        np.zeros(delta.size, dtype=int) if prompt is None else np.unique(np.asarray(prompt), return_inverse=True)[1]
    )
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
    if not rows:
        beta = Estimate(*[float("nan")] * 3)
    else:
        weight, difference = np.array(rows).T
        beta = bootstrap(lambda w, d: float((w * d).sum() / w.sum()), weight, difference, seed=seed)
    spread = {kind: float(np.sqrt(np.mean(v**2))) if v.size else float("nan") for kind, v in deviations.items()}
    return TiltFit(beta, spread[True], spread[False], len(rows))


@dataclass(frozen=True)
class TiltLine:
    """
    The line `logit pass@1(pi) = intercept + slope * logit pass@1(q)` over prompts. A pure tilt has slope 1 and intercept
    beta; a smaller slope says that hard prompts gained more than a tilt gives them, as an expansion does.

    Args:
        slope, intercept ([`Estimate`]):
            The line. NaN if the base's prompts do not differ enough for one, or the policy solves all or none of them.
        n_prompts (`int`):
            Prompts it was fitted on.
    """

    slope: Estimate
    intercept: Estimate
    n_prompts: int


def tilt_line(
    base_n: ArrayLike, base_c: ArrayLike, policy_n: ArrayLike, policy_c: ArrayLike, level: float = 0.95
) -> TiltLine:
    """
    Fits the line between the logits of pass@1 under base and policy, from counts.

    Drawing a line through the points `logit(c / n)` would find a slope below 1 for every tilt, since the noise of the
    base's counts flattens it, and has no points at all where c is 0 or n. So the counts are modelled: `c_q ~ Bin(n_q,
    sigmoid(t))` and `c_pi ~ Bin(n_pi, sigmoid(intercept + slope t))` with `t ~ Normal(mu, s^2)` over prompts, and fitted by
    maximum likelihood (Gauss-Hermite quadrature over t). The intervals are Wald's.

    Args:
        base_n, base_c, policy_n, policy_c (`ArrayLike` of integers, shape (P,)):
            Samples per prompt and correct ones among them.
        level (`float`, *optional*, defaults to `0.95`):
            Nominal coverage of the intervals.

    Returns:
        [`TiltLine`]
    """
    base_n, base_c = _counts(base_n, base_c)
    policy_n, policy_c = _counts(policy_n, policy_c)
    undefined = Estimate(*[float("nan")] * 3)
    # With one base rate for all prompts, or a policy that solves all or nothing, there is no line to fit
    share = policy_c.sum() / max(policy_n.sum(), 1)
    if base_c.size < 8 or len(np.unique(base_c / np.maximum(base_n, 1))) < 3 or not 0 < share < 1:
        return TiltLine(undefined, undefined, int(base_c.size))
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
    parameters = np.array([0.0, 1.0, math.log(rate / (1 - rate)), 0.3])
    parameters, hessian = _minimise(loss, parameters)
    covariance = np.linalg.pinv(hessian)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    intercept, slope = (
        Estimate(float(value), float(value - z * sd), float(value + z * sd))
        for value, sd in zip(parameters[:2], np.sqrt(np.maximum(covariance.diagonal()[:2], 0)), strict=True)
    )
    return TiltLine(slope, intercept, int(base_c.size))


def normalised_ranks(logps: ArrayLike, prompt: ArrayLike) -> np.ndarray:
    """
    Rank of each sample among those of its prompt by log-probability: 0 for the least likely, 1 for the likeliest, equal
    ones in the middle of their places. NaN for the only sample of a prompt.

    Args:
        logps (`ArrayLike`, shape (N,)):
            Log-probabilities.
        prompt (`ArrayLike`, shape (N,)):
            Which prompt a sample belongs to.
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


def rank_of_correct(logps: ArrayLike, correct: ArrayLike, prompt: ArrayLike, seed: int = 0) -> Estimate:
    """
    Mean [`normalised_ranks`] of the correct samples of prompts with both kinds. Above .5 what is rewarded is what was
    likely already (arXiv 2506.02355); .5 is no such bias.
    """
    right, labels = np.asarray(correct, dtype=bool), np.asarray(prompt)
    ranks = normalised_ranks(logps, prompt)
    per_prompt = []
    for label in np.unique(labels):
        mine = labels == label
        if right[mine].any() and not right[mine].all():
            per_prompt.append((ranks[mine & right].sum(), (mine & right).sum()))
    if not per_prompt:
        return Estimate(*[float("nan")] * 3)
    total, count = np.array(per_prompt).T
    return bootstrap(lambda t, c: float(t.sum() / c.sum()), total, count, seed=seed)


def uplift_by_rank(
    before: ArrayLike, after: ArrayLike, correct: ArrayLike, prompt: ArrayLike, n_bins: int = 4
) -> np.ndarray:
    """
    Of the correct samples at a rank, the share whose log-probability rises with the update (arXiv 2506.02355). The rank
    is that of [`normalised_ranks`] before the update, in `n_bins` equal bins.

    Returns:
        `np.ndarray` of shape (n_bins,): From the least likely to the likeliest; NaN for a bin without samples.
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
    Mean change of the log-probability of correct samples over an update, in nats. Negative: what was rewarded became less
    likely, pulled down by wrong samples that look like it (arXiv 2505.18830). NaN without correct samples.
    """
    before, after = _same_length(before=before, after=after)
    right = np.asarray(correct, dtype=bool)
    return float((after - before)[right].mean()) if right.any() else float("nan")


@dataclass(frozen=True)
class SaturationBucket:
    """Gain of the policy over the base among the prompts whose base pass@1 lies in `[low, high)` (the last: `[low, 1]`)."""

    low: float
    high: float
    n_prompts: float
    gain: Estimate


def saturation(
    base_n: ArrayLike,
    base_c: ArrayLike,
    policy_n: ArrayLike,
    policy_c: ArrayLike,
    edges: Sequence[float] = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0),
    seed: int = 0,
) -> list[SaturationBucket]:
    """
    Gain in pass@1 per bucket of the base's pass@1. The tilt predicts a hump ([`tilt_gain`]).

    Half of the base's samples put a prompt into its bucket, the other half says what the base reaches there; with the same
    samples for both, every low bucket would show a gain and every high one a loss, base against base too. The average over all
    such halvings is taken, so a prompt can lie in several buckets with a share each (`n_prompts` is their sum).

    Args:
        base_n, base_c, policy_n, policy_c (`ArrayLike` of integers, shape (P,)):
            Samples per prompt and correct ones among them; two samples of the base or more.
        edges (`Sequence[float]`, *optional*):
            Edges of the buckets, rising from 0 to 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
    """
    edges_B = np.asarray(edges, dtype=np.float64)
    if edges_B.size < 2 or edges_B[0] != 0 or edges_B[-1] != 1 or (np.diff(edges_B) <= 0).any():
        raise ValueError(f"edges={list(edges)} must rise from 0 to 1: they are limits of pass@1.")
    base_n, base_c = _counts(base_n, base_c)
    policy_n, policy_c = _counts(policy_n, policy_c)
    if base_n.size and base_n.min() < 2:
        raise ValueError(
            f"base_n={int(base_n.min())} is too small: the base's samples are halved, so there must be two."
        )
    share_PB = np.zeros((base_c.size, edges_B.size - 1))
    gain_PB = np.zeros_like(share_PB)  # gain times share
    for i, (n, c) in enumerate(zip(base_n.tolist(), base_c.tolist(), strict=True)):
        half = n // 2
        split = _hypergeometric(n, c, half)
        taken = np.arange(split.size)
        bucket = np.minimum(np.searchsorted(edges_B, taken / half, side="right") - 1, edges_B.size - 2)
        gain = policy_c[i] / policy_n[i] - (c - taken) / (n - half)
        np.add.at(share_PB[i], bucket, split)
        np.add.at(gain_PB[i], bucket, split * gain)
    return [
        SaturationBucket(
            float(edges_B[b]),
            float(edges_B[b + 1]),
            float(share_PB[:, b].sum()),
            bootstrap(lambda g, s: _ratio(g.sum(), s.sum()), gain_PB[:, b], share_PB[:, b], seed=seed),
        )
        for b in range(edges_B.size - 1)
    ]


def _counts(n: ArrayLike, c: ArrayLike, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: it is a number of samples.")
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if ((c < 0) | (c > n)).any():
        raise ValueError(f"c={c.tolist()} must lie between 0 and n={n.tolist()}: it counts the correct samples.")
    return n, c


def _same_length(**columns: ArrayLike) -> tuple[np.ndarray, ...]:
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    if len({array.shape for array in arrays.values()}) != 1:
        shapes = " and ".join(f"{name} has shape {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{shapes}: they must be equal, with one entry per sample.")
    return tuple(arrays.values())


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else float("nan")


def _hypergeometric(population: int, marked: int, drawn: int) -> np.ndarray:
    """Probabilities of 0, 1, ..., min(marked, drawn) marked ones among `drawn` of `population`."""
    total = comb(population, drawn)
    rest = population - marked
    return np.array(
        [
            comb(marked, k) * comb(rest, drawn - k) / total if drawn - k <= rest else 0.0
            for k in range(min(marked, drawn) + 1)
        ]
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _minimise(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, max_steps: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method with halved steps, for a handful of parameters. Returns the minimum and the Hessian there."""

    def hessian(x: np.ndarray) -> np.ndarray:
        shifts = 1e-5 * np.eye(x.size)
        columns = [(loss(x + shift)[1] - loss(x - shift)[1]) / 2e-5 for shift in shifts]
        return (np.array(columns) + np.array(columns).T) / 2

    value, gradient = loss(x)
    for _ in range(max_steps):
        # Where the loss is not convex, the absolute eigenvalues still give a direction downwards
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


def _at_least(probabilities: Sequence[float], count: int) -> float:
    """Probability that at least `count` of independent events with these probabilities happen."""
    law = np.array([1.0])
    for p in probabilities:
        law = np.convolve(law, [1 - p, p])
    return float(min(1.0, law[count:].sum()))


def _t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t by its expansion around the normal; good to 1 % from three degrees of freedom on."""
    z = NormalDist().inv_cdf(p)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
