"""Tables of runs that were made beside each other, on bases made anew: pairs of settings, and forms of credit per token."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cells import markdown, spread, thousands
from benchmarks.controlled_study.records import Records, select
from benchmarks.controlled_study.settings import ARMS
from benchmarks.controlled_study.tables import (
    ANEW,
    ANEW_BUDGET,
    BEST_RATES,
    CUT_SEEDS,
    FORMS,
    RECOMMENDED,
    TABLES,
    THREE,
)
from benchmarks.curves import area, tokens_to


Row = dict[str, Any]

CUT_TOKENS = 100_000  # the part of the runs that baseline_tokens_table speaks of


def anew(records: Records, dial: str, arm: str, rate: float, judge: str = "exact") -> list[Row]:
    return select(records, dial=dial, arm=arm, learning_rate=rate, judge=judge, beside=ANEW)


def collapsed(runs: Sequence[Row]) -> str:
    """How many runs ended below a quarter of the best accuracy that they had."""
    n = sum(r["curve"][-1]["accuracy"] < max(p["accuracy"] for p in r["curve"]) / 4 for r in runs)
    return f"{n} of {len(runs)}"


def last(runs: Sequence[Row], name: str, digits: int) -> str:
    return spread([r["curve"][-1][name] for r in runs if name in r["curve"][-1]], lambda x: f"{x:.{digits}f}")


def no_dead_update(run: Row) -> bool:
    return not any(point["dead_updates"] for point in run["curve"][1:])


def dead_updates_table(records: Records) -> str:
    """
    Optimizer steps in which nothing teaches: taken, and left out. Ratios are medians over the seeds' own ratios. A run without
    a dead update stands for both of its pair.
    """
    rows = []
    for dial, arm, factor in itertools.product(ANEW_BUDGET, THREE, (1, 2)):
        rate, budget = factor * BEST_RATES[dial, arm], ANEW_BUDGET[dial]
        taken = {r["seed"]: r for r in anew(records, dial, arm, rate)}
        left_out = {seed: r for seed, r in taken.items() if no_dead_update(r)}
        left_out |= {r["seed"]: r for r in anew(records, dial, f"{arm}_live", rate)}
        seeds = sorted(taken.keys() & left_out)
        if not seeds:
            continue
        pairs = [[runs[seed] for seed in seeds] for runs in (taken, left_out)]
        speeds = [[tokens_to(r) for r in runs] for runs in pairs]
        both = [b / a for a, b in zip(*speeds, strict=True) if math.isfinite(a) and math.isfinite(b)]
        dead = [statistics.fmean(p["dead_updates"] for p in r["curve"][1:]) for r in pairs[0]]
        rows.append(
            [
                dial,
                ARMS[arm].label,
                f"{rate:g}",
                spread(dead, lambda x: f"{x:.2f}"),
                *(spread(some, lambda t, budget=budget: thousands(t, budget)) for some in speeds),
                f"{spread(both, lambda x: f'{x:.2f}')} ({len(both)})" if both else "-",
                *(spread([area(r, budget) for r in runs], lambda a: f"{a:.3f}") for runs in pairs),
                *(collapsed(runs) for runs in pairs),
            ]
        )
    header = ["dial", "method", "learning rate", "dead updates", "tokens to 50 %, taken", "left out", "ratio (seeds)"]
    return markdown([*header, "mean accuracy, taken", "left out", "collapsed, taken", "left out"], rows)


def dead_tokens_table(records: Records) -> str:
    """The same runs with and without compute for dead tokens: tokens to 50 %, and processor time."""
    rows = []
    for dial, arm in itertools.product(("95", "99"), ("grpo", RECOMMENDED)):
        rate, budget = BEST_RATES[dial, arm], ANEW_BUDGET[dial]
        pairs = [{r["seed"]: r for r in anew(records, dial, arm + cut, rate)} for cut in ("", "_cut")]
        seeds = sorted(set.intersection(*map(set, pairs)))
        if not seeds:
            continue
        runs = [[found[seed] for seed in seeds] for found in pairs]
        per_token = [[r["cpu_seconds"] / r["tokens_generated"] * 1e5 for r in some] for some in runs]
        rows.append(
            [
                dial,
                ARMS[arm].label,
                *(spread([tokens_to(r) for r in some], lambda t, b=budget: thousands(t, b)) for some in runs),
                *(spread([area(r, budget) for r in some], lambda a: f"{a:.3f}") for some in runs),
                *(spread(seconds, lambda x: f"{x:.1f}") for seconds in per_token),
                spread([b / a for a, b in zip(*per_token, strict=True)], lambda x: f"{x:.2f}"),
                str(len(seeds)),
            ]
        )
    header = ["dial", "method", "tokens to 50 %, all", "live only", "mean accuracy, all", "live only"]
    return markdown([*header, "CPU seconds per 100k tokens, all", "live only", "ratio", "seeds"], rows)


def baseline_table(records: Records) -> str:
    """Credit per token as it is and against the baseline of the group, at 1, 2 and 4 times SGPO's learning rate."""
    rows = []
    for dial, factor, form in itertools.product(ANEW_BUDGET, (1, 2, 4), FORMS):
        rate, budget = factor * BEST_RATES[dial, "sgpo"], ANEW_BUDGET[dial]
        runs = anew(records, dial, f"{RECOMMENDED}{form}", rate)
        if runs:
            rows.append(
                [
                    dial,
                    f"{rate:g}",
                    ARMS[f"{RECOMMENDED}{form}"].label,
                    *(
                        spread([tokens_to(r, goal) for r in runs], lambda t, b=budget: thousands(t, b))
                        for goal in (0.5, 0.8)
                    ),
                    spread([area(r, budget) for r in runs], lambda a: f"{a:.3f}"),
                    last(runs, "accuracy", 2),
                    spread([r["probes"]["end"]["pass"]["32"] for r in runs], lambda x: f"{x:.2f}"),
                    last(runs, "entropy", 2),
                    collapsed(runs),
                ]
            )
    header = ["dial", "learning rate", "credit", "tokens to 50 %", "tokens to 80 %", "mean accuracy"]
    return markdown([*header, "accuracy at the end", "pass@32 at the end", "entropy at the end", "collapsed"], rows)


def baseline_tokens_table(records: Records) -> str:
    """What `skip_dead_tokens` leaves to compute with either form of credit, while both still learn."""
    rows = []
    for dial, form in itertools.product(ANEW_BUDGET, FORMS[:2]):
        arm = f"{RECOMMENDED}{form}_cut"
        runs = anew(records, dial, arm, BEST_RATES[dial, "sgpo"])
        runs = [r for r in runs if r["seed"] in CUT_SEEDS]
        points = [[p for p in r["curve"][1:] if p["tokens"] <= CUT_TOKENS] for r in runs]
        if runs:
            # A point without a failed group has no share of verified tokens
            shares = [
                [statistics.fmean(p[name] for p in some if name in p) for some in points]
                for name in ("trained_tokens", "silent_credit", "tied", "failed")
            ]
            cells = [spread(some, lambda x: f"{x:.2f}") for some in shares]
            rows.append([dial, ARMS[arm].label, *cells, str(len(runs))])
    header = ["dial", "credit", "tokens trained on, of all", "verified tokens without credit", "tied groups"]
    return markdown([*header, "failed groups", "seeds"], rows)


def baseline_elsewhere_table(records: Records) -> str:
    """The same forms of credit at one learning rate: under judges with errors, in mixed groups, outside of the pretraining."""
    rows = []
    for name in ("baseline_judges", "baseline_mixed", "baseline_axes"):
        cases = dict.fromkeys(
            (run.dial, run.judge, run.arm, run.learning_rate, run.tokens) for run in TABLES[name].runs()
        )
        for dial, judge, arm, rate, budget in cases:
            runs = anew(records, dial, arm, rate, judge=judge)
            if runs:
                rows.append(
                    [
                        dial,
                        judge,
                        ARMS[arm].label,
                        spread([tokens_to(r) for r in runs], lambda t, b=budget: thousands(t, b)),
                        spread([area(r, budget) for r in runs], lambda a: f"{a:.3f}"),
                        last(runs, "accuracy", 2),
                        last(runs, "entropy", 2),
                        collapsed(runs),
                        str(len(runs)),
                    ]
                )
    header = ["dial", "judge", "credit", "tokens to 50 %", "mean accuracy", "accuracy at the end"]
    return markdown([*header, "entropy at the end", "collapsed", "seeds"], rows)
