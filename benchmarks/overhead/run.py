"""
What a training step costs with SGPO, as a ratio to GRPO's step on the same rollouts.

    python -m benchmarks.overhead.run

The learning rate is 0, so both trainers see the same completions in every step, and step i of one is compared with step i of
the other. Their rounds alternate, in an order that alternates too, so a machine that slows down slows both. Cases: no failed
group (the judge is never asked); every group failed (a function judges all completions); the same with prefix credit; no
failed group, and both options that leave out what has no credit. The package's own time in its hooks is measured as well. It
is a smaller number, and a steadier one.
"""

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import provenance, write_results
from trl_sgpo import SGPOConfig, SGPOTrainer, StepwiseJudge
from trl_sgpo.tasks.rewrite_chain import (
    PretrainConfig,
    build_model,
    build_tokenizer,
    first_wrong_block,
    make_dataset,
    segment_blocks,
)


ROUNDS, STEPS, WARM_UP = 12, 12, 2
HERE = Path(__file__).parent


def outcome_mixed(prompts, completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


def outcome_failed(prompts, completions, **kwargs):
    return [0.0] * len(completions)


CASES = (
    ("no_failed_group", outcome_mixed, {"failed_groups": "sgpo"}),
    ("every_group_failed", outcome_failed, {"failed_groups": "sgpo"}),
    ("every_group_failed_prefix_credit", outcome_failed, {"failed_groups": "prefix"}),
    # Nothing to leave out: what it costs to look
    ("no_failed_group_skipping", outcome_mixed, {"skip_dead_tokens": True, "skip_dead_updates": True}),
)


class StepTimes(TrainerCallback):
    """How long each step took, and what of it was the package's own."""

    def __init__(self):
        self.times, self.own = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter() - self.start)
        self.own.append(getattr(self.trainer, "own_seconds", 0.0))


HOOKS = ("_prepare_inputs", "_generate_and_score_completions", "_calculate_rewards", "log")


class TimedTrainer(SGPOTrainer):
    """Measures the package's own share: each of its hooks, less what that spends in GRPOTrainer, and the judge in it."""

    own_seconds = 0.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in HOOKS:
            setattr(self, name, self.timed(getattr(self, name), +1))

    def timed(self, method, sign):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.own_seconds += sign * (time.perf_counter() - start)

        return run


@contextmanager
def inner_timed():
    """While it lasts, what GRPOTrainer spends inside a hook is taken off what the trainer has counted as its own."""
    inner = {name: getattr(GRPOTrainer, name) for name in HOOKS}

    def minus(method):
        def run(trainer, *args, **kwargs):
            if not isinstance(trainer, TimedTrainer):
                return method(trainer, *args, **kwargs)
            return trainer.timed(method, -1)(trainer, *args, **kwargs)

        return run

    for name, method in inner.items():
        setattr(GRPOTrainer, name, minus(method))
    try:
        yield
    finally:
        for name, method in inner.items():
            setattr(GRPOTrainer, name, method)


def train(arm, outcome, settings, seed):
    tokenizer = build_tokenizer()
    times = StepTimes()
    own = settings if arm == "sgpo" else {}
    config = SGPOConfig if arm == "sgpo" else GRPOConfig
    judge = StepwiseJudge(first_wrong_block, segmenter=segment_blocks)
    trainer = (TimedTrainer if arm == "sgpo" else GRPOTrainer)(
        model=build_model(PretrainConfig(), tokenizer),
        reward_funcs=[outcome, judge] if arm == "sgpo" else [outcome],
        args=config(
            output_dir="outputs/overhead",
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=48,
            learning_rate=0.0,
            max_steps=STEPS,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            seed=seed,
            **own,
        ),
        train_dataset=make_dataset(256, n_operations=6, seed=seed),
        processing_class=tokenizer,
        callbacks=[times],
    )
    times.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    with inner_timed():
        trainer.train()
    # The first steps pay for what is made once
    steps, seconds = times.times[WARM_UP:], sum(times.times[WARM_UP:])
    judged = [entry.get("sgpo/judge_seconds", 0.0) for entry in trainer.state.log_history if "loss" in entry]
    return steps, (times.own[-1] - times.own[WARM_UP - 1]) / seconds, sum(judged[WARM_UP:]) / seconds


def bootstrap(rounds: list[list[float]], draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the median ratio. Rounds are drawn, not steps: what slows one step slows its neighbours."""
    rng = random.Random(0)
    medians = sorted(
        statistics.median(ratio for drawn in rng.choices(rounds, k=len(rounds)) for ratio in drawn)
        for _ in range(draws)
    )
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each case, each with a seed of its own")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    result = {
        **provenance(("trl", "transformers", "torch", "accelerate")),
        "steps": rounds * (STEPS - WARM_UP),
    }
    for case, outcome, settings in CASES:
        ratios, shares, judge_shares, seconds = [], [], [], []
        for seed in range(rounds):
            order = ("grpo", "sgpo") if seed % 2 == 0 else ("sgpo", "grpo")
            runs = {arm: train(arm, outcome, settings, seed) for arm in order}
            ratios.append([a / b for a, b in zip(runs["sgpo"][0], runs["grpo"][0], strict=True)])
            seconds += runs["grpo"][0]
            shares.append(runs["sgpo"][1])
            judge_shares.append(runs["sgpo"][2])
        low, high = bootstrap(ratios)
        median = statistics.median(ratio for found in ratios for ratio in found)
        result[case] = {
            "ratio_median": median,
            "ratio_95_interval": [low, high],
            "grpo_step_seconds_median": statistics.median(seconds),
            "own_share_of_step": statistics.median(shares),
            "own_share_of_step_range": [min(shares), max(shares)],
            "judge_share_of_step": statistics.median(judge_shares),
        }
        print(f"{case}: SGPO / GRPO step time {median:.4f} [{low:.4f}, {high:.4f}]", file=sys.stderr)
    write_results(HERE / "results.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
