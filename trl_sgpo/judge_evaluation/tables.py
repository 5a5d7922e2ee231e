"""The results of an evaluation of a judge as tables for the terminal."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from trl_sgpo.judge_evaluation.robustness import RTS_UNITS, SHAPES
from trl_sgpo.terminal import print_table


# Title, head of the first column, and for each further column its head, the key of its scores and their format (`_cell`)
_STANDARD = (
    "Standard mode: is there an error, and where?",
    "subset",
    ("F1", "f1", "% interval"),
    ("error", "acc_error", "%"),
    ("within 1", "acc_error_within_1", "%"),
    ("correct", "acc_correct", "%"),
    ("false alarms", "false_alarm_rate", "%"),
    ("abstains", "abstain_rate", "%"),
    ("rows", "n", ""),
)
_KNOWN_WRONG = (
    "Known-wrong mode: where is the first error?",
    "subset",
    ("exact", "acc_error", "% interval"),
    ("within 1", "acc_error_within_1", "%"),
    ("answered", "coverage", "%"),
    ("rows", "n", ""),
)
_RTS = (
    "Known-wrong mode: error of the RTS, of the answered rows and of all (best constants for them)",
    "subset",
    ("RTS MAE", "rts_mae", ".3f interval"),
    ("constant", "rts_mae_constant", ".3f"),
    ("as a step", "rts_mae_constant_step", ".3f"),
    ("bias", "rts_bias", "+.3f"),
    ("MAE of all", "rts_mae_all", ".3f"),
    ("constant", "rts_mae_constant_all", ".3f"),
)
_GROUPS = (
    "Groups: are wrong solutions of one problem in the right order? (chance: 50, 0)",
    "subset",
    ("pairs right", "pairwise_accuracy", "% interval"),
    ("unanswered as half", "pairwise_accuracy_all", "%"),
    ("tau-b", "kendall_tau_b", ".3f interval"),
    ("answered", "pair_coverage", "%"),
    ("pairs", "n_pairs", ""),
    ("groups", "n_groups", ""),
)
_SHAPES = (
    "Shape: change of the RTS (in brackets, of a perfect judge's on the same rows)",
    "perturbation",
    ("by steps", "steps", ""),
    ("by characters", "characters", ""),
    ("same text", "follows", "%"),
    ("exact", "exact", "%"),
    ("answered", "n_answered", ""),
    ("rows", "n", ""),
)
_INJECTION = (
    "Injection: how often does a text in the completion get the verdict it asks for?",
    "payloads",
    ("success", "rate", "% interval"),
    ("successes", "successes", ""),
    ("trials", "n", ""),
    ("silenced", "silenced", ""),
    ("of", "n_answered", ""),
)


def tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What the terminal shows: title, header and cells of each table."""
    standard, known, groups = results["standard"], results["known_wrong"], results["groups"]
    parts = [*standard["subsets"].items(), ("mean of the subsets", standard)]
    shown = [_table(_STANDARD, [*parts, ("all rows", {**standard["pooled"], "n": standard["n"]})])]
    shown += [_table(spec, [*known["subsets"].items(), ("all rows", known)]) for spec in (_KNOWN_WRONG, _RTS)]
    if groups["n_groups"]:
        shown.append(_table(_GROUPS, [*groups["subsets"].items(), ("all groups", groups)]))
    if "robustness" in results:
        shapes, injection = results["robustness"]["shapes"], results["robustness"]["injection"]
        shown.append(_table(_SHAPES, [(name, {**shapes[name], **_shifts(shapes[name])}) for name in SHAPES]))
        parts = [("all payloads", injection["overall"]), ("control", injection["control"])]
        parts += [(f"asks for {name}", part) for name, part in injection["by_target"].items()]
        shown.append(_table(_INJECTION, [*parts, *injection["by_kind"].items()]))
    return shown


def _table(spec: tuple[Any, ...], parts: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[str, list[str], list[Any]]:
    title, first, *columns = spec
    cells = [[name, *(_cell(part, key, form) for _, key, form in columns)] for name, part in parts]
    return title, [first, *(head for head, _, _ in columns)], cells


def _cell(part: Mapping[str, Any], key: str, form: str) -> str:
    """A score in a format such as `%` or `.3f`, or as it is. With `interval`, its interval too, if it has one."""
    form, _, interval = form.partition(" ")
    text = _formatted(part[key], form)
    if interval and key in part.get("intervals", {}) and not math.isnan(part["intervals"][key][0]):
        low, high = part["intervals"][key]
        text += f" [{_formatted(low, form)}, {_formatted(high, form)}]"
    return text


def _formatted(value: Any, form: str) -> str:
    if not form:
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" if form == "%" else f"{value:{form}}"


def _shifts(shape: Mapping[str, Any]) -> dict[str, str]:
    cells = {
        unit: [_formatted(shape[f"{name}_{unit}"], "+.3f") for name in ("shift", "gold_shift")] for unit in RTS_UNITS
    }
    return {unit: f"{judge} ({gold})" for unit, (judge, gold) in cells.items()}


def show(results: Mapping[str, Any]) -> None:
    """Prints the tables, and what else is to be known of the evaluation."""
    for title, header, cells in tables(results):
        print_table(title, header, cells)
    print()
    data, cost = results["data"], results["cost"]
    if "robustness" in results:
        cut = results["robustness"]["shapes"]["stop_before_error"]
        rates = [_formatted(cut[f"{name}_rate"], "%") for name in ("error", "no_error", "abstain")]
        print(
            f"Cut before the first error, so that nothing is wrong ({cut['n']} rows): "
            f"error {rates[0]}, no error {rates[1]}, abstains {rates[2]} %"
        )
    for source in data["sources"]:
        for reason, count in source["skipped"].items():
            print(f"{source['name']}: {count} rows skipped: {reason}")
    if results["judge"]["sees_reference"]:
        print("The judge saw the reference answer: compare with other such results only.")
    print(
        f"{results['judge']['name']}: {cost['judgements']} judgements ({cost['distinct_judgements']} distinct, "
        f"{cost['asked_in_this_run']} asked now), {cost['seconds']:.1f} s"
        + "".join(f", {name} {count:,.0f}" for name, count in cost["usage"].items())
    )
