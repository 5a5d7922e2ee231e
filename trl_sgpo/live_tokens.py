"""
Which rows and tokens of a round's batches have credit, and smaller batches that give the same gradient. Pure functions.

A token without an advantage adds nothing to the gradient, but TRL runs forward and backward over it and multiplies the
result by 0. Attention is causal, so what comes after the last token with credit can be left out, and rows without
credit altogether. The loss is a mean over the batch that was. The advantages are multiplied by what makes the mean over
the smaller batch equal to it: the policy term of every loss of TRL is linear in a positive factor on the advantages.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from trl_sgpo.rounds import own_tokens


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import GRPOConfig


Batch = Mapping[str, Any]

# One number for each row: its advantage if that is only a rounding residue, else 0. TRL shuffles and splits it with the
# rest of a round
RESIDUE = "residue"

# What TRL gives for every token of the completion, and of prompt and completion together
_OF_COMPLETION = (
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "advantages",
    "old_per_token_logps",
    "sampling_per_token_logps",
    "ref_per_token_logps",
    "importance_sampling_ratio",
)
_OF_PROMPT = ("prompt_ids", "prompt_mask")
_OF_BOTH = ("token_type_ids", "mm_token_type_ids")
_OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "image_sizes",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_images",
    "num_tiles",
)

# Frequencies that depend on the length of the batch, padding included
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Kinds of layers that leave padding out, and for which a token's distance from others counts and not its place
_RELATIVE_LAYERS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "indexed_attention",
    "linear_attention",
    "conv",
}


def live_tokens(batch: Batch) -> Tensor:
    """
    Which tokens have credit, boolean, shape `(B, T)`: the policy's own ones with an advantage that is no residue.

    Example:

    ```python
    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> live_tokens({"completion_mask": mask, "advantages": torch.tensor([0.5, 0.0])})
    tensor([[ True,  True, False],
            [False, False, False]])
    ```
    """
    advantages = batch["advantages"]
    advantages_BT = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
    live_BT = own_tokens(batch) & (advantages_BT != 0)
    residue_B = batch.get(RESIDUE)
    return live_BT if residue_B is None else live_BT & (advantages_BT != residue_B.unsqueeze(1))


def tokens_stand_alone(args: "GRPOConfig") -> bool:
    """Whether no option ties the tokens of a completion together, so that those after the last credit can be left out."""
    return (
        args.loss_type != "vespo"
        and args.importance_sampling_level == "token"
        and args.off_policy_mask_threshold is None
    )


def padding_can_go(model: "PreTrainedModel") -> tuple[bool, bool]:
    """
    Whether tokens may be taken off the right and off the left of a batch without a change of what the model says of the
    others. TRL passes no `position_ids`, so left padding counts for a model to which a token's place matters. In doubt it
    stays.
    """
    config = model.config.get_text_config().to_dict()
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [part for part in scaling.values() if isinstance(part, dict)]  # one for each kind of layer
    if any((part.get("rope_type") or part.get("type")) in _LENGTH_DEPENDENT_ROPE for part in (scaling, *kinds)):
        return False, False
    attention = config.get("attn_config") or {}
    relative = bool(
        scaling
        or config.get("rope_theta")
        or config.get("alibi")
        or attention.get("alibi")
        or config.get("model_type") == "bloom"
    )
    layers = {*(config.get("layer_types") or ()), *(config.get("block_types") or ())}
    scaled_by_place = (
        config.get("attn_temperature_tuning")
        or "llama_4_scaling_beta" in scaling
        or any(scaling.get(layer, {}) is None for layer in layers)  # instead of rotary positions
    )
    adapters = (getattr(model, "peft_config", None) or {}).values()
    # Virtual tokens stand in front of the padding
    learns_prompt = any(adapter.is_prompt_learning or adapter.is_adaption_prompt for adapter in adapters)
    stays = scaled_by_place or learns_prompt or layers - _RELATIVE_LAYERS
    return True, relative and not stays


def count_live_rows(batches: Sequence[Batch]) -> Tensor:
    """How many rows with credit each micro-batch holds, shape `(N,)`."""
    return torch.stack([live_tokens(batch).any(dim=1).sum() for batch in batches])


def smaller_batches(
    batches: Sequence[Batch],
    n_live: int,
    loss_type: str,
    cut_tokens: bool = True,
    cut_right: bool = True,
    cut_left: bool = True,
    multiple: int | None = None,
) -> list[dict[str, Any]]:
    """
    Micro-batches with the same gradient and fewer rows and tokens, as many as there were.

    Rows with credit are sorted by where their credit ends and spread evenly, so that rows of like length share a batch.
    The places that are left over are filled with rows without credit: every rank needs the same number of rows in every
    micro-batch, because TRL gathers one number per row. Rows take their images along.

    Args:
        batches (`Sequence[dict]`):
            Micro-batches of one optimizer step, all with the same number of rows. Of the loss "bnpo", which divides by
            the tokens of a micro-batch, only one at a time.
        n_live (`int`):
            Number of rows with credit in them, the largest of all ranks.
        loss_type (`str`):
            TRL's `loss_type`, which says what the mean is taken over.
        cut_tokens (`bool`):
            Whether tokens after the last credit may be left out, and not only padding.
        cut_right, cut_left (`bool`):
            Whether anything may be taken off that side of the batch.
        multiple (`int`, *optional*):
            Prompts and completions keep a length that is a multiple of it, TRL's `pad_to_multiple_of`.

    Raises:
        ValueError: If there are several micro-batches and the loss is "bnpo".
    """
    if len(batches) > 1 and loss_type == "bnpo":
        raise ValueError("The loss 'bnpo' divides by the tokens of a micro-batch, so rows cannot change places.")
    n_rows, n_batches = len(batches[0]["completion_mask"]), len(batches)
    n_kept = max(1, -(-n_live // n_batches))  # rounded up
    whole = _joined(batches)
    live_BT = live_tokens(whole)
    live_B = live_BT.any(dim=1)
    needed_BT = live_BT if cut_tokens else whole["completion_mask"].bool() & live_B.unsqueeze(1)
    needed_BT = needed_BT | _images_of_tools(whole)
    live, ends = live_B.tolist(), (_last_true(needed_BT) + 1).tolist()
    prompts = whole["prompt_mask"].sum(dim=1).tolist()
    # Rows without credit come last, the shortest ones first
    order = sorted(range(len(live)), key=lambda i: (0, -ends[i], prompts[i]) if live[i] else (1, ends[i] + prompts[i]))
    chosen = [order[start : start + n_kept] for start in range(0, n_kept * n_batches, n_kept)]
    n_tokens = int(own_tokens(whole).sum())
    smaller = []
    for rows in chosen:
        batch = {name: _take(value, rows) for name, value in whole.items()}
        n_before_B = own_tokens(batch).sum(dim=1)
        if cut_right:
            _cut_right(batch, max(ends[i] for i in rows), multiple or 1)
        if cut_left:
            _cut_left(batch, multiple or 1)
        factor_B = mean_factor(loss_type, own_tokens(batch), n_before_B, n_rows, n_tokens)
        advantages = batch["advantages"]
        batch["advantages"] = advantages * (factor_B if advantages.dim() == 1 else factor_B.unsqueeze(1))
        if not sum(batch.get("num_images") or ()):  # models refuse an empty tensor of images
            batch = {name: value for name, value in batch.items() if name not in _OF_IMAGES}
        smaller.append(unsplit_pixel_values_by_grid(batch))
    return smaller


def mean_factor(loss_type: str, own_BT: Tensor, n_before_B: Tensor, n_rows: int, n_tokens: int) -> Tensor:
    """
    What the advantages of the kept rows are multiplied by so that the loss is the mean over the batch that was, shape
    `(B,)`.

    - "dapo", "cispo", "vespo": 1. They divide by the tokens of the round, which stay.
    - "grpo", "sapo": a row's kept tokens over its tokens, times kept rows over rows.
    - "dr_grpo", "luspo": kept rows over rows.
    - "bnpo": kept tokens over tokens.

    Args:
        own_BT (`torch.Tensor` of shape `(B, T)`):
            Which tokens of the kept rows are left and count.
        n_before_B (`torch.Tensor` of shape `(B,)`):
            How many each of these rows had.
        n_rows (`int`), n_tokens (`int`):
            Rows and tokens of the micro-batch that was.

    Example:

    ```python
    >>> own = torch.tensor([[True, True], [True, False]])
    >>> mean_factor("grpo", own, torch.tensor([4, 2]), n_rows=8, n_tokens=20)
    tensor([0.1250, 0.1250])
    ```
    """
    ones_B = torch.ones(len(own_BT), device=own_BT.device)
    share = len(own_BT) / n_rows
    if loss_type in ("grpo", "sapo"):
        return own_BT.sum(dim=1) / n_before_B.clamp(min=1) * share
    if loss_type in ("dr_grpo", "luspo"):
        return ones_B * share
    if loss_type == "bnpo":
        return ones_B * (own_BT.sum().clamp(min=1) / max(n_tokens, 1))
    return ones_B


def _joined(batches: Sequence[Batch]) -> dict[str, Any]:
    """The micro-batches of a round, which have the same keys, as one, with one entry per row."""
    joined: dict[str, Any] = {}
    for name, first in batches[0].items():
        values: list[Any] = [batch[name] for batch in batches]
        if isinstance(first, Tensor) and first.dim() > 0:
            joined[name] = torch.cat(values)
        elif isinstance(first, list):
            joined[name] = [value for part in values for value in part]
        else:  # a number for the whole round, or None
            joined[name] = first
    # Images with such a mask have one entry per row already. TRL goes by numbers, and takes them for one entry per image
    # if there are as many images as rows
    one_per_row = "pixel_attention_mask" in joined and "spatial_shapes" not in joined
    return joined if one_per_row else split_pixel_values_by_grid(joined)


def _images_of_tools(batch: Batch) -> Tensor:
    """Which tokens of the completions stand for an image, boolean, shape `(B, T)`: a model refuses an image without them."""
    found_BT = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
    for name in _OF_BOTH:
        if batch.get(name) is not None:
            found_BT |= batch[name][:, -found_BT.shape[1] :] != 0
    return found_BT


def _take(value: Any, rows: list[int]) -> Any:
    if isinstance(value, list):
        return [value[i] for i in rows]
    return value[rows] if isinstance(value, Tensor) and value.dim() > 0 else value


def _cut_right(batch: dict[str, Any], end: int, multiple: int) -> None:
    """Takes off what comes after the first `end` tokens of the completions, at least one of them, in place."""
    length = batch["completion_ids"].shape[1]
    n = length - min(length, -(-max(1, end) // multiple) * multiple)
    for name in (*_OF_COMPLETION, *_OF_BOTH):
        value = batch.get(name)
        if n == 0 or value is None or value.dim() == 1:
            continue
        if name in _OF_BOTH or value.shape[1] == length:  # a ratio may be one number per completion
            batch[name] = value[:, :-n]


def _cut_left(batch: dict[str, Any], multiple: int) -> None:
    """Takes off the padding in front of all prompts, in place."""
    starts_B = batch["prompt_mask"].long().argmax(dim=1)
    n = int(starts_B.min()) // multiple * multiple
    for name in (*_OF_PROMPT, *_OF_BOTH):
        if n and batch.get(name) is not None:
            batch[name] = batch[name][:, n:]


def _last_true(values_BT: Tensor) -> Tensor:
    """Index of the last true value in each row, -1 where there is none, shape `(B,)`."""
    places_T = torch.arange(1, values_BT.shape[1] + 1, device=values_BT.device)
    return (values_BT * places_T).amax(dim=1) - 1
