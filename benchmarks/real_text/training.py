"""The command `train`: the arms, and a run of one of them from the base until its tokens are spent."""

import argparse
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from benchmarks.real_text.data import read_parts
from benchmarks.real_text.evaluation import evaluate_test, generate, is_correct
from benchmarks.real_text.judge import exact_answer, final_answer, make_judge
from benchmarks.real_text.model import DEVICE, load_base
from benchmarks.real_text.records import check_settings, settings_of, surroundings, write_json
from trl_sgpo import SGPOConfig, SGPOTrainer, StepwiseJudge
from trl_sgpo.analysis import SharpeningCallback
from trl_sgpo.analysis.metrics import mean_estimate


# The arms differ in these alone; the outcome reward and all other settings are the same
ARMS: dict[str, dict[str, Any] | None] = {"grpo": None, "sgpo": {}, "prefix": {"failed_groups": "prefix"}}
NAMES = {"base": "base", "grpo": "GRPO", "sgpo": "SGPO", "prefix": "prefix credit"}


def train(args: argparse.Namespace) -> None:
    base = args.output / "base"
    if not (base / "evaluation.json").exists():
        raise ValueError(f"There is no finished base model in {base}. Run `pretrain` first, with the same --output.")
    rows = args.prompts_per_update * args.group_size
    if args.micro_batch < 1 or rows % args.micro_batch or args.micro_batch % args.group_size:
        raise ValueError(
            f"--micro-batch={args.micro_batch} must divide the {rows} completions of an update (--prompts-per-update times "
            f"--group-size) and be a multiple of --group-size={args.group_size}."
        )
    parts = read_parts(args.output)
    settings = settings_of(args, "output", "arm", "seed", "generation_rows")
    settings["base"] = json.loads((base / "settings.json").read_text())
    for seed in args.seed:
        for arm in args.arm:
            folder = args.output / "runs" / f"{arm}-seed{seed}"
            kept = folder / "result.json"
            if kept.exists():
                check_settings(kept, settings, f"the run {folder.name}", key="settings")
                print(f"{folder.name} is finished: nothing to do.")
                continue
            if folder.exists():
                print(f"{folder.name} was broken off: it begins anew.")
                shutil.rmtree(folder)
            result = train_one(arm, seed, args, base, parts, folder)
            write_json(kept, {"arm": arm, "seed": seed, "settings": settings, **result, **surroundings()})
            print(
                f"{folder.name}: {result['updates']} updates, {result['generated_tokens']:,} tokens, {result['seconds']:.0f} s; "
                f"test accuracy {mean_estimate(result['test_sampled'])} by sampling, "
                f"{mean_estimate(result['test_greedy'])} greedily"
            )


def train_one(
    arm: str, seed: int, args: argparse.Namespace, base: Path, parts: dict[str, list[dict]], folder: Path
) -> dict[str, Any]:
    model, tokenizer = load_base(base)
    judge = StepwiseJudge(make_judge())
    options = ARMS[arm]
    rows = args.prompts_per_update * args.group_size
    trainer = SGPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[exact_answer] if options is None else [exact_answer, judge],
        train_dataset=Dataset.from_list(parts["rl"]),
        args=SGPOConfig(
            output_dir=str(folder),
            seed=seed,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=rows // args.micro_batch,
            num_generations=args.group_size,
            max_completion_length=args.max_completion,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            max_steps=100_000,  # the run ends when its tokens are spent
            bf16=DEVICE.type == "cuda",
            use_cpu=DEVICE.type == "cpu",
            gradient_checkpointing=False,
            logging_steps=1,
            log_completions=True,  # for the report
            num_completions_to_print=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(options or {}),
        ),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    folder.mkdir(parents=True, exist_ok=True)
    # The probe's questions come from the end of the test set, the curve's from its begin
    watch = Watch(trainer, args, parts["test"][: args.evaluation_questions], f"{NAMES[arm]} {seed}", folder)
    trainer.add_callback(watch)
    trainer.add_callback(
        SharpeningCallback(
            trainer=trainer,
            prompts=parts["test"][-args.probe_questions :],
            n_samples=args.probe_samples,
            every=10**9,
            at_begin=False,
            judge=judge,
            extract_answer=final_answer,
            batch_size=args.generation_rows,
            cache_dir=args.output / "cache",
        )
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_state()
    log = [entry for entry in trainer.state.log_history if "sgpo/accuracy" in entry]
    probe = next(entry for entry in reversed(trainer.state.log_history) if "sharpening/pass@1" in entry)

    def means(keys: tuple[str, ...], entries: list[dict]) -> dict[str, float | None]:
        """Over the updates that logged a key: without a judged completion there are no steps, which is not the same as 0."""
        values = {key: [entry[key] for entry in entries if key in entry] for key in keys}
        return {key: statistics.mean(found) if found else None for key, found in values.items()}

    lengths = ("completions/mean_length", "completions/clipped_ratio", "sgpo/steps_per_completion", "sgpo/rts_gap")
    tenth = max(1, len(log) // 10)
    return {
        "updates": len(log),
        "generated_tokens": watch.generated,
        "seconds": seconds,
        "evaluation_seconds": watch.evaluation_seconds,
        "probe_seconds": probe["sharpening/seconds/total"],
        "groups": means(
            tuple(f"sgpo/groups/{kind}" for kind in ("solved", "mixed", "failed", "rescued", "tied")), log
        ),
        # A policy may learn to stop early or to pad instead of to calculate
        "shape_at_begin": means(lengths, log[:tenth]),
        "shape_at_end": means(lengths, log[-tenth:]),
        "curve": watch.points,
        "probe": {
            key.removeprefix("sharpening/"): value for key, value in probe.items() if key.startswith("sharpening/")
        },
        **evaluate_test(
            trainer.model,
            tokenizer,
            parts["test"],
            n=4,
            max_new_tokens=args.max_completion,
            rows_at_once=args.generation_rows,
        ),
    }


class Watch(TrainerCallback):
    """Shows progress, writes the log, evaluates on test questions as training goes on, ends the run when its tokens are spent."""

    def __init__(self, trainer: SGPOTrainer, args: argparse.Namespace, rows: list[dict], title: str, folder: Path):
        self.trainer, self.args, self.rows, self.title = trainer, args, rows, title
        self.log_file = folder / "metrics.jsonl"
        self.generated = 0
        self.points: list[dict[str, float]] = []
        self.evaluation_seconds = 0.0

    def evaluate(self, step: int) -> None:
        start = time.perf_counter()
        texts = generate(
            self.trainer.model,
            self.trainer.processing_class,
            self.rows,
            n=self.args.evaluation_samples,
            max_new_tokens=self.args.max_completion,
            rows_at_once=self.args.generation_rows,
        )
        accuracy = statistics.mean(map(statistics.mean, is_correct(self.rows, texts)))
        self.evaluation_seconds += time.perf_counter() - start
        self.points.append({"step": step, "generated_tokens": self.generated, "test/accuracy": accuracy})
        self.write(self.points[-1])
        self.bar.set_postfix(accuracy=f"{accuracy:.3f}")

    def write(self, entry: dict[str, Any]) -> None:
        numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and math.isfinite(v)}
        with self.log_file.open("a") as file:
            file.write(json.dumps(numbers) + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=self.args.tokens, desc=f"{self.title}: generated tokens", unit_scale=True)
        self.evaluate(0)

    def on_log(self, args, state, control, logs, **kwargs):
        self.write({"step": state.global_step, **logs})
        if "completions/mean_length" not in logs:
            return
        new = round(logs["completions/mean_length"] * args.generation_batch_size)
        self.generated += new
        self.bar.update(min(new, self.args.tokens - self.bar.n))
        share = self.generated / self.args.tokens
        if share >= 1:
            control.should_training_stop = True
        elif share >= len(self.points) / self.args.evaluations:
            self.evaluate(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.evaluate(state.global_step)
        self.bar.close()
