"""
Run by `test_distributed.py` on one or two processes: trains in each of several modes, with groups that straddle the ranks, and
writes down what each rank saw. Rank 1 never has anything to judge in the mode `one_sided`. The modes of `WITHOUT_JUDGE` ask no judge. They and those of
`STRADDLING` take completions that are the same however many processes there are, so that two can be compared with one.
"""

import json
import math
import os
import sys
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parent))
from conftest import words_as_steps

import trl_sgpo.policy
import trl_sgpo.trainer
from trl_sgpo import SGPOConfig, SGPOTrainer, StepJudge, StepwiseJudge, Verdict
from trl_sgpo.tasks.rewrite_chain import PretrainConfig, build_model, build_tokenizer, make_dataset


folder, modes = Path(sys.argv[1]), sys.argv[2:]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

WITHOUT_JUDGE = {
    # Of three groups the first is dead, the second one failed, half of it on each rank, and the third one mixed
    "lens": {"failed_groups": "lens", "exclude_dead_groups": True},
    # One group on each rank, of which the first failed
    "zvp": {"failed_groups": "zvp"},
    # Only the last of three groups is alive, all of it on rank 1, and only in the first update
    "whole": {"failed_groups": "none", "skip_dead_updates": True},
    "live": {"failed_groups": "none", "skip_dead_updates": True, "skip_dead_tokens": True},
}
# As one_sided, with credit per token
PER_TOKEN = {"prefix": {"failed_groups": "prefix"}}
# Of three groups two failed, the second one with half of it on each rank, and the third one is mixed
STRADDLING = {
    "baseline": {"failed_groups": "prefix", "prefix_baseline": "group", "judge_scope": "all_incorrect"},
    "longest": {"rts_share_of": "longest"},
}
# Every completion of rank 1 is truncated, so half of the second group and the whole third one are
MASKED = {"masked": {"mask_truncated_completions": True}}


tokenizer = build_tokenizer()
n_gathers = 0


def counting(values, inner=accelerate.utils.gather):
    """The package's own gathers; TRL's go by other names."""
    global n_gathers
    n_gathers += 1
    return inner(values)


trl_sgpo.trainer.gather = trl_sgpo.policy.gather = counting


class RecordingJudge(StepJudge):
    def __init__(self, mode):
        self.mode = mode
        self.sizes = []

    def judge(self, items):
        self.sizes.append(len(items))
        if self.mode == "fails_on_one_rank" and rank == 1:
            raise RuntimeError("this rank has lost its judge")
        if self.mode in STRADDLING:
            return [Verdict.error(sum(map(len, item.steps)) % len(item.steps)) for item in items]
        return [Verdict.error((len(item.steps[0]) + i) % len(item.steps)) for i, item in enumerate(items)]


def outcome_of(mode):
    n_outcomes = []

    def outcome(prompts, completions, **kwargs):
        rows = range(rank * len(completions), (rank + 1) * len(completions))
        if mode == "lens":
            return [[1.0, 0.0, float(row % 2)][row // 4] for row in rows]
        if mode in STRADDLING:
            return [[0.0, 0.0, float(row % 2)][row // 4] for row in rows]
        if mode in ("whole", "live"):
            n_outcomes.append(len(completions))
            return [float(len(n_outcomes) == 1 and row >= 8 and row % 2) for row in rows]
        if mode == "zvp":
            return [[0.0, float(row % 2)][row // 6] for row in rows]
        if mode in ("one_sided", "prefix"):
            # Ranks hold two groups of eight: rank 0 the failed one and half of nothing else
            return [0.0 if rank == 0 else float(i % 2) for i in range(len(completions))]
        return [0.0] * len(completions)

    return outcome


def train(mode):
    global n_gathers
    # Six rows a rank and groups of four: the second group has two rows on each rank. One-sided: one group of six a rank.
    size = 6 if mode in ("one_sided", "zvp", "prefix") else 4
    judge = RecordingJudge(mode)
    torch.manual_seed(0)
    trainer = SGPOTrainer(
        model=build_model(PretrainConfig(layers=1, width=32, heads=2), tokenizer),
        reward_funcs=[outcome_of(mode), StepwiseJudge(judge, segmenter=words_as_steps, transform="identity")],
        args=SGPOConfig(
            output_dir=str(folder / mode),
            per_device_train_batch_size=12 // world_size,
            num_generations=size,
            max_completion_length=12,
            generation_kwargs={"suppress_tokens": [0, 1]},
            learning_rate=1e-3,
            max_steps=2,
            logging_steps=1,
            log_completions=True,
            failed_group_weight=0.5,
            **(WITHOUT_JUDGE | PER_TOKEN | STRADDLING | MASKED).get(mode, {}),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=make_dataset(12, n_operations=2, seed=0),
        processing_class=tokenizer,
    )
    rounds = []
    n_gathers = 0
    calculate, generate = trainer._calculate_rewards, trainer._generate_and_score_completions

    def record_rewards(*args):
        rewards = calculate(*args)
        rounds.append({"rewards": rewards.tolist()})
        return rewards

    def record_advantages(inputs):
        output = generate(inputs)
        rounds[-1]["advantages"] = output["advantages"].tolist()
        return output

    def same_completions(prompt_ids, *args, **kwargs):
        """Random ones, of different lengths, by their place among those of all ranks."""
        rows = range(rank * len(prompt_ids), (rank + 1) * len(prompt_ids))
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        end = [tokenizer.eos_token_id] if mode in MASKED and rank == 0 else []
        return [
            torch.randint(2, len(tokenizer), (4 + row % 5,), generator=seed).tolist() + end
            for row, seed in zip(rows, seeds, strict=True)
        ], None

    trainer._calculate_rewards, trainer._generate_and_score_completions = record_rewards, record_advantages
    if mode in WITHOUT_JUDGE | STRADDLING | MASKED:
        trainer._generate_single_turn = same_completions
    trainer.train()
    checksum = sum(p.double().abs().sum().item() for p in trainer.model.parameters())
    assert not math.isnan(checksum)
    (folder / mode / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "rounds": rounds,
                "sizes": judge.sizes,
                "log": trainer.state.log_history,
                "checksum": checksum,
                "gathers_per_round": n_gathers / len(rounds),
            }
        )
    )


for one in modes:
    train(one)
if dist.is_initialized():
    dist.destroy_process_group()
# torch 2.13 now and then aborts while the interpreter ends ("terminate called without an active exception"), as it does
# after GRPOTrainer too: 3 of 38 runs. Everything to be tested is done and written, so the interpreter's end is left out.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
