"""Completions of a model, and what they say about it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.pretrained.shared_prompts import generate
from benchmarks.pretrained.tasks import Problem, Task, lenient_answer, right_lines, strict_answer
from trl_sgpo.analysis.metrics import pass_at_k


SAMPLING_BATCH = 128


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    n: int,
    max_new_tokens: int,
    greedy: bool = False,
) -> tuple[list[list[str]], list[int]]:
    """`n` completions of each problem, at temperature 1 from a seed of its own, and the lengths of all in tokens."""
    prompts = [p.row()["prompt"] for p in problems for _ in range(n)]
    texts: list[str] = []
    lengths: list[int] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in range(0, len(prompts), SAMPLING_BATCH):
            inputs = tokenizer.apply_chat_template(
                prompts[start : start + SAMPLING_BATCH],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(model.device)
            found = generate(
                model,
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                do_sample=not greedy,
            )
            completions = found[:, inputs["input_ids"].shape[1] :]
            lengths += (completions != tokenizer.pad_token_id).sum(dim=1).tolist()
            texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [texts[i : i + n] for i in range(0, len(texts), n)], lengths


@dataclass(frozen=True)
class Effort:
    """How much is sampled to measure a model: so many problems, so many samples of each. Some get many, for pass@k."""

    usual: tuple[int, int]
    wide: tuple[int, int] = (0, 0)


EFFORT = {"chains": Effort(usual=(128, 4), wide=(24, 32)), "gsm8k": Effort(usual=(200, 2))}


def score(problems: Sequence[Problem], texts: Sequence[Sequence[str]], lengths: Sequence[int]) -> dict[str, Any]:
    """What a set of completions says: means over problems of the means over their samples."""

    def mean(value: Any) -> float:
        by_problem = [statistics.fmean(value(p, t) for t in some) for p, some in zip(problems, texts, strict=True)]
        return round(statistics.fmean(by_problem), 4)

    return {
        "accuracy": mean(lambda p, t: strict_answer(t) == p.answer),
        "lenient": mean(lambda p, t: lenient_answer(t) == p.answer),
        "right_lines": mean(lambda p, t: right_lines(p.solution, t)),
        "length": round(statistics.fmean(lengths), 1),
    }


def counts(problems: Sequence[Problem], texts: Sequence[Sequence[str]]) -> list[int]:
    """Right completions of each problem."""
    return [sum(strict_answer(t) == p.answer for t in some) for p, some in zip(problems, texts, strict=True)]


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, effort: Effort) -> dict[str, Any]:
    """What a model can do on the held-out problems: sampled, greedy, and pass@k where the task has many samples."""
    (n_problems, n), (n_wide, n_many) = effort.usual, effort.wide
    problems, wide = task.to_test[:n_problems], task.to_test[-n_wide:] if n_wide else []
    texts, lengths = sample(model, tokenizer, problems, n, task.max_completion_length)
    greedy, greedy_lengths = sample(model, tokenizer, problems, 1, task.max_completion_length, greedy=True)
    found = {
        "sampled": score(problems, texts, lengths),
        "greedy": score(problems, greedy, greedy_lengths),
        "samples": n,
        "right": counts(problems, texts),
        "right_greedy": counts(problems, greedy),
    }
    if wide:
        many, _ = sample(model, tokenizer, wide, n_many, task.max_completion_length)
        right = counts(wide, many)
        ks = [2**i for i in range(n_many.bit_length())]
        found["pass"] = {k: round(float(pass_at_k([n_many] * n_wide, right, k).mean()), 4) for k in ks}
    return found
