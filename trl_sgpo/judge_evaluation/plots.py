"""One picture of a judge: its RTS beside the true one, and which steps it names. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure


_GOLD, _JUDGE = "#E69F00", "#0072B2"  # colour-blind readers can tell them apart
# A scatter of more points than this cannot be read
_MOST_POINTS = 600


def plot_judge(
    path: str | PathLike[str],
    predicted: Sequence[int],
    label: Sequence[int],
    n_steps: Sequence[int],
    title: str,
    summary: Mapping[str, Any],
    seed: int = 0,
) -> None:
    """
    Draws known-wrong mode into a PNG file. A verdict below 0 names no step. `summary` is the result of
    [`~trl_sgpo.judge_evaluation.metrics.known_wrong_summary`] on these rows, and `seed` that of the jitter, which
    separates equal points.
    """
    named, gold_index, steps = (np.asarray(values) for values in (predicted, label, n_steps))
    answered = named >= 0
    gold, rts = (gold_index / steps)[answered], (named / steps)[answered]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))

    if len(gold) > _MOST_POINTS:
        # The scale begins below 1, so that a single solution is not white
        log = LogNorm(vmin=0.15)
        cells = left.hexbin(gold, rts, gridsize=18, extent=(0, 1, 0, 1), mincnt=1, norm=log, cmap="Blues")
        figure.colorbar(cells, ax=left, label="solutions", shrink=0.85)
    else:
        noise = np.random.default_rng(seed).uniform(-0.012, 0.012, size=(2, len(gold)))
        left.scatter(gold + noise[0], rts + noise[1], s=14, color=_JUDGE, alpha=0.4, linewidths=0, zorder=2)
    left.plot([0, 1], [0, 1], color="black", linewidth=1, label="right")
    if len(gold):
        constant = summary["constant"]
        left.axhline(constant, color=_GOLD, linewidth=1.5, linestyle="--", label=f"constant {constant:.2f}")
    limits = (-0.03, 1.03)
    left.set(xlim=limits, ylim=limits, aspect="equal", xlabel="RTS of the annotators", ylabel="RTS of the judge")
    left.set_title(
        f"{len(gold)} of {len(named)} answered\n"
        f"mean error {summary['rts_mae']:.3f}, constant {summary['rts_mae_constant']:.3f}"
        if len(gold)
        else f"none of {len(named)} answered",
        fontsize=10,
    )
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)

    places = np.arange(len(summary["histogram_gold"]))
    for offset, name, key, colour in (
        (-0.2, "annotators", "histogram_gold", _GOLD),
        (0.2, "judge", "histogram_predicted", _JUDGE),
    ):
        right.bar(places + offset, list(summary[key].values()), width=0.4, label=name, color=colour)
    right.set_xticks(places, [name.replace("_", "\n") for name in summary["histogram_gold"]], fontsize=8)
    right.set(xlabel="first wrong step (index from 0)", ylabel="solutions")
    right.set_title("which step is named", fontsize=10)
    right.legend(fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}, on solutions that are known to be wrong", fontsize=11)
    figure.savefig(path, dpi=120, metadata={"Software": None})
