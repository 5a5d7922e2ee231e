"""
Solutions whose first wrong step is annotated, from the Hub or from files: ProcessBench, Mr-Ben, rows with one boolean
per step, and your own files. A row that cannot be understood raises an error that names its place. A row that is
understood but cannot be used (no steps, or a label that is not a step) is skipped and counted.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sgpo.loading import read_records


PROBLEM_FIELDS = ("problem", "question", "prompt", "Question")
STEPS_FIELDS = ("steps", "completions", "Model_Solution_Steps")
LABEL_FIELDS = ("label", "first_error", "first_error_step", "labels", "Model_Solution_First_Error_Step")
REFERENCE_FIELDS: tuple[str, ...] = ("reference", "reference_answer", "solution", "answer")
REFERENCE_FIELDS += ("Ground_Truth_Answer_Modified", "Ground_Truth_Answer")
ID_FIELDS = ("id", "Question_UUID")
SUBSET_FIELDS = ("subset", "Subject")


@dataclass(frozen=True)
class Row:
    """
    One annotated solution.

    Args:
        file (`str`):
            Name of the file or dataset, without its folder.
        label (`int`):
            0-based index of the first wrong step, -1 for none.
        final_answer_correct (`bool`, *optional*):
            None if the data do not say it.
        columns (`Mapping[str, Any]`):
            Further columns that the judge may see.
    """

    id: str
    file: str
    subset: str
    problem: str
    steps: tuple[str, ...]
    label: int
    final_answer_correct: bool | None
    reference: str | None
    columns: Mapping[str, Any]

    @property
    def known_wrong(self) -> bool:
        """Whether the row belongs to the known-wrong mode."""
        return self.label != -1 and self.final_answer_correct is not True

    @property
    def group(self) -> tuple[str, str]:
        """The solutions of one problem."""
        return self.subset, self.problem


class _UnusableRow(Exception):
    """A row that is understood but cannot be used. Its text is the reason that is counted."""


def read_rows(
    data: Sequence[str], split: str | None = None, columns: Sequence[str] = ()
) -> tuple[list[Row], list[dict[str, Any]]]:
    """
    Reads annotated solutions from datasets of the Hub (all splits, or the one that is named) and local files.
    `columns` are kept for the judge. Returns the rows, and for each source its name, hash, number of rows, and number
    of skipped rows by reason. A row that cannot be understood raises a `ValueError` that says which row, which field,
    and what is expected.
    """
    rows: list[Row] = []
    sources = []
    for name in data:
        for source, records in read_records(name, split, "data"):
            skipped: Counter[str] = Counter()
            n_before = len(rows)
            for place, record in records:
                try:
                    rows.append(_row(record, place, source["name"], source.get("split"), columns))
                except _UnusableRow as reason:
                    skipped[str(reason)] += 1
            sources.append({**source, "rows": len(rows) - n_before, "skipped": dict(skipped)})
    return rows, sources


def _row(record: Any, place: str, file: str, split: str | None, columns: Sequence[str]) -> Row:
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{place}: it is {type(record).__name__}, not an object with fields. Write one object per solution."
        )
    from trl_sgpo.judges.base import is_empty

    steps = _steps(record, place)
    label = _label(record, place, len(steps))
    missing = [name for name in columns if name not in record]
    if missing:
        raise ValueError(f"{place}: columns={missing} are not there, only {sorted(record)}. Name columns of the data.")
    subset = next((str(record[name]) for name in SUBSET_FIELDS if record.get(name)), split or Path(file).stem)
    source = record.get("source")
    reference = next((record[name] for name in REFERENCE_FIELDS if not is_empty(record.get(name))), None)
    return Row(
        id=next((str(record[name]) for name in ID_FIELDS if record.get(name) is not None), place),
        file=file,
        subset=f"{source}/{subset}" if source and str(source) != subset else subset,
        problem=problem_of(record, place),
        steps=steps,
        label=label,
        final_answer_correct=_final_answer_correct(record, place),
        reference=None if reference is None else str(reference),
        columns={name: record[name] for name in columns},
    )


def field_of(record: Mapping[str, Any], names: Sequence[str], what: str, place: str) -> tuple[str, Any]:
    """Name and value of the first of these fields that a record has."""
    for name in names:
        if name in record:
            return name, record[name]
    raise ValueError(
        f"{place}: there is no {what}, only the fields {sorted(record)}. Name it as one of {list(names)}."
    )


def problem_of(record: Mapping[str, Any], place: str) -> str:
    """The text of the problem in a record. `place` names the record in the error if there is none."""
    name, problem = field_of(record, PROBLEM_FIELDS, "problem", place)
    if isinstance(problem, list) and problem and all(isinstance(message, Mapping) for message in problem):
        from trl_sgpo.judges.stepwise import problem_text

        problem = problem_text(problem)
    if not isinstance(problem, str):
        raise ValueError(f"{place}: {name}={short(problem)} must be a string or a list of messages.")
    return f"{problem}\nOptions:\n{record['Options']}" if record.get("Options") else problem


def _steps(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    name, steps = field_of(record, STEPS_FIELDS, "list of steps", place)
    if hasattr(steps, "tolist"):
        steps = steps.tolist()
    if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"{place}: {name}={short(steps)} must be a list of strings, one per step.")
    if not any(step.strip() for step in steps):
        raise _UnusableRow("no steps")
    return tuple(steps)


def _label(record: Mapping[str, Any], place: str, n_steps: int) -> int:
    name, label = field_of(record, LABEL_FIELDS, "label", place)
    if label is None:
        raise _UnusableRow(f"{name} is empty")
    if name == "labels":
        if not isinstance(label, list | tuple):
            raise ValueError(f"{place}: labels={short(label)} must be a list, one boolean per step.")
        if len(label) != n_steps:
            raise _UnusableRow("labels and steps differ in number")
        if not all(right is None or right in (0, 1) for right in label):
            hint = " In PRM800K's form 0 is neutral and -1 wrong: write true for 1 and 0, false for -1."
            hint = hint if -1 in label else ""
            raise ValueError(
                f"{place}: labels={short(label)} must be true (or 1), false (or 0) or null for each step.{hint}"
            )
        wrong = [i for i, right in enumerate(label) if right is not None and not right]
        first = wrong[0] if wrong else n_steps
        if any(right is None for right in label[:first]):
            raise _UnusableRow("a step before the first wrong one has no label")
        return wrong[0] if wrong else -1
    if name == "Model_Solution_First_Error_Step":
        text = str(label).strip()
        correctness = str(record.get("Model_Solution_Correctness") or "").strip().lower()
        if text.upper() == "N/A":
            if correctness == "incorrect":
                raise _UnusableRow("called incorrect, without a first wrong step")
            return -1
        if not text.isdecimal():  # prose, in its coding part
            raise _UnusableRow("the first wrong step is no number")
        if correctness == "correct":
            raise _UnusableRow("called correct, with a first wrong step")
        label = int(text) - 1
        if label < 0:
            raise _UnusableRow("label out of range")
    try:
        number = int(label)
        whole = number == float(label) and not isinstance(label, bool)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(
            f"{place}: {name}={short(label)} must be the 0-based index of the first wrong step, or -1 for none."
        )
    if not -1 <= number < n_steps:
        raise _UnusableRow("label out of range")
    return number


def _final_answer_correct(record: Mapping[str, Any], place: str) -> bool | None:
    value = record.get("final_answer_correct")
    if value is not None and value not in (0, 1):
        raise ValueError(f"{place}: final_answer_correct={short(value)} must be true, false or null.")
    return None if value is None else bool(value)


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def sample_rows(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """
    At most `limit` rows, in their old order. Problems are drawn, so that groups stay whole. If the first group alone is
    larger than `limit`, it is taken anyway.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group, []).append(i)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    for members in order:
        if chosen and len(chosen) + len(members) > limit:
            break
        chosen += members
    return [rows[i] for i in sorted(chosen)]
