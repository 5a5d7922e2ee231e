"""The results of an evaluation as tables, for the terminal and for a model card."""

from collections.abc import Mapping
from typing import Any

from trl_sgpo.terminal import fitted, print_table


Table = tuple[str, list[str], list[list[str]], str]

_INTERVAL = "[]: 95 % bootstrap interval over the problems."
_TEST = " p: sign-flip test over the problems, two-sided, not corrected for the number of comparisons."


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Title, header, cells and note of each table: one of all benchmarks if there are several, then one of each."""
    benchmarks, models = results["benchmarks"], list(results["models"])
    shown: list[Table] = []
    if len(benchmarks) > 1:
        shown.append(overview(results))
    for one in benchmarks.values():
        numbers = one["models"]
        first = next(iter(numbers.values()))
        greedy = one["kind"] == "greedy"
        title = f"{one['set']}, {'greedy pass@1' if greedy else one['kind']}, {first['problems']} problems"
        header = ["model", "accuracy %", *(["against " + models[0], "p"] if len(models) > 1 else [])]
        header += ["no answer %", "cut off %", "tokens"]
        cells = [_row(name, own, len(models) > 1) for name, own in numbers.items()]
        shown.append((title, header, cells, ""))
        ks = [k for k in first["pass_at_k"] if int(k) > 1]
        if ks:
            rows = [[name, *(_with_interval(own["pass_at_k"][k]) for k in ks)] for name, own in numbers.items()]
            shown.append((f"{one['set']}, pass@k %", ["model", *(f"k = {k}" for k in ks)], rows, ""))
    last = shown.pop()
    return [*shown, (*last[:3], _INTERVAL + (_TEST if len(models) > 1 else ""))]


def overview(results: Mapping[str, Any]) -> Table:
    """The accuracy of every model on every benchmark, and the means over the benchmarks."""
    models, rows = list(results["models"]), []
    for label, one in results["benchmarks"].items():
        cells = []
        for name in models:
            own = one["models"][name]
            sure = "*" if own.get("against_base", {}).get("p", 1) < 0.05 else ""
            cells.append(_percent(own["accuracy"]["value"]) + sure)
        rows.append([label, *cells])
    values = [[one["models"][name]["accuracy"]["value"] for one in results["benchmarks"].values()] for name in models]
    rows.append(["mean", *(_percent(sum(own) / len(own)) for own in values)])
    note = f"*: differs from {models[0]} with p < 0.05, not corrected. The mean counts each benchmark once."
    return "Accuracy in %", ["benchmark", *models], rows, note if len(models) > 1 else ""


def show(results: Mapping[str, Any]) -> None:
    """Prints the tables, and what else is to be known of the evaluation."""
    for title, header, cells, note in tables(results):
        print_table(title, header, cells, note)
    for line in remarks(results):
        print(fitted(line))


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What may have gone wrong, in words."""
    found = []
    for name, source in results["sets"].items():
        if source["unparseable"]:
            found.append(
                f"{name}: {source['unparseable']} problems are left out, because their answer cannot be parsed."
            )
    for label, one in results["benchmarks"].items():
        for name, own in one["models"].items():
            if (own["no_answer"] or 0) > 0.5:
                found.append(
                    f"{name} gives no answer to more than half of {label}. It has to stand in \\boxed{{}}, or as LaTeX "
                    "behind words such as 'the answer is'. Does the prompt ask for it (--template, --system_prompt), and is "
                    "there room (--max_new_tokens)?"
                )
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """All numbers as one table for a model card, and how they were measured."""
    models = list(results["models"])
    lines = [f"| benchmark | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for label, one in results["benchmarks"].items():
        cells = []
        for name in models:
            own = one["models"][name]
            p = f", p = {_p(own['against_base']['p'])}" if "against_base" in own else ""
            cells.append(f"{_with_interval(own['accuracy'])}{p}")
        lines.append(f"| {label} ({own['problems']} problems) | {' | '.join(cells)} |")
    decoding, versions = results["decoding"], results["versions"]
    sampled = any(one["kind"] != "greedy" for one in results["benchmarks"].values())
    how = (
        f" temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g} (avg@n is the mean over n samples),"
        if sampled
        else ""
    )
    against = (
        f" p: sign-flip test against {models[0]}, not corrected for the number of comparisons."
        if len(models) > 1
        else ""
    )
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("transformers", "trl", "math-verify", "vllm") if name in versions
    )
    text = (
        f"Accuracy in %, with 95 % bootstrap intervals over the problems.{against} Measured with `trl-sgpo evaluate` "
        f"{versions.get('trl-sgpo', '')}:{how} at most {decoding['max_new_tokens']} new tokens, engine "
        f"{decoding['engine']}, answers compared by {results['scoring']} ({named})."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def _row(name: str, own: Mapping[str, Any], compared: bool) -> list[str]:
    against = own.get("against_base")
    cells = [name, _with_interval(own["accuracy"])]
    if compared:
        cells += [_with_interval(against["difference"], "+"), _p(against["p"])] if against else ["-", "-"]
    tokens = "-" if own["tokens"] is None else f"{own['tokens']:.0f}"
    return [*cells, _percent(own["no_answer"]), _percent(own["cut"]), tokens]


def _with_interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    text = _percent(estimate["value"], sign)
    # If all problems are alike, no resample differs. An interval without width would look like certainty
    if estimate["low"] is not None and estimate["low"] < estimate["high"]:
        text += f" [{_percent(estimate['low'], sign)}, {_percent(estimate['high'], sign)}]"
    return text


def _percent(share: float | None, sign: str = "") -> str:
    return "-" if share is None else f"{100 * share:{sign}.1f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
