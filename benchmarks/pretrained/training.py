"""
The base of a task, and one run from it. Both can be cut off at any time: a run goes on from its last checkpoint.

Rows without credit are left out of the loss. The trainer keeps 32-bit weights and computes in bf16, and it generates from a
bf16 copy of the weights, because casting them for each token takes most of the time on a CPU.
"""

import copy
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from benchmarks.pretrained.settings import ARMS, GROUP_SIZE, GROUPS_PER_UPDATE, Run
from benchmarks.pretrained.tasks import (
    Problem,
    Task,
    accuracy_reward,
    dataset,
    first_wrong_step,
    lenient_answer,
    random_step,
    right_lines,
    strict_answer,
)
from benchmarks.pretrained.weights import source_of
from trl_sgpo import SGPOConfig, SGPOTrainer, StepwiseJudge
from trl_sgpo.analysis.metrics import pass_at_k
from trl_sgpo.judges import ArithmeticJudge, JudgeItem, StepJudge
from trl_sgpo.judges.prm import PRMJudge
from trl_sgpo.steps import segment
from trl_sgpo.tasks.token_budget import TokenBudget


MICRO_BATCH = {"cpu": 16, "cuda": 32}  # completions; the update is the same
SFT_BATCH = 16
SAMPLING_BATCH = 128
STATE = "watcher.json"  # in a checkpoint: the curve so far
SAVE_EVERY = 10  # updates
FINGERPRINT = "fingerprint"  # in a base's folder, when it is finished


@dataclass(frozen=True)
class Effort:
    """
    How much is sampled to measure a task: every so many tokens of a run, so many problems, so many samples of each. At the
    end of it, some problems get many samples for pass@k.
    """

    every: int
    along: tuple[int, int]
    end: tuple[int, int]
    wide: tuple[int, int] = (0, 0)


EFFORT = {
    "chains": Effort(every=30_000, along=(64, 4), end=(128, 4), wide=(24, 32)),
    "gsm8k": Effort(every=100_000, along=(64, 2), end=(200, 2)),
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
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
            choice = (
                {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            )
            found = model.generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **choice
            )
            completions = found[:, inputs["input_ids"].shape[1] :]
            lengths += (completions != tokenizer.pad_token_id).sum(dim=1).tolist()
            texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [texts[i : i + n] for i in range(0, len(texts), n)], lengths


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
    (n_problems, n), (n_wide, n_many) = effort.end, effort.wide
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


class Policy(SGPOTrainer):
    """Generates from a bf16 copy of the policy's weights. `imitate`: the advantage is the outcome reward itself."""

    def __init__(self, *args: Any, imitate: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.imitate = imitate
        self.sampler = copy.deepcopy(self.accelerator.unwrap_model(self.model)).to(torch.bfloat16).eval()

    def sampling(self) -> PreTrainedModel:
        """The copy, with the weights of now."""
        model = self.accelerator.unwrap_model(self.model)
        with torch.no_grad():
            for old, new in zip(self.sampler.parameters(), model.parameters(), strict=True):
                old.copy_(new)
        return self.sampler

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        policy, self.model_wrapped = self.model_wrapped, self.sampling()
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model_wrapped = policy

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_BF = super()._calculate_rewards(*args, **kwargs)
        self.outcome_B = rewards_BF[:, 0]
        return rewards_BF

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.imitate and self.model.training:
            output["advantages"] = self.outcome_B.to(output["advantages"])
        return output


class Watcher(TokenBudget):
    """
    Measures the policy along the way, and keeps the curve beside each checkpoint. At `until`, a `time.time()`, the run stops
    with a checkpoint to go on from.
    """

    def __init__(self, run: Run, trainer: Policy, task: Task, until: float | None = None):
        super().__init__(run.tokens)
        self.run, self.trainer, self.task, self.until = run, trainer, task, until
        self.effort = EFFORT[run.task]
        self.curve: list[dict[str, Any]] = []
        self.window: dict[str, list[float]] = {}
        self.seconds = 0.0
        self.started = time.perf_counter()

    def restore(self, checkpoint: Path) -> None:
        for name, value in json.loads((checkpoint / STATE).read_text()).items():
            setattr(self, name, value)

    def on_save(self, args, state, control, **kwargs):
        names = ("generated", "updates", "_evaluated_at", "curve", "window")
        said = {name: getattr(self, name) for name in names} | {"seconds": self.taken()}
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE).write_text(json.dumps(said))

    def taken(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.curve:
            super().on_train_begin(args, state, control, **kwargs)

    def due(self) -> bool:
        return self.generated // self.effort.every > self.curve[-1]["tokens"] // self.effort.every

    def out_of_time(self) -> bool:
        return self.until is not None and time.time() > self.until

    def on_step_end(self, args, state, control, **kwargs):
        if self.out_of_time():
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if not self.out_of_time():
            super().on_train_end(args, state, control, **kwargs)

    def evaluate(self) -> None:
        n_problems, n = self.effort.along
        problems = self.task.to_test[:n_problems]
        tokenizer = self.trainer.processing_class
        texts, lengths = sample(self.trainer.sampling(), tokenizer, problems, n, self.task.max_completion_length)
        logged = {name: round(statistics.fmean(values), 4) for name, values in self.window.items()}
        self.curve.append({"tokens": self.generated, **score(problems, texts, lengths), **logged})
        self.window = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {
            "entropy": "entropy",
            "sgpo/accuracy": "train_accuracy",
            "sgpo/groups/failed": "failed",
            "sgpo/groups/mixed": "mixed",
            "sgpo/groups/rescued": "rescued",
            "sgpo/rts": "rts",
            "sgpo/dead_updates": "dead_updates",
            "sgpo/credit/silent": "silent_credit",
            "grad_norm": "grad_norm",
        }
        for name, short in names.items():
            value = float((logs or {}).get(name, "nan"))
            if np.isfinite(value):
                self.window.setdefault(short, []).append(value)
        super().on_log(args, state, control, logs, **kwargs)


def _load(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path, padding_side="left")


def base_folder(task: str, folder: Path) -> Path:
    return folder / f"base-{task}"


def make_base(name: str, task: Task, weights: str, folder: Path) -> Path:
    """The model after a short supervised fine-tuning on the task's solutions, which gives it the format. Made once."""
    out = base_folder(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):  # several runs may ask at the same time
        if not (out / FINGERPRINT).exists():
            _make_base(task, weights, out)
    return out


def _make_base(task: Task, weights: str, out: Path) -> None:
    model, tokenizer = _load(weights)
    args = SFTConfig(
        output_dir=f"{out}-sft",
        per_device_train_batch_size=SFT_BATCH,
        num_train_epochs=1,
        learning_rate=1e-4,
        warmup_steps=5,
        max_length=None,
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=device() == "cpu",
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    SFTTrainer(
        model, args=args, train_dataset=dataset(task.to_imitate, for_sft=True), processing_class=tokenizer
    ).train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    (out / FINGERPRINT).write_text(digest.hexdigest()[:12])


def fingerprint(base: Path) -> str:
    """Names a base's weights. Made again on another machine, they are others."""
    return (base / FINGERPRINT).read_text()


def _agreement(problems: Sequence[Problem], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """What `ArithmeticJudge` says of the wrong chains, against the exact judge: shares of them."""
    kinds = []
    for problem, some in zip(problems, texts, strict=True):
        for text in some:
            steps = tuple(text[start:end] for start, end in segment(text))
            exact = first_wrong_step(problem.question, steps, problem.solution) if steps else None
            if exact is not None:
                said = ArithmeticJudge().judge([JudgeItem(problem.question, steps)])[0]
                late = said.first_error is None or said.first_error > exact
                agrees = said.first_error == exact
                kinds.append(
                    "abstains"
                    if said.status == "abstain"
                    else "same"
                    if agrees
                    else "later or none"
                    if late
                    else "earlier"
                )
    return {
        kind: round(kinds.count(kind) / len(kinds), 4) for kind in ("same", "earlier", "later or none", "abstains")
    }


def describe_base(name: str, task: Task, weights: str, folder: Path) -> dict[str, Any]:
    """What the published model can do with its own chat template, and the base; and how many of the base's groups fail."""
    base = make_base(name, task, weights, folder)
    described: dict[str, Any] = {"weights": source_of(weights), "base_weights": fingerprint(base)}
    effort = EFFORT[name]
    for label, path in (("published", weights), ("base", base)):
        model, tokenizer = _load(path)
        model = model.to(device(), torch.bfloat16).eval()
        described[label] = measure(model, tokenizer, task, effort)
    problems = task.to_train[-effort.along[0] :]
    texts, _ = sample(model, tokenizer, problems, GROUP_SIZE, task.max_completion_length)
    right = counts(problems, texts)
    described["groups"] = {
        "failed": round(statistics.fmean(n == 0 for n in right), 4),
        "mixed": round(statistics.fmean(0 < n < GROUP_SIZE for n in right), 4),
    }
    if name == "chains":
        described["arithmetic_judge"] = _agreement(problems, texts)
    return described


def _judge(name: str, task: Task, trained: Path | None) -> StepwiseJudge:
    judge: StepJudge | Any
    if name == "trained":
        assert trained is not None, "run.py asks for the folder"
        judge = PRMJudge(trained, known_wrong_rule="median")  # it is asked about wrong completions only
    else:
        judge = {"task": task.judge, "arithmetic": ArithmeticJudge(), "random": random_step}[name]
    return StepwiseJudge(judge, reference_column="reference")


def make_trainer(run: Run, task: Task, base: Path, folder: Path, judge: Path | None = None) -> Policy:
    arm = ARMS[run.arm]
    group_size = arm.config.get("num_generations", GROUP_SIZE)
    model, tokenizer = _load(base)
    args = SGPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=MICRO_BATCH[device()],
        gradient_accumulation_steps=GROUPS_PER_UPDATE * group_size // MICRO_BATCH[device()],
        max_completion_length=task.max_completion_length,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        max_steps=100_000,  # the run ends when its tokens are spent
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=device() == "cpu",
        logging_steps=1,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=run.seed,
        skip_dead_tokens=True,
        **{"num_generations": GROUP_SIZE, **arm.config},
    )
    rewards: list[Any] = [accuracy_reward, *([_judge(arm.judge, task, judge)] if arm.judge else [])]
    return Policy(model, rewards, args, dataset(task.to_train), processing_class=tokenizer, imitate=arm.imitate)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with a curve; one that was cut off while it was written is removed."""
    while folder.exists() and (found := get_last_checkpoint(str(folder))):
        if (Path(found) / STATE).exists():
            return Path(found)
        shutil.rmtree(found)
    return None


def train(
    run: Run, task: Task, base: Path, folder: Path, until: float | None = None, judge: Path | None = None
) -> dict[str, Any] | None:
    """
    Runs it, or goes on with it. Its checkpoints are deleted at the end, the policy is kept. None if it is not finished at
    `until`, a `time.time()`. `judge` is the folder of the trained judge.
    """
    out = folder / run.key.replace("/", "-")
    checkpoint = last_checkpoint(out)
    trainer = make_trainer(run, task, base, out, judge)
    watcher = Watcher(run, trainer, task, until)
    if checkpoint:
        watcher.restore(checkpoint)
    trainer.add_callback(watcher)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not watcher.finished():
        return None
    seconds = watcher.taken()
    end = measure(trainer.sampling(), trainer.processing_class, task, EFFORT[run.task])
    trainer.save_model(str(out / "policy"))
    for leftover in out.glob("checkpoint-*"):
        shutil.rmtree(leftover)
    trained = {"judge": json.loads((judge / "judge_train.json").read_text())} if judge else {}
    return {
        **asdict(run),
        "base_weights": fingerprint(base),
        **(trained if ARMS[run.arm].judge == "trained" else {}),
        "seconds": round(seconds, 1),
        "updates": watcher.updates,
        "tokens_generated": watcher.generated,
        "curve": watcher.curve,
        "end": end,
    }
