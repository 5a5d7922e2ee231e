"""
The samples of base and policy, read from a run's `sharpening` folder, as the numbers of the page: those of
`analysis/sharpening/compare.py`, with intervals. The folder holds `probe.json` (settings), `prompts.parquet`,
`base.parquet` (one row per sample of the base) and one `policy_<step>.parquet` per probe of the policy.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_sgpo.analysis.metrics import Estimate, chance_pass_at_k, mean_estimate, saturation, usual_ks
from trl_sgpo.analysis.report.finding import LEVEL, Evidence, Finding, decide, unknown
from trl_sgpo.analysis.sharpening.compare import (
    NUMBERS,
    Comparison,
    base_rates,
    compare,
    count,
    kl,
    of_prompts,
    perplexity_under,
)


if TYPE_CHECKING:
    import pandas as pd


TAUS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class ProbeError(Exception):
    """The probes cannot be used. The message says why."""


@dataclass
class Probes:
    """The contents of the folder. The samples are without their texts."""

    settings: dict[str, Any]
    prompt_ids: list[Any]  # the prompts with samples in every file, sorted
    domain: list[str] | None  # their domains
    base: "pd.DataFrame"
    policy: dict[int, "pd.DataFrame"]  # by step
    notes: list[str]  # what is missing, and why


def read_probes(folder: Path, only_domain: str | None = None) -> Probes:
    """
    Reads the folder; only one domain, if it is named. Raises `ProbeError` if there are no samples of the base, or none
    of the policy, or no prompt of the domain.
    """
    notes: list[str] = []
    try:
        settings = json.loads((folder / "probe.json").read_text())
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        settings = {}
        notes.append(f"probe.json could not be read ({type(error).__name__}): the sampling settings are not known.")
    base = _read(folder / "base.parquet")
    if isinstance(base, str):
        raise ProbeError(
            f"The samples of the base cannot be read: {base}. Without them the policy cannot be compared."
        )
    policy: dict[int, pd.DataFrame] = {}
    for path in sorted(folder.glob("policy_*.parquet")):
        name = re.fullmatch(r"policy_(\d+)", path.stem)
        frame = _read(path)
        if isinstance(frame, str) or name is None:
            notes.append(f"A probe is left out: {frame if isinstance(frame, str) else path.name + ' names no step'}.")
        else:
            policy[int(name[1])] = frame
    if not policy:
        raise ProbeError("There are samples of the base, but none of the policy yet (policy_<step>.parquet).")
    prompts_of = {step: set(frame["prompt_id"]) for step, frame in policy.items()}
    of_base = set(base["prompt_id"])
    notes += [
        f"The probe at step {step} has other prompts than the base: only the prompts of all files are used."
        for step, own in prompts_of.items()
        if own != of_base
    ]
    prompt_ids = sorted(of_base.intersection(*prompts_of.values()))
    if not prompt_ids:
        raise ProbeError("No prompt has samples of both base and policy: the files belong to different probes.")
    domain = None
    prompts = _read(folder / "prompts.parquet", ("prompt_id", "domain"), ("prompt_id",))
    if isinstance(prompts, str):
        notes.append(f"{prompts}, so domains are not known.")
    elif "domain" in prompts.columns and prompts["domain"].notna().any():
        by_id = dict(zip(prompts["prompt_id"], prompts["domain"], strict=True))
        domain = [str(by_id.get(i, "?")) for i in prompt_ids]
    if only_domain is not None:
        known = sorted(set(domain or []))
        if only_domain not in known:
            has = f"its domains are {known}" if known else "it has none"
            raise ProbeError(f"No prompt of the probe is of the domain {only_domain!r}: {has}.")
        prompt_ids = [i for i, name in zip(prompt_ids, domain or [], strict=True) if name == only_domain]
        domain = [only_domain] * len(prompt_ids)
    elif domain is not None and len(set(domain)) > 1:
        several = f"{len(set(domain))} domains together ({', '.join(sorted(set(domain)))})"
        notes.append(f"The finding is about {several}: --domain looks at one.")
    return Probes(settings, prompt_ids, domain, base, policy, notes)


def _read(
    path: Path, wanted: tuple[str, ...] = NUMBERS, needed: tuple[str, ...] = ("prompt_id", "correct")
) -> "pd.DataFrame | str":
    """The columns that the file has, without texts; or what is wrong with the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return f"{path.name} is missing"
    try:
        file = pq.ParquetFile(path)
        missing = set(needed) - set(file.schema_arrow.names)
        if missing:
            return f"{path.name} has no column {' and '.join(sorted(missing))}"
        frame = file.read(columns=[name for name in wanted if name in file.schema_arrow.names]).to_pandas()
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"{path.name} could not be read ({str(error).strip().splitlines()[0][:120]})"
    frame = frame.dropna(axis="columns", how="all") if len(frame) else frame  # a column of nulls is no column
    for name in ("correct", "process_correct"):
        if name in frame.columns:
            frame = frame[frame[name].notna()] if name == "correct" else frame
            frame[name] = frame[name].fillna(False).astype(bool)
    return frame


def analyse(folder: Path, guess: float | None = None, domain: str | None = None) -> tuple[dict[str, Any], Finding]:
    """
    All numbers of the probes in a run's `sharpening` folder, and the finding of the last probe. Raises `ProbeError` if
    the probes cannot be used. `guess` is the probability that one guess is correct, for the chance level of pass@k.
    """
    probes = read_probes(folder, domain)
    ids, steps = probes.prompt_ids, sorted(probes.policy)
    frames = {step: of_prompts(probes.policy[step], ids) for step in steps}
    last = frames[steps[-1]]
    n_samples = int(min(count(samples, ids).n.min() for samples in (probes.base, last)))
    if not n_samples:
        raise ProbeError("Some prompt has no sample of the base or of the policy: the probe was cut off.")
    compared = compare(probes.base, last, ids, k=n_samples)
    evidence = _evidence(compared, base_rates(last, ids), n_samples, guess)
    numbers = {
        "settings": probes.settings,
        **_numbers(compared, evidence, usual_ks(n_samples), ids, probes.domain),
        "step": steps[-1],
        "steps": steps,
        "over_time": _over_time(frames, ids, n_samples),
        "notes": probes.notes + _missing(compared, last),
    }
    return numbers, decide(evidence)


def analyse_or_explain(
    folder: Path | None, guess: float | None = None, domain: str | None = None
) -> tuple[dict[str, Any] | None, Finding, list[str]]:
    """As [`analyse`], with what is missing in words instead of an exception."""
    if folder is None:
        return None, unknown("there are no probes of the base model"), []
    try:
        numbers, finding = analyse(folder, guess, domain)
    except ProbeError as error:
        return None, unknown("the probes cannot be used"), [f"sharpening: {error}"]
    return numbers, finding, [f"sharpening: {note}" for note in numbers.pop("notes")]


def _evidence(compared: Comparison, rates: np.ndarray, k: int, guess: float | None) -> Evidence:
    base, policy = compared.base, compared.policy
    expanded = (base.c == 0) & (policy.c > 0)
    return Evidence(
        n_prompts=len(base.n),
        n_samples=int(base.n.min()),
        k=k,
        base_pass_1=mean_estimate(base.pass_at(1)),
        policy_pass_1=mean_estimate(policy.pass_at(1)),
        base_pass_k=mean_estimate(base.pass_at(k)),
        policy_pass_k=mean_estimate(policy.pass_at(k)),
        gain_1=mean_estimate(policy.pass_at(1) - base.pass_at(1), level=LEVEL),
        gain_k=mean_estimate(policy.pass_at(k) - base.pass_at(k), level=LEVEL),
        support=compared.support,
        slope=compared.line.slope,
        base_rates=tuple(rates[expanded & ~np.isnan(rates)].tolist()),
        process_gain_k=mean_estimate(policy.verified_at(k) - base.verified_at(k), level=LEVEL),
        guess=guess,
    )


def _numbers(
    compared: Comparison, evidence: Evidence, ks: Sequence[int], ids: Sequence[Any], domain: list[str] | None
) -> dict[str, Any]:
    """The numbers of the last probe, for `summary.json`."""
    base, policy, guess = compared.base, compared.policy, evidence.guess
    verified = base.verified is not None and policy.verified is not None
    return {
        "n_prompts": evidence.n_prompts,
        "base_samples": evidence.n_samples,
        "policy_samples": int(policy.n.min()),
        "guess": guess,
        "k": list(ks),
        "pass_at_k": {
            "base": _estimates(base.pass_at, ks),
            "policy": _estimates(policy.pass_at, ks),
            "chance": [chance_pass_at_k(guess, k) for k in ks] if guess is not None else None,
            "base_process": _estimates(base.verified_at, ks) if verified else None,
            "policy_process": _estimates(policy.verified_at, ks) if verified else None,
        },
        "cover": {
            "tau": list(TAUS),
            "base": _estimates(base.cover_at, TAUS),
            "policy": _estimates(policy.cover_at, TAUS),
        },
        "gain_1": evidence.gain_1,
        "gain_k": evidence.gain_k,
        "process_gain_k": evidence.process_gain_k,
        "support": compared.support,
        "base_rates_of_expanded": list(evidence.base_rates),
        "tilt_line": compared.line,
        "tilt_fit": compared.of_policy.tilt,
        "prompts": {
            "prompt_id": [str(i) for i in ids],
            "base": base.rate.tolist(),
            "policy": policy.rate.tolist(),
            "domain": domain,
        },
        "efficiency_gap": compared.gap,
        "rank_under_base": compared.of_base.rank_by_base,
        "rank_under_policy": compared.of_policy.rank_by_policy,
        "base_perplexity_of_base": compared.of_base.base_perplexity,
        "saturation": _saturation(compared, domain),
    }


def _over_time(frames: dict[int, Any], ids: Sequence[Any], k: int) -> dict[str, list[Any]]:
    """The numbers of all probes."""
    counts = [count(samples, ids) for samples in frames.values()]
    return {
        "step": list(frames),
        "pass_1": [mean_estimate(of.pass_at(1)) for of in counts],
        "pass_k": [mean_estimate(of.pass_at(min(k, max(1, int(of.n.min()))))) for of in counts],
        "kl": [kl(samples) for samples in frames.values()],
        "base_perplexity": [perplexity_under(samples, "logp_base") for samples in frames.values()],
    }


def _saturation(compared: Comparison, domain: list[str] | None) -> dict[str, Any]:
    """Gain per bucket of the base's pass@1: of all prompts, and of each domain."""
    if not compared.buckets:
        return {}
    base, policy = compared.base, compared.policy
    parts = {"all prompts": np.ones(len(base.n), dtype=bool)}
    if domain is not None and len(set(domain)) > 1:
        parts |= {name: np.array(domain) == name for name in sorted(set(domain))}
    return {
        name: {
            "gain": mean_estimate((policy.rate - base.rate)[mine]),
            "n_prompts": int(mine.sum()),
            "buckets": list(compared.buckets)
            if mine.all()
            else saturation(base.n[mine], base.c[mine], policy.n[mine], policy.c[mine]),
        }
        for name, mine in parts.items()
    }


def _missing(compared: Comparison, last: dict[str, np.ndarray]) -> list[str]:
    notes = []
    if compared.base.verified is None or compared.policy.verified is None:
        notes.append("No process_correct in the samples: no process-verified pass@k (is every step right?).")
    if not {"logp_policy", "logp_base"} <= set(last):
        notes.append("No log-probabilities in the last probe: no tilt strength, KL and perplexity.")
    if not compared.buckets:
        notes.append("The base has one sample per prompt: no saturation per bucket.")
    return notes


def _estimates(of: Callable[[Any], np.ndarray], values: Sequence[Any]) -> list[Estimate]:
    return [mean_estimate(of(value)) for value in values]
