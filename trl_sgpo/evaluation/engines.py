"""
What answers problems: a model that transformers or vLLM runs in this process. A server is asked in `server.py`.

Left out: continuous batching with transformers, which waits for the longest answer of a batch. vLLM does not.
"""

import gc
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """How a model is asked, whatever runs it. What has no comment is an argument of the script."""

    max_new_tokens: int
    temperature: float
    top_p: float
    template: str
    system_prompt: str | None
    chat: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def messages(self, problem: str) -> list[dict[str, str]]:
        """
        A problem as a conversation.

        Example:

        ```python
        >>> decoding = Decoding(64, 0.6, 0.95, "{problem} Box it.", None, "auto")
        >>> decoding.messages("1 + 1?")
        [{'role': 'user', 'content': '1 + 1? Box it.'}]
        ```
        """
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        # Not str.format: templates hold the braces of \boxed{}
        return [*system, {"role": "user", "content": self.template.replace("{problem}", problem)}]

    def plain(self, problem: str) -> str:
        """A problem as a text to go on with, for a model without a chat template."""
        return "\n\n".join(message["content"] for message in self.messages(problem)) + "\n"

    def seed_of(self, *parts: Any) -> int:
        """A seed that depends on what is asked and on nothing before it, so that a resumed run draws the same samples."""
        text = "\n".join(map(str, (self.seed, *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Sample:
    """One answer: its text, its tokens (None if a server does not count), whether it was cut off at `max_new_tokens`."""

    text: str
    tokens: int | None
    cut: bool


@dataclass(frozen=True)
class Question:
    """A problem to answer and the seed of its samples."""

    problem: str
    seed: int


class Engine(ABC):
    """One model, ready to answer. `is_chat` says whether it is asked in a conversation, or goes on with a plain text."""

    is_chat: bool

    @abstractmethod
    def answer(self, questions: Sequence[Question], n: int) -> list[list[Sample] | str]:
        """Per question `n` samples, or one greedy answer if `n` is 0; or the reason why there are none."""

    def close(self) -> None:  # noqa: B027  # a server has nothing to free
        """Frees the memory of the model."""


class TransformersEngine(Engine):
    """
    A model that transformers runs: a folder, a name on the Hub, or a PEFT adapter. With one and the same batch, machine and
    seed the samples are the same ones.
    """

    def __init__(self, model: str, decoding: Decoding, batch_size: int, engine_args: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.decoding = decoding
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(model)
        self.is_chat = is_asked_in_chat(self.tokenizer, decoding.chat)
        on_gpu = torch.cuda.is_available()
        defaults: dict[str, Any] = {"dtype": torch.bfloat16 if on_gpu else torch.float32}
        if on_gpu:
            defaults["device_map"] = "auto"
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, **{**defaults, **engine_args})
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"models: {model!r} could not be loaded: {error}") from error
        loaded.eval()
        own = loaded.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        self.ends = sorted({id for id in [*ends, self.tokenizer.eos_token_id] if id is not None})
        ids = (self.tokenizer.pad_token_id, *self.ends, 0)
        self.pad_id = next(id for id in ids if id is not None)
        # A new one: what the model's own says of sampling (a repetition penalty, top_k) is no setting of this evaluation
        loaded.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=self.ends or None, pad_token_id=self.pad_id
        )
        self.model: Any = loaded

    def answer(self, questions: Sequence[Question], n: int) -> list[list[Sample] | str]:
        import torch

        prompts = [prompt_ids(self.tokenizer, question.problem, self.decoding) for question in questions]
        rows = [ids for ids in prompts for _ in range(n or 1)]
        torch.manual_seed(questions[0].seed)
        samples: list[Sample] = []
        for start in range(0, len(rows), self.batch_size):
            samples += self._write(rows[start : start + self.batch_size], sampling=n > 0)
        return [samples[i : i + (n or 1)] for i in range(0, len(samples), n or 1)]

    def _write(self, rows: list[list[int]], sampling: bool) -> list[Sample]:
        import torch

        from trl_sgpo.judges.batches import pad

        input_ids, mask = (tensor.to(self.model.device) for tensor in pad(rows, self.pad_id, "left"))
        how: dict[str, Any] = {"do_sample": False}
        if sampling:
            how = {
                "do_sample": True,
                "temperature": self.decoding.temperature,
                "top_p": self.decoding.top_p,
                "top_k": 0,
            }
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=input_ids, attention_mask=mask, max_new_tokens=self.decoding.max_new_tokens, **how
            )[:, input_ids.shape[1] :].tolist()
        samples = []
        for ids in written:
            end = next((i for i, id in enumerate(ids) if id in self.ends), None)
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            samples.append(Sample(text, len(ids) if end is None else end + 1, end is None))
        return samples

    def close(self) -> None:
        import torch

        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class VLLMEngine(Engine):
    """A model that vLLM runs on this machine. `engine_args` are arguments of `vllm.LLM`."""

    def __init__(self, model: str, decoding: Decoding, engine_args: Mapping[str, Any]) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError("engine='vllm' needs vLLM: `pip install trl-sgpo[vllm]`.") from error
        if (Path(model) / "adapter_config.json").exists():
            raise ValueError(
                f"models: {model!r} is an adapter. Merge it into its base for engine='vllm', or use engine='transformers'."
            )
        self.decoding = decoding
        self.tokenizer = load_tokenizer(model)
        self.is_chat = is_asked_in_chat(self.tokenizer, decoding.chat)
        self.llm: Any = LLM(model=model, **engine_args)

    def answer(self, questions: Sequence[Question], n: int) -> list[list[Sample] | str]:
        from vllm import SamplingParams
        from vllm.platforms import current_platform

        # On a CPU vLLM fails with a seed as soon as it reads a prompt in parts. Its own one decides there
        seeded = n > 0 and not current_platform.is_cpu()
        prompts = [
            {"prompt_token_ids": prompt_ids(self.tokenizer, question.problem, self.decoding)} for question in questions
        ]
        settings = [
            SamplingParams(
                n=n or 1,
                temperature=self.decoding.temperature if n else 0.0,
                top_p=self.decoding.top_p if n else 1.0,
                max_tokens=self.decoding.max_new_tokens,
                seed=question.seed if seeded else None,
            )
            for question in questions
        ]
        outputs = self.llm.generate(prompts, settings, use_tqdm=False)
        return [
            [Sample(one.text, len(one.token_ids), one.finish_reason == "length") for one in output.outputs]
            for output in outputs
        ]

    def close(self) -> None:
        del self.llm
        gc.collect()


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, or that of its base, for an adapter's folder without one."""
    import json

    from transformers import AutoTokenizer

    folder = Path(model)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "tokenizer_config.json").exists():
        model = json.loads(adapter.read_text())["base_model_name_or_path"]
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"models: the tokenizer of {model!r} could not be loaded: {error} Give a name on the Hub, or a folder with the "
            "tokenizer's files beside the weights."
        ) from error


def is_asked_in_chat(tokenizer: Any, chat: str) -> bool:
    """Whether a model is asked with its chat template. `chat="on"` without a template is a `ValueError`."""
    has_template = tokenizer.chat_template is not None
    if chat == "on" and not has_template:
        raise ValueError("chat='on', but the tokenizer has no chat template. Use chat='auto' or chat='off'.")
    return chat != "off" and has_template


def prompt_ids(tokenizer: Any, problem: str, decoding: Decoding) -> list[int]:
    """The token ids that a model goes on from."""
    if is_asked_in_chat(tokenizer, decoding.chat):
        text = tokenizer.apply_chat_template(
            decoding.messages(problem), tokenize=False, add_generation_prompt=True, **decoding.chat_template_kwargs
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(decoding.plain(problem))["input_ids"])
