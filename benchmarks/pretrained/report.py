"""
Tables of what has been recorded.

    python -m benchmarks.pretrained.report

writes results/tables.md and a picture for each task, and prints the tables.

Along a run the accuracy is that of the completions that it is trained on: no problem comes twice, so they are new to it. At the
end held-out problems are sampled. Between seeds: the median, the smallest and the largest value. Two methods are compared by
problem: the difference of their rates on the same problems, over all seeds that both have, with a bootstrap interval of 95 %
over problems. "Last" is the mean of the last 512 completions.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import markdown, ratio, spread, thousands
from benchmarks.common import read_lines
from benchmarks.curves import tokens_to
from benchmarks.pretrained.settings import (
    ALL_STEPS,
    ARMS,
    BUDGET,
    COMPARED,
    GSM8K_RATE,
    LEARNING_RATES,
    MAIN,
    TABLES,
    TUNING_SEED,
)
from trl_sgpo.analysis.metrics import mean_estimate


HERE = Path(__file__).parent
GOALS = (0.1, 0.2, 0.3)  # accuracies that tokens are counted to
ALONG = {  # what a picture shows; the lines of a word problem's solution can be written in many ways
    "chains": {"accuracy": "accuracy", "right_lines": "share of right leading lines"},
    "gsm8k": {"accuracy": "accuracy", "length": "tokens per completion"},
}
DRAWN = {"chains": COMPARED, "gsm8k": (*MAIN, "prefix_centred", *ALL_STEPS, "prefix_judge")}  # methods of a picture
WINDOW = 512  # completions that an accuracy along the way is the mean of

Row = dict[str, Any]


def mean_accuracy(run: Row) -> float:
    """Of all completions of the run."""
    return statistics.fmean(point["accuracy"] for point in run["curve"])


def window_size(run: Row) -> int:
    """The updates of a window: all, if the run is short."""
    return min(len(run["curve"]), max(1, WINDOW // run["curve"][0]["completions"]))


def windows(run: Row, name: str) -> list[dict[str, float]]:
    """The running mean over [`WINDOW`] completions of what the updates logged, each at the middle of its window."""
    n = window_size(run)
    points = []
    for i in range(n, len(run["curve"]) + 1):
        window = [point for point in run["curve"][i - n : i] if name in point]
        if window:
            middle = (window[0]["tokens"] + window[-1]["tokens"]) / 2
            points.append({"tokens": middle, name: statistics.fmean(point[name] for point in window)})
    return points


def tokens_to_goal(run: Row, goal: float) -> float:
    """Generated tokens at which the accuracy first reaches a goal; inf if never."""
    points = windows(run, "accuracy")
    return tokens_to({"curve": points}, goal) if points else math.inf


def best_rate(runs: Sequence[Row], arm: str) -> float | None:
    """
    The learning rate with the largest mean accuracy over the tuning run, when all of them are recorded. Methods that were not
    tuned take prefix credit's.
    """
    tuned = [r for r in runs if r["task"] == "chains" and r["seed"] == TUNING_SEED]
    tuned = [
        r for r in tuned if r["arm"] == (arm if arm in MAIN else "prefix") and r["learning_rate"] in LEARNING_RATES
    ]
    if len(tuned) < len(LEARNING_RATES):
        return None
    return max(tuned, key=mean_accuracy)["learning_rate"]


def runs_of(runs: Sequence[Row], task: str, arm: str) -> list[Row]:
    """The runs of a method at its learning rate, by seed."""
    rate = best_rate(runs, arm) if task == "chains" else GSM8K_RATE
    found = [r for r in runs if (r["task"], r["arm"], r["learning_rate"]) == (task, arm, rate)]
    return sorted((r for r in found if r["seed"] != TUNING_SEED), key=lambda r: r["seed"])


def rates(run: Row) -> np.ndarray:
    """The share of right samples of each held-out problem, at the end."""
    return np.array(run["end"]["right"]) / run["end"]["samples"]


def difference(runs: Sequence[Row], others: Sequence[Row]) -> str:
    """The difference of accuracies at the end, paired by problem, over the seeds that both have."""
    found = {r["seed"]: rates(r) for r in others}
    pairs = [rates(r) - found[r["seed"]] for r in runs if r["seed"] in found]
    return f"{mean_estimate(np.mean(pairs, axis=0))}" if pairs else "-"


def bases_table(bases: Sequence[Row]) -> str:
    rows = []
    for base in bases:
        for label in ("published", "base"):
            m = base[label]
            failed = f"{base['groups']['failed']:.0%}" if label == "base" else ""
            cells = [f"{m[kind][name]:.3f}" for kind in ("greedy", "sampled") for name in ("accuracy", "lenient")]
            rows.append([base["task"], label, *cells, f"{m['sampled']['right_lines']:.2f}", failed, base["weights"]])
    header = ["task", "model", "greedy, strict", "lenient", "sampled, strict", "lenient", "right leading lines"]
    return markdown([*header, "failed groups of 8", "weights"], rows)


def tune_table(runs: Sequence[Row]) -> str:
    rows = []
    for arm in MAIN:
        found = {r["learning_rate"]: r for r in runs if r["arm"] == arm and r["seed"] == TUNING_SEED}
        cells = []
        for rate in LEARNING_RATES:
            run = found.get(rate)
            if run:
                accuracy, right = (windows(run, name)[-1][name] for name in ALONG["chains"])
                length = run["curve"][-1]["length"]
                cells.append(f"{mean_accuracy(run):.3f} / {accuracy:.3f} / {right:.3f} / {length:.0f}")
            else:
                cells.append("-")
        if found:
            rows.append([ARMS[arm].label, *cells])
    return markdown(
        ["mean accuracy / at the end / right leading lines / length", *(f"{rate:g}" for rate in LEARNING_RATES)], rows
    )


def task_table(runs: Sequence[Row], task: str) -> str:
    grpo = runs_of(runs, task, "grpo")
    grpo_budget = min((r["tokens"] for r in grpo), default=BUDGET[task])
    goals = [
        g
        for g in GOALS
        if g == GOALS[0] or any(math.isfinite(tokens_to_goal(r, g)) for r in runs if r["task"] == task)
    ]
    rows = []
    for arm, about in ARMS.items():
        found = runs_of(runs, task, arm)
        if not found:
            continue
        budget = min(r["tokens"] for r in found)
        ends = [r["end"]["sampled"] for r in found]
        last = [
            {name: points[-1][name] for name in ("failed", "entropy") if (points := windows(r, name))} for r in found
        ]
        tokens = []
        for goal in goals:
            reached = [[tokens_to_goal(r, goal) for r in some] for some in (found, grpo)]
            tokens += [
                spread(reached[0], lambda t, budget=budget: thousands(t, budget)),
                ratio(*(statistics.median(some) if some else math.inf for some in reached), budget, grpo_budget),
            ]
        cells = [
            spread([mean_accuracy(r) for r in found], lambda x: f"{x:.3f}"),
            *tokens,
            spread([rates(r).mean() for r in found], lambda x: f"{x:.3f}"),
            *(spread([e[name] for e in ends], lambda x: f"{x:.3f}") for name in ("lenient", "right_lines")),
            difference(found, grpo) if arm != "grpo" else "",
            *(
                spread([p[name] for p in last if name in p] or [math.nan], lambda x: f"{x:.2f}")
                for name in ("failed", "entropy")
            ),
            spread([e["length"] for e in ends], lambda x: f"{x:.0f}"),
            f"{statistics.median(r['seconds'] for r in found) / 60:.0f}",
        ]
        rows.append([about.label, f"{found[0]['learning_rate']:g}", str(len(found)), *cells])
    header = ["method", "learning rate", "seeds", "mean accuracy over the run"]
    for goal in goals:
        header += [f"tokens to {goal:.0%}", "of GRPO's"]
    header += ["accuracy at the end", "lenient", "right leading lines", "accuracy less GRPO's, by problem"]
    return markdown([*header, "failed groups, last", "entropy, last", "length at the end", "minutes"], rows)


def pass_table(bases: Sequence[Row], runs: Sequence[Row], task: str) -> str:
    """pass@k of the base and of each method at its end."""
    found = [("base", [base["base"]["pass"]]) for base in bases if base["task"] == task and "pass" in base["base"]]
    for arm, about in ARMS.items():
        found.append((about.label, [r["end"]["pass"] for r in runs_of(runs, task, arm) if "pass" in r["end"]]))
    found = [(label, some) for label, some in found if some]
    ks = list(found[0][1][0]) if found else []
    rows = [[label, *(spread([one[k] for one in some], lambda x: f"{x:.2f}") for k in ks)] for label, some in found]
    return markdown(["model", *(f"pass@{k}" for k in ks)], rows)


def draw(runs: Sequence[Row], task: str, path: Path) -> None:
    """Accuracy, and what [`ALONG`] has beside it, over generated tokens, a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (name, title) in zip(axes, ALONG[task].items(), strict=True):
        for i, arm in enumerate(DRAWN[task]):
            for j, run in enumerate(runs_of(runs, task, arm)):
                points = windows(run, name)
                x, y = [p["tokens"] / 1000 for p in points], [p[name] for p in points]
                label = f"{ARMS[arm].label} ({run['learning_rate']:g})" if j == 0 else None
                axis.plot(x, y, color=f"C{i}", lw=1.5, label=label)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("generated tokens (thousands)")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(handles, labels, **place, fontsize=8, title="method (learning rate)", title_fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the records")
    args = parser.parse_args()
    runs, bases = read_lines(args.output / "runs.jsonl"), read_lines(args.output / "bases.jsonl")
    sections = [
        ("Models before the training", bases_table(bases)),
        (TABLES["tune"].question, tune_table(runs)),
        (TABLES["main"].question, task_table(runs, "chains")),
        ("Do they find what the base does not find in 32 tries?", pass_table(bases, runs, "chains")),
        (TABLES["gsm8k"].question, task_table(runs, "gsm8k")),
    ]
    recorded = [(title, table) for title, table in sections if len(table.splitlines()) > 2]
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in recorded)
    (args.output / "tables.md").write_text(text + "\n")
    print(text)
    for task in BUDGET:
        if any(runs_of(runs, task, arm) for arm in MAIN):
            draw(runs, task, args.output / f"{task}.png")


if __name__ == "__main__":
    main()
