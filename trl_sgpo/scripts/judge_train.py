# /// script
# dependencies = [
#     "trl-sgpo[peft]",
#     "trackio",
# ]
# ///
"""
Trains a step-wise judge on solutions whose first wrong step is annotated.

    python -m trl_sgpo.scripts.judge_train --config recipes/judge/rewrite_chain.yaml
    accelerate launch -m trl_sgpo.scripts.judge_train --config recipes/judge/rewrite_chain.yaml

`--kind discriminative` makes a token classifier, which scores every step in one pass: `PRMJudge(output_dir)` loads it with
its layout and its calibrated threshold. The separator after a step carries the label, 1 before the first error and 0 at
it; the steps behind the error have none, for nobody judged them.

`--kind generative` trains a causal language model on its own critiques: those that can be read and whose verdict is the
annotated one, with no answer more frequent than the others. `GenerativeJudge(output_dir)` loads it. A model that cannot
judge at all yet begins with `--bootstrap missing` or `all`: bare verdict lines instead of critiques.

`--data` takes names of the Hub and local files with the fields that `judge_eval` reads: `prompt`, `completions` and
`labels` (one boolean per step), or `problem`, `steps` and `label` (0-based first wrong step, -1 for none).

A share of the problems is kept out of training to calibrate and to report; problems of the files named in `--exclude`,
on which the judge is to be evaluated, are taken out too. Takes the arguments of `SFTConfig` as well.
"""

import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig, TrlParser

    from trl_sgpo.judge_evaluation.data import Row
    from trl_sgpo.judges import JudgeItem


logger = logging.getLogger(__name__)

KINDS = ("discriminative", "generative")
CLASS_BALANCES = ("weights", "none")
BOOTSTRAPS = ("none", "missing", "all")

# Data that judges are compared on: a judge trained on it has no score there any more
EVALUATION_SETS = ("processbench", "prmbench", "mr-ben", "mr_ben")


@dataclass
class JudgeTrainArguments:
    """
    Arguments of the training of a judge.

    Args:
        data (`list[str]`):
            Names of the Hub or local files with annotated solutions.
        kind (`str`, *optional*, defaults to `"discriminative"`):
            `"discriminative"` (a token classifier, for `PRMJudge`) or `"generative"` (for `GenerativeJudge`).
        split (`str`, *optional*):
            The split of a dataset of the Hub. All of them by default.
        exclude (`list[str]`, *optional*):
            Names of the Hub or local files whose problems must not be trained on.
        dev_data (`list[str]`, *optional*):
            Data to calibrate and report on. By default a share of the problems of `data`.
        dev_share (`float`, *optional*, defaults to `0.1`):
            That share.
        separator (`str`, *optional*, defaults to `"<extra_0>"`):
            Discriminative: text after every step, where its score is read. If it is no token of the vocabulary, and not
            blank, it is added as a special token, which no completion can contain.
        class_balance (`str`, *optional*, defaults to `"weights"`):
            Discriminative: `"weights"` gives right and wrong steps the same total weight in the loss, `"none"` counts
            every labelled step once.
        lm_weight (`float`, *optional*, defaults to `0.0`):
            Discriminative: weight of a language-modelling loss on the tokens of the right steps, beside the loss on the labels.
            One label per step is little to learn from; to expect the right step helps to see the wrong one. Needs a model
            with tied embeddings, for a token classifier has no others.
        samples (`int`, *optional*, defaults to `4`):
            Generative: critiques that are sampled per solution and round.
        rounds (`int`, *optional*, defaults to `1`):
            Generative: rounds of sampling from the latest judge and training `model_name_or_path` anew.
        bootstrap (`str`, *optional*, defaults to `"none"`):
            Generative: solutions for which no critique was right are left out (`"none"`) or trained with a bare verdict
            line (`"missing"`); or all are, and nothing is sampled (`"all"`), which is what `GenerativeJudge(answer="score")`
            needs.
        sampling_temperature (`float`, *optional*, defaults to `0.8`):
            Generative: of the critiques.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Generative: tokens per critique.
        max_tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Most tokens of one batch when the judge is asked.
        answer (`str`, *optional*, defaults to `"generate"`):
            Generative: how the trained judge is asked on the dev data, `"generate"` or `"score"`.
    """

    data: list[str] = field(metadata={"help": "Names of the Hub or local files with annotated solutions."})
    kind: str = field(default="discriminative", metadata={"help": "'discriminative' or 'generative'."})
    split: str | None = field(default=None, metadata={"help": "Split of a dataset of the Hub. All by default."})
    exclude: list[str] | None = field(
        default=None, metadata={"help": "Names or files whose problems must not be trained on."}
    )
    dev_data: list[str] | None = field(
        default=None, metadata={"help": "Data to calibrate and report on. By default a share of the problems."}
    )
    dev_share: float = field(default=0.1, metadata={"help": "Share of the problems that is kept for that."})
    separator: str = field(
        default="<extra_0>", metadata={"help": "Text after every step, where a token classifier scores it."}
    )
    class_balance: str = field(
        default="weights", metadata={"help": "'weights': right and wrong steps weigh the same. Or 'none'."}
    )
    lm_weight: float = field(
        default=0.0, metadata={"help": "Weight of a language-modelling loss on the right steps of a token classifier."}
    )
    samples: int = field(default=4, metadata={"help": "Critiques per solution and round."})
    rounds: int = field(default=1, metadata={"help": "Rounds of sampling and training."})
    bootstrap: str = field(
        default="none", metadata={"help": "Bare verdict lines for 'none', the 'missing' or 'all' solutions."}
    )
    sampling_temperature: float = field(default=0.8, metadata={"help": "Temperature of the critiques."})
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens per critique."})
    max_tokens_per_batch: int = field(
        default=16384, metadata={"help": "Most tokens of one batch when the judge is asked."}
    )
    answer: str = field(
        default="generate", metadata={"help": "How a generative judge is asked: 'generate' or 'score'."}
    )

    def __post_init__(self) -> None:
        for name in ("data", "exclude", "dev_data"):
            if isinstance(getattr(self, name), str):  # a single name in a YAML file
                setattr(self, name, [getattr(self, name)])
        for name, choices in (
            ("kind", KINDS),
            ("class_balance", CLASS_BALANCES),
            ("bootstrap", BOOTSTRAPS),
            ("answer", ("generate", "score")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: it must be one of {list(choices)}.")
        for name in ("samples", "rounds", "max_new_tokens", "max_tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.dev_share < 1:
            raise ValueError(f"dev_share={self.dev_share} must lie strictly between 0 and 1: a share of the problems.")
        if not (self.lm_weight >= 0 and math.isfinite(self.lm_weight)):
            raise ValueError(
                f"lm_weight={self.lm_weight} must be a finite number of at least 0. 0 leaves that loss out."
            )
        if not self.sampling_temperature > 0:
            raise ValueError(
                f"sampling_temperature={self.sampling_temperature} must be positive: several critiques of one solution "
                "have to differ."
            )
        for name in self.data:
            if any(known in name.lower() for known in EVALUATION_SETS):
                raise ValueError(
                    f"data={name!r} is a set that judges are evaluated on; one trained on it has no score there any more. "
                    "Train on other data, and name this one in `exclude`, which keeps its problems out of training."
                )


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeData:
    """
    What is trained on and what is calibrated on, and what was taken out.

    Args:
        train, dev (`list[Row]`):
            Annotated solutions. No problem is in both.
        excluded (`int`):
            Rows that were taken out of `train` because their problem is in `exclude`, or in `dev_data`.
        skipped (`dict[str, int]`):
            Rows that could not be used, by reason.
    """

    train: list["Row"]
    dev: list["Row"]
    excluded: int
    skipped: dict[str, int]


def read_data(arguments: JudgeTrainArguments, seed: int = 0) -> JudgeData:
    """
    Reads, excludes and splits.

    Raises:
        ValueError: If a row cannot be understood (which file, row and field), or nothing is left to train or calibrate on.
    """
    from trl_sgpo.judge_evaluation.data import read_rows

    rows, sources = read_rows(arguments.data, arguments.split)
    skipped: Counter[str] = Counter()
    for source in sources:
        skipped.update(source["skipped"])
    held_out = read_rows(arguments.exclude)[0] if arguments.exclude else []
    dev = read_rows(arguments.dev_data)[0] if arguments.dev_data else []
    forbidden = {same_problem(row.problem) for row in [*held_out, *dev]}
    train = [row for row in rows if same_problem(row.problem) not in forbidden]
    excluded = len(rows) - len(train)
    if not dev:
        problems = sorted({same_problem(row.problem) for row in train})
        random.Random(seed).shuffle(problems)
        kept = set(problems[: max(1, round(arguments.dev_share * len(problems)))] if len(problems) > 1 else [])
        dev = [row for row in train if same_problem(row.problem) in kept]
        train = [row for row in train if same_problem(row.problem) not in kept]
    for name, part in (("train", train), ("calibrate", dev)):
        if not part:
            raise ValueError(
                f"data={arguments.data} leaves nothing to {name} on: {len(rows)} rows were read, {excluded} of them have "
                f"a problem of exclude={arguments.exclude}, and {sum(skipped.values())} more could not be used "
                f"({dict(skipped)}). Give more data, or `dev_data`."
            )
    if all(row.label == -1 for row in train):
        raise ValueError(f"data={arguments.data} has no solution with an error, so there is nothing to learn from it.")
    return JudgeData(train, dev, excluded, dict(skipped))


def same_problem(text: str) -> str:
    """What two spellings of a problem have in common: its letters and digits."""
    return re.sub(r"[\W_]+", " ", text).strip().casefold()


def as_item(row: "Row", known_wrong: bool = False) -> "JudgeItem":
    from trl_sgpo.judges import JudgeItem

    return JudgeItem(row.problem, row.steps, known_wrong=known_wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Discriminative
# ---------------------------------------------------------------------------------------------------------------------


def step_labels(n_scores: int, first_error: int) -> list[int]:
    """
    Labels of the first `n_scores` steps: 1 before the first error, 0 at it, -100 (no label) behind it.

    ```python
    >>> step_labels(4, first_error=1), step_labels(2, first_error=-1)
    ([1, 0, -100, -100], [1, 1])
    ```
    """
    if first_error < 0:
        return [1] * n_scores
    return [1 if i < first_error else 0 if i == first_error else -100 for i in range(n_scores)]


def classifier_examples(rows: Sequence["Row"], encoder: Any) -> list[dict[str, list[int]]]:
    """
    Token ids and labels in the judge's own layout. An example ends with its last label: nothing behind it is learnt.
    Completions of which no labelled step fits into the context are left out.
    """
    examples = []
    for row, encoded in zip(rows, encoder.encode([as_item(row) for row in rows]), strict=True):
        if isinstance(encoded, Exception):
            raise ValueError(f"row {row.id!r} of {row.file} cannot be encoded: {encoded}") from encoded
        labelled = [
            (start, position, label)
            for start, position, label in zip(
                encoded.starts, encoded.positions, step_labels(len(encoded.positions), row.label), strict=True
            )
            if label != -100
        ]
        if not labelled:
            continue
        end = labelled[-1][1] + 1
        labels = [-100] * end
        for _, position, label in labelled:
            labels[position] = label
        starts = [start for start, _, _ in labelled]
        examples.append({"input_ids": encoded.ids[:end], "labels": labels, "starts": starts})
    return examples


class ClassifierCollator:
    """
    Batches of examples, padded on the right. `lm_labels` are the tokens of the right steps, and -100 elsewhere.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Pads.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorForTokenClassification

        self.pad = DataCollatorForTokenClassification(tokenizer)

    def __call__(self, examples: list[dict[str, list[int]]]) -> Any:
        import torch

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
    """
    Weights of a wrong and of a right step in the loss. With `"weights"` both classes have half of the total weight.

    ```python
    >>> class_weights([{"labels": [1, 1, 1, 0]}], "weights")
    (2.0, 0.6666666666666666)
    ```
    """
    counts = Counter(label for example in examples for label in example["labels"] if label != -100)
    if balance == "none" or not counts[0] or not counts[1]:
        return 1.0, 1.0
    total = counts[0] + counts[1]
    return total / (2 * counts[0]), total / (2 * counts[1])


def classifier_loss(logits: Any, labels: Any, weights: tuple[float, float]) -> Any:
    """Weighted cross-entropy, summed over the labelled steps; logits of shape `(N, T, 2)`, labels of shape `(N, T)`."""
    import torch

    weight = torch.tensor(weights, device=logits.device)
    logits = logits.float().view(-1, 2)
    return torch.nn.functional.cross_entropy(
        logits, labels.view(-1), weight=weight, ignore_index=-100, reduction="sum"
    )


def right_step_lm_loss(hidden: Any, embeddings: Any, lm_labels: Any) -> Any:
    """
    Mean cross-entropy of the next token over the tokens of right steps; hidden states of shape `(N, T, D)`, the tied
    embeddings of shape `(V, D)`, labels of shape `(N, T)`. Zero without such tokens.
    """
    import torch

    targets = lm_labels[:, 1:]
    mask = targets != -100
    # Only where there is a target: a matrix of all positions and the whole vocabulary would be large
    logits = (hidden[:, :-1][mask] @ embeddings.T).float()
    return torch.nn.functional.cross_entropy(logits, targets[mask], reduction="sum") / mask.sum().clamp(min=1)


def classifier_trainer(weights: tuple[float, float], lm_weight: float, **kwargs: Any) -> Any:
    """A `transformers.Trainer` with these losses."""
    from transformers import Trainer

    class ClassifierTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels, lm_labels = inputs["labels"], inputs["lm_labels"]
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                output_hidden_states=lm_weight > 0,
            )
            n_labels = (labels != -100).sum()
            total = num_items_in_batch if num_items_in_batch is not None else n_labels
            loss = classifier_loss(outputs.logits, labels, weights) / total
            if lm_weight > 0:
                embeddings = self.accelerator.unwrap_model(model).get_input_embeddings().weight
                lm_loss = right_step_lm_loss(outputs.hidden_states[-1], embeddings, lm_labels)
                # With accumulated gradients every part counts by its share of the labels
                loss = loss + lm_weight * lm_loss * n_labels / total
            return (loss, outputs) if return_outputs else loss

    return ClassifierTrainer(**kwargs)


def train_classifier(
    arguments: JudgeTrainArguments, training_args: "SFTConfig", model_args: "ModelConfig", data: JudgeData
) -> dict[str, Any]:
    """Trains and saves a token classifier, calibrates its threshold. Returns the dev numbers."""
    from datasets import Dataset
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from trl_sgpo.judges.prm import PRMEncoder, PRMSpec

    if model_args.use_peft:
        raise ValueError(
            "use_peft=True does not go with kind='discriminative': PRMJudge loads whole models. Leave it out, or train "
            "a judge of kind='generative'."
        )
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
            f"lm_weight={arguments.lm_weight} needs a model with tied embeddings, and {path!r} has output embeddings of its own, "
            "which a token classifier lacks. Set lm_weight=0, or take another model."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.separator.strip() and arguments.separator not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [arguments.separator]})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    spec = PRMSpec(
        template="chat" if tokenizer.chat_template else "plain", separator=arguments.separator, before_first_step=""
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (training_args.max_length, longest) if limit is not None]
    examples = classifier_examples(data.train, PRMEncoder(tokenizer, spec, min(limits, default=None)))
    if not examples:
        raise ValueError(
            f"max_length={training_args.max_length} leaves no labelled step in any of {len(data.train)} solutions. Give a "
            "larger max_length."
        )
    tokenizer.padding_side = "right"
    training_args.remove_unused_columns = False  # the collator takes the columns that the model does not
    trainer = classifier_trainer(
        class_weights(examples, arguments.class_balance),
        arguments.lm_weight,
        model=model,
        args=training_args,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        data_collator=ClassifierCollator(tokenizer),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    model.config.prm_spec = spec.to_config()  # before it is saved: PRMJudge reads it there
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    result: dict[str, Any] = {"examples": len(examples)}
    if trainer.is_world_process_zero():
        result |= calibrate(Path(str(training_args.output_dir)), data.dev, training_args.use_cpu, arguments)
    trainer.accelerator.wait_for_everyone()
    return result


def calibrate(folder: Path, dev: Sequence["Row"], use_cpu: bool, arguments: JudgeTrainArguments) -> dict[str, Any]:
    """
    Finds the threshold of a saved judge on all dev rows and writes it into its config. The numbers that are returned
    are of verdicts by the threshold of the *other* half of the dev problems, so that they flatter nobody.
    """
    from trl_sgpo.judge_evaluation.metrics import ABSTAIN, NO_ERROR, first_error_f1
    from trl_sgpo.judges.prm import PRMJudge, best_threshold, verdict_from_scores

    judge = PRMJudge(folder, device="cpu" if use_cpu else None, max_tokens_per_batch=arguments.max_tokens_per_batch)
    scores = judge.scores([as_item(row) for row in dev])
    pairs = list(zip(dev, scores, strict=True))
    rows = [(row, own) for row, own in pairs if not any(map(math.isnan, own))]
    if not rows:
        raise ValueError(f"none of the {len(dev)} dev solutions fits into the model, so no threshold can be found.")
    problems = sorted({same_problem(row.problem) for row, _ in rows})
    halves = {problem: i % 2 for i, problem in enumerate(problems)}
    parts = [[(row, own) for row, own in rows if halves[same_problem(row.problem)] == half] for half in (0, 1)]

    def threshold(part: list[Any]) -> float:
        return best_threshold([own for _, own in part], [row.label for row, _ in part]).threshold

    final = threshold(rows)
    unscored = [row.label for row, own in pairs if any(map(math.isnan, own))]  # too long: no verdict
    predicted, labels = [ABSTAIN] * len(unscored), unscored
    for here, other in (parts, parts[::-1]):
        chosen = threshold(other) if other else final
        for row, own in here:
            verdict = verdict_from_scores(own, len(row.steps), chosen, known_wrong=False)
            predicted.append(NO_ERROR if verdict.first_error is None else verdict.first_error)
            labels.append(row.label)
    config = json.loads((folder / "config.json").read_text())
    config["prm_spec"]["threshold"] = final
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {**first_error_f1(predicted, labels), "threshold": final, "dev_rows": len(dev)}


# ---------------------------------------------------------------------------------------------------------------------
# Generative
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Critique:
    """
    An answer to train on.

    Args:
        row (`Row`):
            The solution it is about.
        known_wrong (`bool`):
            Whether the question said that the answer is known to be wrong.
        text (`str`):
            The answer, ending in the verdict line.
    """

    row: "Row"
    known_wrong: bool
    text: str


def known_wrong_by_turns(rows: Sequence["Row"]) -> list[bool]:
    """In which of its two modes the judge is asked: every other solution with an error is said to be wrong."""
    turn = 0
    modes = []
    for row in rows:
        turn += row.label >= 0
        modes.append(row.known_wrong and turn % 2 == 1)
    return modes


def verdict_line(label: int) -> str:
    """The bare verdict of an annotated solution."""
    return "FIRST_ERROR: none" if label < 0 else f"FIRST_ERROR: {label + 1}"


def balanced(critiques: Sequence[Critique], seed: int) -> list[Critique]:
    """No answer more often than the answers are on average, so that the judge does not learn to say the usual one."""
    by_label: dict[int, list[Critique]] = {}
    for critique in critiques:
        by_label.setdefault(critique.row.label, []).append(critique)
    most = -(-len(critiques) // max(len(by_label), 1))
    rng = random.Random(seed)
    kept = [c for _, own in sorted(by_label.items()) for c in (own if len(own) <= most else rng.sample(own, most))]
    rng.shuffle(kept)
    return kept


def own_critiques(
    folder: str, arguments: JudgeTrainArguments, training_args: "SFTConfig", rows: Sequence["Row"], seed: int
) -> tuple[list[Critique], dict[str, float]]:
    """
    The model's critiques of all solutions that end in the annotated verdict, and how many did.

    Each rank asks about a share of the solutions and gets what all have found.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from trl_sgpo.judges.generative import GenerativeJudge

    state = PartialState()
    judge = GenerativeJudge(
        folder,
        votes=arguments.samples,
        temperature=arguments.sampling_temperature,
        max_new_tokens=arguments.max_new_tokens,
        max_tokens_per_batch=arguments.max_tokens_per_batch,
        batch_deadline=None,
        device="cpu" if training_args.use_cpu else None,
        trust_remote_code=training_args.trust_remote_code,
        seed=seed,
    )
    modes = known_wrong_by_turns(rows)
    mine = range(state.process_index, len(rows), state.num_processes)
    from tqdm.auto import tqdm

    found: list[
        tuple[int, bool, bool, str]
    ] = []  # a row, whether the answer was read, whether it was right, the answer
    chunk = max(1, 256 // arguments.samples)
    for start in tqdm(range(0, len(mine), chunk), desc="asking for critiques", disable=not state.is_main_process):
        part = mine[start : start + chunk]
        for i, answers in zip(part, judge.sample([as_item(rows[i], modes[i]) for i in part]), strict=True):
            for text, verdict in answers:
                gold = -1 if verdict.first_error is None else verdict.first_error
                readable = verdict.status != "abstain"
                found.append((i, readable, readable and gold == rows[i].label, text))
    found = gather_object(found)
    right = [Critique(rows[i], modes[i], text) for i, _, good, text in sorted(found) if good]
    n = max(len(found), 1)
    shares = {
        "sampled": float(len(found)),
        "readable": sum(readable for _, readable, _, _ in found) / n,
        "right": len(right) / n,
        "solutions_with_a_right_one": len({id(critique.row) for critique in right}) / len(rows),
    }
    return right, shares


def critique_examples(
    critiques: Sequence[Critique], layout: Any, prompt: Any, max_length: int | None
) -> list[dict[str, list[int]]]:
    """Token ids and labels, the very ids that the judge asks with; only the answer and its EOS token are learnt."""
    eos = layout.tokenizer.eos_token_id
    examples = []
    for critique in critiques:
        item = as_item(critique.row, critique.known_wrong)
        try:
            _, question = layout.ask(prompt, item)
        except ValueError as error:
            logger.info("A critique of %s is left out: %s", critique.row.id, error)
            continue
        answer = [*layout.encode_answer(critique.text.strip()), eos]
        if max_length is None or len(question) + len(answer) <= max_length:
            examples.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return examples


def train_generative(
    arguments: JudgeTrainArguments, training_args: "SFTConfig", model_args: "ModelConfig", data: JudgeData
) -> dict[str, Any]:
    """Rounds of sampling, filtering and supervised fine-tuning. Returns the dev numbers."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from trl_sgpo.judges.generative import GenerativeJudge, QuestionLayout
    from trl_sgpo.judges.prompt import JudgePrompt

    base, output = str(model_args.model_name_or_path), str(training_args.output_dir)
    prompt = JudgePrompt()
    tokenizer = AutoTokenizer.from_pretrained(
        base, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    layout = QuestionLayout(tokenizer)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),  # type: ignore[dict-item]
    }
    result: dict[str, Any] = {}
    for turn in range(1 if arguments.bootstrap == "all" else arguments.rounds):
        critiques: list[Critique] = []
        if arguments.bootstrap != "all":
            asked = base if turn == 0 else output
            critiques, shares = own_critiques(asked, arguments, training_args, data.train, training_args.seed + turn)
            print(f"round {turn + 1}: " + ", ".join(f"{name} {value:.3g}" for name, value in shares.items()))
            result |= {f"critiques/{name}": value for name, value in shares.items()}
        if arguments.bootstrap != "none":
            done = {id(critique.row) for critique in critiques}
            modes = known_wrong_by_turns(data.train)
            critiques += [
                Critique(row, mode, verdict_line(row.label))
                for row, mode in zip(data.train, modes, strict=True)
                if id(row) not in done
            ]
        kept = balanced(critiques, training_args.seed)
        examples = critique_examples(kept, layout, prompt, training_args.max_length)
        if not examples:
            raise ValueError(
                f"no critique is left to train on: of {len(data.train)} solutions {len(critiques)} critiques have the "
                f"annotated verdict, and of those kept none fits into max_length={training_args.max_length}. Give a "
                "larger max_length or more `samples`; for a model that cannot judge yet, `--bootstrap missing`."
            )
        trainer = SFTTrainer(
            model=base,
            args=training_args,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            quantization_config=get_quantization_config(model_args),
        )
        trainer.train()
        trainer.save_model(output)
        trainer.save_state()
        result |= {"examples": len(examples), "examples_too_long": len(kept) - len(examples)}
        trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        judge = GenerativeJudge(
            output,
            tokenizer=tokenizer,
            prompt=prompt,
            answer=arguments.answer,
            max_new_tokens=arguments.max_new_tokens,
            max_tokens_per_batch=arguments.max_tokens_per_batch,
            batch_deadline=None,
            device="cpu" if training_args.use_cpu else None,
        )
        result |= evaluate_generative(judge, data.dev)
    trainer.accelerator.wait_for_everyone()
    return result


def evaluate_generative(judge: Any, dev: Sequence["Row"]) -> dict[str, Any]:
    """The dev numbers of a generative judge, asked without being told which solutions are wrong."""
    from trl_sgpo.judge_evaluation.metrics import ABSTAIN, NO_ERROR, first_error_f1
    from trl_sgpo.judges.base import ask

    verdicts = ask(judge, [as_item(row) for row in dev])
    codes = {"abstain": ABSTAIN, "no_error": NO_ERROR}
    predicted = [codes.get(verdict.status, verdict.first_error) for verdict in verdicts]
    return {**first_error_f1(predicted, [row.label for row in dev]), "dev_rows": len(dev)}  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# The card, the table, the Hub
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = {
    "f1": "F1: harmonic mean of the next two",
    "acc_error": "solutions with an error whose first wrong step is found exactly",
    "acc_correct": "solutions without an error that are left alone",
    "acc_error_within_1": "solutions with an error found within one step",
    "abstain_rate": "solutions without a verdict",
    "threshold": "threshold, kept in `config.json`",
}


def model_card(name: str, arguments: JudgeTrainArguments, base: str, data: JudgeData, result: dict[str, Any]) -> str:
    """The text of the model card: how to use the judge, what it was trained on, what it is worth."""
    from trl_sgpo import __version__

    discriminative = arguments.kind == "discriminative"
    judge = "PRMJudge" if discriminative else "GenerativeJudge"
    module = "prm" if discriminative else "generative"
    base_line = "" if Path(base).exists() else f"base_model: {base}\n"
    hub_data = [name for name in arguments.data if not Path(name).exists()]
    datasets = "datasets:\n" + "".join(f"- {name}\n" for name in hub_data) if hub_data else ""
    numbers = "\n".join(f"| {text} | {result[key]:.3f} |" for key, text in NUMBERS.items() if key in result)
    shown = ", ".join(name if not Path(name).exists() else Path(name).name for name in arguments.data)
    extra = f', answer="{arguments.answer}"' if not discriminative and arguments.answer != "generate" else ""
    how = (
        "A token classifier: the separator after each step is scored. In training it has label 1 before the first error "
        f"and 0 at it; steps behind it have none. Class balance: `{arguments.class_balance}`."
        if discriminative
        else f"Trained on {result.get('examples', 0)} critiques whose verdict is the annotated one "
        f"(bootstrap: `{arguments.bootstrap}`), no answer more frequent than the average."
    )
    return f"""---
{base_line}{datasets}library_name: transformers
pipeline_tag: {"token-classification" if discriminative else "text-generation"}
tags:
- trl-sgpo
- step-wise-judge
---

# {name}

A step-wise judge: it finds the first wrong step of a solution. Trained with `python -m trl_sgpo.scripts.judge_train`, version
{__version__}, kind `{arguments.kind}`.

```python
from trl_sgpo import StepwiseJudge
from trl_sgpo.judges.{module} import {judge}

judge = StepwiseJudge({judge}("{name}"{extra}))
```

## Evaluation

On {result.get("dev_rows", 0)} solutions whose problems were not trained on{
        ", each half judged by the threshold of the other half" if discriminative else ""
    }:

| what | value |
|---|---|
{numbers}

These are numbers on data like the training data. Measure the judge on what it will see, with
`python -m trl_sgpo.scripts.judge_eval`.

## Training

{how} {len(data.train)} solutions from {shown}; {
        data.excluded
    } more were left out because their problem belongs to evaluation
data.
"""


def save_card_and_push(
    arguments: JudgeTrainArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    data: JudgeData,
    result: dict[str, Any],
    push: bool,
) -> None:
    """Writes the card and the numbers into the judge's folder, and pushes the folder if asked to. Main process only."""
    folder = Path(str(training_args.output_dir))
    name = training_args.hub_model_id or folder.name
    (folder / "README.md").write_text(
        model_card(name, arguments, str(model_args.model_name_or_path), data, result), encoding="utf-8"
    )
    (folder / "judge_train.json").write_text(json.dumps(result, indent=2) + "\n")
    if push:
        from huggingface_hub import HfApi

        api = HfApi(token=training_args.hub_token)
        repo = api.create_repo(name, private=training_args.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message="Train the judge",
            ignore_patterns=["checkpoint-*", "runs/*", "*.bin.tmp"],
        )
        print(f"Judge pushed to {repo}.")


def show(result: dict[str, Any], seconds: float) -> None:
    print(f"\nOn {result['dev_rows']} solutions of problems that were not trained on:")
    for key, text in NUMBERS.items():
        if key in result:
            print(f"  {key:20} {result[key]:.3f}   {text}")
    print(f"  {'seconds':20} {seconds:.0f}")


def make_parser() -> "TrlParser":
    from trl import ModelConfig, SFTConfig, TrlParser

    configs: list[Any] = [JudgeTrainArguments, SFTConfig, ModelConfig]
    return TrlParser(configs, prog="python -m trl_sgpo.scripts.judge_train")


def run(arguments: JudgeTrainArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> dict[str, Any]:
    """Trains a judge as the arguments say and leaves it in `output_dir`. Returns its numbers (on the main process)."""
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path is missing: name the model that becomes the judge, on the Hub or a folder."
        )
    start = perf_counter()
    push, training_args.push_to_hub = training_args.push_to_hub, False  # once, at the end, with its numbers
    data = read_data(arguments, training_args.seed)
    main_process = training_args.process_index == 0
    if main_process:
        print(
            f"{len(data.train)} solutions to train on ({sum(row.label >= 0 for row in data.train)} with an error), "
            f"{len(data.dev)} to calibrate and report on; {data.excluded} left out because their problem is evaluation "
            f"data, {sum(data.skipped.values())} could not be used {data.skipped or ''}"
        )
    train = train_classifier if arguments.kind == "discriminative" else train_generative
    result = train(arguments, training_args, model_args, data)
    if main_process:
        result["seconds"] = perf_counter() - start
        save_card_and_push(arguments, training_args, model_args, data, result, push)
        show(result, result["seconds"])
        print(f"Judge saved to {training_args.output_dir}.")
    return result


def main() -> None:
    arguments, training_args, model_args = make_parser().parse_args_and_config(fail_with_unknown_args=True)
    run(arguments, training_args, model_args)


if __name__ == "__main__":
    main()
