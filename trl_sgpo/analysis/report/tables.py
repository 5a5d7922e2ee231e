"""The tables of a summary, as text: the page and the terminal show the same ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_sgpo.analysis.metrics import Estimate


@dataclass(frozen=True)
class Table:
    """
    A table as text.

    Args:
        title (`str`):
            What it shows.
        header (`list[str]`), rows (`list[list[str]]`):
            The first column is the name of a row.
        note (`str`, *optional*):
            What to know about its cells.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


_COMPARED = (
    ("accuracy", "accuracy"),
    ("teaching", "groups that teach"),
    ("solved", "· solved"),
    ("mixed", "· mixed"),
    ("failed", "· failed, of these"),
    ("rescued", "·· rescued"),
    ("other_rewards", "·· other rewards"),
    ("tied", "·· tied"),
    ("abstained", "·· judge silent"),
    ("unjudged", "·· not judged"),
    ("pass@", "pass@{k}"),
    ("effective_tokens", "effective {unit}"),
    ("answer_entropy", "answer entropy (nats)"),
    ("distinct_answers", "distinct answers"),
    ("rts", "RTS of judged"),
    ("rts_gap", "RTS gap"),
    ("reward", "reward"),
    ("entropy", "policy entropy (nats)"),
    ("grad_norm", "grad_norm"),
    ("length", "length (tokens)"),
    ("clipped", "cut off"),
)


def number(value: float | None, sign: str = "") -> str:
    """A number for a table; a dash for NaN."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:{sign},.0f}"
    if abs(value) >= 10:
        return f"{value:{sign}.1f}"
    return f"{value:{sign}.{3 if abs(value) >= 0.0005 else 4}f}" if abs(value) >= 0.00005 else f"{value:{sign}.0e}"


def with_interval(e: Estimate, sign: str = "") -> str:
    """`value [low, high]`, without the brackets if there is no interval or if it has no width."""
    if math.isnan(e.low) or e.low == e.high:
        return number(e.value, sign)
    return f"{number(e.value, sign)} [{number(e.low, sign)}, {number(e.high, sign)}]"


def comparison(summary: Mapping[str, Any]) -> Table | None:
    """The methods side by side: first fifth of the run, and last fifth with interval or range."""
    labels = summary["labels"]
    by_name = {run["name"]: run for run in summary["runs"]}
    names = list(dict.fromkeys(name for arm in labels.values() for name in arm["numbers"]))
    rows = []
    for key, title in _COMPARED:
        for name in (
            sorted((n for n in names if n.startswith("pass@")), key=lambda n: int(n[5:])) if key == "pass@" else [key]
        ):
            if name not in names or (name == "pass@1" and "accuracy" in names):
                continue
            if name in ("rescued", "other_rewards", "tied", "abstained") and not any(
                arm["numbers"].get(name, {}).get(when, Estimate(0, 0, 0)).value > 0
                for arm in labels.values()
                for when in ("start", "end")
            ):
                continue
            cells = []
            for arm in labels.values():
                if name not in arm["numbers"]:
                    cells.append("–")
                    continue
                start, end = arm["numbers"][name]["start"], arm["numbers"][name]["end"]
                if len(arm["runs"]) == 1:
                    end = by_name[arm["runs"][0]]["numbers"][name]["end"]
                cells.append(f"{number(start.value)} → {with_interval(end)}")
            rows.append([title.format(k=name[5:], unit=summary["length_unit"]), *cells])
    if not rows:
        return None
    several = any(len(arm["runs"]) > 1 for arm in labels.values())
    header = [
        "",
        *(f"{label} (mean of {len(arm['runs'])})" if len(arm["runs"]) > 1 else label for label, arm in labels.items()),
    ]
    note = "First → last fifth of the run. In brackets: " + (
        "smallest and largest run if several are averaged, else the 95 % interval over groups."
        if several
        else "95 % interval over groups (over log entries for numbers that come from the log)."
    )
    return Table("Side by side" if len(labels) > 1 else "The run in numbers", header, rows, note)


def run_list(summary: Mapping[str, Any]) -> Table:
    """What was read of each run."""
    rows = [
        [
            run["name"],
            run["label"],
            f"{run['first_step']}–{run['last_step']}",
            str(run["n_log_entries"]),
            str(run["n_completions_files"]),
            str(run["n_groups"]),
            str(run["group_size"] or "–"),
            run["outcome"] or "–",
            run["path"],
        ]
        for run in summary["runs"]
    ]
    header = ["run", "label", "updates", "log entries", "completions files", "groups", "G", "outcome", "folder"]
    return Table("What was read", header, rows)


def group_shares(summary: Mapping[str, Any]) -> Table | None:
    """What became of the groups, over time, for each run."""
    kinds = (
        ("teaching", "teach"),
        ("mixed", "mixed"),
        ("rescued", "rescued"),
        ("other_rewards", "other rewards"),
        ("solved", "solved"),
        ("tied", "tied"),
        ("abstained", "judge silent"),
        ("unjudged", "not judged"),
    )
    rows = []
    for run in summary["runs"]:
        numbers = run["numbers"]
        if "teaching" not in numbers:
            continue
        for when, title in (("start", "first fifth"), ("end", "last fifth"), ("all", "whole run")):
            values = [numbers[kind][when] if kind in numbers else math.nan for kind, _ in kinds]
            values = [v.value if isinstance(v, Estimate) else v for v in values]
            rows.append([f"{run['name']}, {title}", *(_percent(v) for v in values)])
    if not rows:
        return None
    note = (
        "Per cent of the logged groups. Groups that are solved, tied, not judged or with a silent judge teach nothing."
    )
    return Table("Which groups teach, and why others do not", ["", *(title for _, title in kinds)], rows, note)


def judge_cost(summary: Mapping[str, Any]) -> Table | None:
    """What the judge cost, for each run that logged it."""
    rows = [
        [
            run["name"],
            f"{run['judge']['calls']:,.0f}",
            number(run["judge"]["seconds"]),
            _percent(run["judge"]["share_of_step_time"], " %"),
            number(1000 * run["judge"]["seconds_per_call"]),
            _percent(run["judge"]["abstain_rate"], " %"),
            _percent(run["judge"]["no_error_rate"], " %"),
        ]
        for run in summary["runs"]
        if run["judge"]
    ]
    header = ["", "completions judged", "seconds", "of step time", "ms per completion", "abstained", "no error"]
    return Table("The judge's cost", header, rows) if rows else None


def probe_numbers(run: Mapping[str, Any]) -> list[Table]:
    """The tables of one run's probes."""
    p = run["sharpening"]
    s, k_max, at = p["support"], p["k"][-1], p["pass_at_k"]
    settings = ", ".join(
        f"{key} {value}"
        for key, value in p["settings"].items()
        if isinstance(value, str | int | float) and "hash" not in key
    )
    sides = [
        [f"pass@{k}", with_interval(at["base"][i]), with_interval(at["policy"][i])]
        + ([number(at["chance"][i])] if at["chance"] else [])
        for i, k in enumerate(p["k"])
    ]
    if at["policy_process"]:
        for i in sorted({0, len(p["k"]) - 1}):
            sides.append(
                [
                    f"process-verified pass@{p['k'][i]}",
                    with_interval(at["base_process"][i]),
                    with_interval(at["policy_process"][i]),
                ]
                + (["–"] if at["chance"] else [])
            )
    for tau in (0.1, 0.5, 0.9):
        i = p["cover"]["tau"].index(tau)
        sides.append(
            [f"Cover@{tau}", with_interval(p["cover"]["base"][i]), with_interval(p["cover"]["policy"][i])]
            + (["–"] if at["chance"] else [])
        )
    n = p["n_prompts"]
    support = Table(
        "Which prompts are solved",
        ["", "solved by the policy", "not solved by the policy"],
        [
            [
                "solved by the base",
                f"{s.preserved} preserved",
                f"{s.shrunk} lost (chance {s.shrunk_null:.1f}, p {_p(s.p_shrunk)})",
            ],
            [
                "not solved by the base",
                f"{s.expanded} won (chance {s.expanded_null:.1f}, p {_p(s.p_expanded)})",
                f"{s.out_of_reach} out of reach",
            ],
        ],
        f"Of {n} prompts, in {p['base_samples']} samples of the base and {p['policy_samples']} of the policy. Chance: base "
        f"against base, with the same pass@1. If the base never solved a prompt, its pass rate there may still be up to "
        f"{number(s.unseen_rate)} (95 %). Retained {with_interval(s.srr)}, discovered {with_interval(s.ndr)}, net change "
        f"{with_interval(s.nscr, '+')}.",
    )
    others = [
        ["tilt line, slope", with_interval(p["tilt_line"].slope)],
        ["tilt line, intercept (beta)", with_interval(p["tilt_line"].intercept)],
    ]
    if p["tilt_fit"]:
        fit = p["tilt_fit"]
        others += [
            ["tilt strength beta from log-probabilities", with_interval(fit.beta)],
            ["· unexplained spread, correct / incorrect", f"{number(fit.sd_correct)} / {number(fit.sd_incorrect)}"],
        ]
    rates = sorted(p["base_rates_of_expanded"])
    if rates:
        others.append(
            ["base's rate on won prompts (median, smallest)", f"{number(rates[len(rates) // 2])}, {number(rates[0])}"]
        )
    others += [
        [f"sampling-efficiency gap, pass@{k_max} of the base - pass@1", with_interval(p["efficiency_gap"], "+")],
        ["rank of the base's correct samples", with_interval(p["rank_under_base"])],
        ["rank of the policy's correct samples", with_interval(p["rank_under_policy"])],
        ["KL(policy, base), nats per sample", number(p["over_time"]["kl"][-1])],
        [
            "base perplexity of base's / policy's samples",
            f"{number(p['base_perplexity_of_base'])} / {number(p['over_time']['base_perplexity'][-1])}",
        ],
    ]
    tables = [
        Table(
            "Base and policy",
            ["", "base", f"policy, update {p['step']}", *(["guessing"] if at["chance"] else [])],
            sides,
            f"{n} prompts; {settings}." if settings else f"{n} prompts.",
        ),
        support,
        Table("Tilt, distance and rank", ["", "value"], [row for row in others if row[1] not in ("–", "– / –")]),
    ]
    if p["saturation"]:
        buckets = next(iter(p["saturation"].values()))["buckets"]
        header = ["", "all", *(f"{b.low:g}–{b.high:g}" for b in buckets)]
        rows = [
            [
                f"{name} ({part['n_prompts']})",
                with_interval(part["gain"], "+"),
                *(
                    f"{with_interval(b.gain, '+')} ({b.n_prompts:.0f})" if b.n_prompts >= 0.5 else "–"
                    for b in part["buckets"]
                ),
            ]
            for name, part in p["saturation"].items()
        ]
        tables.append(
            Table("Gain in pass@1, by the base's pass@1", header, rows, "In round brackets: prompts in the bucket.")
        )
    return tables


def _percent(share: float, unit: str = "") -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{1 if 0 < share < 0.1 else 0}f}{unit}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
