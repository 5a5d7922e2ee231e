"""Checks of [`SharpeningCallback`]'s arguments. Each function returns the checked value, or raises."""

import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name

from trl_sgpo.analysis.metrics import usual_ks
from trl_sgpo.analysis.sharpening.base import is_peft, is_sharded
from trl_sgpo.arguments import check_judge_columns, check_names
from trl_sgpo.judges import StepwiseJudge
from trl_sgpo.outcome import find_outcomes


# Arguments of a reward function that are not columns of the dataset
_REWARD_ARGUMENTS = {"self", "prompts", "completions", "completion_ids", "trainer_state", "environments"}
_REWARD_ARGUMENTS |= {"log_extra", "log_metric"}


def check_trainer(trainer: Any) -> None:
    """Raises if it is no GRPOTrainer, or if its completions are more than one call of the generation."""
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(
            f"trainer={type(trainer).__name__} is not a GRPOTrainer or SGPOTrainer. Make the trainer first, then "
            "`trainer.add_callback(SharpeningCallback(trainer=trainer, prompts=...))`."
        )
    settings: Any = trainer
    kinds = {
        "tools": settings.tools,
        "environment_factory": settings.environment_factories,
        "rollout_func": settings.rollout_func,
        "a multimodal processor": settings._is_vlm,
    }
    uses = [name for name, used in kinds.items() if used]
    if uses:
        raise ValueError(
            f"The trainer uses {' and '.join(uses)}, which SharpeningCallback cannot probe: it draws single-turn completions "
            "of text. Leave the callback out of such a run."
        )
    if (settings.args.generation_kwargs or {}).get("do_sample") is False or settings.temperature == 0:
        raise ValueError(
            f"temperature={settings.temperature} and generation_kwargs={settings.args.generation_kwargs} make generation "
            "greedy: all samples of a prompt would be equal, and pass@k would say nothing. Sample, as training does."
        )


def check_numbers(**numbers: int | None) -> None:
    """Raises if a number is neither `None` nor an integer of at least 1."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def check_ks(ks: Sequence[int] | None, n_samples: int) -> list[int]:
    """The ks of pass@k, sorted."""
    found = usual_ks(n_samples) if ks is None else sorted(set(ks))
    if not found or found[0] < 1 or found[-1] > n_samples:
        raise ValueError(
            f"ks={list(ks or ())} must lie between 1 and n_samples={n_samples}: pass@k of a prompt needs at least k "
            f"samples of it. Raise n_samples to {max(ks or (1,))}, or leave out the larger ones."
        )
    return found


def check_taus(taus: Sequence[float]) -> list[float]:
    if any(not 0 < tau <= 1 for tau in taus):
        raise ValueError(f"taus={list(taus)} must lie in (0, 1]: they are shares of a prompt's samples.")
    return list(taus)


def check_extract_answer(extract_answer: Any) -> Any:
    if extract_answer is not None and not callable(extract_answer):
        raise TypeError(
            f"extract_answer={extract_answer!r} is not callable. Give a function from a completion's text to its "
            "answer, for instance `lambda text: text.split()[-1]`."
        )
    return extract_answer


def check_threshold(given: float | None, trainer: Any) -> float:
    """The smallest outcome that is correct: the argument, else the trainer's, else 0.5."""
    threshold = getattr(trainer.args, "success_threshold", 0.5) if given is None else given
    if math.isnan(threshold):
        raise ValueError("success_threshold=nan: no outcome reaches it. Give the smallest one that means 'correct'.")
    return float(threshold)


def check_base_model(base_model: Any, trainer: Any) -> Any:
    if base_model is not None and is_peft(trainer):
        raise ValueError(
            "base_model was given, but the policy is a PEFT model: its base is the model without the adapters. "
            "Leave base_model out."
        )
    if base_model is not None and is_sharded(trainer) and not isinstance(base_model, str):
        raise ValueError(
            f"base_model={type(base_model).__name__} is a module, but the policy is sharded over the ranks, and the "
            "base has to be loaded in the same way. Give its name or path."
        )
    return base_model


def check_batch_options(outcomes: Sequence[Any], outcome_indices: Sequence[int], trainer: Any, needed: bool) -> None:
    """Raises if metrics of the training batches are `needed` and the outcome is not among the trainer's rewards."""
    if needed and not outcome_indices:
        raise ValueError(
            "batch_rank and batch_update need the outcome among the trainer's rewards, but outcome_reward is "
            f"{get_callable_name(outcomes[0])!r}, which the trainer does not use. Name one of "
            f"{trainer.reward_func_names}, or leave batch_rank and batch_update out."
        )


def probe_rows(prompts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The probe set as a list of rows, checked."""
    if isinstance(prompts, str | Mapping) or not hasattr(prompts, "__len__"):
        raise TypeError(
            f"prompts={type(prompts).__name__} is not a set of rows. Give a `Dataset` or a list of dicts with the column "
            "'prompt' and the columns that the outcome reward needs. Of a stream take a part: `list(stream.take(64))`."
        )
    rows = []
    for i, row in enumerate(prompts):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"prompts[{i}] is {type(row).__name__}, not a row: it must be a dict with the column 'prompt' and the "
                "columns that the outcome reward needs."
            )
        if row.get("prompt") in (None, "", []):
            raise ValueError(
                f"prompts[{i}] has no column 'prompt', or an empty one; its columns are {sorted(row)}. Name the column "
                "with the problem 'prompt', as in the training set."
            )
        rows.append(dict(row))
    if not rows:
        raise ValueError("prompts is empty: without a prompt there is nothing to probe. Between 50 and 200 are usual.")
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        text = prompt_text(row["prompt"])
        if text in first:
            raise ValueError(
                f"prompts[{i}] is the same as prompts[{first[text]}] ({text[:60]!r}): its samples would count twice, and "
                "the intervals would be too narrow. Leave duplicates out, and raise n_samples for more samples."
            )
        first[text] = i
    return rows


def prompt_text(prompt: Any) -> str:
    """The prompt itself, or a conversation as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def check_columns(rows: list[dict[str, Any]], outcome: Any) -> None:
    """
    Raises if a row has a column that no reward can be given, lacks one that the outcome reward needs, or lacks the domain
    that other rows have.
    """
    check_names(dict.fromkeys(name for row in rows for name in row), [outcome], "prompts")
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(TypeError, ValueError):  # some callables have no signature
        parameters = inspect.signature(outcome).parameters
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in _REWARD_ARGUMENTS
    ]
    for column in [*needed, *(["domain"] if any("domain" in row for row in rows) else [])]:
        lacking = [i for i, row in enumerate(rows) if column not in row]
        if lacking:
            who = (
                "the domain of each"
                if column == "domain"
                else f"the outcome reward {get_callable_name(outcome)!r} needs"
            )
            raise ValueError(
                f"prompts lacks the column {column!r} in {len(lacking)} of {len(rows)} rows, prompts[{lacking[0]}] for "
                f"one: {who}. Take the rows from a data set with the training set's columns."
            )


def outcomes_of(trainer: Any, given: Any) -> tuple[list[Any], list[int]]:
    """The outcome rewards, one for each task, and their columns; a function that the trainer does not use has none."""
    names, funcs = trainer.reward_func_names, trainer.reward_funcs
    if callable(given) and not isinstance(given, nn.Module):
        return [given], [i for i, func in enumerate(funcs) if func is given][:1]
    if given is not None and not isinstance(given, str | list | tuple):
        raise TypeError(
            f"outcome_reward={type(given).__name__} is neither a name nor a reward function. Give one of {names}, or a "
            "function `f(prompts, completions, **columns) -> list[float]`."
        )
    indices = getattr(trainer, "outcome_indices", []) if given is None else []
    if not indices:
        own_judge = getattr(trainer, "judge_index", None)
        others = [i for i, func in enumerate(funcs) if i != own_judge and not isinstance(func, StepwiseJudge)]
        found = find_outcomes([names[i] for i in others], None, given, needed_by="SharpeningCallback")
        indices = [others[i] for i in found]
    models = [names[i] for i in indices if isinstance(funcs[i], nn.Module)]
    if models:
        raise ValueError(
            f"outcome_reward={models[0]!r} is a reward model, whose scores do not say right or wrong. Give a function "
            "that does, `outcome_reward=accuracy_reward`."
        )
    return [funcs[i] for i in indices], indices


def judge_of(trainer: Any, given: Any, rows: list[dict[str, Any]]) -> StepwiseJudge | None:
    """The judge of the steps: the argument (`False` for none), else the trainer's. Raises if it cannot judge the rows."""
    if given is False:
        return None
    found = getattr(trainer, "stepwise_judge", None)
    found = found or next((func for func in trainer.reward_funcs if isinstance(func, StepwiseJudge)), None)
    if given is not None:
        found = given if isinstance(given, StepwiseJudge) else StepwiseJudge(given)
    check_judge_columns(found, set.intersection(*map(set, rows)), "prompts")
    return found
