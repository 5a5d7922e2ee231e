"""A probe as one flat dictionary of numbers, for the log: [`log_numbers`]."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_sgpo.analysis.metrics import Estimate, SupportTable, TiltFit, answer_entropy, maj_at_k
from trl_sgpo.analysis.sharpening.compare import (
    NUMBERS,
    Comparison,
    Likelihoods,
    ProbeCounts,
    compare,
    count,
    likelihoods,
)


if TYPE_CHECKING:
    from trl_sgpo.analysis.sharpening.probe import Sample


# The columns of a probe's parquet files, each an attribute of a sample
FILE_COLUMNS = ("prompt_id", "sample", "text", *NUMBERS[1:])


def as_columns(samples: Sequence["Sample"], names: Sequence[str] = NUMBERS) -> dict[str, list[Any]]:
    """The samples as columns, by default of numbers. A column is left out if no sample has a value in it."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in names}
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def log_numbers(
    policy: Sequence["Sample"],
    base: Sequence["Sample"] | None,
    n_prompts: int,
    ks: Sequence[int],
    taus: Sequence[float],
    domains: Sequence[str] | None = None,
    extract_answer: Callable[[str], Hashable] | None = None,
) -> dict[str, float]:
    """
    All numbers of a probe, with keys without prefix; the base's own numbers begin with `base_`. An undefined number is
    left out. Without `base` there is no comparison, and without `extract_answer` no maj@k and no entropy of the
    answers. The samples are scored, equally many per prompt, and those of a prompt stand next to each other.
    """
    columns, prompt_ids = as_columns(policy), range(n_prompts)
    if base is None:
        found = _of_likelihoods(likelihoods(columns))
        counts = count(columns, prompt_ids)
    else:
        compared = compare(as_columns(base), columns, prompt_ids, k=max(ks))
        counts = compared.policy
        of_base = _of_side(compared.base, base, ks, taus, extract_answer)
        found = _of_likelihoods(compared.of_policy) | _of_comparison(compared, domains)
        found |= {f"base_{key}": value for key, value in of_base.items()}
    found |= _of_side(counts, policy, ks, taus, extract_answer)
    n_tokens = sum(sample.n_tokens for sample in policy)
    for key, name in (("entropy", "entropy"), ("kl_k3", "k3")):
        totals = [getattr(sample, name) for sample in policy]
        if None not in totals:
            found[key] = float(np.sum(totals) / n_tokens)
    return {key: float(value) for key, value in found.items() if not math.isnan(value)}


def _of_side(
    counts: ProbeCounts,
    samples: Sequence["Sample"],
    ks: Sequence[int],
    taus: Sequence[float],
    extract_answer: Callable[[str], Hashable] | None,
) -> dict[str, float]:
    """The numbers of base or policy alone."""
    found = {f"pass@{k}": float(counts.pass_at(k).mean()) for k in ks}
    found |= {f"cover@{tau:g}": float(counts.cover_at(tau).mean()) for tau in taus}
    found["mean_tokens"] = float(np.mean([sample.n_tokens for sample in samples]))
    found["unscored"] = float(np.mean([not sample.scored for sample in samples]))
    if counts.verified is not None:
        found |= {f"process_pass@{k}": float(counts.verified_at(k).mean()) for k in ks}
        solved = [sample for sample in samples if sample.correct]
        if solved:
            found["process_abstained"] = float(np.mean([not sample.judged for sample in solved]))
    if extract_answer is not None:
        size = len(samples) // len(counts.n)
        groups = [samples[start : start + size] for start in range(0, len(samples), size)]
        answers = [[extract_answer(sample.text) for sample in group] for group in groups]
        right = [[bool(sample.correct) for sample in group] for group in groups]
        for k in ks:
            found[f"maj@{k}"] = float(np.mean([maj_at_k(a, r, k) for a, r in zip(answers, right, strict=True)]))
        found["answer_entropy"] = float(np.mean([answer_entropy(group) for group in answers]))
        found["distinct_answers"] = float(np.mean([len(set(group)) for group in answers]))
    return found


def _of_likelihoods(of_policy: Likelihoods) -> dict[str, float]:
    return {
        "perplexity": of_policy.perplexity,
        "base_perplexity": of_policy.base_perplexity,
        "rank_by_policy": of_policy.rank_by_policy.value,
        "rank_by_base": of_policy.rank_by_base.value,
        "kl_k1": of_policy.kl,
        **(_fields("tilt", of_policy.tilt) if of_policy.tilt else {}),
    }


def _of_comparison(compared: Comparison, domains: Sequence[str] | None) -> dict[str, float]:
    found = _fields("support", compared.support)
    found["efficiency_gap"] = compared.gap.value
    found |= _interval("tilt/slope", compared.line.slope) | _interval("tilt/intercept", compared.line.intercept)
    for bucket in compared.buckets:
        found[f"saturation/{bucket.low:g}-{bucket.high:g}"] = bucket.gain.value
    base, policy = compared.base.rate, compared.policy.rate
    for domain in dict.fromkeys(domains or ()):
        mine = np.array([other == domain for other in domains or ()])
        found[f"domain/{domain}/base_pass@1"] = float(base[mine].mean())
        found[f"domain/{domain}/pass@1"] = float(policy[mine].mean())
        found[f"domain/{domain}/gain"] = float((policy[mine] - base[mine]).mean())
        found[f"domain/{domain}/n_prompts"] = int(mine.sum())
    return found


def _fields(prefix: str, numbers: SupportTable | TiltFit) -> dict[str, float]:
    """Every field of a dataclass, with the ends of its interval if it has one."""
    found: dict[str, float] = {}
    for name, value in vars(numbers).items():
        found |= _interval(f"{prefix}/{name}", value) if isinstance(value, Estimate) else {f"{prefix}/{name}": value}
    return found


def _interval(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
