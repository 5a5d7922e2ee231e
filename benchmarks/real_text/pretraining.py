"""The command `pretrain`: the base model, from random weights. It goes on where it was broken off."""

import argparse
import hashlib
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.real_text.data import load_gsm8k, split_questions, write_lines
from benchmarks.real_text.evaluation import evaluate_base
from benchmarks.real_text.judge import plain_text
from benchmarks.real_text.model import CONTEXT, DEVICE, build_model, train_tokenizer
from benchmarks.real_text.records import check_settings, settings_of, surroundings, write_json
from trl_sgpo.analysis.metrics import mean_estimate


SECONDS_BETWEEN_CHECKPOINTS = 30


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
