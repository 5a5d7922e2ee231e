"""
Process reward models as a body and a head. In every family a score is the head's output for the hidden state at one
position. So the body runs once per completion, and the head only at the positions of the scores. A causal LM's logits
over the whole vocabulary are never computed.

This file imports transformers, so nothing imports it before a model is loaded.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from trl_sgpo.judges.prm.encoder import single_token
from trl_sgpo.judges.prm.spec import PRMSpec


# Some architectures change the logits after the output embeddings. By setting: the value that changes nothing
_LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}


class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
    """
    Qwen2.5-Math-PRM and Qwen2.5-Math-7B-PRM800K: Qwen2 with a two-layer head of two labels.

    The checkpoints come with code of their own, which fails on recent versions of transformers. This is the same model
    with the same names of weights, so no code from the Hub is run.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU(), nn.Linear(config.hidden_size, 2)
        )
        self.post_init()


def load_body_and_head(
    path: str, config: Any, spec: PRMSpec, tokenizer: Any, **kwargs: Any
) -> tuple[PreTrainedModel, nn.Module]:
    """Loads a model from the Hub or a folder, inside `outside_deepspeed()`. `kwargs` go to `from_pretrained`."""
    if spec.head == "value_head":
        # TRL's `AutoModelForCausalLMWithValueHead` and similar classes save it, with a prefix of the names or without
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # else it reports the head as unexpected weights
        try:
            body, info = AutoModel.from_pretrained(
                path, config=config, key_mapping={r"^pretrained_model\.": ""}, output_loading_info=True, **kwargs
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
        _check_nothing_is_missing(path, spec, info)
        return body, _load_value_head(path, kwargs.get("revision"))
    if spec.head == "causal_lm":
        auto: Any = AutoModelForCausalLM
    elif any(str(name).endswith("ForProcessRewardModel") for name in config.architectures or []):
        auto = Qwen2ForProcessRewardModel
        kwargs.pop("trust_remote_code", None)
    else:
        auto = AutoModelForTokenClassification
    model, info = auto.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    _check_nothing_is_missing(path, spec, info)
    return body_and_head(model, spec, tokenizer)


def body_and_head(model: Any, spec: PRMSpec, tokenizer: Any) -> tuple[PreTrainedModel, nn.Module]:
    """The body of a loaded model and a copy of its head in float32. A `ValueError` if it has no such head."""
    if hasattr(model, "get_base_model"):  # PEFT puts its layers into the model, and a wrapper around it
        model = model.get_base_model()
    inner = getattr(model, "pretrained_model", model)  # TRL's models with a value head
    body = inner.base_model
    if spec.head == "value_head":
        head = getattr(getattr(model, "v_head", None), "summary", getattr(model, "v_head", None))
    elif spec.head == "token_classification":
        head = getattr(model, "score", getattr(model, "classifier", None))
    else:
        head = _verdict_rows(inner, spec, tokenizer)
    if head is None:
        raise ValueError(
            f"model is a {type(model).__name__}, which has no head for head={spec.head!r}: a module `score` or "
            "`classifier` (token_classification), `v_head` (value_head), output embeddings (causal_lm). Give its spec."
        )
    # A score is compared with a threshold, and bfloat16 has only eight bits for it. The head is small, so float32 is
    # cheap
    return body, copy.deepcopy(head).float().eval().requires_grad_(False)


def _verdict_rows(model: Any, spec: PRMSpec, tokenizer: Any) -> nn.Linear | None:
    """Two rows of a causal LM's output embeddings as a head: those of the tokens for a wrong and for a right step."""
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        return None
    config = model.config.get_text_config()
    for name, neutral in _LOGIT_TRANSFORMS.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None):
            raise ValueError(
                f"model is a {type(model).__name__} that changes its logits after the output embeddings "
                f"({name}={value}). This is not supported. Use a model without it, or another judge."
            )
    ids = [single_token(tokenizer, getattr(spec, name), name) for name in ("negative", "positive")]
    bias = getattr(embeddings, "bias", None)
    head = nn.Linear(embeddings.weight.shape[1], 2, bias=bias is not None)
    with torch.no_grad():
        head.weight.copy_(embeddings.weight[ids])
        if bias is not None:
            head.bias.copy_(bias[ids])
    return head.to(embeddings.weight.device)


def _load_value_head(path: str, revision: str | None) -> nn.Linear:
    tensors = _read_tensors(path, revision, "v_head.summary.")
    if "weight" not in tensors:
        raise ValueError(
            f"model={path!r} has no weights `v_head.summary.weight`, as head='value_head' needs. Give its own spec."
        )
    n_labels, n_inputs = tensors["weight"].shape
    head = nn.Linear(n_inputs, n_labels, bias="bias" in tensors)
    head.load_state_dict(tensors)
    return head.eval().requires_grad_(False)


def _read_tensors(path: str, revision: str | None, mark: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with `mark` in their names, by the rest of the name. No other tensors are read."""

    def find(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    for single in ("model.safetensors", "pytorch_model.bin"):
        names = [single]
        if (index := find(f"{single}.index.json")) is not None:
            weight_map = json.loads(Path(index).read_text())["weight_map"]
            names = sorted({file for name, file in weight_map.items() if mark in name})
        found: dict[str, torch.Tensor] = {}
        for file in filter(None, map(find, names)):
            if file.endswith(".safetensors"):
                from safetensors import safe_open

                with safe_open(file, framework="pt") as tensors:
                    found |= {name: tensors.get_tensor(name) for name in tensors.keys() if mark in name}  # noqa: SIM118
            else:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                found |= {name: tensor.clone() for name, tensor in loaded.items() if mark in name}
        if found:
            return {name.split(mark, 1)[1]: tensor for name, tensor in found.items()}
    return {}


def _check_nothing_is_missing(path: str, spec: PRMSpec, info: dict[str, Any]) -> None:
    # transformers would continue with random weights, and the scores of a random head look like any others
    wrong = sorted({*map(str, info["missing_keys"]), *(str(key[0]) for key in info["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"model={path!r} lacks weights that head={spec.head!r} needs, or has them in another shape: "
            f"{', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}. Give the spec that it was trained with."
        )
