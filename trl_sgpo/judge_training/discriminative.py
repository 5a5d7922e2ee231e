"""
Trains a token classifier that scores every step of a solution in one pass. `PRMJudge(output_dir)` loads it. The
separator after a step carries its label: 1 before the first wrong step, 0 at that step. Later steps have no label,
because the annotation does not say anything about them.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, Trainer

from trl_sgpo.judge_evaluation.metrics import ABSTAIN, NO_ERROR, first_error_f1
from trl_sgpo.judge_training.data import JudgeData, as_item, ask_in_batches, same_problem
from trl_sgpo.judges.prm import PRMEncoder, PRMJudge, PRMSpec, best_threshold, verdict_from_scores


if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from trl_sgpo.judge_evaluation.data import Row
    from trl_sgpo.judge_training.arguments import JudgeTrainArguments


def step_labels(n_scores: int, first_error: int) -> list[int]:
    """
    Labels of the first `n_scores` steps: 1 before the first wrong step, 0 at that step, -100 (no label) after it.
    """
    if first_error < 0:
        return [1] * n_scores
    return [1 if i < first_error else 0 if i == first_error else -100 for i in range(n_scores)]


def classifier_examples(rows: Sequence["Row"], encoder: PRMEncoder) -> list[dict[str, list[int]]]:
    """
    Token ids and labels in the judge's own layout. An example ends with its last label, because no later token is
    trained on. A solution is left out if none of its labelled steps fits into the context.
    """
    examples = []
    for row, encoded in zip(rows, encoder.encode([as_item(row) for row in rows]), strict=True):
        if isinstance(encoded, Exception):
            raise ValueError(f"row {row.id!r} of {row.file} cannot be encoded: {encoded}") from encoded
        labelled = [label for label in step_labels(len(encoded.positions), row.label) if label != -100]
        if not labelled:
            continue
        end = encoded.positions[len(labelled) - 1] + 1
        labels = [-100] * end
        for position, label in zip(encoded.positions, labelled, strict=False):
            labels[position] = label
        examples.append({"input_ids": encoded.ids[:end], "labels": labels, "starts": encoded.starts[: len(labelled)]})
    return examples


class ClassifierCollator:
    """
    Makes batches of examples, padded on the right. `lm_labels` holds the tokens of the right steps, and -100
    elsewhere.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pad = DataCollatorForTokenClassification(tokenizer)

    def __call__(self, examples: list[dict[str, list[int]]]) -> Any:
        batch = self.pad([{name: example[name] for name in ("input_ids", "labels")} for example in examples])
        lm_labels = torch.full_like(batch["labels"], -100)
        for row, example in zip(lm_labels, examples, strict=True):
            ends = [i for i, label in enumerate(example["labels"]) if label != -100]
            for start, end in zip(example["starts"], ends, strict=True):
                if example["labels"][end] == 1:
                    row[start:end] = torch.tensor(example["input_ids"][start:end])
        batch["lm_labels"] = lm_labels
        return batch


def class_weights(examples: Sequence[dict[str, list[int]]], balance: str) -> tuple[float, float]:
    """Weights of a wrong and of a right step in the loss. With `"weights"` each class has half of the total weight."""
    counts = Counter(label for example in examples for label in example["labels"] if label != -100)
    if balance == "none" or not counts[0] or not counts[1]:
        return 1.0, 1.0
    total = counts[0] + counts[1]
    return total / (2 * counts[0]), total / (2 * counts[1])


def classifier_loss(logits: torch.Tensor, labels: torch.Tensor, weights: tuple[float, float]) -> torch.Tensor:
    """Weighted cross-entropy, summed over the labelled steps. Logits: `(N, T, 2)`, labels: `(N, T)`."""
    weight = torch.tensor(weights, device=logits.device)
    return cross_entropy(logits.float().view(-1, 2), labels.view(-1), weight, ignore_index=-100, reduction="sum")


def right_step_lm_loss(hidden: torch.Tensor, embeddings: torch.Tensor, lm_labels: torch.Tensor) -> torch.Tensor:
    """
    Mean cross-entropy of the next token over the tokens of the right steps, and zero if there are none. Hidden states:
    `(N, T, D)`, tied embeddings: `(V, D)`, labels: `(N, T)`.
    """
    targets = lm_labels[:, 1:]
    mask = targets != -100
    # Only the positions with a target: logits of all positions over the whole vocabulary would need much memory
    logits = (hidden[:, :-1][mask] @ embeddings.T).float()
    return cross_entropy(logits, targets[mask], reduction="sum") / mask.sum().clamp(min=1)


class ClassifierTrainer(Trainer):
    """
    A `transformers.Trainer` with [`classifier_loss`], whose `weights` are those of a wrong and of a right step, and
    `lm_weight` times [`right_step_lm_loss`]. 0 leaves that out.
    """

    def __init__(self, *, weights: tuple[float, float], lm_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights = weights
        self.lm_weight = lm_weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, lm_labels = inputs["labels"], inputs["lm_labels"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=self.lm_weight > 0,
        )
        n_labels = (labels != -100).sum()
        total = num_items_in_batch if num_items_in_batch is not None else n_labels
        loss = classifier_loss(outputs.logits, labels, self.weights) / total
        if self.lm_weight > 0:
            embeddings = self.accelerator.unwrap_model(model).get_input_embeddings().weight
            lm_loss = right_step_lm_loss(outputs.hidden_states[-1], embeddings, lm_labels)
            # With accumulated gradients every part counts by its share of the labels
            loss = loss + self.lm_weight * lm_loss * n_labels / total
        return (loss, outputs) if return_outputs else loss


def load_classifier(
    arguments: "JudgeTrainArguments", training_args: "SFTConfig", model_args: "ModelConfig"
) -> tuple[Any, Any]:
    """The model with a new classification head, and its tokenizer with the separator."""
    path = str(model_args.model_name_or_path)
    found = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **found)
    model = AutoModelForTokenClassification.from_pretrained(
        path,
        num_labels=2,
        id2label={0: "wrong", 1: "right"},
        label2id={"wrong": 0, "right": 1},
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **found,
    )
    if arguments.lm_weight > 0 and not model.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"lm_weight={arguments.lm_weight} needs a model with tied embeddings. {path!r} has separate output "
            "embeddings, which a token classifier lacks. Set lm_weight=0, or take another model."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.separator.strip() and arguments.separator not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [arguments.separator]})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def train_classifier(
    arguments: "JudgeTrainArguments", training_args: "SFTConfig", model_args: "ModelConfig", data: JudgeData
) -> dict[str, Any]:
    """Trains a token classifier, saves it and calibrates its threshold. Returns its numbers on the dev data."""
    if model_args.use_peft:
        raise ValueError(
            "use_peft=True does not go with kind='discriminative', because PRMJudge loads whole models. Leave it "
            "out, or train a judge of kind='generative'."
        )
    model, tokenizer = load_classifier(arguments, training_args, model_args)
    spec = PRMSpec(
        template="chat" if tokenizer.chat_template else "plain", separator=arguments.separator, before_first_step=""
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (training_args.max_length, longest) if limit is not None]
    examples = classifier_examples(data.train, PRMEncoder(tokenizer, spec, min(limits, default=None)))
    if not examples:
        raise ValueError(
            f"max_length={training_args.max_length} leaves no labelled step in any of {len(data.train)} solutions. Give "
            "a larger max_length."
        )
    tokenizer.padding_side = "right"
    training_args.remove_unused_columns = False  # the collator needs columns that the model does not take
    trainer = ClassifierTrainer(
        weights=class_weights(examples, arguments.class_balance),
        lm_weight=arguments.lm_weight,
        model=model,
        args=training_args,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        data_collator=ClassifierCollator(tokenizer),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    model.config.prm_spec = spec.to_config()  # set before the model is saved, because PRMJudge reads it there
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    result: dict[str, Any] = {"examples": len(examples)}
    if trainer.is_world_process_zero():
        folder = Path(str(training_args.output_dir))
        result |= calibrate(folder, data.dev, training_args.use_cpu, arguments.max_tokens_per_batch)
    trainer.accelerator.wait_for_everyone()
    return result


def calibrate(folder: Path, dev: Sequence["Row"], use_cpu: bool, max_tokens_per_batch: int) -> dict[str, Any]:
    """
    Finds the threshold of a saved judge on all dev rows, and writes it into the judge's `config.json`. The returned
    numbers use another threshold: each half of the dev problems is judged with the threshold of the *other* half.
    Otherwise the choice of the threshold would flatter them.
    """
    judge = PRMJudge(folder, device="cpu" if use_cpu else None, max_tokens_per_batch=max_tokens_per_batch)
    pairs = list(zip(dev, ask_in_batches(judge.scores, dev), strict=True))
    rows = [(row, own) for row, own in pairs if not any(map(math.isnan, own))]
    if not rows:
        raise ValueError(f"none of the {len(dev)} dev solutions fits into the model, so no threshold can be found.")
    problems = sorted({same_problem(row.problem) for row, _ in rows})
    halves = {problem: i % 2 for i, problem in enumerate(problems)}
    parts = [[(row, own) for row, own in rows if halves[same_problem(row.problem)] == half] for half in (0, 1)]
    final = _threshold(rows)
    labels = [row.label for row, own in pairs if any(map(math.isnan, own))]  # too long: no verdict
    predicted = [ABSTAIN] * len(labels)
    for here, other in (parts, parts[::-1]):
        chosen = _threshold(other) if other else final
        for row, own in here:
            verdict = verdict_from_scores(own, len(row.steps), chosen, known_wrong=False)
            predicted.append(NO_ERROR if verdict.first_error is None else verdict.first_error)
            labels.append(row.label)
    config = json.loads((folder / "config.json").read_text())
    config["prm_spec"]["threshold"] = final
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {**first_error_f1(predicted, labels), "threshold": final, "dev_rows": len(dev)}


def _threshold(scored: Sequence[tuple["Row", Any]]) -> float:
    """The threshold with the best F1 on rows and the scores of their steps."""
    return best_threshold([scores for _, scores in scored], [row.label for row, _ in scored]).threshold
