"""
When does SGPO learn faster than GRPO, and when does prefix credit? The tables and the plots of docs/evidence/theory.md, from exact
population gradients. One core, no GPU.

    python -m benchmarks.dynamics.run
"""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from benchmarks.common import commit, write_results
from benchmarks.dynamics.learning import (
    adam_step,
    adam_step_per_logit,
    learn,
    mean_until,
    noise_limited_step,
    sgd_step,
    simulate,
    updates_until,
)
from benchmarks.dynamics.world import (
    ARMS,
    JUDGED,
    Moments,
    false_credit,
    moments,
    noise_behind,
    one_skill,
    prepare,
    start_probability,
    two_step_accuracy,
)


HERE = Path(__file__).parent
PLOTS = HERE.parent.parent / "docs" / "evidence" / "theory"
N_STEPS, GROUP_SIZE = 5, 8
SHARES = (0.05, 0.20, 0.75, 0.95, 0.99)
SWEEP = (0.02, 0.05, 0.10, 0.20, 0.35, 0.50, 0.65, 0.75, 0.85, 0.90, 0.95, 0.98, 0.99, 0.995)
LUCK = 1 / 216
COEFFICIENTS = ((0.3, 1.0), (1.0, 1.0), (1.0, 0.5), (1.0, 0.0))
# The colour-blind can tell them apart too
STYLE = {
    "grpo": ("GRPO", "#000000", "-"),
    "grpo_live": ("GRPO, live groups only", "#999999", "--"),
    "sgpo": ("SGPO", "#D55E00", "-"),
    "sgpo_all_incorrect": ("SGPO, all incorrect", "#E69F00", "--"),
    "prefix": ("prefix credit", "#0072B2", "-"),
    "prefix_all_incorrect": ("prefix credit, all incorrect", "#56B4E9", "--"),
    "sign": ("-1 for failed groups", "#CC79A7", ":"),
    "ngrpo": ("NGRPO", "#009E73", ":"),
}


# What is computed for which optimizers: the area and the plots; group sizes; luck
SWEPT = ("sgd", "noisy", "noisy_one_skill")
NOISY = ("noisy", "noisy_one_skill")
LUCKY = ("sgd", "adam_8", *NOISY)
# Arm, groups per update, whether all steps are one skill
SIMULATED = tuple((arm, n, shared) for shared in (False, True) for n in (1, 8) for arm in ("grpo", "sgpo", "prefix"))


class Rule(NamedTuple):
    """How a gradient becomes a step, with a learning rate that is small enough for curves to be smooth."""

    title: str
    step: Callable[[Moments], np.ndarray]
    learning_rate: float
    n_groups: int | None
    shared: bool


RULES = {
    "sgd": Rule("gradient ascent", sgd_step, 1.0, None, False),
    "adam_8": Rule("Adam, 8 groups, little other noise", adam_step, 0.1, 8, False),
    "adam_8_per_logit": Rule("Adam, a scale per logit", adam_step_per_logit, 0.05, 8, False),
    "noisy": Rule("Adam in noise, a skill per step", noise_limited_step, 0.2, 1, False),
    "noisy_one_skill": Rule("Adam in noise, one skill", noise_limited_step, 0.05, 1, True),
}


def curve(arm: str, share: float, rule: str, until: float = 0.5, luck: float = 0.0, **settings: Any) -> np.ndarray:
    """The accuracy over updates, from a base model with this share of failed groups of eight."""
    start = np.full(N_STEPS, start_probability(share, N_STEPS, GROUP_SIZE, luck))
    _, step, learning_rate, n_groups, shared = RULES[rule]
    if "group_size" in settings and n_groups:
        # 64 completions per update, whatever the size of the groups
        n_groups, learning_rate = 64 // settings["group_size"], learning_rate / 8**0.5
    return learn(prepare(arm, luck=luck, **settings), start, n_groups, step, learning_rate, until, shared=shared)


def time_to_half(arm: str, share: float, rule: str, **settings: Any) -> float:
    return updates_until(curve(arm, share, rule, **settings), 0.5)


def settings_of(arm: str) -> list[dict[str, Any]]:
    """The exact judge, judges that are wrong at random, and judges that err to one side."""
    if arm not in JUDGED:
        return [{}]
    noises = [{"noise": noise} for noise in (0.0, 0.2, 0.4)]
    return noises + [{"noise": 0.4, "noise_kind": kind} for kind in ("earlier", "later")]


def name_of(arm: str, settings: dict[str, Any]) -> str:
    return f"{arm} {settings['noise']} {settings.get('noise_kind', 'uniform')}" if settings.get("noise") else arm


def theorem() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for start in (0.5, 0.1, 0.02):
        solved = {arm: two_step_accuracy(start, arm, 2000) > 0.9 for arm in ("sgpo", "grpo")}
        found[str(start)] = {arm: int(np.argmax(above)) for arm, above in solved.items()}
    return found


def coefficients(share: float, rule: str) -> dict[str, float]:
    """Prefix credit's updates until 0.5 over GRPO's, by its two coefficients."""
    base = time_to_half("grpo", share, rule)
    return {
        f"+{reward} / -{penalty}": time_to_half("prefix", share, rule, prefix_reward=reward, error_penalty=penalty)
        / base
        for reward, penalty in COEFFICIENTS
    }


def gradient(arm: str, share: float, **settings: Any) -> dict[str, Any]:
    """Signal and noise of one group at the start."""
    start = np.full(N_STEPS, start_probability(share, N_STEPS, GROUP_SIZE))
    prepared = prepare(arm, **settings)
    group = moments(prepared, start)
    found = {
        "signal": group.signal,
        "noise": group.noise,
        "snr": group.snr,
        "groups_for_snr_1": 1 / group.snr**2,
        "snr_one_skill": one_skill(group).snr,
        "noise_behind_error": noise_behind(group),
        "live_groups": group.live,
        "by_step": group.mean_K[:N_STEPS].tolist(),
    }
    if arm.startswith("sgpo"):
        found["false_credit"] = false_credit(prepared, start)
    return found


def ratios(share: float, rule: str, bar: tqdm) -> dict[str, Any]:
    """Updates until half of the solutions are right, and their ratio to GRPO's."""
    found: dict[str, Any] = {}
    base = time_to_half("grpo", share, rule)
    for arm in ARMS:
        for settings in settings_of(arm):
            updates = time_to_half(arm, share, rule, **settings)
            found[name_of(arm, settings)] = {"updates": updates, "ratio": updates / base}
            bar.update()
    return found


def areas(share: float, rule: str) -> dict[str, float]:
    """Mean accuracy until GRPO is at 0.9, over GRPO's."""
    curves = {arm: curve(arm, share, rule, until=0.995) for arm in ARMS}
    horizon = updates_until(curves["grpo"], 0.9)
    base = mean_until(curves["grpo"], horizon)
    return {arm: mean_until(values, horizon) / base for arm, values in curves.items()}


def lucky(share: float, rule: str) -> dict[str, dict[str, float]]:
    """Updates until 0.5, and their ratio to GRPO's, if some wrong solutions pass."""
    updates = {arm: time_to_half(arm, share, rule, luck=LUCK) for arm in ARMS}
    return {arm: {"updates": found, "ratio": found / updates["grpo"]} for arm, found in updates.items()}


def group_sizes(share: float, rule: str) -> dict[str, dict[str, float]]:
    """Updates of 64 completions until 0.5, over those of GRPO with groups of eight, from the same base model."""
    base = time_to_half("grpo", share, rule, group_size=8)
    return {
        str(size): {arm: time_to_half(arm, share, rule, group_size=size) / base for arm in ("grpo", "sgpo", "prefix")}
        for size in (4, 8, 16)
    }


def simulation(arm: str, share: float, n_groups: int, shared: bool) -> dict[str, float]:
    """Sampled Adam against the mean step: updates until 0.5."""
    start, rate = np.full(N_STEPS, start_probability(share, N_STEPS, GROUP_SIZE)), 0.05
    expected = updates_until(learn(prepare(arm), start, n_groups, adam_step, rate, 0.5, shared=shared), 0.5)
    runs = simulate(prepare(arm), start, n_groups, int(2.5 * expected), rate, n_runs=16, shared=shared)
    found = [updates_until(run, 0.5) for run in runs]
    reached = [updates for updates in found if np.isfinite(updates)]
    median = float(np.median(np.nan_to_num(found, nan=np.inf)))
    return {"expected": expected, "median": median, "reached": len(reached), "runs": len(runs)}


def figure(n_columns: int, height: float = 3.8) -> tuple[Figure, Any]:
    made = Figure(figsize=(5.2 * n_columns, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, n_columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return made, axes


def plot_theorem(path: Path) -> None:
    made, axes = figure(1)
    ax = axes[0]
    for start, width in ((0.5, 2.6), (0.1, 1.8), (0.02, 1.1)):
        for arm in ("sgpo", "grpo"):
            label, colour, _ = STYLE[arm]
            values = two_step_accuracy(start, arm, 2000)
            ax.plot(np.arange(1, 2001), values, color=colour, linewidth=width, label=f"{label}, p = q = {start:g}")
    ax.axhline(0.9, color="grey", linewidth=0.8)
    ax.set(xscale="log", xlabel="iterations", ylabel="P(solved) = p q", xlim=(1, 2000), ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    made.savefig(path, dpi=130)


def plot_sweep(path: Path, sweep: dict[str, dict[str, list[float]]]) -> None:
    made, axes = figure(len(sweep))
    logit = np.log(np.array(SWEEP) / (1 - np.array(SWEEP)))
    ticks = np.array([0.05, 0.2, 0.5, 0.75, 0.95, 0.99])
    for ax, (rule, by_arm) in zip(axes, sweep.items(), strict=True):
        for arm, values in by_arm.items():
            label, colour, line = STYLE[arm]
            ax.plot(logit, values, color=colour, linestyle=line, linewidth=1.8, label=label)
        ax.set(title=RULES[rule].title, yscale="log", ylim=(0.08, 3), xlabel="failed groups at the start")
        ax.set_xticks(np.log(ticks / (1 - ticks)), [f"{100 * x:g}%" for x in ticks])
        ax.set_yticks([0.1, 0.2, 0.5, 1, 2], ["1/10", "1/5", "1/2", "1", "2"])
        ax.minorticks_off()
    axes[0].set_ylabel("updates until half are right,\nas a multiple of GRPO's")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    made.savefig(path, dpi=130)


def plot_gradient(path: Path, share: float) -> None:
    made, (left, right) = figure(2)
    steps = np.arange(1, N_STEPS + 1)
    for arm in ("grpo", "sgpo", "sgpo_all_incorrect", "prefix", "sign"):
        label, colour, line = STYLE[arm]
        by_step = gradient(arm, share)["by_step"]
        left.plot(steps, by_step, color=colour, linestyle=line, marker="o", markersize=4, label=label)
    left.set(yscale="log", xlabel="step", ylabel="population gradient of the step's logit", xticks=steps)
    left.set_title(f"where the signal goes, {100 * share:g} % failed groups")
    left.legend(frameon=False, fontsize=8, loc="lower left")

    noises = np.linspace(0, 1, 21)
    for arm in ("prefix", "sgpo"):
        label, colour, _ = STYLE[arm]
        for kind, line in (("uniform", "-"), ("earlier", "--"), ("later", ":")):
            snr = [gradient(arm, share, noise=noise, noise_kind=kind)["snr"] for noise in noises]
            right.plot(noises, snr, color=colour, linestyle=line, label=f"{label}, {kind}")
    right.axhline(gradient("grpo", share)["snr"], color="black", linewidth=1.2, label="GRPO")
    right.set(yscale="log", xlabel="share of verdicts that are replaced", ylabel="signal to noise of one group")
    right.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    right.minorticks_off()
    right.set_ylim(0.04, 4)
    right.set_title(f"what a noisy judge leaves of it, {100 * share:g} % failed groups")
    right.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    made.savefig(path, dpi=130)


def rounded(value: Any) -> Any:
    """Four significant digits: a results file that can be read."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PLOTS.mkdir(exist_ok=True)
    arms = [(arm, settings) for arm in ARMS for settings in settings_of(arm)]
    results: dict[str, Any] = {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
        },
        "steps": N_STEPS,
        "group_size": GROUP_SIZE,
        "theorem": theorem(),
        "start": {
            str(share): {"p": (p := start_probability(share, N_STEPS, GROUP_SIZE)), "accuracy": p**N_STEPS}
            for share in SHARES
        },
        "gradient": {
            str(share): {name_of(arm, settings): gradient(arm, share, **settings) for arm, settings in arms}
            for share in SHARES
        },
    }
    with tqdm(total=len(RULES) * len(SHARES) * len(arms), desc="updates until 0.5") as bar:
        results["updates"] = {rule: {str(share): ratios(share, rule, bar) for share in SHARES} for rule in RULES}
    results["area"] = {rule: {str(share): areas(share, rule) for share in SHARES} for rule in tqdm(SWEPT, desc="area")}
    results["group_sizes"] = {
        rule: {str(share): group_sizes(share, rule) for share in (0.75, 0.95)}
        for rule in tqdm(NOISY, desc="group sizes")
    }
    results["coefficients"] = {
        rule: {str(share): coefficients(share, rule) for share in SHARES} for rule in tqdm(SWEPT, desc="coefficients")
    }
    results["luck"] = {
        rule: {str(share): lucky(share, rule) for share in (0.75, 0.90, 0.95)} for rule in tqdm(LUCKY, desc="luck")
    }
    results["simulated_adam"] = {
        f"{arm}, {n} groups, {'one skill' if shared else 'a skill per step'}": simulation(arm, 0.95, n, shared)
        for arm, n, shared in tqdm(SIMULATED, desc="simulated Adam")
    }
    sweep: dict[str, dict[str, list[float]]] = {}
    for rule in tqdm(SWEPT, desc="plots"):
        base = [time_to_half("grpo", share, rule) for share in SWEEP]
        sweep[rule] = {
            arm: [time_to_half(arm, share, rule) / b for share, b in zip(SWEEP, base, strict=True)] for arm in ARMS
        }
    write_results(HERE / "results.json", rounded(results))
    plot_theorem(PLOTS / "theorem.png")
    plot_sweep(PLOTS / "sweep.png", sweep)
    plot_gradient(PLOTS / "gradient.png", share=0.95)
    print(f"Wrote {HERE / 'results.json'} and the plots in {PLOTS}.")


if __name__ == "__main__":
    main()
