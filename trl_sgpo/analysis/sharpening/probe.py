"""
Sampling from the model of a GRPOTrainer, and its log-probabilities, without leaving a trace in its training. The work
is cut into batches that do not depend on the number of ranks, each with its own seed. So one rank and several ranks
draw the same samples, if the generation uses torch's seed. Left out: images, tools, environments and rollout
functions, because they need more than one call of the generation.
"""

import copy
import hashlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


# Attributes of each module that are put back; TRL's generation switches checkpointing off and on again
_MODULE_FLAGS = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
# Attributes of the trainer that are put back
_TRAINER_FIELDS = ("_step", "_buffered_inputs", "num_generations_eval", "_current_train_step_time")


class Stopwatch:
    """Seconds per named part: `with watch("generate"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start


@dataclass
class Sample:
    """One completion of a probe prompt. Log-probabilities are in nats, summed over the tokens."""

    prompt_id: int
    sample: int  # its number among the samples of the prompt
    text: str  # without special tokens
    completion: Any  # in the form that reward functions get
    token_ids: list[int]  # with the end token
    logp_policy: float | None = None
    logp_base: float | None = None
    k3: float | None = None  # sum of `k3_terms` over the tokens
    entropy: float | None = None  # the policy's, summed over the tokens
    correct: bool | None = None
    process_correct: bool | None = None  # correct, and every step too
    scored: bool = False  # the outcome reward gave a number
    judged: bool = False  # the judge gave a verdict

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class Batch:
    """
    One call of the generation. `rows` are pairs (prompt_id, sample); only the first `keep` rows count, the others fill
    up the batch.
    """

    index: int
    rows: list[tuple[int, int]]
    keep: int
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    logps: list[Tensor] = field(default_factory=list)  # per token
    base_logps: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)


def plan_batches(
    n_prompts: int, n_samples: int, batch_size: int, n_ranks: int = 1, distinct_prompts: bool = False
) -> list[Batch]:
    """
    Cuts the work into batches of equal size; rank r of R takes the batches r, r + R, ... Every rank gets the same
    number of batches, and some batches may keep no row.

    The default goes prompt by prompt, so the rows of a batch have similar lengths, and the plan does not depend on
    `n_ranks`. `distinct_prompts` goes sample by sample: among the batches that the ranks work on at the same time, no
    prompt comes twice. vLLM needs this, because equal prompts with equal seeds would give equal samples.

    ```python
    >>> [batch.rows[: batch.keep] for batch in plan_batches(n_prompts=2, n_samples=3, batch_size=4)]
    [[(0, 0), (0, 1), (0, 2), (1, 0)], [(1, 1), (1, 2)]]
    ```
    """
    if distinct_prompts:
        size = min(batch_size, -(-n_prompts // n_ranks))
        per_sample = -(-n_prompts // size)
        per_sample += -per_sample % n_ranks
        chunks = [
            [(prompt, sample) for prompt in range(start * size, min((start + 1) * size, n_prompts))]
            for sample in range(n_samples)
            for start in range(per_sample)
        ]
    else:
        rows = [(prompt, sample) for prompt in range(n_prompts) for sample in range(n_samples)]
        size = min(batch_size, len(rows))
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        chunks += [[]] * (-len(chunks) % n_ranks)
    return [
        Batch(index, chunk + (chunk[:1] or [(0, 0)]) * (size - len(chunk)), len(chunk))
        for index, chunk in enumerate(chunks)
    ]


def seed_of(*parts: object) -> int:
    """A seed in [0, 2^31) from values that can be printed."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


@contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """
    Inside this context the policy is in eval mode, and the trainer's records are set aside. Afterwards everything that
    training depends on is as before, whatever happened inside: random states, the mode and the checkpointing of every
    module, `use_cache`, counters, buffers and metrics.
    """
    roots = (trainer.model, trainer.model_wrapped)
    modules = {id(module): module for root in roots for module in root.modules()}
    flags = [
        (module, {name: module.__dict__[name] for name in _MODULE_FLAGS if name in module.__dict__})
        for module in modules.values()
    ]
    fields = {name: getattr(trainer, name) for name in _TRAINER_FIELDS}
    records = trainer._metrics, trainer._pending_metrics, trainer._pending_extra_logs
    tokens_seen = trainer.state.num_input_tokens_seen
    config = trainer.model.config
    use_cache = getattr(config, "use_cache", None)
    vllm = getattr(trainer, "vllm_generation", None)
    vllm_kwargs = vllm.generation_kwargs if vllm is not None else None
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._pending_metrics, trainer._pending_extra_logs = defaultdict(list), defaultdict(list)
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        trainer._metrics, trainer._pending_metrics, trainer._pending_extra_logs = records
        trainer.state.num_input_tokens_seen = tokens_seen
        for name, value in fields.items():
            setattr(trainer, name, value)
        for module, values in flags:
            for name, value in values.items():
                setattr(module, name, value)
        if use_cache is not None:
            config.use_cache = use_cache
        if vllm is not None:
            vllm.generation_kwargs = vllm_kwargs
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if device_states is not None:
            torch.cuda.set_rng_state_all(device_states)


class Probe:
    """
    Draws the same number of samples for each prompt of a set (strings, or lists of messages), in batches of the size
    in training by default. Every rank has to use it, inside [`undisturbed`].
    """

    def __init__(
        self, trainer: Any, prompts: Sequence[Any], n_samples: int, batch_size: int | None = None, seed: int = 0
    ) -> None:
        self.trainer = trainer
        self.prompts = list(prompts)
        self.n_samples = n_samples
        self.batch_size = batch_size or trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        self.seed = seed

    def draw(self, stream: str, watch: Stopwatch, description: str | None = None) -> list[Batch]:
        """
        Generates this rank's share of the samples. Another `stream` gives independent samples. Without a `description`
        there is no progress bar.
        """
        from tqdm.auto import tqdm

        accelerator, by_sample = self.trainer.accelerator, bool(self.trainer.use_vllm)
        rank, n_ranks = accelerator.process_index, accelerator.num_processes
        plan = plan_batches(len(self.prompts), self.n_samples, self.batch_size, n_ranks, distinct_prompts=by_sample)
        mine = plan[rank::n_ranks]
        quiet = description is None or rank > 0 or self.trainer.args.disable_tqdm
        with watch("generate"):
            for batch in tqdm(mine, desc=description, disable=quiet):
                # Ranks that share one vLLM engine need one seed: that of the sample on which they all work
                seed = seed_of(self.seed, stream, batch.rows[0][1] if by_sample else batch.index)
                self._generate(batch, seed)
        return mine

    def _generate(self, batch: Batch, seed: int) -> None:
        trainer = self.trainer
        torch.manual_seed(seed)
        if trainer.use_vllm:
            trainer.num_generations_eval = 1
            trainer.vllm_generation.generation_kwargs = {**trainer.vllm_generation.generation_kwargs, "seed": seed}
        # Only these three parts of the output are used; a contract test pins their places
        output = trainer._generate([self.prompts[prompt] for prompt, _ in batch.rows])
        batch.prompt_ids, batch.completion_ids, batch.completions = output[0], output[1], output[3]

    def add_logps(self, batches: Sequence[Batch]) -> None:
        """Log-probabilities and entropies of the batches' tokens under the current policy."""
        for batch in batches:
            batch.logps, batch.entropies = token_logps(
                self.trainer, self.trainer.model, batch.prompt_ids, batch.completion_ids, entropy=True
            )

    def add_base_logps(self, batches: Sequence[Batch], model: Any) -> None:
        """Log-probabilities of the batches' tokens under `model`."""
        for batch in batches:
            batch.base_logps, _ = token_logps(self.trainer, model, batch.prompt_ids, batch.completion_ids)

    def samples(self, batches: Sequence[Batch]) -> list[Sample]:
        """The samples of the batches, without the rows that only fill them up."""
        found = []
        for batch in batches:
            texts = self.trainer.processing_class.batch_decode(batch.completion_ids, skip_special_tokens=True)
            for i, (prompt, number) in enumerate(batch.rows[: batch.keep]):
                sample = Sample(prompt, number, texts[i], batch.completions[i], batch.completion_ids[i])
                if batch.logps:
                    sample.logp_policy = float(batch.logps[i].sum())
                    sample.entropy = float(batch.entropies[i].sum())
                if batch.base_logps:
                    sample.logp_base = float(batch.base_logps[i].sum())
                if batch.logps and batch.base_logps:
                    sample.k3 = float(k3_terms(batch.logps[i], batch.base_logps[i]).sum())
                found.append(sample)
        return found


def k3_terms(policy_logps: Tensor, base_logps: Tensor) -> Tensor:
    """
    `exp(-d) - 1 + d` with `d = log pi - log q` of a token. Over tokens that the policy sampled, the mean is KL(policy,
    base) per token in nats. No term is negative. The mean is unbiased if the base gives every sampled token some
    probability.
    """
    d = policy_logps - base_logps
    return torch.exp(-d) - 1 + d


@torch.no_grad()
def token_logps(
    trainer: Any,
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    entropy: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """
    Log-probability of every completion token, in nats, and its entropy if it is wanted: one float64 tensor per row.
    They come from the trainer's own forward pass: at the sampling temperature, over the whole vocabulary (`top_p`,
    `top_k` and `min_p` do not truncate it), with the end token. A reference model gives no entropies.
    """
    device, pad = trainer.accelerator.device, trainer._tokenizer.pad_token_id
    longest_prompt, longest_completion = max(map(len, prompt_ids)), max([1, *map(len, completion_ids)])
    input_ids = torch.full((len(prompt_ids), longest_prompt + longest_completion), pad)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        written = slice(longest_prompt - len(prompt), longest_prompt + len(completion))
        input_ids[row, written] = torch.tensor([*prompt, *completion])
        mask[row, written] = 1
    logps, entropies, *_ = trainer._get_per_token_logps_and_entropies(
        model,
        input_ids.to(device),
        mask.to(device),
        longest_completion,
        batch_size=max(trainer.args.per_device_train_batch_size, trainer.args.per_device_eval_batch_size),
        compute_entropy=entropy,
    )

    def rows(values: Tensor) -> list[Tensor]:
        return [row[: len(ids)].double() for row, ids in zip(values.float().cpu(), completion_ids, strict=True)]

    return rows(logps), rows(entropies) if entropy else []


def sampling_settings(trainer: Any) -> dict[str, Any]:
    """How the trainer samples, for base and policy alike."""
    return {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k,
        "min_p": trainer.min_p,
        "repetition_penalty": trainer.repetition_penalty,
        "max_completion_length": trainer.max_completion_length,
        "generation_kwargs": copy.deepcopy(trainer.args.generation_kwargs),
        "backend": "vllm" if trainer.use_vllm else "transformers",
    }
