"""Checks of what [`SGPOTrainer`] is given beside its config, before any weights are loaded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from trl_sgpo.judges import CallableJudge, StepwiseJudge
from trl_sgpo.judges.stepwise import NOT_IN_ROW


# What GRPOTrainer gives every reward function, so that no column of such a name can be given beside it
TAKEN_NAMES = ("prompts", "completions")


def check_counts(
    funcs: Sequence[Any], judge_index: int | None, weights: Sequence[float] | None, processing_classes: Any
) -> None:
    """Raises if there is not one weight and one processing class for each reward function. The judge is one of them."""
    classes = processing_classes
    if classes is not None and not isinstance(classes, list):
        classes = [classes]
    for name, values, of_judge in (
        ("reward_weights", weights, "its weight there, usually 1.0"),
        ("reward_processing_classes", classes, "None there"),
    ):
        if values is None or len(values) == len(funcs):
            continue
        judge = ""
        if judge_index is not None:
            judge = f" The StepwiseJudge at position {judge_index} is one of them: put {of_judge}."
        shown = f"={weights}" if values is weights else ""
        raise ValueError(
            f"{name}{shown} has the length {len(values)}, but reward_funcs has {len(funcs)} entries, and each needs one.{judge}"
        )


def check_datasets(funcs: Sequence[Any], removes_unused: bool | None, **datasets: Any) -> None:
    """Raises if a dataset, or one of a mapping of datasets, is known to have a column of one of `TAKEN_NAMES`."""
    for argument, given in datasets.items():
        parts = given.items() if isinstance(given, Mapping) else [(None, given)]
        for part, dataset in parts:
            names = () if removes_unused else known_columns(dataset) or ()
            check_names(names, funcs, argument if part is None else f"{argument}[{part!r}]")


def check_names(names: Iterable[str], funcs: Sequence[Any], where: str) -> None:
    """Raises if one of the names of columns is in `TAKEN_NAMES`. Reward models, or their names, are given no column."""
    taken = [name for name in names if name in TAKEN_NAMES]
    if taken and not all(isinstance(func, str | nn.Module) for func in funcs):
        raise ValueError(
            f"{where} has a column {taken[0]!r}. Every reward function is given an argument of that name, so it cannot be "
            f"given the column too. Rename the column or remove it."
        )


def known_columns(dataset: Any) -> list[str] | None:
    """The columns of a dataset's rows; `None` if only a row can tell, as in some streams and with a transform."""
    shown = getattr(dataset, "format", None)
    if isinstance(shown, Mapping):
        if shown["type"] == "custom":
            return None
        if not shown["output_all_columns"]:
            return list(shown["columns"])
    return getattr(dataset, "column_names", None)


def check_judge_columns(judge: StepwiseJudge | None, names: Iterable[str] | None, where: str) -> None:
    """Raises if a judge function has to be given a column that is not among the `names` of those that there are."""
    if judge is None or names is None or not isinstance(judge.judge, CallableJudge):
        return
    names = set(names).difference(NOT_IN_ROW)
    missing = [name for name in judge.judge.required_columns if name not in names]
    if missing:
        raise ValueError(
            f"The judge {judge.judge.name} has to be given the column {missing[0]!r}. What {where} has for a judge is "
            f"{sorted(names)}. Add the column, or give the parameter a default value."
        )
