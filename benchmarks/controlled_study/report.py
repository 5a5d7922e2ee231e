"""
Tables and pictures of what the study has recorded so far.

    python -m benchmarks.controlled_study.report

writes results/tables.md and results/*.png, and prints the tables. Intervals are the smallest and the largest value of the
seeds. A method that did not reach an accuracy within its budget has "> budget" there, and counts as infinite in the median.
"""

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import markdown, ratio, spread, thousands
from benchmarks.controlled_study.comparisons import (
    baseline_elsewhere_table,
    baseline_table,
    baseline_tokens_table,
    dead_tokens_table,
    dead_updates_table,
)
from benchmarks.controlled_study.records import Records, best_learning_rate, select
from benchmarks.controlled_study.settings import (
    ARMS,
    COMPLETIONS_PER_UPDATE,
    DIALS,
    EXPOSURES,
    LEARNING_RATES,
    OTHER_BASES,
    TUNING_CHECK_SEEDS,
    TUNING_SEEDS,
)
from benchmarks.controlled_study.tables import (
    AREA,
    BLAMES_LAST,
    COMMON_RATE,
    GUARDS,
    JUDGE_BUDGET,
    JUDGED_ARMS,
    LARGE_UPDATE,
    NOISY_JUDGES,
    RECOMMENDED,
    TABLES,
    THREE,
    TUNING_BUDGET,
    WITHOUT_JUDGE,
)
from benchmarks.curves import area, tokens_to
from trl_sgpo.tasks.rewrite_chain import AXES


HERE = Path(__file__).parent
COLORS = {"grpo": "#8a8f98", "sgpo": "#1f6feb", RECOMMENDED: "#d1480a"}
DRAWN = ("75", "95", "99")  # below, all curves lie over each other

Row = dict[str, Any]


def main_runs(records: Records, dial: str, arm: str, judge: str = "exact", **others: Any) -> list[Row]:
    """
    The runs of an arm; where nothing else is said, in groups of eight, updates of the usual size, and at the learning rate that
    tuning chose.
    """
    where = {"group_size": 8, "completions_per_update": COMPLETIONS_PER_UPDATE} | others
    tuned = best_learning_rate(records, dial, arm, judge, where["completions_per_update"])
    if tuned is not None:
        where.setdefault("learning_rate", tuned)
    return select(records, dial=dial, arm=arm, judge=judge, **where)


def failed_share(records: Records, dial: str) -> str:
    """The share of groups of eight that fail before training, as it was measured."""
    base = records.bases.get(dial)
    return f"{base['failed_groups']:.1%}" if base else f"about {dial} %"


def bases_table(records: Records) -> str:
    rows = []
    for name in [*DIALS, *(d for d in records.bases if d not in DIALS)]:
        base = records.bases.get(name)
        if base:
            p = base["probe"]
            rows.append(
                [
                    name,
                    f"{base['failed_groups']:.1%}",
                    f"{base['accuracy']:.4f}",
                    f"{base['greedy']:.2f}",
                    f"{base['right_prefix']:.2f}",
                    f"{p['pass']['64']:.2f}",
                    f"{p['verified_pass']['64']:.2f}",
                    f"{p['entropy']:.2f}",
                ]
            )
    return markdown(
        ["dial", "failed groups of 8", "pass@1", "greedy", "RTS", "pass@64", "the same, every step right", "entropy"],
        rows,
    )


def judge_errors_table(records: Records) -> str:
    """How often each judge that errs is wrong about the wrong solutions of the bases: where it cannot move, it is right."""
    names = [name for name in DIALS if "judge_errors" in records.bases.get(name, {}).get("probe", {})]
    rows = [
        [
            failed_share(records, name),
            *(f"{records.bases[name]['probe']['judge_errors'][j]:.0%}" for j in NOISY_JUDGES),
        ]
        for name in names
    ]
    return markdown(["failed groups of 8", *NOISY_JUDGES], rows)


def tune_table(records: Records) -> str:
    """Areas under the curves of the tuning runs; bold is what the arm was run with."""
    found: dict[tuple[str, str, str, int], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for r in records.runs.values():
        if r["seed"] in TUNING_SEEDS:
            found[r["dial"], r["arm"], r["judge"], r["completions_per_update"]][r["learning_rate"]].append(r)
    rates = sorted({rate for runs in found.values() for rate in runs})
    rows = []
    for condition, runs in found.items():
        tokens = min(r["tokens"] for some in runs.values() for r in some)
        chosen = best_learning_rate(records, *condition)
        cells = []
        for rate in rates:
            cell = f"{statistics.fmean(area(r, tokens) for r in runs[rate]):.3f}" if rate in runs else "-"
            cells.append(f"**{cell}**" if rate == chosen else cell)
        dial, arm, judge, completions = condition
        rows.append([dial, ARMS[arm].label, judge, str(completions), *cells])
    return markdown(["dial", "method", "judge", "completions per update", *(f"{rate:g}" for rate in rates)], rows)


def tune_check_table(records: Records) -> str:
    """Areas under the curves of single seeds: the one that chose the learning rates, and two that did not."""
    rows = []
    for arm in (*THREE, "zvp"):
        for seed in (*TUNING_SEEDS, *TUNING_CHECK_SEEDS):
            found = {
                r["learning_rate"]: area(r, TUNING_BUDGET["95"])
                for r in records.runs.values()
                if (r["dial"], r["arm"], r["judge"], r["seed"]) == ("95", arm, "exact", seed)
                and r["completions_per_update"] == COMPLETIONS_PER_UPDATE
                and r["learning_rate"] in LEARNING_RATES
            }
            if found:
                best = max(found.values())
                cells = [found.get(rate) for rate in LEARNING_RATES]
                shown = ["-" if c is None else (f"**{c:.3f}**" if c == best else f"{c:.3f}") for c in cells]
                rows.append([ARMS[arm].label, str(seed), *shown])
    return markdown(["method", "seed", *(f"{rate:g}" for rate in LEARNING_RATES)], rows)


def budget_of(runs: Sequence[Row]) -> int:
    """The tokens that all runs of an arm had."""
    return min((r["tokens"] for r in runs), default=0)


def speeds_of(runs: Sequence[Row]) -> dict[int, float]:
    """Tokens to 50 % by seed; infinite if it was not reached within the budget of all."""
    budget = budget_of(runs)
    speeds = {r["seed"]: tokens_to(r) for r in runs}
    return {seed: tokens if tokens <= budget else math.inf for seed, tokens in speeds.items()}


def on_shared_seeds(*speeds: dict[int, float]) -> list[float]:
    """The median of each, over the seeds that all of them have: arms are compared on nothing else."""
    shared = set.intersection(*map(set, speeds))
    return [statistics.median(s[seed] for seed in shared) for s in speeds] if shared else [math.inf] * len(speeds)


def speed_table(records: Records, dial: str, arms: Sequence[str], **others: Any) -> str:
    found = {arm: main_runs(records, dial, arm, **others) for arm in arms}
    found = {arm: rows for arm, rows in found.items() if rows}
    budgets = {arm: budget_of(rows) for arm, rows in found.items()}
    speeds = {arm: speeds_of(rows) for arm, rows in found.items()}
    rows = []
    for arm in sorted(
        found,
        key=lambda a: (
            statistics.median(speeds[a].values()),
            -statistics.fmean(area(r, AREA[dial]) for r in found[a]),
        ),
    ):
        rows.append(
            [
                ARMS[arm].label,
                f"{found[arm][0]['learning_rate']:g}",
                spread(list(speeds[arm].values()), lambda t, budget=budgets[arm]: thousands(t, budget)),
                *(
                    ratio(*on_shared_seeds(speeds[arm], speeds[other]), budgets[arm], budgets[other])
                    if other in speeds
                    else ""
                    for other in ("grpo", "sgpo")
                ),
                spread([area(r, AREA[dial]) for r in found[arm]], lambda a: f"{a:.3f}"),
                str(len(found[arm])),
            ]
        )
    return markdown(
        [
            "method",
            "learning rate",
            "tokens to 50 %",
            "of GRPO's",
            "of SGPO's",
            f"mean accuracy over {AREA[dial] // 1000}k tokens",
            "seeds",
        ],
        rows,
    )


def judges_table(records: Records) -> str:
    """
    Tokens to 50 %, and how much of the tokens that the arm saves against GRPO with an exact judge it still saves with one that
    errs, by medians.
    """
    grpo = speeds_of(main_runs(records, "95", "grpo"))
    rows = []
    for arm in (*JUDGED_ARMS, *GUARDS):
        cells = []
        # Without errors four judgments are one, and a guard is measured under one judge only
        plain = arm.removesuffix("_votes") if arm not in records_arms(records, "exact") else arm
        exact = speeds_of(main_runs(records, "95", plain))
        for judge in ("exact", *NOISY_JUDGES):
            found = main_runs(records, "95", plain if judge == "exact" else arm, judge)
            if not found:
                cells.append("-")
                continue
            speeds = speeds_of(found)
            cell = spread(list(speeds.values()), lambda t: thousands(t, JUDGE_BUDGET))
            if exact and grpo and judge != "exact":
                without, erring, right = on_shared_seeds(grpo, speeds, exact)
                if without > right:
                    saved = (without - erring) / (without - right)
                    cell += f", {saved:.0%}" if math.isfinite(saved) else ", lost"
            cells.append(cell)
        if any(cell != "-" for cell in cells):
            rows.append([ARMS[arm].label, *cells])
    return markdown(["method", "exact", *NOISY_JUDGES], rows)


def length_table(records: Records) -> str:
    """What becomes of length and accuracy if the judge always blames the last step; GRPO, without a judge, beside it."""

    def change(curve: list[Row], name: str, digits: int) -> str:
        points = [point[name] for point in curve if name in point]
        return f"{points[0]:.{digits}f} to {points[-1]:.{digits}f}" if points else "-"

    rows = []
    for arm, judge in (("sgpo", BLAMES_LAST), (RECOMMENDED, BLAMES_LAST), ("grpo", "exact")):
        for r in select(records, dial="95", arm=arm, judge=judge, learning_rate=COMMON_RATE, group_size=8)[:3]:
            curve, alarm = r["curve"], r.get("length_alarm")
            label = ARMS[arm].label + (", last step blamed" if judge == BLAMES_LAST else "")
            lengths = [change(curve, name, 1) for name in ("length", "failed_length", "failed_steps")]
            said = f"update {alarm} of {r['updates']}" if alarm is not None else "silent"
            said = said if judge == BLAMES_LAST else "-"
            rows.append([label, str(r["seed"]), *lengths, change(curve, "accuracy", 3), said])
    header = ["method", "seed", "tokens per completion", "of failed groups", "steps there", "accuracy", "alarm"]
    return markdown(header, rows)


def records_arms(records: Records, judge: str) -> set[str]:
    """The arms that were run on the dial with 95 % failed groups with this judge."""
    return {r["arm"] for r in select(records, dial="95", judge=judge, group_size=8)}


def axis_runs(records: Records, dial: str, arm: str) -> list[Row]:
    """The runs of an arm outside of the pretraining; of an arm with several learning rates those at the better one."""
    by_rate = defaultdict(list)
    for r in main_runs(records, dial, arm):
        by_rate[r["learning_rate"]].append(r)
    return max(by_rate.values(), key=lambda runs: statistics.fmean(area(r, r["tokens"]) for r in runs), default=[])


def axes_table(records: Records) -> str:
    """
    Accuracy on problems outside of the pretraining, which are trained on: its mean over the run, and at the end of it. SFT is
    there for what the architecture can, with more tokens, so only its end is shown.
    """
    rows = []
    for axis in AXES:
        for exposure in EXPOSURES:
            dial = f"{axis}@{exposure:g}"
            found = {arm: axis_runs(records, dial, arm) for arm in (*THREE, "sft")}
            if not found["grpo"]:
                continue
            cells = []
            for arm, runs in found.items():
                ends = [r["curve"][-1]["accuracy"] for r in runs]
                areas = [area(r, r["tokens"]) for r in runs]
                shown = [spread(values, lambda a: f"{a:.2f}") for values in (areas, ends) if values]
                cells.append(("; ".join(shown) if arm != "sft" else shown[-1]) if runs else "-")
            at_first = found["grpo"][0]["curve"][0]
            tied = [p["tied"] for r in found["sgpo"] for p in r["curve"][1:2] if "tied" in p]
            rows.append(
                [
                    axis,
                    f"{exposure:.0%}",
                    f"{at_first['accuracy']:.3f}",
                    f"{statistics.fmean(tied):.2f}" if tied else "-",
                    *cells,
                ]
            )
    return markdown(
        ["axis", "exposure", "base", "tied groups at the start", *(ARMS[a].label for a in (*THREE, "sft"))], rows
    )


def drift_table(records: Records) -> str:
    """What training outside of the pretraining does to the inside, and to the entropy (nats per token)."""
    rows = []
    for axis in AXES:
        for exposure in EXPOSURES:
            for arm in THREE:
                runs = axis_runs(records, f"{axis}@{exposure:g}", arm)
                if not runs:
                    continue
                inside = [[r["curve"][i]["inside"] for r in runs] for i in (0, -1)]
                # The entropy is logged in training, so the first evaluation has none
                entropy = [[r["curve"][i]["entropy"] for r in runs] for i in (1, -1)]
                prefix = [[r["curve"][i]["right_prefix"] for r in runs] for i in (0, -1)]
                cells = [
                    f"{statistics.fmean(before):.2f} to {spread(after, lambda x: f'{x:.2f}')}"
                    for before, after in (inside, entropy, prefix)
                ]
                rows.append([axis, f"{exposure:.0%}", ARMS[arm].label, *cells])
    return markdown(["axis", "exposure", "method", "accuracy inside", "entropy", "RTS outside"], rows)


def probes_table(records: Records) -> str:
    rows = []
    for dial in ("75", "95"):
        base = records.bases.get(dial)
        if base:
            p = base["probe"]
            rows.append(
                [
                    dial,
                    "base",
                    "",
                    f"{p['pass']['1']:.2f}",
                    f"{p['pass']['64']:.2f}",
                    f"{p['verified_pass']['64']:.2f}",
                    f"{p['distinct']:.0f}",
                    f"{p['entropy']:.3f}",
                ]
            )
        for arm in THREE:
            for when in ("matched", "end"):
                found = [r["probes"][when] for r in main_runs(records, dial, arm) if when in r.get("probes", {})]
                if found:
                    rows.append(
                        [
                            dial,
                            ARMS[arm].label,
                            "from 50 % on" if when == "matched" else "at the end",
                            *(
                                spread([p[group][k] for p in found], lambda x: f"{x:.2f}")
                                for group, k in (("pass", "1"), ("pass", "64"), ("verified_pass", "64"))
                            ),
                            spread([p["distinct"] for p in found], lambda x: f"{x:.0f}"),
                            spread([p["entropy"] for p in found], lambda x: f"{x:.3f}"),
                        ]
                    )  # fmt: skip
    return markdown(
        ["dial", "method", "when", "pass@1", "pass@64", "every step right: pass@64", "distinct of 64", "entropy"], rows
    )


def reports_table(records: Records) -> str:
    rows = []
    dials = [*DIALS, *(f"{axis}@{exposure:g}" for axis in AXES for exposure in EXPOSURES)]
    reports = {(r["dial"], r["arm"]): r for r in records.runs.values() if r.get("report")}
    for record in (reports[dial, arm] for dial in dials for arm in THREE if (dial, arm) in reports):
        verdict = record["verdict"]
        perplexity = verdict["base_perplexity"]
        shown = f"{perplexity['base']:.2f} to {perplexity['policy']:.2f}" if perplexity else "-"
        accuracy = record["curve"][-1]["accuracy"]
        rows.append(
            [
                record["dial"],
                ARMS[record["arm"]].label,
                f"{record['tokens_generated'] // 1000}k: {accuracy:.2f}",
                verdict["headline"],
                "; ".join(verdict["evidence"]),
                shown,
                " ".join(verdict["groups"]),
            ]
        )
    header = ["dial", "method", "tokens: accuracy", "verdict", "evidence", "the base's perplexity on the samples"]
    return markdown([*header, "what it says of the groups"], rows)


def draw_curves(records: Records, dial: str, arms: Sequence[str], path: Path) -> None:
    """A line per seed: in full for the arms that have a color of their own, dashed and thin for the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    others = [a for a in arms if a not in COLORS]
    shades = ("#b5179e", "#087f5b", "#7048e8", "#000000", "#5c940d", "#e0a100")
    for arm in arms:
        runs = main_runs(records, dial, arm)
        color = COLORS.get(arm) or shades[others.index(arm)]
        style = {"lw": 1.8, "zorder": 3} if arm in COLORS else {"lw": 1, "ls": (0, (4, 2)), "zorder": 4}
        for i, record in enumerate(runs):
            x = [p["tokens"] / 1000 for p in record["curve"]]
            y = [p["accuracy"] for p in record["curve"]]
            label = f"{ARMS[arm].label} ({record['learning_rate']:g})" if i == 0 else None
            axis.plot(x, y, color=color, label=label, **style)
    axis.axhline(0.5, color="black", lw=0.5, ls=":")
    axis.set_xlabel("generated tokens (thousands); a run ends at its goal or its budget")
    axis.set_ylabel("accuracy on held-out problems")
    axis.set_title(
        f"Base model with {failed_share(records, dial)} failed groups, a line per seed", loc="left", fontsize=11
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        title="method (learning rate)",
        title_fontsize=8,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the records")
    args = parser.parse_args()
    records = Records(args.output)
    sections = [("Bases", bases_table(records)), (TABLES["tune"].question, tune_table(records))]
    sections.append((TABLES["tune_check"].question, tune_check_table(records)))
    for dial in DIALS:
        arms = [arm for arm in ARMS if main_runs(records, dial, arm)]
        if not arms:
            continue
        title = f"Tokens to 50 % at {failed_share(records, dial)} failed groups"
        sections.append((title, speed_table(records, dial, arms)))
        if dial in DRAWN:
            # The variants of an arm would lie over each other
            drawn = [arm for arm in arms if arm in (*THREE, "grpo_exclude", *WITHOUT_JUDGE)]
            draw_curves(records, dial, drawn, args.output / f"curves_{dial}.png")
    common = speed_table(records, "95", THREE, learning_rate=COMMON_RATE)
    sections.append((TABLES["common_rate"].question, common))
    for base in OTHER_BASES:
        title = f"Another base model ({base}), {failed_share(records, base)} failed groups"
        sections.append((title, speed_table(records, base, THREE)))
    sections.append((TABLES["judges"].question, judges_table(records)))
    sections.append(("Share of wrong verdicts on the bases' wrong solutions", judge_errors_table(records)))
    sections.append((TABLES["length"].question, length_table(records)))
    for size in (4, 16):
        sections.append((f"Groups of {size}", speed_table(records, "95", THREE, group_size=size)))
    large = speed_table(records, "95", THREE, completions_per_update=LARGE_UPDATE)
    sections.append((f"Updates of {LARGE_UPDATE} completions", large))
    sections.append((TABLES["axes"].question, axes_table(records)))
    sections.append(("Training outside of the pretraining: accuracy inside, and entropy", drift_table(records)))
    sections.append(("Diversity: 64 samples for each of 32 problems", probes_table(records)))
    sections.append((TABLES["reports"].question, reports_table(records)))
    sections.append((TABLES["dead_updates"].question, dead_updates_table(records)))
    sections.append((TABLES["dead_tokens"].question, dead_tokens_table(records)))
    sections.append((TABLES["baseline"].question, baseline_table(records)))
    sections.append((TABLES["baseline_tokens"].question, baseline_tokens_table(records)))
    elsewhere = baseline_elsewhere_table(records)
    sections.append(
        ("And under a judge with errors, in mixed groups, and outside of what pretraining showed?", elsewhere)
    )
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections)
    (args.output / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
