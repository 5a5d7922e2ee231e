"""
Pictures of a summary. Each is one panel, small enough for a phone; the page arranges them. Needs matplotlib. In the
SVG of the page, the page's own variables replace the colours, so that the picture follows light and dark mode. The PNG
beside the page has the colours as they are here.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_sgpo.analysis.metrics import tilt_gain


if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes


# Okabe and Ito's colours, which colour-blind readers can tell apart. The page has a variable for each.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#fffffe"
KINDS = {  # what became of a group: name and colour
    "solved": ("solved", "#a6dcc9"),
    "mixed": ("mixed", SERIES[0]),
    "rescued": ("rescued", SERIES[4]),
    "other_rewards": ("failed, other rewards", SERIES[3]),
    "tied": ("tied", "#b8bfc7"),
    "abstained": ("judge silent", "#8b949e"),
    "unjudged": ("failed, not judged", "#5b646e"),
    "failed": ("failed", "#5b646e"),
}
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    **{color: f"--s{i + 1}" for i, color in enumerate(SERIES)},
    "#a6dcc9": "--k-solved",
    "#b8bfc7": "--k-tied",
    "#8b949e": "--k-silent",
    "#5b646e": "--k-failed",
}
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Figure:
    """One picture: the SVG is for the page, the PNG for a file."""

    key: str  # name of the file
    title: str
    caption: str  # what to see in it
    svg: str
    png: bytes
    term: str = ""  # its entry in the glossary


def _draw(
    key: str,
    title: str,
    caption: str,
    paint: Callable[[Any], None],
    term: str = "",
    legend: bool = True,
    ncols: int = 3,
) -> Figure:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = {
        "font.size": 9.5,
        "font.family": "sans-serif",
        "svg.fonttype": "none",  # text stays text: the page's own font, and it can be searched
        "svg.hashsalt": key,
        "text.parse_math": False,  # a run may be called $x$
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": GRID,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "lines.linewidth": 1.9,
        "figure.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        figure = Canvas(figsize=(4.0, 2.75), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        paint(axes)
        handles, names = axes.get_legend_handles_labels()
        if legend and names:
            names = [name if len(name) <= 40 else name[:39] + "…" for name in names]
            ncols = min(ncols, len(names), max(1, 60 // (4 + max(map(len, names)))))
            spacing: dict[str, Any] = {"handlelength": 1.5, "columnspacing": 1.2, "borderaxespad": 0.2}
            figure.legend(handles, names, loc="outside upper left", ncols=ncols, fontsize=8.5, **spacing)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")  # the page has its own
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return Figure(key, title, caption, _for_page(svg.getvalue(), key), png.getvalue(), term)


def _for_page(svg: str, key: str) -> str:
    """The SVG as part of a page: no prolog, unique ids, colours and fonts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    # matplotlib writes `font-size: 9px; font-family: ..`, before 3.10 `font: 9px ..`
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r"font: (?:\w+ )??([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1
    )


def figures(summary: Mapping[str, Any]) -> dict[str, list[Figure]]:
    """All pictures of a summary, by section: `"groups"`, `"training"`, `"judge"`, `"probes"` and `"probe:<run>"`."""
    sections = {
        "groups": _group_figures(summary),
        "training": _training_figures(summary),
        "judge": _judge_figures(summary),
    }
    probed = [run for run in summary["runs"] if run["sharpening"]]
    if len(probed) > 1:
        sections["probes"] = _probe_overlays(probed, summary)
    for i, run in enumerate(probed):
        sections[f"probe:{run['name']}"] = _probe_figures(run, f"probe{i + 1}")
    return sections


def _colors(summary: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each label."""
    return {
        label: (SERIES[i % len(SERIES)], _STYLES[i // len(SERIES) % len(_STYLES)])
        for i, label in enumerate(summary["labels"])
    }


def _group_figures(summary: Mapping[str, Any]) -> list[Figure]:
    found = []
    for i, (label, arm) in enumerate(summary["labels"].items()):
        series = {kind: arm["series"][kind]["value"] for kind in KINDS if kind in arm["series"]}
        if {"unjudged", "rescued", "tied"} & set(series):
            series.pop("failed", None)  # its parts are known
        series = {kind: values for kind, values in series.items() if any(v > 0 for v in values)}
        if not series:
            continue
        x, columns = _known(summary["bins"], *series.values())
        names, colors = zip(*(KINDS[kind] for kind in series), strict=True)
        if len(x) == 1:  # an area has two ends
            x, columns = [x[0] - 0.5, x[0] + 0.5], [[*values, *values] for values in columns]

        def paint(axes: "Axes", x: Any = x, columns: Any = columns, names: Any = names, colors: Any = colors) -> None:
            axes.stackplot(x, columns, labels=names, colors=colors, edgecolor=PAPER, linewidth=0.6)
            axes.set(xlabel="update", ylabel="share of groups", ylim=(0, 1), xlim=(x[0], x[-1]))

        title = "What became of the groups" + (f": {label}" if len(summary["labels"]) > 1 else "")
        caption = "Coloured groups teach. Pale green groups are solved already. Grey groups failed and teach nothing."
        found.append(_draw(f"groups_{i + 1}", title, caption, paint, "groups"))
    return found


# Name of the series, title, unit, caption, entry in the glossary, limits of the axis
_CURVES: tuple[tuple[str, str, str, str, str, tuple[float, float] | None], ...] = (
    ("accuracy", "Accuracy in training batches", "share correct", "The policy on its training prompts.", "accuracy", (0, 1)),
    ("teaching", "Groups that teach", "share of groups", "Groups with a gradient.", "teaching", (0, 1)),
    ("effective_tokens", "Effective tokens", "share of {unit}", "Generated {unit} that teach.", "effective_tokens", (0, 1)),
    ("answer_entropy", "Answer entropy", "nats", "How much the answers of a group differ.", "answer_entropy", None),
    ("distinct_answers", "Distinct answers", "answers per group", "How many answers a group has.", "answer_entropy", None),
    ("reward", "Reward", "mean reward", "The mean of TRL's reward.", "", None),
    ("entropy", "Policy entropy", "nats per token", "Falls as the policy grows sure, right or wrong.", "entropy", None),
    ("grad_norm", "Gradient norm", "grad_norm", "The printed loss hides it: 0 if no group teaches.", "loss", None),
    ("length", "Completion length", "tokens", "Mean length as logged by TRL.", "", None),
    ("kl_to_reference", "KL to the reference", "nats per token", "TRL's own, if beta is above 0.", "kl", None),
)  # fmt: skip


def _training_figures(summary: Mapping[str, Any]) -> list[Figure]:
    found = [figure for curve in _CURVES for figure in _overlay(summary, *curve)]
    reached = {
        label: {int(name[5:]): numbers for name, numbers in arm["numbers"].items() if name.startswith("pass@")}
        for label, arm in summary["labels"].items()
    }
    reached = {label: by_k for label, by_k in reached.items() if len(by_k) > 1}
    if reached:
        colors = _colors(summary)

        def paint(axes: "Axes") -> None:
            for label, by_k in reached.items():
                ks, color = sorted(by_k), colors[label][0]
                for when, style in (("start", ":"), ("end", "-")):
                    y = [by_k[k][when].value for k in ks]
                    axes.plot(ks, y, style, color=color, marker="o", ms=3, label=f"{label}, {when}")
            _pass_at_k_axes(axes, sorted({k for by_k in reached.values() for k in by_k}))

        caption = "First and last fifth of the run. A rise only at small k: the same prompts are solved, sooner."
        found.insert(1, _draw("pass_at_k_training", "pass@k in training batches", caption, paint, "pass@k", ncols=2))
    return found


def _overlay(
    summary: Mapping[str, Any],
    name: str,
    title: str,
    unit: str,
    caption: str,
    term: str,
    limits: tuple[float, float] | None,
) -> list[Figure]:
    """The curves of all methods in one picture; no picture if no run has this number."""
    arms = {label: arm["series"][name] for label, arm in summary["labels"].items() if name in arm["series"]}
    if not arms:
        return []
    colors = _colors(summary)
    unit, caption = (text.format(unit=summary["length_unit"]) for text in (unit, caption))

    def paint(axes: "Axes") -> None:
        for label, series in arms.items():
            x, (y, low, high) = _known(summary["bins"], series["value"], series["low"], series["high"])
            color, style = colors[label]
            n = len(summary["labels"][label]["runs"])
            said = f"{label} (mean of {n})" if n > 1 else label
            axes.plot(x, y, style, color=color, label=said, marker="o" if len(x) < 3 else "")
            if n > 1:
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set(xlabel="update", ylabel=unit, ylim=limits or (min(0.0, axes.get_ylim()[0]), None))

    return [_draw(name, title, caption, paint, term, legend=len(summary["labels"]) > 1)]


def _judge_figures(summary: Mapping[str, Any]) -> list[Figure]:
    found = []
    judged = [label for label, arm in summary["labels"].items() if arm["rts_histogram"]]
    for i, (label, arm) in enumerate(summary["labels"].items()):
        if label not in judged:
            continue

        def paint(axes: "Axes", histogram: Any = arm["rts_histogram"]) -> None:
            for part, name, offset, color in (
                ("first_third", "first third of the run", -0.021, SERIES[5]),
                ("last_third", "last third", 0.021, SERIES[0]),
            ):
                total = max(1, sum(histogram[part]))
                x, y = [m + offset for m in histogram["centers"]], [v / total for v in histogram[part]]
                axes.bar(x, y, 0.04, color=color, label=name)
            axes.set(xlabel="RTS", ylabel="share of judged", xlim=(-0.06, 1.06))

        title = "Place of the first wrong step" + (f": {label}" if len(judged) > 1 else "")
        caption = "Share of a wrong completion before its first wrong step."
        found.append(_draw(f"rts_{i + 1}", title, caption, paint, "rts"))
    caption = "If it grows, the policy pads with small right steps."
    title, unit = "RTS by steps minus by characters", "difference of RTS"
    return found + _overlay(summary, "rts_gap", title, unit, caption, "rts_gap", None)


def _probe_overlays(probed: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Figure]:
    labels = [run["label"] for run in probed]
    lines: list[tuple[Any, str, str, str | None]] = []  # the legend names a label once
    for i, label in enumerate(labels):
        n = labels.count(label)
        name = None if label in labels[:i] else f"{label} ({n} runs)" if n > 1 else label
        lines.append((probed[i]["sharpening"], *_colors(summary)[label], name))

    def at_k(axes: "Axes") -> None:
        axes.plot(lines[0][0]["k"], _values(lines[0][0]["pass_at_k"]["base"]), color=MUTED, label="base")
        for probe, color, style, name in lines:
            axes.plot(probe["k"], _values(probe["pass_at_k"]["policy"]), style, color=color, label=name)
        _pass_at_k_axes(axes, lines[0][0]["k"])

    def over_time(axes: "Axes") -> None:
        for probe, color, style, name in lines:
            over = probe["over_time"]
            x, estimates = _from_base(over["step"], over["pass_1"], probe["pass_at_k"]["base"][0])
            axes.plot(x, _values(estimates), style, color=color, marker="o", ms=3, label=name)
        axes.set(xlabel="update", ylabel="pass@1", ylim=(0, 1))

    caption = "On the probe's fixed prompts; update 0 is the base."
    return [
        _draw("probes_pass_at_k", "pass@k of all probed runs", "One line per run, last probe.", at_k, "pass@k"),
        _draw("probes_pass_1", "pass@1 of all probed runs", caption, over_time, "pass@k"),
    ]


def _probe_figures(run: Mapping[str, Any], key: str) -> list[Figure]:
    p = run["sharpening"]
    k_max = p["k"][-1]

    def pass_at_k(axes: "Axes") -> None:
        for name, label, color, style in (
            ("base", "base", MUTED, "-"),
            ("policy", "policy", SERIES[0], "-"),
            ("base_process", "base, every step right", MUTED, ":"),
            ("policy_process", "policy, every step right", SERIES[0], ":"),
        ):
            estimates = p["pass_at_k"][name]
            if estimates and style == "-":
                _line_with_interval(axes, p["k"], estimates, color, label=label)
            elif estimates:
                axes.plot(p["k"], _values(estimates), style, color=color, label=label)
        if p["pass_at_k"]["chance"]:
            axes.plot(p["k"], p["pass_at_k"]["chance"], "--", color=SERIES[1], lw=1.2, label="guessing")
        _pass_at_k_axes(axes, p["k"])

    def cover(axes: "Axes") -> None:
        for name, color in (("base", MUTED), ("policy", SERIES[0])):
            _line_with_interval(axes, p["cover"]["tau"], p["cover"][name], color, label=name)
        axes.set(xlabel="tau (share of a prompt's samples)", ylabel="share of prompts", ylim=(0, 1), xlim=(0, 1))

    def scatter(axes: "Axes") -> None:
        import numpy as np

        rng = np.random.default_rng(0)  # moves points apart that would lie on one another
        base, policy = (np.array(p["prompts"][name]) for name in ("base", "policy"))
        noise = rng.uniform(-0.01, 0.01, size=(2, len(base)))
        right, top = (min(1.0, 1.1 * values.max() + 0.02) for values in (base, policy))
        domains = p["prompts"]["domain"] or [""] * len(base)
        x, y = base + right * noise[0], policy + top * noise[1]
        for i, domain in enumerate(sorted(set(domains))):
            mine, color = np.array([d == domain for d in domains]), SERIES[i % len(SERIES)]
            axes.scatter(x[mine], y[mine], s=13, alpha=0.6, linewidths=0, color=color, label=domain or None)
        axes.plot([0, min(right, top)], [0, min(right, top)], color=MUTED, lw=1, ls=":", label="no change")
        slope, intercept = p["tilt_line"].slope.value, p["tilt_line"].intercept.value
        if not math.isnan(slope):
            q = np.linspace(0.001, max(0.002, min(0.999, base.max())), 200)  # no further than the data
            tilted = 1 / (1 + np.exp(-np.clip(intercept + slope * np.log(q / (1 - q)), -50, 50)))
            axes.plot(q, tilted, color=INK, lw=1.4, label=f"tilt line, slope {slope:.2f}")
        axes.set(xlabel="pass@1 of the base", ylabel="pass@1 of the policy")
        axes.set(xlim=(-0.03 * right, right + 0.03), ylim=(-0.03 * top, top + 0.03))

    def over_time(axes: "Axes") -> None:
        over = p["over_time"]
        for name, label, at, color in (("pass_1", "pass@1", 0, SERIES[0]), ("pass_k", f"pass@{k_max}", -1, SERIES[1])):
            x, estimates = _from_base(over["step"], over[name], p["pass_at_k"]["base"][at])
            _line_with_interval(axes, x, estimates, color, marker="o", ms=3, label=label)
        axes.set(xlabel="update (0: the base)", ylabel="probability", ylim=(0, 1))

    def kl(axes: "Axes") -> None:
        axes.plot(*_from_base(p["over_time"]["step"], p["over_time"]["kl"], 0.0), color=SERIES[0], marker="o", ms=3)
        bottom = min(0.0, axes.get_ylim()[0])
        axes.set(xlabel="update (0: the base)", ylabel="nats per sample", ylim=(bottom, None))

    def perplexity(axes: "Axes") -> None:
        values = p["over_time"]["base_perplexity"]
        axes.plot(p["over_time"]["step"], values, color=SERIES[0], marker="o", ms=3, label="samples of the policy")
        if not math.isnan(p["base_perplexity_of_base"]):
            axes.axhline(p["base_perplexity_of_base"], color=MUTED, lw=1.3, ls="--", label="samples of the base")
        axes.set(xlabel="update", ylabel="perplexity under the base", ylim=(1, None))

    def saturated(axes: "Axes") -> None:
        import numpy as np

        reached = 0.05
        for i, (name, part) in enumerate(p["saturation"].items()):
            shown = [b for b in part["buckets"] if b.n_prompts >= 1]
            x, gains = [b.base for b in shown], [b.gain for b in shown]
            y, (low, high) = _values(gains), _ends(gains)
            reached = max([reached, *x])
            if i == 0:
                ends = np.nan_to_num([np.subtract(y, low), np.subtract(high, y)]).clip(min=0)
                axes.errorbar(x, y, ends, color=INK, marker="o", ms=4, capsize=2, label=name, lw=1.5)
                weight = np.array([b.n_prompts for b in shown])
                tilt = _tilt_of_same_gain(np.array(x), np.array(y), weight) if shown else 0.0
            elif len(p["saturation"]) <= 7:
                axes.plot(x, y, "--", color=SERIES[(i - 1) % len(SERIES)], marker="o", ms=3, lw=1.2, label=name)
        right = min(1.0, 1.3 * reached)
        q = np.linspace(0, right, 100)
        axes.plot(q, tilt_gain(q, tilt), color=MUTED, lw=1.2, ls=":", label="pure tilt")
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set(xlabel="pass@1 of the base", ylabel="gain in pass@1", xlim=(-0.02 * right, right))

    wanted: list[tuple[bool, str, str, str, Callable[[Any], None], str, int]] = [
        (True, "pass_at_k", f"pass@k at update {p['step']}", "If the lines meet at large k: sharpened. Policy above at every k: prompts won. Policy below at large k: prompts lost.", pass_at_k, "pass@k", 2),
        (True, "over_time", "pass@1 and pass@k over the run", "Sharpening raises pass@1 to the level of pass@k.", over_time, "pass@k", 3),
        (True, "scatter", "Each prompt before and after", "One point per prompt. After a pure tilt all points lie on one curve.", scatter, "tilt_line", 2),
        (True, "cover", "Cover@tau", "How many prompts are solved reliably.", cover, "cover", 3),
        (bool(p["saturation"]), "saturation", "Gain by the base's pass@1", "Dotted: a pure tilt with the same mean gain.", saturated, "saturation", 2),
        (_any(p["over_time"]["kl"]), "kl", "KL(policy, base)", "How far the policy went from the base.", kl, "kl", 3),
        (_any(p["over_time"]["base_perplexity"]), "perplexity", "Base perplexity of policy samples", "Below the dashed line: the policy writes what the base finds likely.", perplexity, "base_perplexity", 2),
    ]  # fmt: skip
    return [
        _draw(f"{key}_{name}", title, caption, paint, term, ncols=ncols)
        for there, name, title, caption, paint, term, ncols in wanted
        if there
    ]


def _tilt_of_same_gain(base: "np.ndarray", gain: "np.ndarray", weight: "np.ndarray") -> float:
    """The strength of the tilt with the observed mean gain at these rates of the base, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        too_weak = (weight * tilt_gain(base, middle)).sum() < (weight * gain).sum()
        low, high = (middle, high) if too_weak else (low, middle)
    return low


def _from_base(steps: Sequence[int], values: Sequence[Any], base: Any) -> tuple[list[int], list[Any]]:
    """Points over the updates. The base is the first point, unless the policy was probed before its first update."""
    return (list(steps), list(values)) if steps[0] == 0 else ([0, *steps], [base, *values])


def _line_with_interval(axes: "Axes", x: Sequence[float], estimates: Sequence[Any], color: str, **style: Any) -> None:
    axes.plot(x, _values(estimates), color=color, **style)
    axes.fill_between(x, *_ends(estimates), color=color, alpha=0.18, linewidth=0)


def _values(estimates: Sequence[Any]) -> list[float]:
    return [e.value for e in estimates]


def _ends(estimates: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [e.low for e in estimates], [e.high for e in estimates]


def _any(values: Sequence[float]) -> bool:
    return any(not math.isnan(v) for v in values)


def _known(x: Sequence[float], *columns: Sequence[float]) -> tuple[list[float], list[list[float]]]:
    """Without the bins that have no value."""
    rows = [row for row in zip(x, *columns, strict=True) if not any(math.isnan(v) for v in row)]
    return [row[0] for row in rows], [[row[i + 1] for row in rows] for i in range(len(columns))]


def _pass_at_k_axes(axes: "Axes", ks: Sequence[int]) -> None:
    if len(ks) > 1:
        axes.set_xscale("log", base=2)
    shown = list(ks) if len(ks) <= 8 else [*ks[:-1:2], ks[-1]]
    axes.set_xticks(shown, [str(k) for k in shown])
    axes.minorticks_off()
    axes.set(xlabel="k (samples)", ylabel="pass@k", ylim=(0, 1))
