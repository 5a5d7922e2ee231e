"""
A prompt that several rows share is read once, in generating and in training. The completions and, up to rounding, the gradients
are the same. It is for models with rotary positions, without dropout, and without gradient checkpointing, which keeps no cache.

In both, the rows' prompts are read without their last token, and their keys and values are given to every row that needs them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def _read(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> Cache:
    """Keys and values of prompts, shape `(N, P)`, one entry for each of `rows`, which says its prompt."""
    positions = _positions(attention_mask)
    read = model.base_model(input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=True)
    read.past_key_values.batch_select_indices(rows)
    return read.past_key_values


def _different(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different prompts of a batch, padded on the left, with their masks; and of each row its prompt."""
    both, rows = torch.cat([attention_mask, input_ids * attention_mask], dim=1).unique(dim=0, return_inverse=True)
    mask, ids = both.chunk(2, dim=1)
    return ids, mask, rows


@torch.no_grad()
def generate(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    """As the model's own `generate`. With eight completions of each prompt on a CPU this saves a third of the time."""
    ids, mask, rows = _different(input_ids[:, :-1], attention_mask[:, :-1])
    if len(ids) < len(rows):
        kwargs["past_key_values"] = _read(model, ids, mask, rows)
    return type(model).generate(model, input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def log_probs(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, n_tokens: int
) -> tuple[Tensor, Tensor]:
    """
    Log-probabilities and entropies of the last `n_tokens` of each row, shape `(B, n_tokens)`, as
    `GRPOTrainer._get_per_token_logps_and_entropies` gives them. Without Triton, TRL computes logits for prompts too.
    """
    start = input_ids.shape[1] - n_tokens - 1  # the prompt's last token says the completion's first
    past = _read(model, *_different(input_ids[:, :start], attention_mask[:, :start]))
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    found = model(
        input_ids[:, start:],
        attention_mask=attention_mask,
        position_ids=_positions(attention_mask)[:, start:],
        past_key_values=past,
        labels=labels[:, start:],
        fused_lm_head=True,
    )
    return found.log_probs, found.entropy
