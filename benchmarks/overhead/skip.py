"""
What `skip_dead_tokens` saves: the time of forward and backward passes of one round, as a ratio to GRPOTrainer's.

    python -m benchmarks.overhead.skip

A round has 64 completions of 200 tokens in micro-batches of 16, and prompts of 30. There is no generation and no optimizer. The
two trainers take turns on the same round, and the order of the two turns too. Cases: 0, 50 and 95 % of the completions have
no credit; prefix credit where every group failed (5 steps, mean RTS 0.3), so that every completion has credit up to its first
wrong step.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import provenance, write_results
from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.tasks.rewrite_chain import build_tokenizer


HERE = Path(__file__).parent
PAIRS = 5
N_ROWS, N_BATCHES, PROMPT, LENGTH, VOCABULARY = 64, 4, 30, 200, 4096
N_STEPS = 5
RIGHT_STEPS = (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4)  # mean 1.5 of 5


def dead_rows(share):
    """One advantage per completion, 0 for this share of them."""
    advantages_B = torch.randn(N_ROWS)
    advantages_B[torch.randperm(N_ROWS)[: round(share * N_ROWS)]] = 0.0
    return advantages_B


def prefix_credit():
    """1 on the right steps, -0.5 on the first wrong one, 0 after it."""
    advantages_BT = torch.zeros(N_ROWS, LENGTH)
    size = LENGTH // N_STEPS
    for row_T in advantages_BT:
        right = random.choice(RIGHT_STEPS) * size
        row_T[:right], row_T[right : right + size] = 1.0, -0.5
    return advantages_BT


CASES = {
    "0 % dead": lambda: dead_rows(0.0),
    "50 % dead": lambda: dead_rows(0.5),
    "95 % dead": lambda: dead_rows(0.95),
    "prefix credit, all failed": prefix_credit,
}


def make_trainer(trainer_class, config_class, **settings):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=6,
            num_attention_heads=8,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    args = config_class(
        output_dir="outputs/overhead",
        per_device_train_batch_size=N_ROWS // N_BATCHES,
        gradient_accumulation_steps=N_BATCHES,
        num_generations=8,
        max_completion_length=LENGTH,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        **settings,
    )
    data = Dataset.from_list([{"prompt": "a"}] * N_ROWS)
    trainer = trainer_class(
        model, lambda completions, **kw: [0.0] * len(completions), args, data, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = N_BATCHES
    trainer.model.train()
    return trainer


def make_round(advantages):
    """A round's micro-batches, as TRL splits it."""
    ones = torch.ones(N_ROWS, dtype=torch.long)
    whole = {
        "prompt_ids": torch.randint(10, VOCABULARY, (N_ROWS, PROMPT)),
        "prompt_mask": ones.unsqueeze(1).expand(-1, PROMPT).clone(),
        "completion_ids": torch.randint(10, VOCABULARY, (N_ROWS, LENGTH)),
        "completion_mask": ones.unsqueeze(1).expand(-1, LENGTH).clone(),
        "advantages": advantages,
    }
    size, total = N_ROWS // N_BATCHES, torch.tensor(N_ROWS * LENGTH)
    parts = ({name: value[start : start + size] for name, value in whole.items()} for start in range(0, N_ROWS, size))
    return [{**part, "num_items_in_batch": total} for part in parts]


def seconds(trainer, batches):
    """Forward and backward passes of a round, and what makes it smaller."""
    trainer.model.zero_grad()
    start = time.perf_counter()
    batches = [dict(batch) for batch in batches]
    if isinstance(trainer, SGPOTrainer):
        batches = trainer._live_updates.take_round(batches)
    for batch in batches:
        trainer.accelerator.backward(trainer._compute_loss(trainer.model, batch))
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="rounds of each case, each with a seed of its own")
    pairs = parser.parse_args().pairs
    torch.set_num_threads(2)
    grpo = make_trainer(GRPOTrainer, GRPOConfig)
    sgpo = make_trainer(SGPOTrainer, SGPOConfig, skip_dead_tokens=True)
    n_parameters = sum(value.numel() for value in grpo.model.parameters())
    result = {**provenance(("trl", "transformers", "torch")), "parameters": n_parameters, "pairs": pairs}
    seconds(grpo, make_round(dead_rows(0.0)))  # what is made once
    for case, advantages in CASES.items():
        ratios, of_grpo = [], []
        for seed in range(pairs):
            torch.manual_seed(seed)
            random.seed(seed)
            batches = make_round(advantages())
            order = (grpo, sgpo) if seed % 2 == 0 else (sgpo, grpo)
            taken = {trainer: seconds(trainer, batches) for trainer in order}
            ratios.append(taken[sgpo] / taken[grpo])
            of_grpo.append(taken[grpo])
        result[case] = {
            "ratio_median": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "grpo_seconds_median": statistics.median(of_grpo),
        }
        print(f"{case}: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]", file=sys.stderr)
    write_results(HERE / "skip_results.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
