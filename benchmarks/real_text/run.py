"""
Does SGPO learn from real text where GRPO cannot? A language model from scratch on GSM8K, and three ways to train it on.

    python benchmarks/real_text/run.py judge    --data openai/gsm8k                     # how good is the judge? no model
    python benchmarks/real_text/run.py pretrain --data openai/gsm8k                     # the base model
    python benchmarks/real_text/run.py train    --arm grpo sgpo prefix --seed 0         # one run per arm and seed
    python benchmarks/real_text/run.py report   [--record]

`--data` is a folder with train.jsonl and test.jsonl (columns `question` and `answer`), or openai/gsm8k. Everything is written to
`--output` (outputs/real_text). `pretrain` goes on where it was broken off; a run that is finished is not repeated.

The training questions of GSM8K are split once, by `pretrain`: most teach the base model, some watch its loss, and the rest is for
reinforcement learning and unknown to the base. Test questions are for evaluation alone, with nothing chosen by them.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from datasets import Dataset, load_dataset
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)


sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.real_text.judge import ReferenceJudge, exact_answer, final_answer, make_judge, plain_text
from trl_sgpo import SGPOConfig, SGPOTrainer, StepwiseJudge
from trl_sgpo.analysis import SharpeningCallback
from trl_sgpo.analysis.judge_metrics import ABSTAIN, NO_ERROR, first_error_f1
from trl_sgpo.analysis.metrics import Estimate, mean_estimate, pass_at_k
from trl_sgpo.judges import ArithmeticJudge, JudgeItem
from trl_sgpo.scripts.report import main as sharpening_report
from trl_sgpo.steps import segment


HERE = Path(__file__).parent
HUB_NAME = "openai/gsm8k"
PROMPT = "Question: {question}\nAnswer:\n"
# The arms differ in these alone; the outcome reward and all other settings are the same
ARMS: dict[str, dict[str, Any] | None] = {"grpo": None, "sgpo": {}, "prefix": {"credit_assignment": "prefix"}}
NAMES = {"base": "base", "grpo": "GRPO", "sgpo": "SGPO", "prefix": "prefix credit"}
COLORS = {"grpo": "#8a8f98", "sgpo": "#1f6feb", "prefix": "#d9730d"}
CONTEXT = 768  # tokens of the longest question and solution together
SECONDS_BETWEEN_CHECKPOINTS = 30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def load_gsm8k(data: str) -> dict[str, list[dict[str, str]]]:
    """The rows of `train` and `test` as `question` and `answer`. Raises `ValueError` for anything else."""
    splits = {}
    for name in ("train", "test"):
        if data == HUB_NAME:
            rows = load_dataset(HUB_NAME, "main", split=name).to_list()
        else:
            path = Path(data) / f"{name}.jsonl"
            if not path.is_file():
                raise ValueError(
                    f"--data={data!r}: there is no file {path}. Give a folder with train.jsonl and test.jsonl (one JSON object "
                    f"per line, with `question` and `answer`), or the Hub name {HUB_NAME}."
                )
            rows = read_lines(path)
        for i, row in enumerate(rows):
            if not all(isinstance(row.get(column), str) for column in ("question", "answer")):
                raise ValueError(
                    f"--data={data!r}: row {i} of {name} has the columns {sorted(row)}, but `question` and `answer` are "
                    "needed, both texts."
                )
            if final_answer(row["answer"]) is None:
                raise ValueError(
                    f"--data={data!r}: the answer of row {i} of {name} does not end in '#### ' and a number, so nothing can be "
                    f"compared with it: {row['answer'][-60:]!r}."
                )
        splits[name] = [{"question": row["question"].strip(), "answer": row["answer"].strip()} for row in rows]
    return splits


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a file that is there was written to its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def split_questions(splits: dict[str, list[dict]], n_rl: int, n_validation: int, seed: int) -> dict[str, list[dict]]:
    """The four parts, as rows for a trainer: `prompt` and `solution`, GSM8K's answer with its marks."""
    train = list(splits["train"])
    if n_rl < 1 or n_validation < 1 or n_rl + n_validation >= len(train):
        raise ValueError(
            f"--rl-questions={n_rl} and --validation-questions={n_validation} leave {len(train) - n_rl - n_validation} of "
            f"{len(train)} training questions for pretraining. Each part needs at least one."
        )
    random.Random(seed).shuffle(train)
    parts = {
        "rl": train[:n_rl],
        "validation": train[n_rl : n_rl + n_validation],
        "pretrain": train[n_rl + n_validation :],
        "test": splits["test"],
    }
    return {
        name: [{"prompt": PROMPT.format(question=row["question"]), "solution": row["answer"]} for row in rows]
        for name, rows in parts.items()
    }


def read_parts(output: Path) -> dict[str, list[dict]]:
    return {path.stem: read_lines(path) for path in (output / "data").glob("*.jsonl")}


# ---------------------------------------------------------------------------------------------------------------------
# The base model
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(rows: list[dict], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the rows' questions and solutions, which writes any text and every number digit by digit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((row["prompt"] + plain_text(row["solution"]) for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def encode(rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Question, solution and end as ids. In two pieces, as the policy will see them: no token spans the border."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    solutions = tokenizer([plain_text(row["solution"]) for row in rows])["input_ids"]
    ids = [p + s + [tokenizer.eos_token_id] for p, s in zip(prompts, solutions, strict=True)]
    return [row for row in ids if len(row) <= CONTEXT]


def epoch_batches(ids: list[list[int]], batch_size: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """The batches of an epoch: each of rows that are about equally long, in random order, the same ones for the same seed."""
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(ids)), len(ids))
    pool = 16 * batch_size
    order = [
        i
        for start in range(0, len(order), pool)
        for i in sorted(order[start : start + pool], key=lambda i: len(ids[i]))
    ]
    batches = [[ids[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def loss_of(model: Any, batch: list[list[int]], pad: int) -> torch.Tensor:
    """Mean loss over the tokens of questions and solutions: from so little text the questions teach English, too."""
    width = max(map(len, batch))
    # Right padding under causal attention needs no mask: no real token sees a padding token
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch], device=DEVICE)
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch], device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
        return model(input_ids=input_ids, labels=labels).loss


@torch.no_grad()
def validation_loss(model: Any, ids: list[list[int]], batch_size: int, pad: int) -> float:
    model.eval()
    total = tokens = 0.0
    ordered = sorted(ids, key=len)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        n_tokens = sum(len(row) - 1 for row in batch)
        total += loss_of(model, batch, pad).item() * n_tokens
        tokens += n_tokens
    model.train()
    return total / tokens


def pretrain_model(args: argparse.Namespace, parts: dict[str, list[dict]], folder: Path) -> dict[str, Any]:
    """Trains the base until its updates or minutes are over, and keeps the weights with the lowest validation loss."""
    # The tokenizer learns from what the model learns from: the other parts stay unseen
    tokenizer = train_tokenizer(parts["pretrain"], args.vocabulary)
    model = build_model(args, tokenizer).to(DEVICE).train()
    n_parameters = sum(p.numel() for p in model.parameters())
    ids, held_out = encode(parts["pretrain"], tokenizer), encode(parts["validation"], tokenizer)
    if not ids or not held_out:
        raise ValueError(f"No question and solution fits into {CONTEXT} tokens. Is --data the right folder?")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=DEVICE.type == "cuda"
    )
    state = {"update": 0, "seconds": 0.0, "tokens": 0, "best": math.inf, "best_update": 0, "losses": []}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        state = kept["state"]
        print(f"Going on after update {state['update']} and {state['seconds']:.0f} s.")
    start = time.perf_counter() - state["seconds"]
    last_save = time.perf_counter()
    bar = tqdm(total=args.updates, initial=state["update"], desc=f"pretraining {n_parameters / 1e6:.1f}M parameters")
    per_epoch = -(-len(ids) // args.batch_size)
    epoch = batches = None

    def progress() -> float:
        """Share of the pretraining that is over, by updates or by time, whichever is further: the schedule follows it."""
        return max(state["update"] / args.updates, (time.perf_counter() - start) / (60 * args.minutes))

    over = progress() >= 1
    while not over:
        if epoch != state["update"] // per_epoch:
            epoch = state["update"] // per_epoch
            batches = epoch_batches(ids, args.batch_size, args.seed, epoch)
        batch = batches[state["update"] % per_epoch]
        warm_up = min(1.0, (state["update"] + 1) / min(100, 1 + args.updates // 10))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm_up * (0.1 + 0.45 * (1 + math.cos(math.pi * progress())))
        loss = loss_of(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["update"] += 1
        state["tokens"] += sum(map(len, batch))
        bar.update()
        over = progress() >= 1  # asked once: the last update is always validated
        if state["update"] % args.validate_every == 0 or over:
            found = validation_loss(model, held_out, args.batch_size, tokenizer.pad_token_id)
            state["losses"].append({"update": state["update"], "training": loss.item(), "validation": found})
            bar.set_postfix(training=f"{loss.item():.3f}", validation=f"{found:.3f}")
            if found < state["best"]:
                state["best"], state["best_update"] = found, state["update"]
                model.save_pretrained(folder)
            state["seconds"] = time.perf_counter() - start
            if time.perf_counter() - last_save > SECONDS_BETWEEN_CHECKPOINTS:
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state},
                    f"{checkpoint}.part",
                )
                os.replace(f"{checkpoint}.part", checkpoint)
                last_save = time.perf_counter()
    bar.close()
    tokenizer.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return {**state, "parameters": n_parameters, "vocabulary": len(tokenizer), "epochs": state["update"] / per_epoch}


def pretrain(args: argparse.Namespace) -> None:
    splits = load_gsm8k(args.data)
    for name in (
        "rl_questions",
        "validation_questions",
        "layers",
        "width",
        "heads",
        "batch_size",
        "updates",
        "validate_every",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least 1.")
    if args.width % (2 * args.heads):
        raise ValueError(
            f"--width={args.width} must be a multiple of 2 * --heads={args.heads}: a head needs an even width."
        )
    if args.vocabulary < 260:
        raise ValueError(f"--vocabulary={args.vocabulary} must be at least 260: 256 bytes and the special tokens.")
    if args.minutes <= 0:
        raise ValueError(f"--minutes={args.minutes} must be more than 0.")
    parts = split_questions(splits, args.rl_questions, args.validation_questions, args.seed)
    settings = settings_of(args, "data", "output", "generation_rows", "max_completion")
    settings["data"] = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
    base = args.output / "base"
    check_settings(base / "settings.json", settings, "the base model")
    write_json(base / "settings.json", settings)
    for name, rows in parts.items():
        write_lines(args.output / "data" / f"{name}.jsonl", rows)
    print(f"Questions: {', '.join(f'{len(rows)} {name}' for name, rows in parts.items())}.")
    if not (base / "pretrain.json").exists():
        write_json(base / "pretrain.json", {**pretrain_model(args, parts, base), **surroundings()})
    trained = json.loads((base / "pretrain.json").read_text())
    print(
        f"The base model: {trained['parameters'] / 1e6:.1f}M parameters, {trained['update']} updates ({trained['epochs']:.1f} "
        f"epochs, {trained['tokens'] / 1e6:.1f}M tokens) in {trained['seconds']:.0f} s, lowest validation loss "
        f"{trained['best']:.3f} at update {trained['best_update']}."
    )
    if not (base / "evaluation.json").exists():
        write_json(base / "evaluation.json", evaluate_base(args, base, parts))
    found = json.loads((base / "evaluation.json").read_text())
    print(
        f"Of its groups of {found['group_size']} on unseen training questions {found['failed_groups']:.0%} fail, and in "
        f"{found['untied_of_failed']:.0%} of these the judge tells the completions apart. Of the test questions it answers "
        f"{mean_estimate(found['test_sampled'])} by sampling and {mean_estimate(found['test_greedy'])} greedily; a guess drawn "
        f"from the answers of the training questions is right with probability {found['guess']:.4f}."
    )


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


def load_base(base: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(base).to(DEVICE), AutoTokenizer.from_pretrained(base)


def guess_rate(parts: dict[str, list[dict]]) -> float:
    """Probability that an answer drawn from the training questions is that of a test question: the level of luck."""
    train, test = (Counter(final_answer(row["solution"]) for row in parts[part]) for part in ("pretrain", "test"))
    return sum(count * test[answer] for answer, count in train.items()) / (train.total() * test.total())


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Reinforcement learning
# ---------------------------------------------------------------------------------------------------------------------


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

    def means(keys: tuple[str, ...], entries: list[dict]) -> dict[str, float]:
        return {key: statistics.mean(entry.get(key, 0.0) for entry in entries) for key in keys}

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


# ---------------------------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------------------------

_EQUATION = re.compile(r"(?<![\d.,/*+-])(\d{1,6})( ?[-+*/] ?)(\d{1,6})( ?= ?[$]?)(\d{1,6})(?![\d.,/*+-]|\.\d)")


def corrupt(solution: str, recompute: bool, rng: random.Random) -> tuple[str, int] | None:
    """
    A solution with a wrong number in one equation of whole numbers, and where that equation begins; `None` if there is none
    to change. With `recompute` an operand is changed and the result follows from it, so that the arithmetic stays right.
    """
    found = [match for match in _EQUATION.finditer(solution) if _value(match[1], match[2], match[3]) == int(match[5])]
    rng.shuffle(found)
    for match in found:
        numbers = {1: int(match[1]), 3: int(match[3]), 5: int(match[5])}
        for _ in range(20):
            place = rng.choice((1, 3) if recompute else (1, 3, 5))
            changed = {**numbers, place: max(0, numbers[place] + rng.choice((-1, 1)) * rng.randint(1, 9))}
            value = _value(str(changed[1]), match[2], str(changed[3]))
            if recompute:
                if value is None or value.denominator != 1 or value < 0:
                    continue
                changed[5] = int(value)
            # A change of an operand that leaves the result as it is would be found by nobody
            wrong = changed[5] != numbers[5] if recompute else value != changed[5]
            if wrong and changed[place] != numbers[place]:
                text = f"{changed[1]}{match[2]}{changed[3]}{match[4]}{changed[5]}"
                return solution[: match.start()] + text + solution[match.end() :], match.start()
    return None


def _value(left: str, operator: str, right: str) -> Fraction | None:
    a, b = Fraction(left), Fraction(right)
    if operator.strip() == "/":
        return a / b if b else None
    return {"+": a + b, "-": a - b, "*": a * b}[operator.strip()]


def judge_item(row: dict[str, str], text: str) -> tuple[JudgeItem, list[tuple[int, int]]]:
    spans = segment(text)
    steps = tuple(text[start:end] for start, end in spans)
    return JudgeItem(row["question"], steps, reference=row["answer"], known_wrong=False), spans


def judge(args: argparse.Namespace) -> None:
    splits = load_gsm8k(args.data)
    rng = random.Random(0)
    sets: dict[str, tuple[list[JudgeItem], list[int]]] = {"right": ([], [])}
    for row in splits["train"]:
        sets["right"][0].append(judge_item(row, plain_text(row["answer"]))[0])
        sets["right"][1].append(NO_ERROR)
    for name, recompute in (("number changed", False), ("operand changed", True)):
        items, labels = sets.setdefault(name, ([], []))
        for row in splits["train"]:
            found = corrupt(plain_text(row["answer"]), recompute, rng)
            if found is not None:
                item, spans = judge_item(row, found[0])
                items.append(item)
                labels.append(next(i for i, (_, end) in enumerate(spans) if found[1] < end))
    if args.first_error:
        sets["annotated"] = annotated(args.first_error, splits)
    results: dict[str, dict[str, Any]] = {}
    table = Table(title="The judge on solutions whose first wrong step is known", title_justify="left", box=SIMPLE)
    for column in ("solutions", "judge", "n", "found", "within 1", "alarms", "abstains", "F1"):
        table.add_column(column, justify="left" if column in ("solutions", "judge") else "right", no_wrap=True)
    judges = {"arithmetic": ArithmeticJudge(), "reference": ReferenceJudge(), "both": make_judge()}
    for name, (items, labels) in sets.items():
        for judge_name, asked in judges.items():
            verdicts = asked.judge(items)
            codes = {"abstain": ABSTAIN, "no_error": NO_ERROR}
            predicted = [codes.get(verdict.status, verdict.first_error) for verdict in verdicts]
            scores = first_error_f1(predicted, labels)
            results.setdefault(name, {})[judge_name] = {
                "n": len(items),
                **{key: None if math.isnan(value) else value for key, value in scores.items()},
            }
            keys = ("acc_error", "acc_error_within_1", "false_alarm_rate", "abstain_rate", "f1")
            cells = ["-" if math.isnan(scores[key]) else f"{scores[key]:.4f}" for key in keys]
            if len({label == NO_ERROR for label in labels}) == 1:
                cells[-1] = "-"  # F1 needs right and wrong solutions
            table.add_row(name, judge_name, str(len(items)), *cells)
    Console().print(table)
    print(
        "found: the first wrong step exactly; within 1: that or a neighbour; alarms: of the solutions without an error"
    )
    write_json(args.output / "judge.json", results)


def annotated(path: Path, splits: dict[str, list[dict]]) -> tuple[list[JudgeItem], list[int]]:
    """Solutions by other models, with the first wrong step as people labelled it, joined with GSM8K's by the problem's words."""
    if not path.is_file():
        raise ValueError(
            f"--first-error={str(path)!r} is no file. Give a JSON-lines file with `problem`, `steps` and `label`."
        )
    known = {" ".join(row["question"].split()): row["answer"] for name in ("train", "test") for row in splits[name]}
    items, labels, rows = [], [], read_lines(path)
    for row in rows:
        reference = known.get(" ".join(row["problem"].split()))
        if reference is not None:
            items.append(JudgeItem(row["problem"], tuple(row["steps"]), reference=reference, known_wrong=False))
            labels.append(row["label"])
    if not items:
        raise ValueError(f"--first-error={str(path)!r}: none of its {len(rows)} problems is among those of --data.")
    print(f"{len(items)} of {len(rows)} annotated solutions have a reference.")
    return items, labels


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace) -> None:
    folders = sorted(
        (path.parent for path in (args.output / "runs").glob("*/result.json")),
        key=lambda folder: (
            list(ARMS).index(folder.name.partition("-seed")[0]),
            int(folder.name.partition("-seed")[2]),
        ),
    )
    if not folders:
        raise ValueError(
            f"There is no finished run in {args.output / 'runs'}. Run `train` first, with the same --output."
        )
    base = json.loads((args.output / "base" / "evaluation.json").read_text())
    runs = [{**json.loads((folder / "result.json").read_text()), "folder": folder} for folder in folders]
    found = {"base": summary_of(base, *samples(folders[0], "base"))}
    for run in runs:
        found[run["folder"].name] = summary_of(run, *samples(run["folder"], "policy"))
    show_runs(found, {run["folder"].name: run for run in runs})
    arms = compare_arms(runs)
    show_arms(arms)
    draw(runs, args.output / "curves.png")
    page = args.output / "report"
    sharpening_report(
        [
            *map(str, folders),
            "--output",
            str(page),
            "--tokenizer",
            str(args.output / "base"),
            "--guess",
            str(base["guess"]),
        ]
    )
    print(f"Learning curves: {args.output / 'curves.png'}\nPage: {page / 'index.html'}")
    if args.record:
        judge_file = args.output / "judge.json"
        left_out = ("folder", "test_sampled", "test_greedy", "settings", "probe")
        write_json(
            args.record,
            {
                **surroundings(),
                "settings": runs[0]["settings"],
                "base": {
                    **json.loads((args.output / "base" / "pretrain.json").read_text()),
                    **{key: base[key] for key in ("group_size", "failed_groups", "untied_of_failed", "guess")},
                },
                "results": found,
                "arms": arms,
                "runs": [{key: value for key, value in run.items() if key not in left_out} for run in runs],
                "judge": json.loads(judge_file.read_text()) if judge_file.exists() else None,
            },
        )
        draw(runs, args.record.with_name("curves.png"))
        print(f"Recorded in {args.record}")


def samples(folder: Path, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, right ones, and right ones whose every step is, per question of the probe; of the base or of the last policy."""
    path = sorted((folder / "sharpening").glob(f"{which}*.parquet"))[-1]
    columns = {name: np.array(values) for name, values in pq.read_table(path).to_pydict().items()}
    ids = np.unique(columns["prompt_id"])
    # Where the judge saw none of the right completions the column is not there
    verified = columns.get("process_correct", np.zeros(len(columns["prompt_id"]))) == True  # noqa: E712  None is no proof
    counted = [
        np.array([values[columns["prompt_id"] == i].sum() for i in ids])
        for values in (np.ones(len(verified), int), columns["correct"].astype(int), verified.astype(int))
    ]
    return counted[0], counted[1], counted[2]


def interval(estimate: Estimate) -> list[float | None]:
    """Value and ends; `None` where there are too few questions for an interval."""
    values = (estimate.value, estimate.low, estimate.high)
    return [None if math.isnan(value) else round(value, 5) for value in values]


def summary_of(result: dict[str, Any], n: np.ndarray, c: np.ndarray, verified: np.ndarray) -> dict[str, Any]:
    """Accuracy and pass@k of a model, each with its bootstrap interval over questions."""
    largest = int(n.min())
    ks = sorted({2**power for power in range(largest.bit_length()) if 2**power <= largest} | {largest})
    return {
        "greedy": interval(mean_estimate(result["test_greedy"])),
        "sampled": interval(mean_estimate(result["test_sampled"])),
        "pass@k": {k: interval(mean_estimate(pass_at_k(n, c, k))) for k in ks},
        "pass@k, every step right": {k: interval(mean_estimate(pass_at_k(n, verified, k))) for k in ks},
    }


def compare_arms(runs: list[dict]) -> dict[str, dict[str, Any]]:
    """
    Per arm, the accuracy over its seeds and how far it is from GRPO's, question by question. The intervals cover the choice of
    the questions, not of the seeds: `range` is what the seeds differ by.
    """
    by_arm: dict[str, np.ndarray] = {}
    compared = {}
    for arm in ARMS:
        own = [run["test_sampled"] for run in runs if run["arm"] == arm]
        if own:
            by_arm[arm] = np.mean(own, axis=0)
            means = [statistics.mean(values) for values in own]
            compared[arm] = {
                "seeds": [run["seed"] for run in runs if run["arm"] == arm],
                "accuracy": interval(mean_estimate(by_arm[arm])),
                "range": [min(means), max(means)],
            }
            if "grpo" in by_arm and arm != "grpo":
                compared[arm]["minus_grpo"] = interval(mean_estimate(by_arm[arm] - by_arm["grpo"]))
    return compared


def cell(values: list[float | None]) -> str:
    value, low, high = values
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def show_runs(found: dict[str, dict], runs: dict[str, dict]) -> None:
    largest = max(found["base"]["pass@k"])
    table = Table(title="GSM8K, test questions", title_justify="left", box=SIMPLE)
    for column in (
        "",
        "greedy",
        "sampled",
        "pass@1",
        f"pass@{largest}",
        "every step right",
        "failed",
        "rescued",
        "tokens",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name, values in found.items():
        run = runs.get(name)
        groups = run["groups"] if run else {}
        shares = [f"{groups[f'sgpo/groups/{kind}']:.2f}" for kind in ("failed", "rescued")] if run else ["-", "-"]
        table.add_row(
            name,
            cell(values["greedy"]),
            cell(values["sampled"]),
            cell(values["pass@k"][1]),
            cell(values["pass@k"][largest]),
            cell(values["pass@k, every step right"][largest]),
            *shares,
            f"{run['generated_tokens']:,}" if run else "-",
        )
    console = Console(width=max(150, Console().width))  # narrower, the intervals would break
    console.print(table)
    for line in (
        "greedy, sampled   accuracy on all test questions; [95 % interval over questions]",
        f"pass@1, pass@{largest}    on the questions of the probe; every step right: pass@{largest} of what the judge verifies, too",
        "failed, rescued   share of the groups seen in training",
    ):
        console.print(f"  {line}", highlight=False, markup=False)


def show_arms(arms: dict[str, dict]) -> None:
    table = Table(title="Arms, over their seeds", title_justify="left", box=SIMPLE)
    for column in ("", "seeds", "accuracy, sampled", "range of the seeds", "minus GRPO"):
        table.add_column(column, justify="right" if column else "left")
    for arm, values in arms.items():
        low, high = values["range"]
        difference = cell(values["minus_grpo"]) if "minus_grpo" in values else "-"
        table.add_row(
            NAMES[arm],
            ", ".join(map(str, values["seeds"])),
            cell(values["accuracy"]),
            f"{low:.3f} to {high:.3f}" if len(values["seeds"]) > 1 else "-",
            difference,
        )
    Console().print(table)


def draw(runs: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    seen: set[str] = set()
    for run in runs:
        x = [point["generated_tokens"] / 1e6 for point in run["curve"]]
        y = [point["test/accuracy"] for point in run["curve"]]
        axis.plot(x, y, color=COLORS[run["arm"]], lw=2, label=None if run["arm"] in seen else NAMES[run["arm"]])
        seen.add(run["arm"])
    axis.set_title("Accuracy of sampled completions on GSM8K's test questions", loc="left", fontsize=11)
    axis.set_xlabel("generated tokens (millions)")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """What a result depends on, of the arguments."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "function", *left_out)}


def check_settings(path: Path, settings: dict[str, Any], what: str, key: str | None = None) -> None:
    """Raises `ValueError` if something was made before with other settings: two experiments do not share a folder."""
    if not path.exists():
        return
    kept = json.loads(path.read_text())
    kept = kept[key] if key else kept
    different = [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]
    if different:
        listed = ", ".join(f"{name}: {kept.get(name)!r} there, {settings.get(name)!r} now" for name in different)
        raise ValueError(
            f"{path.parent} holds {what} with other settings ({listed}). Give another --output, or remove it."
        )


def surroundings() -> dict[str, Any]:
    """Commit, versions and hardware, as every record has them."""
    git = shutil.which("git")
    found = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE) if git else None
    on_cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "commit": found.stdout.strip() if found and found.returncode == 0 else "unknown",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")},
        "hardware": torch.cuda.get_device_name() if DEVICE.type == "cuda" else on_cpu,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own.add_argument("--output", type=Path, default=Path("outputs/real_text"), help="where everything is written")
        own.set_defaults(function=function)
        return own

    def add_sampling(own: argparse.ArgumentParser) -> None:
        own.add_argument("--max-completion", type=int, default=240, help="tokens of a completion at most")
        own.add_argument(
            "--generation-rows", type=int, default=1024, help="completions generated at once in an evaluation"
        )

    data = {"required": True, "help": f"folder with train.jsonl and test.jsonl, or {HUB_NAME}"}
    own = command("judge", judge, "measure the judge on right, corrupted and annotated solutions")
    own.add_argument("--data", **data)
    own.add_argument(
        "--first-error", type=Path, help="JSON lines with `problem`, `steps` and `label`, as ProcessBench has them"
    )

    own = command("pretrain", pretrain, "make the base model")
    own.add_argument("--data", **data)
    own.add_argument("--minutes", type=float, default=5.0, help="of training at most, over all restarts")
    own.add_argument("--updates", type=int, default=1500, help="of training at most")
    own.add_argument("--layers", type=int, default=8, help="of the Llama")
    own.add_argument("--width", type=int, default=512, help="of the Llama")
    own.add_argument("--heads", type=int, default=8, help="of the Llama")
    own.add_argument("--vocabulary", type=int, default=4096, help="tokens of the byte-level BPE")
    own.add_argument("--batch-size", type=int, default=64, help="questions per update")
    own.add_argument("--learning-rate", type=float, default=6e-4, help="peak, after a warm-up; then a cosine")
    own.add_argument("--validate-every", type=int, default=50, help="updates between two validations")
    own.add_argument(
        "--rl-questions", type=int, default=2000, help="training questions kept from the base for `train`"
    )
    own.add_argument(
        "--validation-questions", type=int, default=200, help="training questions that watch the base's loss"
    )
    own.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches")
    add_sampling(own)

    own = command("train", train, "train the base with one or more arms")
    own.add_argument("--arm", nargs="+", choices=list(ARMS), required=True, help="one run for each")
    own.add_argument("--seed", type=int, nargs="+", default=[0], help="one run for each")
    own.add_argument("--tokens", type=int, default=1_500_000, help="that each run generates in training")
    own.add_argument("--learning-rate", type=float, default=5e-5, help="constant")
    own.add_argument("--prompts-per-update", type=int, default=32, help="groups of an update")
    own.add_argument("--group-size", type=int, default=8, help="completions of a group")
    own.add_argument("--micro-batch", type=int, default=256, help="completions per forward and backward pass")
    own.add_argument("--evaluations", type=int, default=10, help="points of the learning curve after the first")
    own.add_argument("--evaluation-questions", type=int, default=256, help="test questions of the learning curve")
    own.add_argument("--evaluation-samples", type=int, default=4, help="completions of each")
    own.add_argument("--probe-questions", type=int, default=128, help="test questions for pass@k")
    own.add_argument("--probe-samples", type=int, default=64, help="completions of each, of base and policy")
    add_sampling(own)

    own = command("report", report, "table, learning curves and the page of the sharpening report")
    own.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=HERE / "results.json",
        help="keep the results: in benchmarks/real_text/results.json, or in the file that is given",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    try:
        args.function(args)
    except ValueError as error:
        raise SystemExit(f"{args.command}: {error}") from None


if __name__ == "__main__":
    main()
