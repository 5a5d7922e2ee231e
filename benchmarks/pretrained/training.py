"""
The base of a task, and one run from it. Both can be cut off at any time: a run goes on from its last checkpoint.

Rows without credit are left out of the loss. The trainer keeps 32-bit weights. Where the device multiplies in bf16, it computes
in bf16, and it generates from a bf16 copy of the weights, because casting them for each token takes most of the time on a CPU.
"""

import copy
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
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

from benchmarks.pretrained.sampling import EFFORT, counts, measure, sample
from benchmarks.pretrained.settings import ARMS, GROUP_SIZE, GROUPS_PER_UPDATE, TUNING_SEED, Run
from benchmarks.pretrained.shared_prompts import generate, log_probs
from benchmarks.pretrained.tasks import (
    Problem,
    Task,
    accuracy_reward,
    dataset,
    first_wrong_step,
    random_step,
    right_lines,
)
from benchmarks.pretrained.weights import source_of
from benchmarks.real_judge.judges import batch_tokens
from trl_sgpo import SGPOConfig, SGPOTrainer, StepwiseJudge
from trl_sgpo.judges import ArithmeticJudge, JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.prm import PRMJudge
from trl_sgpo.steps import segment
from trl_sgpo.tasks.token_budget import TokenBudget


MICRO_BATCH = {"chains": 32, "gsm8k": 8}  # completions, about 2,000 tokens at most; the update is the same for any
SFT_BATCH = 16
RIGHT_LINES = "right_lines"
LOGGED = {  # of each update: TRL's name, or the package's, and that in the record
    "sgpo/accuracy": "accuracy",
    RIGHT_LINES: "right_lines",
    "completions/mean_length": "length",
    "entropy": "entropy",
    "sgpo/groups/failed": "failed",
    "sgpo/groups/mixed": "mixed",
    "sgpo/groups/rescued": "rescued",
    "sgpo/rts": "rts",
    "sgpo/dead_updates": "dead_updates",
    "sgpo/trained_tokens": "trained_tokens",
    "sgpo/credit/silent": "silent_credit",
    "grad_norm": "grad_norm",
}
STATE = "watcher.json"  # in a checkpoint: the curve so far
SAVE_EVERY = 10  # updates
PROBED = 64  # problems that say how many groups of a base fail
FINGERPRINT = "fingerprint"  # in a base's folder, when it is finished


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision() -> torch.dtype:
    """bf16 where there are instructions for its products. On other CPUs they take eight times as long as in 32 bits."""
    if device() == "cuda":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()  # older versions of PyTorch do not have it
    return torch.bfloat16 if any(map(can.get, ("amx_bf16", "avx512_bf16", "bf16"))) else torch.float32


class Policy(SGPOTrainer):
    """
    Generates from a copy of the policy's weights in [`precision`], reads a prompt once for all its completions, and logs the
    share of right leading lines. `imitate`: the advantage is the outcome reward itself.
    """

    def __init__(self, *args: Any, imitate: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.imitate = imitate
        self.sampler = copy.deepcopy(self.accelerator.unwrap_model(self.model)).to(precision()).eval()
        self.sampler.__dict__.pop("forward", None)  # TRL's is the policy's own, on its 32-bit weights
        self.sampler.generate = partial(generate, self.sampler)

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

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        with self.accelerator.autocast():
            return *log_probs(model, input_ids, attention_mask, logits_to_keep), None

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list
    ) -> torch.Tensor:
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.outcome_B = rewards_BF[:, 0]
        shares = [right_lines(row["reference"], c[-1]["content"]) for row, c in zip(inputs, completions, strict=True)]
        self._metrics["train"][RIGHT_LINES].append(statistics.fmean(shares))
        return rewards_BF

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.imitate:
            output["advantages"] = self.outcome_B.to(output["advantages"])
        return output


class Watcher(TokenBudget):
    """
    Keeps what each update logged, beside each checkpoint too. No problem comes twice in a run, so the accuracy of the
    completions that it is trained on is that of new problems. At `until`, a `time.time()`, the run stops with a checkpoint to
    go on from.
    """

    def __init__(self, tokens: int, until: float | None = None):
        super().__init__(tokens)
        self.until = until
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self.started = time.perf_counter()

    def restore(self, checkpoint: Path) -> None:
        for name, value in json.loads((checkpoint / STATE).read_text()).items():
            setattr(self, name, value)

    def on_save(self, args, state, control, **kwargs):
        said = {name: getattr(self, name) for name in ("generated", "updates", "curve")} | {"seconds": self.taken()}
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE).write_text(json.dumps(said))

    def taken(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def on_step_end(self, args, state, control, **kwargs):
        if self.until is not None and time.time() > self.until:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)
        if logs and "completions/mean_length" in logs:
            found = {short: float(logs.get(name, "nan")) for name, short in LOGGED.items()}
            known = {short: round(value, 4) for short, value in found.items() if np.isfinite(value)}
            self.curve.append({"tokens": self.generated, "completions": args.generation_batch_size, **known})


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
        bf16=precision() == torch.bfloat16,
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
        model = model.to(device(), precision()).eval()
        described[label] = measure(model, tokenizer, task, effort)
    problems = task.to_train[-PROBED:]
    texts, _ = sample(model, tokenizer, problems, GROUP_SIZE, task.max_completion_length)
    right = counts(problems, texts)
    described["groups"] = {
        "failed": round(statistics.fmean(n == 0 for n in right), 4),
        "mixed": round(statistics.fmean(0 < n < GROUP_SIZE for n in right), 4),
    }
    if name == "chains":
        described["arithmetic_judge"] = _agreement(problems, texts)
    return described


class AllSteps(StepJudge):
    """A judge whose unchecked steps before the first wrong one count as right."""

    def __init__(self, judge: StepJudge) -> None:
        self.inner = judge

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [replace(verdict, checked=None) for verdict in self.inner.judge(items)]


def _judge(name: str, task: Task, trained: Path | None) -> StepwiseJudge:
    judge: StepJudge | Any
    if name == "trained":
        assert trained is not None, "run.py asks for the folder"
        # It is asked about wrong completions only
        judge = PRMJudge(trained, known_wrong_rule="median", max_tokens_per_batch=batch_tokens(), dtype=precision())
    else:
        judge = {
            "task": task.judge,
            "all_steps": AllSteps(task.judge),
            "arithmetic": ArithmeticJudge(),
            "random": random_step,
        }[name]
    return StepwiseJudge(judge, reference_column="reference")


def make_trainer(run: Run, task: Task, base: Path, folder: Path, judge: Path | None = None) -> Policy:
    arm = ARMS[run.arm]
    group_size = arm.config.get("num_generations", GROUP_SIZE)
    model, tokenizer = _load(base)
    args = SGPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=MICRO_BATCH[run.task],
        gradient_accumulation_steps=GROUPS_PER_UPDATE * group_size // MICRO_BATCH[run.task],
        max_completion_length=task.max_completion_length,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        max_steps=100_000,  # the run ends when its tokens are spent
        bf16=precision() == torch.bfloat16,
        gradient_checkpointing=False,
        use_cpu=device() == "cpu",
        logging_steps=1,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        log_completions=True,  # the report reads the files
        num_completions_to_print=0,
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
    Runs it, or goes on with it. Its checkpoints are deleted at the end, the policy is kept. A tuning run is not measured at its
    end. None if it is not finished at `until`, a `time.time()`. `judge` is the folder of the trained judge.
    """
    out = folder / run.key.replace("/", "-")
    checkpoint = last_checkpoint(out)
    trainer = make_trainer(run, task, base, out, judge)
    watcher = Watcher(run.tokens, until)
    if checkpoint:
        watcher.restore(checkpoint)
    trainer.add_callback(watcher)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not watcher.finished():
        return None
    seconds = watcher.taken()
    end = {}
    if run.seed != TUNING_SEED:
        end = measure(trainer.sampling(), trainer.processing_class, task, EFFORT[run.task])
    trainer.save_model(str(out / "policy"))
    trainer.save_state()
    for leftover in out.glob("checkpoint-*"):
        shutil.rmtree(leftover)
    trained = {"judge": json.loads((judge / "judge_train.json").read_text())} if judge else {}
    return {
        **asdict(run),
        "base_weights": fingerprint(base),
        "precision": str(precision()).removeprefix("torch."),
        **(trained if ARMS[run.arm].judge == "trained" else {}),
        "seconds": round(seconds, 1),
        "updates": watcher.updates,
        "tokens_generated": watcher.generated,
        "curve": watcher.curve,
        "end": end,
    }
