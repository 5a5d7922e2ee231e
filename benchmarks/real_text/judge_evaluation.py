"""The command `judge`: how good the judge is on right, corrupted and annotated solutions."""

import argparse
import math
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.real_text.data import load_gsm8k, read_lines
from benchmarks.real_text.judge import ReferenceJudge, make_judge, plain_text
from benchmarks.real_text.records import write_json
from trl_sgpo.judge_evaluation.metrics import ABSTAIN, NO_ERROR, first_error_f1
from trl_sgpo.judges import ArithmeticJudge, JudgeItem
from trl_sgpo.steps import segment


_EQUATION = re.compile(r"(?<![\d.,/*+-])(\d{1,6})( ?[-+*/] ?)(\d{1,6})( ?= ?[$]?)(\d{1,6})(?![\d.,/*+-]|\.\d)")


def judge(args: argparse.Namespace) -> None:
    splits = load_gsm8k(args.data)
    rng = random.Random(0)
    sets: dict[str, tuple[list[JudgeItem], list[int]]] = {"right": ([], [])}
    for row in splits["train"]:
        sets["right"][0].append(judge_item(row, plain_text(row["answer"]))[0])
        sets["right"][1].append(NO_ERROR)
    for name, recompute in (("number changed", False), ("operand changed", True)):
        items, labels = sets.setdefault(name, ([], []))
        for row in splits["train"]:
            found = corrupt(plain_text(row["answer"]), recompute, rng)
            if found is not None:
                item, spans = judge_item(row, found[0])
                items.append(item)
                labels.append(next(i for i, (_, end) in enumerate(spans) if found[1] < end))
    if args.first_error:
        sets["annotated"] = annotated(args.first_error, splits)
    results: dict[str, dict[str, Any]] = {}
    table = Table(title="The judge on solutions whose first wrong step is known", title_justify="left", box=SIMPLE)
    for column in ("solutions", "judge", "n", "found", "within 1", "alarms", "abstains", "F1"):
        table.add_column(column, justify="left" if column in ("solutions", "judge") else "right", no_wrap=True)
    judges = {"arithmetic": ArithmeticJudge(), "reference": ReferenceJudge(), "both": make_judge()}
    for name, (items, labels) in sets.items():
        for judge_name, asked in judges.items():
            verdicts = asked.judge(items)
            codes = {"abstain": ABSTAIN, "no_error": NO_ERROR}
            predicted = [codes.get(verdict.status, verdict.first_error) for verdict in verdicts]
            scores = first_error_f1(predicted, labels)
            results.setdefault(name, {})[judge_name] = {
                "n": len(items),
                **{key: None if math.isnan(value) else value for key, value in scores.items()},
            }
            keys = ("acc_error", "acc_error_within_1", "false_alarm_rate", "abstain_rate", "f1")
            cells = ["-" if math.isnan(scores[key]) else f"{scores[key]:.4f}" for key in keys]
            if len({label == NO_ERROR for label in labels}) == 1:
                cells[-1] = "-"  # F1 needs right and wrong solutions
            table.add_row(name, judge_name, str(len(items)), *cells)
    Console().print(table)
    print(
        "found: the first wrong step exactly; within 1: that or a neighbour; alarms: of the solutions without an error"
    )
    write_json(args.output / "judge.json", results)


def judge_item(row: dict[str, str], text: str) -> tuple[JudgeItem, list[tuple[int, int]]]:
    spans = segment(text)
    steps = tuple(text[start:end] for start, end in spans)
    return JudgeItem(row["question"], steps, reference=row["answer"], known_wrong=False), spans


def corrupt(solution: str, recompute: bool, rng: random.Random) -> tuple[str, int] | None:
    """
    A solution with a wrong number in one equation of whole numbers, and where that equation begins; `None` if there is none
    to change. With `recompute` an operand is changed and the result follows from it, so that the arithmetic stays right.
    """
    found = [match for match in _EQUATION.finditer(solution) if _value(match[1], match[2], match[3]) == int(match[5])]
    rng.shuffle(found)
    for match in found:
        numbers = {1: int(match[1]), 3: int(match[3]), 5: int(match[5])}
        for _ in range(20):
            place = rng.choice((1, 3) if recompute else (1, 3, 5))
            changed = {**numbers, place: max(0, numbers[place] + rng.choice((-1, 1)) * rng.randint(1, 9))}
            value = _value(str(changed[1]), match[2], str(changed[3]))
            if recompute:
                if value is None or value.denominator != 1 or value < 0:
                    continue
                changed[5] = int(value)
            # A change of an operand that leaves the result as it is would be found by nobody
            wrong = changed[5] != numbers[5] if recompute else value != changed[5]
            if wrong and changed[place] != numbers[place]:
                text = f"{changed[1]}{match[2]}{changed[3]}{match[4]}{changed[5]}"
                return solution[: match.start()] + text + solution[match.end() :], match.start()
    return None


def _value(left: str, operator: str, right: str) -> Fraction | None:
    a, b = Fraction(left), Fraction(right)
    if operator.strip() == "/":
        return a / b if b else None
    return {"+": a + b, "-": a - b, "*": a * b}[operator.strip()]


def annotated(path: Path, splits: dict[str, list[dict]]) -> tuple[list[JudgeItem], list[int]]:
    """Solutions by other models, with the first wrong step as people labelled it, joined with GSM8K's by the problem's words."""
    if not path.is_file():
        raise ValueError(
            f"--first-error={str(path)!r} is no file. Give a JSON-lines file with `problem`, `steps` and `label`."
        )
    known = {" ".join(row["question"].split()): row["answer"] for name in ("train", "test") for row in splits[name]}
    items, labels, rows = [], [], read_lines(path)
    for row in rows:
        reference = known.get(" ".join(row["problem"].split()))
        if reference is not None:
            items.append(JudgeItem(row["problem"], tuple(row["steps"]), reference=reference, known_wrong=False))
            labels.append(row["label"])
    if not items:
        raise ValueError(f"--first-error={str(path)!r}: none of its {len(rows)} problems is among those of --data.")
    print(f"{len(items)} of {len(rows)} annotated solutions have a reference.")
    return items, labels
