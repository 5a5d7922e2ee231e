"""
The outcome reward: which of the reward functions says right or wrong. One name is usual. A run with several tasks has
several, TRL's pattern: each function returns None for the rows of the other tasks, and the outcome of a completion is
the one that is not None.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from trl.trainer.utils import get_callable_name, get_config_model_id


def reward_name(reward_func: Any) -> str:
    """The name under which GRPOTrainer will log a reward function that it has not seen yet."""
    if isinstance(reward_func, str):
        return reward_func.split("/")[-1]
    if isinstance(reward_func, nn.Module):
        return get_config_model_id(cast(PreTrainedConfig, reward_func.config)).split("/")[-1]
    return get_callable_name(reward_func)


def find_outcomes(
    names: Sequence[str],
    judge_index: int | None,
    outcome_reward: str | Sequence[str] | None,
    needed_by: str | None = None,
    n_given: int | None = None,
) -> list[int]:
    """
    The columns of the outcome rewards, empty if nothing needs an outcome and nothing says which one it is.

    Args:
        outcome_reward (`str` or `Sequence[str]`, *optional*):
            The names that the user gave. Without them it is the only candidate, or all environments' own rewards if
            there is no other candidate.
        needed_by (`str`, *optional*):
            The setting that cannot do without an outcome, as a message names it. Without one an unknown outcome is no
            error.
        n_given (`int`, *optional*):
            How many of the names are the user's reward functions. Those after them are the environments' own.
    """
    candidates = [i for i in range(len(names)) if i != judge_index]
    listed = ", ".join(repr(names[i]) for i in candidates)
    if outcome_reward is not None:
        wanted = [outcome_reward] if isinstance(outcome_reward, str) else list(outcome_reward)
        if not wanted or not all(isinstance(name, str) for name in wanted) or len(set(wanted)) < len(wanted):
            raise TypeError(
                f"outcome_reward={outcome_reward!r} must be the name of a reward function, or a list of different names. The "
                f"reward functions are: {listed or 'none'}."
            )
        found = []
        for name in wanted:
            matches = [i for i in candidates if names[i] == name]
            if len(matches) != 1:
                problem = "is not the name of a reward function" if not matches else "is the name of several"
                raise ValueError(
                    f"outcome_reward={name!r} {problem}. The reward functions are: {listed or 'none'}. Give the name of the "
                    "one that says whether a completion is right or wrong, or the list of those that do."
                )
            found.append(matches[0])
        return sorted(found)
    if len(candidates) == 1 or (candidates and n_given is not None and candidates[0] >= n_given):
        return candidates
    if needed_by is None:
        return []
    if not candidates:
        raise ValueError(
            f"{needed_by} has to know which completions are wrong, and reward_funcs holds no outcome reward, which says right "
            "or wrong. Put one into the list: `reward_funcs=[accuracy_reward, ...]`."
        )
    raise ValueError(
        f"{needed_by} has to know which completions are wrong. reward_funcs holds several reward functions ({listed}), and "
        "outcome_reward is not set. Name the one that says whether a completion is right or wrong, "
        f"`outcome_reward={names[candidates[0]]!r}`, or give a list of names, one for each task."
    )


def join_outcomes(rewards_PGF: Tensor, indices: Sequence[int], names: Sequence[str]) -> Tensor:
    """
    The outcome of each completion, shape `(P, G)`: the one of its outcome rewards, in the columns `indices`, that is
    not None (NaN). A completion with two outcomes raises a `ValueError`.

    Example:

    ```python
    >>> nan = float("nan")
    >>> join_outcomes(torch.tensor([[[1.0, nan], [nan, 0.0]]]), [0, 1], ["math_reward", "code_reward"])
    tensor([[1., 0.]])
    ```
    """
    if not indices:
        return torch.full_like(rewards_PGF[..., 0], torch.nan)
    outcome_PG = rewards_PGF[..., indices[0]]
    for index in indices[1:]:
        other_PG = rewards_PGF[..., index]
        both_PG = ~torch.isnan(outcome_PG) & ~torch.isnan(other_PG)
        if both_PG.any():
            row = int(both_PG.flatten().nonzero()[0])
            first = next(i for i in indices if not torch.isnan(rewards_PGF.flatten(0, 1)[row, i]))
            raise ValueError(
                f"Completion {row} of this round has two outcomes, from {names[first]!r} and from {names[index]!r}, and it can "
                "be right or wrong only once. With several names in outcome_reward, each of these functions must return None "
                "for the rows of the other tasks."
            )
        outcome_PG = torch.where(torch.isnan(outcome_PG), other_PG, outcome_PG)
    return outcome_PG
