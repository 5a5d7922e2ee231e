"""
Trains a causal language model on its own right critiques. `GenerativeJudge(output_dir)` loads it. A critique is right
if its verdict can be read and equals the annotation. No verdict is trained on more often than the average one. A model
that cannot judge yet begins with bare verdict lines instead of critiques.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import SFTTrainer, get_peft_config, get_quantization_config

from trl_sgpo.judge_evaluation.metrics import first_error_f1, verdict_index
from trl_sgpo.judge_training.data import JudgeData, as_item, ask_in_batches
from trl_sgpo.judges.base import StepJudge, ask
from trl_sgpo.judges.generative import GenerativeJudge, QuestionLayout
from trl_sgpo.judges.prompt import JudgePrompt


if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from trl_sgpo.judge_evaluation.data import Row
    from trl_sgpo.judge_training.arguments import JudgeTrainArguments


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Critique:
    """
    An answer to train on, with the verdict line at its end. `known_wrong`: the question said that the final answer is
    wrong.
    """

    row: "Row"
    known_wrong: bool
    text: str


class SampledAnswer(NamedTuple):
    """An answer of the model to the solution at index `i`."""

    i: int
    readable: bool
    right: bool
    text: str


def known_wrong_by_turns(rows: Sequence["Row"]) -> list[bool]:
    """
    Whether the judge is told that a solution is wrong: in every other solution with an error, so that it learns both
    questions. A solution whose final answer is right is never called wrong.
    """
    turn = 0
    modes = []
    for row in rows:
        turn += row.label >= 0
        modes.append(row.known_wrong and turn % 2 == 1)
    return modes


def verdict_line(label: int) -> str:
    """
    The bare verdict of an annotated solution.

    ```python
    >>> verdict_line(1), verdict_line(-1)
    ('FIRST_ERROR: 2', 'FIRST_ERROR: none')
    ```
    """
    return "FIRST_ERROR: none" if label < 0 else f"FIRST_ERROR: {label + 1}"


def bare_verdicts(rows: Sequence["Row"], critiques: Sequence[Critique]) -> list[Critique]:
    """A bare verdict line for each solution that has no critique."""
    done = {id(critique.row) for critique in critiques}
    modes = known_wrong_by_turns(rows)
    pairs = zip(rows, modes, strict=True)
    return [Critique(row, mode, verdict_line(row.label)) for row, mode in pairs if id(row) not in done]


def balanced(critiques: Sequence[Critique], seed: int) -> list[Critique]:
    """The critiques without the surplus of frequent verdicts, so that the judge does not learn the usual one."""
    by_label: dict[int, list[Critique]] = {}
    for critique in critiques:
        by_label.setdefault(critique.row.label, []).append(critique)
    most = -(-len(critiques) // max(len(by_label), 1))  # the average number per verdict, rounded up
    rng = random.Random(seed)
    kept = [c for _, own in sorted(by_label.items()) for c in (own if len(own) <= most else rng.sample(own, most))]
    rng.shuffle(kept)
    return kept


def sample_critiques(
    folder: str, arguments: "JudgeTrainArguments", training_args: "SFTConfig", rows: Sequence["Row"], seed: int
) -> tuple[list[Critique], dict[str, float]]:
    """
    Samples the model's critiques of all solutions. Returns the right ones, and how many there were. Each rank asks
    about a share of the solutions, and gets the critiques of all ranks.
    """
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
    found: list[SampledAnswer] = []
    chunk = max(1, 256 // arguments.samples)
    for start in tqdm(range(0, len(mine), chunk), desc="asking for critiques", disable=not state.is_main_process):
        part = mine[start : start + chunk]
        for i, answers in zip(part, judge.sample([as_item(rows[i], modes[i]) for i in part]), strict=True):
            for text, verdict in answers:
                label = -1 if verdict.first_error is None else verdict.first_error
                readable = verdict.status != "abstain"
                found.append(SampledAnswer(i, readable, readable and label == rows[i].label, text))
    found = gather_object(found)
    right = [Critique(rows[answer.i], modes[answer.i], answer.text) for answer in sorted(found) if answer.right]
    n = max(len(found), 1)
    shares = {
        "sampled": float(len(found)),
        "readable": sum(answer.readable for answer in found) / n,
        "right": len(right) / n,
        "solutions_with_a_right_one": len({id(critique.row) for critique in right}) / len(rows),
    }
    return right, shares


def critique_examples(
    critiques: Sequence[Critique], layout: QuestionLayout, prompt: JudgePrompt, max_length: int | None
) -> list[dict[str, list[int]]]:
    """Token ids, the same ones that the judge asks with, and labels. Only the answer and its EOS token have labels."""
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
    arguments: "JudgeTrainArguments", training_args: "SFTConfig", model_args: "ModelConfig", data: JudgeData
) -> dict[str, Any]:
    """Samples, filters and fine-tunes, round after round, and saves the judge. Returns its numbers on the dev data."""
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
            latest, seed = base if turn == 0 else output, training_args.seed + turn
            critiques, shares = sample_critiques(latest, arguments, training_args, data.train, seed)
            print(f"round {turn + 1}: " + ", ".join(f"{name} {value:.3g}" for name, value in shares.items()))
            result |= {f"critiques/{name}": value for name, value in shares.items()}
        if arguments.bootstrap != "none":
            critiques += bare_verdicts(data.train, critiques)
        kept = balanced(critiques, training_args.seed)
        examples = critique_examples(kept, layout, prompt, training_args.max_length)
        if not examples:
            raise ValueError(
                f"no critique is left to train on: {len(critiques)} critiques of {len(data.train)} solutions have the "
                f"annotated verdict, and none of those kept fits into max_length={training_args.max_length}. Give a "
                "larger max_length or more `samples`. If the model cannot judge yet, use `--bootstrap missing`."
            )
        trainer = SFTTrainer(
            model=base,
            args=training_args,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            quantization_config=get_quantization_config(model_args),
        )
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
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


def evaluate_generative(judge: StepJudge, dev: Sequence["Row"]) -> dict[str, Any]:
    """The numbers of a judge on the dev data. It is not told which solutions are wrong."""
    verdicts = ask_in_batches(partial(ask, judge), dev)
    predicted = [verdict_index(verdict.status, verdict.first_error) for verdict in verdicts]
    return {**first_error_f1(predicted, [row.label for row in dev]), "dev_rows": len(dev)}
