"""The command `report`: tables, learning curves, the page of the sharpening report, and the record."""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.real_text.records import surroundings, write_json
from benchmarks.real_text.training import ARMS, NAMES
from trl_sgpo.analysis.metrics import Estimate, mean_estimate, pass_at_k
from trl_sgpo.scripts.report import main as sharpening_report


COLORS = {"grpo": "#8a8f98", "sgpo": "#1f6feb", "prefix": "#d9730d"}


def report(args: argparse.Namespace) -> None:
    folders = sorted(
        (path.parent for path in (args.output / "runs").glob("*/result.json")),
        key=lambda folder: (
            list(ARMS).index(folder.name.partition("-seed")[0]),
            int(folder.name.partition("-seed")[2]),
        ),
    )
    if not folders:
        raise ValueError(
            f"There is no finished run in {args.output / 'runs'}. Run `train` first, with the same --output."
        )
    base = json.loads((args.output / "base" / "evaluation.json").read_text())
    runs = [{**json.loads((folder / "result.json").read_text()), "folder": folder} for folder in folders]
    found = {"base": summary_of(base, *samples(folders[0], "base"))}
    for run in runs:
        found[run["folder"].name] = summary_of(run, *samples(run["folder"], "policy"))
    show_runs(found, {run["folder"].name: run for run in runs})
    arms = compare_arms(runs)
    show_arms(arms)
    draw(runs, args.output / "curves.png")
    page = args.output / "report"
    sharpening_report(
        [
            *map(str, folders),
            "--output",
            str(page),
            "--tokenizer",
            str(args.output / "base"),
            "--guess",
            str(base["guess"]),
        ]
    )
    print(f"Learning curves: {args.output / 'curves.png'}\nPage: {page / 'index.html'}")
    if args.record:
        judge_file = args.output / "judge.json"
        left_out = ("folder", "test_sampled", "test_greedy", "settings", "probe")
        write_json(
            args.record,
            {
                **surroundings(),
                "settings": runs[0]["settings"],
                "base": {
                    **json.loads((args.output / "base" / "pretrain.json").read_text()),
                    **{key: base[key] for key in ("group_size", "failed_groups", "untied_of_failed", "guess")},
                },
                "results": found,
                "arms": arms,
                "runs": [{key: value for key, value in run.items() if key not in left_out} for run in runs],
                "judge": json.loads(judge_file.read_text()) if judge_file.exists() else None,
            },
        )
        draw(runs, args.record.with_name("curves.png"))
        print(f"Recorded in {args.record}")


def samples(folder: Path, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, right ones, and right ones whose every step is, per question of the probe; of the base or of the last policy."""
    path = sorted((folder / "sharpening").glob(f"{which}*.parquet"))[-1]
    columns = {name: np.array(values) for name, values in pq.read_table(path).to_pydict().items()}
    ids = np.unique(columns["prompt_id"])
    # Where the judge saw none of the right completions the column is not there
    verified = columns.get("process_correct", np.zeros(len(columns["prompt_id"]))) == True  # noqa: E712  None is no proof
    counted = [
        np.array([values[columns["prompt_id"] == i].sum() for i in ids])
        for values in (np.ones(len(verified), int), columns["correct"].astype(int), verified.astype(int))
    ]
    return counted[0], counted[1], counted[2]


def interval(estimate: Estimate) -> list[float | None]:
    """Value and ends; `None` where there are too few questions for an interval."""
    values = (estimate.value, estimate.low, estimate.high)
    return [None if math.isnan(value) else round(value, 5) for value in values]


def summary_of(result: dict[str, Any], n: np.ndarray, c: np.ndarray, verified: np.ndarray) -> dict[str, Any]:
    """Accuracy and pass@k of a model, each with its bootstrap interval over questions."""
    largest = int(n.min())
    ks = sorted({2**power for power in range(largest.bit_length()) if 2**power <= largest} | {largest})
    return {
        "greedy": interval(mean_estimate(result["test_greedy"])),
        "sampled": interval(mean_estimate(result["test_sampled"])),
        "pass@k": {k: interval(mean_estimate(pass_at_k(n, c, k))) for k in ks},
        "pass@k, every step right": {k: interval(mean_estimate(pass_at_k(n, verified, k))) for k in ks},
    }


def compare_arms(runs: list[dict]) -> dict[str, dict[str, Any]]:
    """
    Per arm, the accuracy over its seeds and how far it is from GRPO's, question by question. The intervals cover the choice of
    the questions, not of the seeds: `range` is what the seeds differ by.
    """
    by_arm: dict[str, np.ndarray] = {}
    compared = {}
    for arm in ARMS:
        own = [run["test_sampled"] for run in runs if run["arm"] == arm]
        if own:
            by_arm[arm] = np.mean(own, axis=0)
            means = [statistics.mean(values) for values in own]
            compared[arm] = {
                "seeds": [run["seed"] for run in runs if run["arm"] == arm],
                "accuracy": interval(mean_estimate(by_arm[arm])),
                "range": [min(means), max(means)],
            }
            if "grpo" in by_arm and arm != "grpo":
                compared[arm]["minus_grpo"] = interval(mean_estimate(by_arm[arm] - by_arm["grpo"]))
    return compared


def cell(values: list[float | None]) -> str:
    value, low, high = values
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def show_runs(found: dict[str, dict], runs: dict[str, dict]) -> None:
    largest = max(found["base"]["pass@k"])
    table = Table(title="GSM8K, test questions", title_justify="left", box=SIMPLE)
    for column in (
        "",
        "greedy",
        "sampled",
        "pass@1",
        f"pass@{largest}",
        "every step right",
        "failed",
        "rescued",
        "tokens",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name, values in found.items():
        run = runs.get(name)
        groups = run["groups"] if run else {}
        shares = [
            groups.get(f"sgpo/groups/{kind}") for kind in ("failed", "rescued")
        ]  # without a judge none is rescued
        table.add_row(
            name,
            cell(values["greedy"]),
            cell(values["sampled"]),
            cell(values["pass@k"][1]),
            cell(values["pass@k"][largest]),
            cell(values["pass@k, every step right"][largest]),
            *("-" if share is None else f"{share:.2f}" for share in shares),
            f"{run['generated_tokens']:,}" if run else "-",
        )
    console = Console(width=max(150, Console().width))  # narrower, the intervals would break
    console.print(table)
    for line in (
        "greedy, sampled   accuracy on all test questions; [95 % interval over questions]",
        f"pass@1, pass@{largest}    on the questions of the probe; every step right: pass@{largest} of what the judge verifies, too",
        "failed, rescued   share of the groups seen in training",
    ):
        console.print(f"  {line}", highlight=False, markup=False)


def show_arms(arms: dict[str, dict]) -> None:
    table = Table(title="Arms, over their seeds", title_justify="left", box=SIMPLE)
    for column in ("", "seeds", "accuracy, sampled", "range of the seeds", "minus GRPO"):
        table.add_column(column, justify="right" if column else "left")
    for arm, values in arms.items():
        low, high = values["range"]
        difference = cell(values["minus_grpo"]) if "minus_grpo" in values else "-"
        table.add_row(
            NAMES[arm],
            ", ".join(map(str, values["seeds"])),
            cell(values["accuracy"]),
            f"{low:.3f} to {high:.3f}" if len(values["seeds"]) > 1 else "-",
            difference,
        )
    Console().print(table)


def draw(runs: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    seen: set[str] = set()
    for run in runs:
        x = [point["generated_tokens"] / 1e6 for point in run["curve"]]
        y = [point["test/accuracy"] for point in run["curve"]]
        axis.plot(x, y, color=COLORS[run["arm"]], lw=2, label=None if run["arm"] in seen else NAMES[run["arm"]])
        seen.add(run["arm"])
    axis.set_title("Accuracy of sampled completions on GSM8K's test questions", loc="left", fontsize=11)
    axis.set_xlabel("generated tokens (millions)")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
