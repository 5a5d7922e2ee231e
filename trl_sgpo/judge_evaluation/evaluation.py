"""From a judge and annotated solutions to `results.json`."""

import hashlib
import logging
import math
import os
import platform
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sgpo.analysis.jsonable import write_json
from trl_sgpo.judge_evaluation.asking import EvaluationItem, Record, ask_all, judge_identity
from trl_sgpo.judge_evaluation.data import Row, read_rows, sample_rows
from trl_sgpo.judge_evaluation.metrics import group_summary, known_wrong_summary, standard_summary, verdict_index
from trl_sgpo.judge_evaluation.robustness import (
    injection_results,
    injection_trials,
    shape_items,
    shape_results,
    unperturbed,
)
from trl_sgpo.versions import installed_versions


if TYPE_CHECKING:
    from trl_sgpo.scripts.judge_eval import JudgeEvalArguments


logger = logging.getLogger(__name__)

# What stands at the top of the results too
_HEADLINE_STANDARD = ("f1", "acc_error", "acc_correct", "acc_error_within_1", "abstain_rate")
_HEADLINE_RTS = ("rts_mae", "rts_mae_constant", "rts_mae_minus_constant", "rts_bias", "coverage")


def evaluate(args: "JudgeEvalArguments") -> dict[str, Any]:
    """
    Evaluates the judge that the arguments name. Writes `results.json`, whose content it returns, `verdicts.jsonl` and
    `judge.png`. A judge or data that cannot be read, or a folder with another judge's verdicts, raises a `ValueError`.
    """
    from trl_sgpo.judges import CachedJudge, StepwiseJudge
    from trl_sgpo.judges.stepwise import as_judge
    from trl_sgpo.loading import load_judge

    found = load_judge(args.judge, args.judge_args)
    inner = as_judge(found.judge if isinstance(found, StepwiseJudge) else found)
    everything, sources = read_rows(args.data, args.split, args.columns or ())
    rows = sample_rows(everything, args.limit, args.seed)
    if not rows:
        raise ValueError(f"data={args.data} hold no row that can be used: {sources}. `skipped` says why.")
    # The solutions of a problem follow each other, for servers with prefix caching
    first_seen = {group: i for i, group in reversed(list(enumerate(row.group for row in rows)))}
    rows = sorted(rows, key=lambda row: first_seen[row.group])
    wrong = [row for row in rows if row.known_wrong]

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    known_by = judge_identity(inner, args.judge, args.judge_args)
    judge_hash = hashlib.sha256(known_by.encode()).hexdigest()[:16]
    record = Record(output / "verdicts.jsonl", judge_hash)
    kept = len(record.lines)
    judge = inner
    if args.cache != "none":
        judge = CachedJudge(inner, args.cache or output / "verdicts.sqlite", key=known_by)
    lines: list[dict[str, Any]] = []

    def answers_to(items: Sequence[EvaluationItem], description: str) -> list[int]:
        answered = ask_all(
            judge,
            items,
            record,
            batch_size=args.batch_size,
            reference=args.reference,
            retry_abstained=args.retry_abstained,
            usage_of=inner,
            description=description,
        )
        lines.extend(answered)
        return [verdict_index(line["status"], line["first_error"]) for line in answered]

    items = [EvaluationItem(row, False) for row in rows], [EvaluationItem(row, True) for row in wrong]
    answers, answers_wrong = answers_to(items[0], "standard"), answers_to(items[1], "known wrong")
    clean = dict(zip(map(unperturbed, items[0] + items[1]), answers + answers_wrong, strict=True))
    bootstrap = (args.resamples, args.seed)
    parts: dict[str, Any] = {
        "standard": standard_summary(
            answers,
            [row.label for row in rows],
            [row.subset for row in rows],
            [row.problem for row in rows],
            *bootstrap,
        ),
        "known_wrong": _with_subsets(_known_wrong, wrong, answers_wrong, bootstrap),
        "groups": _with_subsets(_groups, wrong, answers_wrong, bootstrap),
    }
    subsets = parts["groups"]["subsets"]
    parts["groups"]["subsets"] = {name: part for name, part in subsets.items() if part["n_groups"]}
    if args.robustness:
        sample = random.Random(args.seed).sample(wrong, min(args.robustness_rows, len(wrong)))
        shapes, trials = shape_items(sample), injection_trials(sample, args.injection_rows)
        shape_answers = answers_to(shapes, "perturbed")
        trial_answers = answers_to([item for _, item in trials], "injected")
        parts["robustness"] = {
            "rows": len(sample),
            "shapes": shape_results(shapes, shape_answers, clean),
            "injection": injection_results(trials, trial_answers, clean, *bootstrap),
        }
    if isinstance(judge, CachedJudge):
        judge.close()

    headline = [(parts["standard"], key) for key in _HEADLINE_STANDARD]
    headline += [(parts["known_wrong"], key) for key in _HEADLINE_RTS]
    results = {
        **{key: part[key] for part, key in headline},
        "n": len(rows),
        "intervals": {key: part["intervals"][key] for part, key in headline},
        **parts,
        "judge": {"argument": args.judge, "name": inner.name, "hash": judge_hash, "sees_reference": args.reference},
        "data": {
            "sources": sources,
            "rows_read": len(everything),
            "rows_evaluated": len(rows),
            "rows_with_an_error": sum(row.label != -1 for row in rows),
            "rows_known_wrong": len(wrong),
            "rows_with_an_error_and_a_correct_final_answer": sum(
                row.label != -1 and row.final_answer_correct is True for row in rows
            ),
        },
        "cost": _cost(lines, sum(bool(line.get("asked_now")) for line in record.lines.values()), kept),
        "settings": {
            name: value
            for name, value in asdict(args).items()
            if name not in ("judge", "judge_args", "data", "output", "cache")  # may hold paths and keys
        },
        "versions": installed_versions("trl-sgpo", "trl", "transformers", "torch", "numpy", "openai"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }
    write_json(output / "results.json", results)
    _plot(output / "judge.png", wrong, answers_wrong, results)
    return results


def _with_subsets(
    summary: Callable[..., dict[str, Any]], rows: Sequence[Row], answers: Sequence[int], bootstrap: tuple[int, int]
) -> dict[str, Any]:
    """The summary of all rows, and under `subsets` those of each subset."""
    subsets = {}
    for name in sorted({row.subset for row in rows}):
        own = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row.subset == name]
        subsets[name] = summary([row for row, _ in own], [answer for _, answer in own], *bootstrap)
    return {**summary(rows, answers, *bootstrap), "subsets": subsets}


def _known_wrong(rows: Sequence[Row], answers: Sequence[int], resamples: int, seed: int) -> dict[str, Any]:
    labels, n_steps = [row.label for row in rows], [len(row.steps) for row in rows]
    return known_wrong_summary(answers, labels, n_steps, [row.problem for row in rows], resamples, seed)


def _groups(rows: Sequence[Row], answers: Sequence[int], resamples: int, seed: int) -> dict[str, Any]:
    gold = [row.label / len(row.steps) for row in rows]
    rts = [answer / len(row.steps) if answer >= 0 else math.nan for row, answer in zip(rows, answers, strict=True)]
    return group_summary(gold, rts, [row.group for row in rows], resamples, seed)


def _cost(lines: Sequence[Mapping[str, Any]], asked_now: int, kept: int) -> dict[str, Any]:
    """Of all judgements in these results, also those that an earlier run made: the record keeps what each took."""
    distinct = {line["key"]: line for line in lines}.values()
    seconds = sum(line["seconds"] for line in distinct)
    usage: Counter[str] = Counter()
    for line in distinct:
        usage.update(line.get("usage", {}))
    return {
        "judgements": len(lines),
        "distinct_judgements": len(distinct),
        "seconds": seconds,
        "completions_per_second": len(distinct) / seconds if seconds else math.nan,
        "usage": {name: round(count, 3) for name, count in usage.items()},
        "asked_in_this_run": asked_now,
        "in_the_record_before": kept,
    }


def _plot(path: Path, rows: Sequence[Row], answers: Sequence[int], results: Mapping[str, Any]) -> None:
    try:
        from trl_sgpo.judge_evaluation.plots import plot_judge
    except ImportError:
        logger.warning(
            "%s is not drawn, because matplotlib is not installed. Run `pip install trl-sgpo[plots]`.", path
        )
        return
    if rows:
        plot_judge(
            path,
            predicted=answers,
            label=[row.label for row in rows],
            n_steps=[len(row.steps) for row in rows],
            title=results["judge"]["name"],
            summary=results["known_wrong"],
            seed=results["settings"]["seed"],
        )
