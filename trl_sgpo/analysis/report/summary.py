"""
All numbers of all runs as one dictionary: the content of `summary.json`, of which the pictures and the page are made.
Series are binned by update, with the same bins for every run, so that runs can be drawn in one picture. Runs with the
same label are seeds of one method, shown as mean and range.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_sgpo.analysis.metrics import Estimate, bootstrap, pass_at_k, usual_ks
from trl_sgpo.analysis.metrics.rates import UNDEFINED
from trl_sgpo.analysis.report.comparison import analyse_or_explain
from trl_sgpo.analysis.report.diagnosis import RunFacts, advice, answer
from trl_sgpo.analysis.report.logged_groups import FAILED_KINDS, KINDS, Groups
from trl_sgpo.analysis.report.runs import Run


SCHEMA = 1
MOST_BINS = 30
_RESAMPLES = 200  # enough for two digits: there are thousands of groups, and dozens of numbers

# Numbers and their keys in the log
_LOG_KEYS = {
    "reward": "reward",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "loss": "loss",
    "kl_to_reference": "kl",
    "length": "completions/mean_length",
    "clipped": "completions/clipped_ratio",
    "zero_std": "frac_reward_zero_std",
    "rts": "sgpo/rts",
    "rts_gap": "sgpo/rts_gap",
    "judge_calls": "sgpo/judge_calls",
    "judge_seconds": "sgpo/judge_seconds",
    "abstain_rate": "sgpo/abstain_rate",
    "no_error_rate": "sgpo/no_error_rate",
    "step_time": "step_time",
}
# Numbers from the log that come from the completions if there are any
_LOG_FALLBACKS = {
    "accuracy": "sgpo/accuracy",
    **{kind: f"sgpo/groups/{kind}" for kind in ("solved", "mixed", "failed", "rescued", "tied", "unjudged")},
}


class Series:
    """A number over the updates of a run, without NaN. With weights, a mean over a stretch is `sum(w v) / sum(w)`."""

    def __init__(self, step: Any, value: Any, weight: Any = None):
        step, value = np.asarray(step, dtype=np.float64), np.asarray(value, dtype=np.float64)
        weight = np.ones_like(value) if weight is None else np.asarray(weight, dtype=np.float64)
        known = np.isfinite(value) & (weight > 0)
        self.step, self.value, self.weight = step[known], value[known], weight[known]

    def between(self, first: float, last: float) -> "Series":
        mine = (self.step >= first) & (self.step <= last)
        return Series(self.step[mine], self.value[mine], self.weight[mine])

    def mean(self) -> float:
        return float((self.value * self.weight).sum() / self.weight.sum()) if self.value.size else math.nan

    def estimate(self) -> Estimate:
        """The mean with its interval over groups (or log entries)."""
        return bootstrap(
            lambda vw, w: float(vw.sum() / w.sum()) if len(w) else math.nan,
            self.value * self.weight,
            self.weight,
            n_resamples=_RESAMPLES,
        )

    def binned(self, edges: np.ndarray) -> list[float]:
        bins = np.searchsorted(edges, self.step, side="right") - 1
        total = np.bincount(bins, self.value * self.weight, minlength=len(edges) - 1)
        weight = np.bincount(bins, self.weight, minlength=len(edges) - 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (total / weight)[: len(edges) - 1].tolist()


def run_series(run: Run) -> dict[str, Series]:
    """Every number of a run over its updates."""
    steps = [entry["step"] for entry in run.log]

    def logged(keys: Mapping[str, str]) -> dict[str, Series]:
        return {name: Series(steps, [_number(entry.get(key)) for entry in run.log]) for name, key in keys.items()}

    series = logged(_LOG_KEYS)
    if run.groups is not None:
        series |= _group_series(run.groups, bool(run.outcome))
        if not series["rts"].value.size:  # a run without a checkpoint has no log
            series["rts"] = Series(run.groups.rts_step, run.groups.rts)
    if run.groups is None or not run.outcome:
        passes = [key for key in dict.fromkeys(k for e in run.log for k in e) if key.startswith("sgpo/pass@")]
        series |= logged({**_LOG_FALLBACKS, **{key[5:]: key for key in passes}})
        if "teaching" not in series and series["zero_std"].value.size:
            zero = series["zero_std"]
            series["teaching"] = Series(zero.step, 1 - zero.value)
    return {name: one for name, one in series.items() if one.value.size}


def _group_series(g: Groups, has_outcome: bool) -> dict[str, Series]:
    series = {
        "teaching": Series(g.step, g.live),
        "effective_tokens": Series(g.step, g.live_length / np.maximum(g.length, 1), g.length),
        "answer_entropy": Series(g.step, g.entropy),
        "distinct_answers": Series(g.step, g.distinct),
    }
    if g.size == 1:
        series = {}
    if has_outcome:
        with np.errstate(invalid="ignore", divide="ignore"):
            series["accuracy"] = Series(g.step, g.n_correct / g.n_scored, g.n_scored)
        if g.size > 1:
            for kind in KINDS:
                if kind != "unscored" or g.share(kind).any():
                    series[kind] = Series(g.step, g.share(kind))
            series["failed"] = Series(g.step, g.share(*FAILED_KINDS))
            for k in usual_ks(g.size):
                series[f"pass@{k}"] = Series(g.step, pass_at_k(g.n_scored, g.n_correct, k))
    return series


def summarise(
    runs: Sequence[Run],
    missing: Sequence[str] = (),
    guess: float | None = None,
    by_tokens: bool = False,
    version: str = "",
    domain: str | None = None,
) -> dict[str, Any]:
    """
    The dictionary of a report about one run or more.

    Args:
        missing (`Sequence[str]`, *optional*):
            What is missing, in addition to what the runs say.
        guess (`float`, *optional*):
            Probability that one guess is correct.
        by_tokens (`bool`, *optional*, defaults to `False`):
            Whether lengths are tokens.
        domain (`str`, *optional*):
            Use only the probe prompts of this domain.
    """
    all_series = [run_series(run) for run in runs]
    edges = _edges(all_series)
    described = [_describe(run, series, edges, guess, domain) for run, series in zip(runs, all_series, strict=True)]
    said = [
        f"{run.name}: {text}" if len(runs) > 1 else text
        for run, one in zip(runs, described, strict=True)
        for text in one["missing"]
    ]
    return {
        "schema": SCHEMA,
        "version": version,
        "length_unit": "tokens" if by_tokens else "characters",
        "bins": ((edges[:-1] + edges[1:] - 1) / 2).tolist(),
        "labels": {
            label: _arm([one for one in described if one["label"] == label])
            for label in dict.fromkeys(run.label for run in runs)
        },
        "runs": described,
        "missing": [*missing, *said],
    }


def _edges(all_series: Sequence[Mapping[str, Series]]) -> np.ndarray:
    steps = [one.step for series in all_series for one in series.values()]
    every = np.unique(np.concatenate(steps)) if steps else np.zeros(0)
    if not every.size:
        return np.array([0.0, 1.0])
    n_bins = min(MOST_BINS, every.size)
    return np.linspace(every[0], every[-1] + 1, n_bins + 1)


def _describe(
    run: Run, series: Mapping[str, Series], edges: np.ndarray, guess: float | None, domain: str | None
) -> dict[str, Any]:
    first = min((one.step.min() for one in series.values()), default=0)
    last = max((one.step.max() for one in series.values()), default=0)
    fifth = (last - first) / 5
    stretches = {"start": (first, first + fifth), "end": (last - fifth, last), "all": (first, last)}
    numbers = {name: {when: one.between(*ends) for when, ends in stretches.items()} for name, one in series.items()}
    probe, finding, probe_missing = analyse_or_explain(run.probe, guess, domain)
    if probe is None and not probe_missing:
        probe_missing = [
            "No probes of the base model, so no verdict on sharpening or expansion: SharpeningCallback writes them to "
            "<output_dir>/sharpening."
        ]
    groups, facts = run.groups, _facts(run, numbers, int(last - first) + 1)
    return {
        "name": run.name,
        "label": run.label,
        "path": str(run.path),
        "first_step": int(first),
        "last_step": int(last),
        "n_log_entries": len(run.log),
        "n_completions_files": run.n_files,
        "n_groups": len(groups.step) if groups else 0,
        "group_size": groups.size if groups else None,
        "outcome": run.outcome,
        "rewards": run.rewards,
        "has_judge": run.has_judge,
        # An interval of the whole run would say little more than those of its two ends
        "numbers": {
            name: {when: one.estimate() if when != "all" else one.mean() for when, one in parts.items()}
            for name, parts in numbers.items()
        },
        "series": {name: one.binned(edges) for name, one in series.items()},
        "judge": _judge_cost(run),
        "rts_histogram": _rts_histogram(groups, first, last),
        "diagnosis": {"facts": facts, "answer": answer(facts), "advice": advice(facts)},
        "finding": finding,
        "sharpening": probe,
        "missing": [*run.missing, *probe_missing],
    }


def _facts(run: Run, numbers: Mapping[str, Mapping[str, Series]], n_updates: int) -> RunFacts:
    def mean(name: str, when: str = "all") -> float:
        return numbers[name][when].mean() if name in numbers else math.nan

    grad = numbers["grad_norm"]["all"].value if "grad_norm" in numbers else np.zeros(0)
    loss = numbers["loss"]["all"].value if "loss" in numbers else np.zeros(0)
    shares = ("teaching", "solved", "mixed", "rescued", "other_rewards", "tied", "abstained", "unjudged")
    return RunFacts(
        n_groups=len(run.groups.step) if run.groups else 0,
        n_updates=n_updates,
        group_size=run.groups.size if run.groups else 0,
        **{name: mean(name) for name in shares},
        has_judge=run.has_judge,
        loss=float(np.abs(loss).mean()) if loss.size else math.nan,
        grad_norm=float(grad.mean()) if grad.size else math.nan,
        still=float((grad == 0).mean()) if grad.size else math.nan,
        clipped=mean("clipped"),
        distinct=mean("distinct_answers"),
        rts=mean("rts"),
        rts_gap_start=mean("rts_gap", "start"),
        rts_gap_end=mean("rts_gap", "end"),
        length_start=mean("length", "start"),
        length_end=mean("length", "end"),
        accuracy_start=mean("accuracy", "start"),
        accuracy_end=mean("accuracy", "end"),
    )


def _judge_cost(run: Run) -> dict[str, float] | None:
    """Totals from logged means: each entry stands for the updates since the entry before."""
    log = [entry for entry in run.log if "sgpo/judge_calls" in entry]  # probes have entries of their own
    if not log:
        return None
    steps = [float(entry["step"]) for entry in log]
    updates = np.diff([0.0, *steps])

    def column(key: str) -> np.ndarray:
        return np.array([_number(entry.get(key)) for entry in log])

    def rate(key: str) -> float:
        return Series(steps, column(key), column("sgpo/judge_calls") * updates).mean()

    calls, seconds, time = (
        float(np.nansum(column(key) * updates)) for key in ("sgpo/judge_calls", "sgpo/judge_seconds", "step_time")
    )

    return {
        "calls": calls,
        "seconds": seconds,
        "share_of_step_time": seconds / time if time > 0 else math.nan,
        "seconds_per_call": seconds / calls if calls > 0 else math.nan,
        "abstain_rate": rate("sgpo/abstain_rate"),
        "no_error_rate": rate("sgpo/no_error_rate"),
    }


def _rts_histogram(groups: Groups | None, first: float, last: float) -> dict[str, list[float]] | None:
    if groups is None or not groups.rts.size:
        return None
    centers = np.linspace(0, 1, 11)  # an RTS is a fraction of a few steps, so these are no edges
    edges = np.linspace(-0.05, 1.05, 12)
    third = (last - first) / 3
    early, late = groups.rts_step <= first + third, groups.rts_step >= last - third
    return {
        "centers": centers.tolist(),
        "first_third": np.histogram(groups.rts[early], edges)[0].tolist(),
        "last_third": np.histogram(groups.rts[late], edges)[0].tolist(),
    }


def _arm(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one label: mean and range."""
    names = list(dict.fromkeys(name for run in runs for name in run["series"]))

    def spread(values: list[float]) -> Estimate:
        known = [v for v in values if not math.isnan(v)]
        return Estimate(sum(known) / len(known), min(known), max(known)) if known else UNDEFINED

    series = {}
    for name in names:
        columns = zip(*(run["series"][name] for run in runs if name in run["series"]), strict=True)
        points = [spread(list(column)) for column in columns]
        series[name] = {part: [getattr(p, part) for p in points] for part in ("value", "low", "high")}
    numbers = {
        name: {
            when: spread([run["numbers"][name][when].value for run in runs if name in run["numbers"]])
            for when in ("start", "end")
        }
        for name in names
    }
    histograms = [run["rts_histogram"] for run in runs if run["rts_histogram"]]
    summed = {
        part: np.sum([histogram[part] for histogram in histograms], axis=0).tolist()
        for part in ("first_third", "last_third")
    }
    return {
        "runs": [run["name"] for run in runs],
        "numbers": numbers,
        "series": series,
        "rts_histogram": {"centers": histograms[0]["centers"], **summed} if histograms else None,
    }


def _number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):  # older logs hold some numbers as text
        return math.nan
