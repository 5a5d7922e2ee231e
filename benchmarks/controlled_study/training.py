"""One run of the study: a method trains a base model until its tokens are spent. Returns the record of the run."""

import contextlib
import io
import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from trl import SFTConfig, SFTTrainer

from benchmarks.controlled_study.noisy_judges import noisy_judge
from benchmarks.controlled_study.settings import (
    ARMS,
    LENGTH,
    MAX_COMPLETION_LENGTH,
    N_OPERATIONS,
    TOKENS_PER_COMPLETION,
    Run,
    base_config,
    base_folder,
)
from benchmarks.controlled_study.tables import NOISY_JUDGES
from trl_sgpo import SGPOConfig, SGPOTrainer, StepwiseJudge
from trl_sgpo.analysis import SharpeningCallback
from trl_sgpo.analysis.metrics import pass_at_k
from trl_sgpo.analysis.report.runs import read_run
from trl_sgpo.analysis.report.summary import summarise
from trl_sgpo.judges import MajorityVote
from trl_sgpo.tasks.rewrite_chain import (
    accuracy_reward,
    chain_operations,
    evaluate,
    first_wrong_block,
    load_or_pretrain,
    make_dataset,
    make_unseen_dataset,
    right_prefix,
    segment_blocks,
)
from trl_sgpo.tasks.token_budget import TokenBudget


EVALUATE_EVERY = 25_000  # tokens
N_EVALUATED, SAMPLES_PER_PROBLEM = 128, 4
N_DESCRIBED = 256
N_PROBED, SAMPLES_PER_PROBE = 32, 64
MATCHED_ACCURACY = 0.5  # at which the diversity of methods is compared


def problems(dial: str, n: int, seed: int) -> Dataset:
    """Problems to train on, or to evaluate on: those of the base's pretraining, or those outside of it along its axis."""
    axis = base_config(dial).axis
    if axis is None:
        return make_dataset(n, N_OPERATIONS, seed=seed, length=LENGTH)
    return make_unseen_dataset(n, axis, N_OPERATIONS, seed=seed, length=LENGTH)


def inside(dial: str, n: int, seed: int) -> list[str]:
    """Prompts such as a base's pretraining shows, at its longest chains."""
    operations = chain_operations(base_config(dial))
    return list(make_dataset(n, N_OPERATIONS, seed=seed, length=LENGTH, operations=operations)["prompt"])


def base_model(dial: str, folder: Path) -> Path:
    """The base model of a dial, made if it is not there yet."""
    return load_or_pretrain(base_folder(dial, folder), base_config(dial), progress=False)


class Watcher(TokenBudget):
    """Evaluates on held-out problems every 25,000 tokens, and also ends the run when its accuracy has reached its goal."""

    def __init__(self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(run.tokens)
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.held_out = problems(run.dial, N_EVALUATED, seed=2)["prompt"]
        # For a dial that trains outside of the pretraining: what becomes of the inside
        self.inside = inside(run.dial, N_EVALUATED, seed=3) if base_config(run.dial).axis is not None else None
        self.curve: list[dict[str, Any]] = []
        self.window: dict[str, list[float]] = {}
        self.probes: dict[str, dict[str, Any]] = {}

    def evaluate(self) -> None:
        settings = {"n_samples": SAMPLES_PER_PROBLEM, "max_new_tokens": MAX_COMPLETION_LENGTH + 24}
        result = evaluate(self.model, self.tokenizer, self.held_out, **settings)
        point = {
            "tokens": self.generated,
            "accuracy": round(result.accuracy, 4),
            "greedy": round(result.greedy_accuracy, 4),
            "right_prefix": round(result.right_prefix, 4),
            **{name: round(statistics.fmean(values), 4) for name, values in self.window.items()},
        }
        if self.inside is not None:
            point["inside"] = round(evaluate(self.model, self.tokenizer, self.inside, **settings).accuracy, 4)
        self.curve.append(point)
        self.window = {}
        if self.run.probe and result.accuracy >= MATCHED_ACCURACY and "matched" not in self.probes:
            self.probes["matched"] = {"tokens": self.generated, **probe(self.model, self.tokenizer, self.run.dial)}

    def due(self) -> bool:
        return self.generated // EVALUATE_EVERY > self.curve[-1]["tokens"] // EVALUATE_EVERY

    def finished(self) -> bool:
        goal = self.run.stop_at
        reached = goal is not None and all(point["accuracy"] >= goal for point in self.curve[-2:])
        return reached or super().finished()

    def on_log(self, args, state, control, logs, **kwargs):
        names = {
            "entropy": "entropy",
            "sgpo/accuracy": "train_accuracy",
            "sgpo/groups/failed": "failed",
            "sgpo/groups/tied": "tied",
            "sgpo/rts": "rts",
            "completions/mean_length": "length",
            "sgpo/failed/mean_length": "failed_length",
            "sgpo/failed/mean_steps": "failed_steps",
            "sgpo/dead_updates": "dead_updates",
            "sgpo/trained_tokens": "trained_tokens",
            "sgpo/credit/silent": "silent_credit",
        }
        for name, short in names.items():
            if "completions/mean_length" in logs and name in logs and not math.isnan(logs[name]):
                self.window.setdefault(short, []).append(logs[name])
        super().on_log(args, state, control, logs, **kwargs)


class AlarmWatch(logging.Handler):
    """Remembers the update in which the trainer first warned of length."""

    def __init__(self, watcher: Watcher):
        super().__init__(logging.WARNING)
        self.watcher, self.update = watcher, None

    def emit(self, record: logging.LogRecord) -> None:
        if self.update is None and "have grown from" in record.getMessage():
            self.update = self.watcher.updates


class SFTWatcher(Watcher):
    """Counts the tokens of the gold solutions instead."""

    def __init__(self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(run, model, tokenizer)
        solutions = tokenizer(list(problems(run.dial, 100, seed=1)["solution"]))["input_ids"]
        self.tokens_per_solution = statistics.fmean(len(ids) + 1 for ids in solutions)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.count(round(self.tokens_per_solution * args.per_device_train_batch_size), control)


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[list[str]], list[float]]:
    """64 samples for each prompt, and the entropies (nats) of all their tokens."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts, entropies = [], []
        for prompt in prompts:
            ids = tokenizer([prompt] * SAMPLES_PER_PROBE, return_tensors="pt")["input_ids"]
            samples = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=MAX_COMPLETION_LENGTH + 24,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            completion = samples[:, ids.shape[1] :]
            texts.append(tokenizer.batch_decode(completion, skip_special_tokens=True))
            ended = (completion == tokenizer.eos_token_id).cumsum(dim=1)
            written = (ended == 0) | ((ended == 1) & (completion == tokenizer.eos_token_id))
            log_p = model(input_ids=samples).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
            entropies += (-(log_p.exp() * log_p).sum(-1))[written].tolist()
    model.train(was_training)
    return texts, entropies


def diversity(prompts: Sequence[str], texts: Sequence[Sequence[str]], entropies: Sequence[float]) -> dict[str, Any]:
    """pass@k by the verifier and with every step right, distinct solutions per problem, and the mean entropy per token."""
    correct = np.array([sum(accuracy_reward([p] * len(t), t)) for p, t in zip(prompts, texts, strict=True)])
    verified = np.array([sum(right_prefix(p, x) == 1 for x in t) for p, t in zip(prompts, texts, strict=True)])
    verified = np.minimum(verified, correct)
    n = np.full(len(prompts), SAMPLES_PER_PROBE)
    return {
        "pass": {k: round(float(pass_at_k(n, correct, k).mean()), 4) for k in (1, 8, 32, 64)},
        "verified_pass": {k: round(float(pass_at_k(n, verified, k).mean()), 4) for k in (1, 8, 32, 64)},
        "distinct": round(statistics.fmean(len(set(t)) for t in texts), 2),
        "entropy": round(statistics.fmean(entropies), 4),
    }


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dial: str) -> dict[str, Any]:
    """The diversity of 64 samples for each of 32 held-out problems."""
    prompts = problems(dial, N_PROBED, seed=4)["prompt"]
    return diversity(prompts, *sample(model, tokenizer, prompts))


def judge_errors(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of verdicts that name another step than the first wrong one, by judge, over the wrong solutions."""
    wrong = []
    for prompt, solutions in zip(prompts, texts, strict=True):
        for text in solutions:
            steps = tuple(text[start:end] for start, end in segment_blocks(text))
            if steps and (first := first_wrong_block(prompt, steps)) is not None:
                wrong.append((prompt, steps, first))
    shares = {}
    for name in NOISY_JUDGES:
        kind, probability = name.split(":")
        judge = noisy_judge(kind, float(probability), seed=0)
        shares[name] = round(statistics.fmean(judge(prompt, steps) != first for prompt, steps, first in wrong), 3)
    return shares


def _judge(run: Run) -> StepwiseJudge:
    if run.judge == "exact":
        return StepwiseJudge(first_wrong_block, segmenter=segment_blocks)
    kind, probability = run.judge.split(":")
    votes = ARMS[run.arm].votes
    judges = [noisy_judge(kind, float(probability), seed=run.seed + 1000 * vote) for vote in range(votes)]
    return StepwiseJudge(
        MajorityVote(judges, min_agreement=0.75) if votes > 1 else judges[0], segmenter=segment_blocks
    )


def _trainer(run: Run, base: Path, folder: Path) -> Any:
    arm = ARMS[run.arm]
    shared = {
        "output_dir": str(report_folder(run, folder) if run.report else folder / "trainer"),
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.seed,
    }
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = problems(run.dial, 8000, seed=1)
    if run.arm == "sft":
        # TRL tokenises prompt and completion as one text, and this tokenizer splits at spaces
        data = data.map(lambda row: {"completion": f" {row['solution']}"}, remove_columns=["solution"])
        sft = SFTConfig(
            **shared, per_device_train_batch_size=run.completions_per_update, max_steps=100_000, max_length=None
        )
        return SFTTrainer(model, args=sft, train_dataset=data, processing_class=tokenizer)
    # The run ends by its tokens. What is a fraction of the run is a fraction of the updates that they are good for
    expected = run.tokens / (run.completions_per_update * TOKENS_PER_COMPLETION)
    max_steps = math.ceil(20 * expected)
    config = dict(arm.config)
    if "judge_until" in config:
        config["judge_until"] *= expected / max_steps
    args = SGPOConfig(
        **shared,
        per_device_train_batch_size=run.completions_per_update,
        num_generations=run.group_size,
        max_completion_length=MAX_COMPLETION_LENGTH + (24 if base_config(run.dial).axis else 0),
        max_steps=max_steps,
        log_completions=run.report,
        num_completions_to_print=1 if run.report else None,
        per_device_eval_batch_size=256,  # rows per forward pass of a probe
        **config,
    )
    reward_funcs = [accuracy_reward, _judge(run)] if arm.judge else [accuracy_reward]
    return SGPOTrainer(model, reward_funcs, args, data, processing_class=tokenizer)


def report_folder(run: Run, folder: Path) -> Path:
    """Where a run with `report` leaves what the report reads; the name ends as seeds of one arm have to."""
    return folder / "reports" / f"{run.dial.replace('@', '-')}-{run.arm}-seed{run.seed}"


def _watch_sharpening(trainer: SGPOTrainer, run: Run, folder: Path) -> None:
    prompts = [{"prompt": prompt, "domain": "trained"} for prompt in problems(run.dial, N_PROBED, seed=4)["prompt"]]
    if base_config(run.dial).axis is not None:
        prompts += [{"prompt": prompt, "domain": "inside"} for prompt in inside(run.dial, N_PROBED, seed=5)]
    trainer.add_callback(
        SharpeningCallback(
            trainer=trainer,
            prompts=prompts,
            n_samples=SAMPLES_PER_PROBE,
            every=10**9,  # at the end only
            at_begin=False,
            judge=StepwiseJudge(first_wrong_block, segmenter=segment_blocks),
            extract_answer=lambda text: text.split(";")[-1].strip() or None,
            batch_size=256,
            cache_dir=folder / "cache",
        )
    )


def _verdict(run: Run, folder: Path) -> dict[str, Any]:
    """What the report says of the run's last probe, and of its groups."""
    path = report_folder(run, folder)
    said = summarise([read_run(path, path.name, run.arm)], domain="trained")["runs"][0]
    numbers, diagnosis = said["sharpening"], said["diagnosis"]
    return {
        "headline": said["finding"].headline,
        "evidence": list(said["finding"].evidence),
        "groups": [diagnosis["answer"], *diagnosis["advice"]],
        "base_perplexity": _perplexities(numbers),
    }


def _perplexities(numbers: dict[str, Any] | None) -> dict[str, float]:
    if numbers is None:
        return {}
    return {"base": numbers["base_perplexity_of_base"], "policy": numbers["over_time"]["base_perplexity"][-1]}


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Runs it. `folder` keeps the base models."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    base = base_model(run.dial, folder)
    trainer = _trainer(run, base, folder)
    trainer.remove_callback(PrinterCallback)
    kind = SFTWatcher if run.arm == "sft" else Watcher
    watcher = kind(run, trainer.model, trainer.processing_class)
    trainer.add_callback(watcher)
    if run.report:
        _watch_sharpening(trainer, run, folder)
    alarm = AlarmWatch(watcher)
    logging.getLogger("trl_sgpo").addHandler(alarm)
    start, cpu_start = time.perf_counter(), time.process_time()
    with (
        contextlib.redirect_stdout(io.StringIO()) if run.report else contextlib.nullcontext()
    ):  # tables of completions
        trainer.train()
    logging.getLogger("trl_sgpo").removeHandler(alarm)
    if run.report:
        trainer.save_state()
    if run.probe:
        watcher.probes["end"] = {
            "tokens": watcher.generated,
            **probe(trainer.model, trainer.processing_class, run.dial),
        }
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(
            time.process_time() - cpu_start, 1
        ),  # of one thread; does not see what else the machine does
        "updates": watcher.updates,
        "tokens_generated": watcher.generated,
        "curve": watcher.curve,
        **({"length_alarm": alarm.update} if alarm.update is not None else {}),
        **({"probes": watcher.probes} if run.probe else {}),
        **({"verdict": _verdict(run, folder)} if run.report else {}),
    }


def describe_base(dial: str, folder: Path) -> dict[str, Any]:
    """What a base model can do before any training, on the problems of its dial."""
    datasets.disable_progress_bars()
    path = base_model(dial, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = problems(dial, N_DESCRIBED, seed=5)["prompt"]
    result = evaluate(model, tokenizer, prompts, n_samples=8, max_new_tokens=MAX_COMPLETION_LENGTH + 24)
    probed = problems(dial, N_PROBED, seed=4)["prompt"]
    texts, entropies = sample(model, tokenizer, probed)
    return {
        "config": asdict(base_config(dial)),
        "accuracy": result.accuracy,
        "greedy": result.greedy_accuracy,
        "right_prefix": result.right_prefix,
        "failed_groups": result.failed_groups,
        "probe": {**diversity(probed, texts, entropies), "judge_errors": judge_errors(probed, texts)},
    }
