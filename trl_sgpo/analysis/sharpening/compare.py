"""
Base and policy on the same prompts: from their samples to numbers. Samples come as columns, in a dictionary or a
`pd.DataFrame`, by the names of the probe's parquet files: `prompt_id` and `correct`, and if they are known
`process_correct`, `logp_policy`, `logp_base` (in nats, summed over a sample's tokens) and `n_tokens`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_sgpo.analysis.metrics import (
    Estimate,
    SaturationBucket,
    SupportTable,
    TiltFit,
    TiltLine,
    cover_at,
    kl_k1,
    pass_at_k,
    perplexity,
    rank_of_correct,
    sampling_efficiency_gap,
    saturation,
    support_table,
    tilt_fit,
    tilt_line,
)
from trl_sgpo.analysis.metrics.rates import UNDEFINED


Columns = Mapping[str, Any]
NUMBERS = ("prompt_id", "correct", "process_correct", "logp_policy", "logp_base", "n_tokens")


@dataclass(frozen=True)
class ProbeCounts:
    """The samples of base or policy as counts per prompt: arrays of shape (P,), in the order of the prompts."""

    n: np.ndarray  # samples
    c: np.ndarray  # correct samples
    verified: np.ndarray | None  # correct samples with every step right; None if no steps were checked

    @property
    def rate(self) -> np.ndarray:
        """Share of correct samples, that is, pass@1."""
        return self.c / self.n

    def pass_at(self, k: int) -> np.ndarray:
        return pass_at_k(self.n, self.c, k)

    def cover_at(self, tau: float) -> np.ndarray:
        return cover_at(self.n, self.c, tau)

    def verified_at(self, k: int) -> np.ndarray:
        """Process-verified pass@k; NaN if no steps were checked."""
        return np.full(len(self.n), np.nan) if self.verified is None else pass_at_k(self.n, self.verified, k)


@dataclass(frozen=True)
class Likelihoods:
    """What log-probabilities say about one set of samples. NaN, or `None`, if there are none."""

    perplexity: float  # of the samples under the policy
    base_perplexity: float  # of the samples under the base
    kl: float  # KL(policy, base) in nats per sample
    rank_by_policy: Estimate  # of the correct samples
    rank_by_base: Estimate
    tilt: TiltFit | None


@dataclass(frozen=True)
class Comparison:
    """Base and policy on the same prompts."""

    base: ProbeCounts
    policy: ProbeCounts
    of_base: Likelihoods  # of the base's samples
    of_policy: Likelihoods  # of the policy's samples
    support: SupportTable
    line: TiltLine
    gap: Estimate  # pass@k of the base minus pass@1 of the policy
    buckets: tuple[SaturationBucket, ...]  # gain by the base's pass@1; empty if some prompt has one sample of the base


def compare(base_samples: Columns, policy_samples: Columns, prompt_ids: Sequence[Any], k: int) -> Comparison:
    """
    Compares base and policy on the sorted `prompt_ids`, each with samples of both; other samples are left out. The `k`
    of the sampling-efficiency gap is at most the smallest number of samples of a prompt.
    """
    base_samples, policy_samples = (of_prompts(samples, prompt_ids) for samples in (base_samples, policy_samples))
    base, policy = count(base_samples, prompt_ids), count(policy_samples, prompt_ids)
    return Comparison(
        base,
        policy,
        likelihoods(base_samples),
        likelihoods(policy_samples),
        support_table(base.c, policy.c, base.n, policy.n),
        tilt_line(base.n, base.c, policy.n, policy.c),
        sampling_efficiency_gap(base.n, base.c, policy.n, policy.c, k),
        tuple(saturation(base.n, base.c, policy.n, policy.c)) if base.n.min() > 1 else (),
    )


def of_prompts(samples: Columns, prompt_ids: Sequence[Any]) -> dict[str, np.ndarray]:
    """The samples of these prompts only, without their texts."""
    mine = np.isin(np.asarray(samples["prompt_id"]), np.asarray(prompt_ids))
    return {name: np.asarray(samples[name])[mine] for name in NUMBERS if name in samples}


def count(samples: Columns, prompt_ids: Sequence[Any]) -> ProbeCounts:
    """Samples and correct samples of each prompt."""
    position = _positions(samples, prompt_ids)
    right = np.asarray(samples["correct"], dtype=bool)

    def of(rows: np.ndarray) -> np.ndarray:
        return np.bincount(position[rows & (position >= 0)], minlength=len(prompt_ids))

    verified = None
    if "process_correct" in samples:
        verified = of(right & np.asarray(samples["process_correct"], dtype=bool))
    return ProbeCounts(of(np.ones(len(right), dtype=bool)), of(right), verified)


def likelihoods(samples: Columns) -> Likelihoods:
    """What the log-probabilities of these samples say."""
    both = _known(samples, "logp_policy", "logp_base")
    return Likelihoods(
        perplexity=perplexity_under(samples, "logp_policy"),
        base_perplexity=perplexity_under(samples, "logp_base"),
        kl=kl(samples),
        rank_by_policy=_rank(samples, "logp_policy"),
        rank_by_base=_rank(samples, "logp_base"),
        tilt=tilt_fit(both["logp_policy"] - both["logp_base"], both["correct"], both["prompt_id"]) if both else None,
    )


def kl(samples: Columns) -> float:
    """KL(policy, base) in nats per sample."""
    both = _known(samples, "logp_policy", "logp_base")
    return kl_k1(both["logp_policy"], both["logp_base"]) if both else math.nan


def perplexity_under(samples: Columns, logp: str) -> float:
    """Perplexity of the samples under the policy (`"logp_policy"`) or the base (`"logp_base"`)."""
    known = _known(samples, logp, "n_tokens")
    return perplexity(known[logp], known["n_tokens"]) if known else math.nan


def base_rates(samples: Columns, prompt_ids: Sequence[Any]) -> np.ndarray:
    """
    The base's pass@1 on prompts, from samples of the *policy*: the mean over samples of `1{correct} q(y|x) / pi(y|x)`
    (importance sampling). It says how rare the solutions of a prompt are for the base even if the base never found
    one. It is too low by the solutions that the base knows and the policy never writes. NaN without log-probabilities.

    ```python
    >>> base_rates({"prompt_id": [0, 0], "correct": [True, False], "logp_policy": [-1.0, -1.0],
    ...             "logp_base": [-1.0 + np.log(0.02), -1.0]}, [0]).round(3)
    array([0.01])
    ```
    """
    both = _known(samples, "logp_policy", "logp_base")
    if not both:
        return np.full(len(prompt_ids), np.nan)
    position = _positions(both, prompt_ids)
    # A ratio above 1 on a correct sample is possible; above e^20 it is a numerical accident
    weight = np.exp(np.minimum(both["logp_base"] - both["logp_policy"], 20.0)) * both["correct"]
    mine = position >= 0
    total = np.bincount(position[mine], weight[mine], minlength=len(prompt_ids))
    n = np.bincount(position[mine], minlength=len(prompt_ids))
    return np.minimum(np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0), 1.0)


def _rank(samples: Columns, logp: str) -> Estimate:
    known = _known(samples, logp)
    return rank_of_correct(known[logp], known["correct"], known["prompt_id"]) if known else UNDEFINED


def _positions(samples: Columns, prompt_ids: Sequence[Any]) -> np.ndarray:
    """The place of each sample's prompt in the list, -1 if it is not there."""
    place = {prompt: i for i, prompt in enumerate(prompt_ids)}
    return np.array([place.get(prompt, -1) for prompt in samples["prompt_id"]], dtype=np.int64)


def _known(samples: Columns, *names: str) -> dict[str, np.ndarray]:
    """The samples that have a value in each of these columns; empty if a column is not there."""
    if not all(name in samples for name in names):
        return {}
    columns = {name: np.asarray(samples[name], dtype=np.float64) for name in names}
    rows = np.logical_and.reduce([~np.isnan(column) for column in columns.values()])
    columns |= {"prompt_id": np.asarray(samples["prompt_id"]), "correct": np.asarray(samples["correct"], dtype=bool)}
    return {name: column[rows] for name, column in columns.items()}
