"""What a model writes and how much of it is right: completions, accuracies, and what the base leaves for a judge to see."""

import argparse
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.real_text.judge import exact_answer, final_answer, make_judge
from benchmarks.real_text.model import DEVICE, load_base
from trl_sgpo import StepwiseJudge


def generate(
    model: Any,
    tokenizer: Any,
    rows: list[dict],
    n: int,
    max_new_tokens: int,
    rows_at_once: int,
    greedy: bool = False,
    seed: int = 0,
) -> list[list[str]]:
    """`n` completions of every row at temperature 1. The random state is left as it was found: training is not touched."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    texts: list[list[str]] = [[] for _ in rows]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        num_return_sequences=n,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            size = max(1, rows_at_once // n)
            for start in range(0, len(order), size):
                indices = order[start : start + size]
                batch = tokenizer([rows[i]["prompt"] for i in indices], return_tensors="pt", padding=True).to(DEVICE)
                with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
                    ids = model.generate(
                        input_ids=batch["input_ids"],
                        attention_mask=batch["attention_mask"],
                        generation_config=settings,
                    )
                decoded = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                for place, i in enumerate(indices):
                    texts[i] = decoded[place * n : (place + 1) * n]
    finally:
        model.train(was_training)
    return texts


def is_correct(rows: list[dict], texts: list[list[str]]) -> list[list[float]]:
    """The outcome of every completion of every row."""
    return [
        exact_answer([row["prompt"]] * len(group), group, [row["solution"]] * len(group))
        for row, group in zip(rows, texts, strict=True)
    ]


def evaluate_test(model: Any, tokenizer: Any, rows: list[dict], n: int, **sampling: int) -> dict[str, list[float]]:
    """Per question: the share of `n` sampled completions that are right, and whether the greedy one is."""
    sampled = is_correct(rows, generate(model, tokenizer, rows, n=n, **sampling))
    greedy = is_correct(rows, generate(model, tokenizer, rows, n=1, greedy=True, **sampling))
    return {
        "test_sampled": [statistics.mean(group) for group in sampled],
        "test_greedy": [group[0] for group in greedy],
    }


def evaluate_base(args: argparse.Namespace, base: Path, parts: dict[str, list[dict]]) -> dict[str, Any]:
    """What the base can do, and whether there is something for a judge to see in the groups that fail."""
    model, tokenizer = load_base(base)
    sampling = {"max_new_tokens": args.max_completion, "rows_at_once": args.generation_rows}
    rows, size = parts["rl"][:256], 8
    texts = generate(model, tokenizer, rows, n=size, **sampling)
    correct = is_correct(rows, texts)
    judge = StepwiseJudge(make_judge())
    failed = [i for i, group in enumerate(correct) if not any(group)]
    untied = 0
    for i in failed:
        prompts, own = [rows[i]["prompt"]] * size, [rows[i]] * size
        found = {judge.rts(score) for score in judge.score(prompts, texts[i], own)} - {None}
        untied += len(found) > 1
    return {
        "group_size": size,
        "failed_groups": len(failed) / len(rows),
        "untied_of_failed": untied / max(1, len(failed)),
        "guess": guess_rate(parts),
        "examples": [
            {"prompt": row["prompt"], "completion": group[0]} for row, group in zip(rows[:4], texts, strict=False)
        ],
        **evaluate_test(model, tokenizer, parts["test"], n=4, **sampling),
    }


def guess_rate(parts: dict[str, list[dict]]) -> float:
    """Probability that an answer drawn from the training questions is that of a test question: the level of luck."""
    train, test = (Counter(final_answer(row["solution"]) for row in parts[part]) for part in ("pretrain", "test"))
    return sum(count * test[answer] for answer, count in train.items()) / (train.total() * test.total())
