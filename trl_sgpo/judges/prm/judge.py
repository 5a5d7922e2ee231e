"""
A process reward model in this process.

There is one forward pass per completion, not one per step. The models are causal, so the score of a step does not
depend on the text after it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_sgpo.judges.base import JudgeItem
from trl_sgpo.judges.batches import pad, token_batches
from trl_sgpo.judges.local_model import LocalModelJudge, context_length
from trl_sgpo.judges.prm.encoder import EncodedSteps, PRMEncoder
from trl_sgpo.judges.prm.scores import StepScorer, checked_rule
from trl_sgpo.judges.prm.spec import PRMSpec


class PRMJudge(LocalModelJudge, StepScorer):
    """
    Judge that scores every step with a process reward model. The first step whose score is below the threshold is the
    error.

    The confidence of a verdict is the probability that the model gives it. For an error that is one minus the score of
    the step (by the rule `"median"`, the step's share), for "no error" the lowest score of all. If a completion is too
    long for the model, the steps that fit are scored. An error among them counts. Without one the judge abstains.

    Args:
        model (`str`, `Path` or `tuple`):
            Hub id or folder of the model, or a loaded model and its tokenizer, `(model, tokenizer)`.
        spec ([`PRMSpec`], *optional*):
            The model's layout. By default the one in its config, or the preset of its architecture or name.
        threshold (`float`, *optional*):
            A step is wrong if its score is below this. Defaults to the spec's. See [`~PRMJudge.calibrate`].
        known_wrong_rule (`str`, *optional*, defaults to `"threshold"`):
            The verdict on a completion that is known to be wrong. `"threshold"`: as on any other one. "No error" is
            then treated as an abstention by [`StepwiseJudge`]. `"argmin"`: the same, but the step with the lowest
            score instead of "no error". Then the judge always answers, but less accurately. `"median"`: the median of
            the first wrong step, whatever the threshold. It has the smallest expected error of the RTS if the scores
            are calibrated probabilities. See [`~trl_sgpo.judges.prm.median_step`].
        max_tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Most tokens of one forward pass, with padding. If a batch does not fit into the memory, it is halved.
        device, dtype, offload (*optional*):
            See [`GenerativeJudge`]. `dtype` is the type of the body's weights. The head is always in float32.
        trust_remote_code, revision (`bool` and `str`, *optional*):
            See [`GenerativeJudge`]. No preset needs code from the Hub.

    Raises:
        TypeError: If `model` is neither a string nor a pair.
        ValueError: If the model cannot be loaded or does not go with the spec, if its config gives no spec, or if
            another argument is out of its range.

    Example:

    ```python
    >>> judge = PRMJudge("Qwen/Qwen2.5-Math-PRM-7B", offload=True)
    >>> trainer = SGPOTrainer(..., reward_funcs=[accuracy_reward, StepwiseJudge(judge)])
    ```
    """

    def __init__(
        self,
        model: str | Path | tuple[Any, Any],
        spec: PRMSpec | None = None,
        threshold: float | None = None,
        known_wrong_rule: str = "threshold",
        max_tokens_per_batch: int = 16384,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        offload: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        if spec is not None and not isinstance(spec, PRMSpec):
            raise TypeError(f"spec={spec!r} is no `PRMSpec`. Give `PRMSpec(...)` or `PRMSpec.preset(name)`.")
        if not max_tokens_per_batch > 0:
            raise ValueError(f"max_tokens_per_batch={max_tokens_per_batch} must be a positive number of tokens.")
        self.spec: PRMSpec
        self._body: Any
        self._head: torch.nn.Module
        self._given_spec = spec
        self.known_wrong_rule = checked_rule(known_wrong_rule)
        self.max_tokens_per_batch = max_tokens_per_batch
        super().__init__(model, None, device, dtype, offload, trust_remote_code, revision)
        if threshold is not None:
            self.threshold = threshold
        self._check_fit()

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self._body, self._head

    def _load_model(self, path: str, **kwargs: Any) -> None:
        from transformers import AutoConfig

        from trl_sgpo.judges.prm.models import load_body_and_head

        source = {name: kwargs[name] for name in ("revision", "trust_remote_code")}
        with self._loading():
            config = AutoConfig.from_pretrained(path, **source)
        self._set_layout(config)
        with self._loading(OSError):
            self._body, self._head = load_body_and_head(path, config, self.spec, self.tokenizer, **kwargs)

    def _take_model(self, model: Any) -> None:
        from trl_sgpo.judges.prm.models import body_and_head

        self._set_layout(model.config)
        self._body, self._head = body_and_head(model, self.spec, self.tokenizer)

    def _set_layout(self, config: Any) -> None:
        self.spec = PRMSpec.from_config(config) if self._given_spec is None else self._given_spec
        self.encoder = PRMEncoder(self.tokenizer, self.spec, context_length(config))

    def _check_fit(self) -> None:
        embeddings = self._body.get_input_embeddings().weight
        self._vocabulary_size = embeddings.shape[0]
        largest = max(self.encoder.layout_ids, default=0)
        if largest >= self._vocabulary_size:
            raise ValueError(
                f"the tokenizer's id {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}) is outside the "
                f"vocabulary of {self.model_name!r}, which has {self._vocabulary_size} entries. Use the model's own."
            )
        weight = next(self._head.parameters())
        n_outputs = self._head(weight.new_zeros(1, self._body.config.get_text_config().hidden_size)).shape[-1]
        if self.spec.positive_index >= n_outputs or (self.spec.activation == "softmax" and n_outputs == 1):
            raise ValueError(
                f"the head of {self.model_name!r} has {n_outputs} outputs, which does not go with "
                f"head={self.spec.head!r}, positive_label={self.spec.positive_label} and activation="
                f"{self.spec.activation!r}. With a single output use positive_label=0 and activation='sigmoid'."
            )

    @property
    def cache_key(self) -> str:
        version = f"{self.revision}, {self._version}, {self._body.dtype}"
        options = f"{version}, known_wrong_rule={self.known_wrong_rule}"
        return f"PRMJudge({self.model_name}, {options}) {self._layout_text()}"

    def _score_encoded(
        self, items: Sequence[JudgeItem], encoded: dict[int, EncodedSteps]
    ) -> dict[int, list[float] | str]:
        results: dict[int, list[float] | str] = {}
        for i, one in encoded.items():
            if max(one.ids) >= self._vocabulary_size:  # on a GPU this would end the process
                results[i] = f"token {max(one.ids)} is outside the model's vocabulary of {self._vocabulary_size}"
        lengths = {i: len(one.ids) for i, one in encoded.items() if i not in results}
        if not lengths:
            return results
        try:
            with self._ready():
                for batch in token_batches(lengths, self.max_tokens_per_batch):
                    scored = self._run(
                        lambda keys: self._forward([encoded[i] for i in keys]),
                        batch,
                        lambda i: f"a completion of {lengths[i]} tokens",
                    )
                    results.update(zip(batch, scored, strict=True))
        except Exception as error:  # the model could not be moved
            self._show_traceback()
            return {i: f"{type(error).__name__}: {error}" for i in encoded} | results
        return results

    def _forward(self, batch: Sequence[EncodedSteps]) -> list[list[float]]:
        input_ids, attention_mask = pad([one.ids for one in batch], self._pad_id, "right")
        counts = [len(one.positions) for one in batch]
        rows = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
        columns = torch.tensor([position for one in batch for position in one.positions])
        hidden = self._body(
            input_ids=input_ids.to(self.device),
            # Without padding there is nothing to mask, and attention may take its fastest path
            attention_mask=None if attention_mask.all() else attention_mask.to(self.device),
            use_cache=False,
        ).last_hidden_state
        logits = self._head(hidden[rows.to(hidden.device), columns.to(hidden.device)].float())  # (n_scores, n_labels)
        shares = logits.sigmoid() if self.spec.activation == "sigmoid" else logits.softmax(dim=-1)
        scores = shares[:, min(self.spec.positive_index, logits.shape[-1] - 1)]
        return [one.tolist() for one in scores.cpu().split(counts)]
