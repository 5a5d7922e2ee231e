"""
Annotated RewriteChain solutions for `judge_train`: where is the first wrong step?

    python recipes/judge/make_data.py

Writes `train.jsonl`, `test_noise.jsonl` and `test_policy.jsonl` to outputs/judge. Half of the training solutions are corrupted
right ones. Half are samples of the quickstart's base model, which is what the judge will see. The base model is made here if it
is missing. The annotator is the task itself. The judge never sees it.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_sgpo.tasks.rewrite_chain import (
    OPERATIONS,
    SEPARATOR,
    PretrainConfig,
    Problem,
    load_or_pretrain,
    sample_problem,
    segment_blocks,
)


BASE = PretrainConfig(noise=0.85)  # as in the quickstart
N_OPERATIONS = 5
NOISES = (0.0, 0.05, 0.1, 0.2, 0.4)
TEMPERATURES = (0.0, 0.3, 0.6, 1.0)  # 0 is greedy: the right solutions of the policy


def first_error(problem: Problem, steps: Sequence[str]) -> int:
    """
    The annotation: the first block that is not the right one, or that comes after the place where the solution should have
    ended. If the solution ends too early, its last block. -1 if nothing is wrong.

    If a solution has the wrong number of blocks, the task's own checker (`first_wrong_block`) calls it wrong from its first
    block on. A judge that scores steps from left to right cannot know this at the first block, so it is taught what it can see.
    """
    gold = problem.gold_blocks()
    for i, step in enumerate(steps):
        if i >= len(gold) or step.strip().removesuffix(SEPARATOR).split() != gold[i].split():
            return i
    finished = len(steps) == len(gold) and not steps[-1].rstrip().endswith(SEPARATOR)
    return -1 if finished else len(steps) - 1


def corrupted(problem: Problem, rng: random.Random) -> str:
    """A solution with wrong letters, and sometimes with blocks that are missing, too many or malformed."""
    blocks = problem.blocks(rng.choice(NOISES), rng)
    if rng.random() < 0.2:
        i = rng.randrange(len(blocks))
        words = blocks[i].split()
        kind = rng.choice(("cut", "extra", "skip", "operation", "letter", "swap"))
        if kind == "cut":
            blocks = blocks[: max(i, 1)]
        elif kind == "extra":
            blocks.append(blocks[-1])
        elif kind == "skip" and len(blocks) > 1:
            del blocks[i]
        elif kind == "operation" and i < len(blocks) - 1:
            place = rng.randrange(BASE.length, len(words))
            words[place : place + 1] = rng.choice(([], [f"[{rng.choice(OPERATIONS)}]"], [words[place]] * 2))
            blocks[i] = " ".join(words)
        elif kind == "letter":
            place = rng.randrange(BASE.length)
            words[place : place + 1] = rng.choice(([], [words[place]] * 2))
            blocks[i] = " ".join(words)
        else:
            words[0], words[1] = words[1], words[0]
            blocks[i] = " ".join(words)
    return f" {SEPARATOR} ".join(blocks)


def sampled(model, tokenizer, problems: Sequence[Problem], temperature: float, batch_size: int = 512) -> Iterator[str]:
    """One completion of the policy per problem."""
    settings = GenerationConfig(
        max_new_tokens=40,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
    )
    for start in range(0, len(problems), batch_size):
        batch = tokenizer([p.prompt for p in problems[start : start + batch_size]], return_tensors="pt", padding=True)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        ids = model.generate(**inputs, generation_config=settings)
        yield from tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def row(problem: Problem, text: str) -> dict | None:
    steps = [text[start:end] for start, end in segment_blocks(text)]
    if not steps:
        return None
    first = first_error(problem, steps)
    labels = [first < 0 or i < first for i in range(len(steps))]
    return {"prompt": problem.prompt, "completions": steps, "labels": labels}


def write(path: Path, rows: Sequence[dict | None]) -> None:
    kept = [one for one in rows if one is not None]
    path.write_text("".join(json.dumps(one) + "\n" for one in kept))
    wrong = sum(not all(one["labels"]) for one in kept)
    print(f"{path}: {len(kept)} solutions, {wrong} with an error")


def problems_of(seed: int, n: int) -> list[Problem]:
    rng = random.Random(seed)
    return [sample_problem(rng, N_OPERATIONS, BASE.length) for _ in range(n)]


def policy_rows(model, tokenizer, problems: Sequence[Problem]) -> list[dict | None]:
    quarter = -(-len(problems) // len(TEMPERATURES))
    rows: list[dict | None] = []
    for i, temperature in enumerate(TEMPERATURES):
        part = problems[i * quarter : (i + 1) * quarter]
        rows += map(row, part, sampled(model, tokenizer, part, temperature))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=Path, default=Path("outputs/quickstart/base"), help="the quickstart's base model"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/judge"), help="folder for the files")
    parser.add_argument("--rows", type=int, default=24_000, help="solutions to train on")
    parser.add_argument("--test-rows", type=int, default=2_000, help="solutions in each test file")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    base = load_or_pretrain(args.base, BASE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    transformers.set_seed(0)
    for name, seed, n_noise, n_policy in (
        ("train", 100, args.rows // 2, args.rows - args.rows // 2),
        ("test_noise", 200, args.test_rows, 0),
        ("test_policy", 201, 0, args.test_rows),
    ):
        rng = random.Random(seed)
        problems = problems_of(seed, n_noise + n_policy)
        rows = [row(problem, corrupted(problem, rng)) for problem in problems[:n_noise]]
        rows += policy_rows(model, tokenizer, problems[n_noise:]) if n_policy else []
        write(args.output / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
