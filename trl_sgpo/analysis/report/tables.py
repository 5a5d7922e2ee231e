"""The tables of a summary, as text: the page and the terminal show the same ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_sgpo.analysis.metrics import Estimate


@dataclass(frozen=True)
class Table:
    """A table as text. The first column is the name of a row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""  # what to know about its cells


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
        shown = [key] if key in names else []
        if key == "pass@":
            shown = sorted((n for n in names if n.startswith("pass@")), key=lambda n: int(n[5:]))
        for name in shown:
            ends = [arm["numbers"].get(name) for arm in labels.values()]
            if name == "pass@1" and "accuracy" in names:
                continue
            if name in ("rescued", "other_rewards", "tied", "abstained") and not any(
                end["start"].value > 0 or end["end"].value > 0 for end in ends if end
            ):
                continue
            cells = []
            for arm, end in zip(labels.values(), ends, strict=True):
                # The interval of one run, the range of several
                source = by_name[arm["runs"][0]]["numbers"].get(name) if len(arm["runs"]) == 1 else end
                cells.append(f"{number(end['start'].value)} → {with_interval(source['end'])}" if end else "–")
            rows.append([title.format(k=name[5:], unit=summary["length_unit"]), *cells])
    if not rows:
        return None
    sizes = {label: len(arm["runs"]) for label, arm in labels.items()}
    several = any(n > 1 for n in sizes.values())
    header = ["", *(f"{label} (mean of {n})" if n > 1 else label for label, n in sizes.items())]
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
            name,
            f"{cost['calls']:,.0f}",
            number(cost["seconds"]),
            _percent(cost["share_of_step_time"], " %"),
            number(1000 * cost["seconds_per_call"]),
            _percent(cost["abstain_rate"], " %"),
            _percent(cost["no_error_rate"], " %"),
        ]
        for name, cost in ((run["name"], run["judge"]) for run in summary["runs"])
        if cost
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

    def side(name: str, base: Estimate, policy: Estimate, chance: float = math.nan) -> list[str]:
        return [name, with_interval(base), with_interval(policy), *([number(chance)] if at["chance"] else [])]

    guesses = at["chance"] or [math.nan] * len(p["k"])
    sides = [side(f"pass@{k}", at["base"][i], at["policy"][i], guesses[i]) for i, k in enumerate(p["k"])]
    for i in sorted({0, len(p["k"]) - 1}) if at["policy_process"] else []:
        name = f"process-verified pass@{p['k'][i]}"
        sides.append(side(name, at["base_process"][i], at["policy_process"][i]))
    for tau in (0.1, 0.5, 0.9):
        i = p["cover"]["tau"].index(tau)
        sides.append(side(f"Cover@{tau}", p["cover"]["base"][i], p["cover"]["policy"][i]))
    n = p["n_prompts"]
    lost = f"{s.shrunk} lost (chance {s.shrunk_null:.1f}, p {_p(s.p_shrunk)})"
    won = f"{s.expanded} won (chance {s.expanded_null:.1f}, p {_p(s.p_expanded)})"
    support = Table(
        "Which prompts are solved",
        ["", "solved by the policy", "not solved by the policy"],
        [
            ["solved by the base", f"{s.preserved} preserved", lost],
            ["not solved by the base", won, f"{s.out_of_reach} out of reach"],
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
        typical = f"{number(rates[len(rates) // 2])}, {number(rates[0])}"
        others.append(["base's rate on won prompts (median, smallest)", typical])
    perplexities = f"{number(p['base_perplexity_of_base'])} / {number(p['over_time']['base_perplexity'][-1])}"
    others += [
        [f"sampling-efficiency gap, pass@{k_max} of the base - pass@1", with_interval(p["efficiency_gap"], "+")],
        ["rank of the base's correct samples", with_interval(p["rank_under_base"])],
        ["rank of the policy's correct samples", with_interval(p["rank_under_policy"])],
        ["KL(policy, base), nats per sample", number(p["over_time"]["kl"][-1])],
        ["base perplexity of base's / policy's samples", perplexities],
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
    rows: list[list[str]] = []
    header: list[str] = []
    for name, part in p["saturation"].items():
        cells = [
            f"{with_interval(b.gain, '+')} ({b.n_prompts:.0f})" if b.n_prompts >= 0.5 else "–" for b in part["buckets"]
        ]
        rows.append([f"{name} ({part['n_prompts']})", with_interval(part["gain"], "+"), *cells])
        header = ["", "all", *(f"{b.low:g}–{b.high:g}" for b in part["buckets"])]
    if rows:
        title, note = "Gain in pass@1, by the base's pass@1", "In round brackets: prompts in the bucket."
        tables.append(Table(title, header, rows, note))
    return tables


def _percent(share: float, unit: str = "") -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{1 if 0 < share < 0.1 else 0}f}{unit}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
