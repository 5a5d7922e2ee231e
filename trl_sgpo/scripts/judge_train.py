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

`--kind discriminative` trains a token classifier, which scores every step in one pass. `PRMJudge(output_dir)` loads it
with its layout and its calibrated threshold. `--kind generative` trains a causal language model on its own right
critiques. `GenerativeJudge(output_dir)` loads it. A model that cannot judge yet begins with `--bootstrap missing` or
`all`.

`--data` takes what `judge_eval` reads. A share of the problems is kept out of training to calibrate and to report, and
so are the problems of `--exclude`, on which the judge will be evaluated. All arguments of `SFTConfig` and
`ModelConfig` are taken as well.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from trl_sgpo.command_line import find_checkpoint, parse
from trl_sgpo.judge_training.arguments import JudgeTrainArguments
from trl_sgpo.judge_training.card import NUMBERS, save_card_and_push
from trl_sgpo.judge_training.data import read_data


if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig, TrlParser


def make_parser(prog: str = "python -m trl_sgpo.scripts.judge_train") -> "TrlParser":
    """The parser of the command line and of YAML files."""
    from trl import ModelConfig, SFTConfig, TrlParser

    configs: list[Any] = [JudgeTrainArguments, SFTConfig, ModelConfig]
    return TrlParser(configs, prog=prog)


def run(arguments: JudgeTrainArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> dict[str, Any]:
    """
    Trains the judge that the arguments describe, and leaves it in `output_dir`. Returns its numbers on the main
    process.
    """
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path is missing. Name the model that becomes the judge: a name on the Hub, or a folder."
        )
    training_args.resume_from_checkpoint = find_checkpoint(training_args)
    samples_critiques = arguments.kind == "generative" and arguments.bootstrap != "all"
    if training_args.resume_from_checkpoint and samples_critiques:
        raise ValueError(
            f"resume_from_checkpoint={training_args.resume_from_checkpoint!r} goes with kind='generative' only if "
            f"bootstrap='all'. With bootstrap={arguments.bootstrap!r} each round trains on critiques that are sampled anew. "
            "Leave it out."
        )
    if training_args.resume_from_checkpoint and training_args.process_index == 0:
        print(f"Training goes on from {training_args.resume_from_checkpoint}.")
    start = perf_counter()
    push, training_args.push_to_hub = training_args.push_to_hub, False  # once, at the end, with its numbers
    data = read_data(arguments, training_args.seed)
    main_process = training_args.process_index == 0
    if main_process:
        print(
            f"{len(data.train)} solutions to train on ({sum(row.label >= 0 for row in data.train)} with an error), "
            f"{len(data.dev)} to calibrate and report on. {data.excluded} were left out because their problems are "
            f"evaluation data, {sum(data.skipped.values())} could not be used {data.skipped or ''}"
        )
    result = _train(arguments, training_args, model_args, data)
    if main_process:
        result["seconds"] = perf_counter() - start
        save_card_and_push(arguments, training_args, model_args, data, result, push)
        show(result)
        print(f"Judge saved to {training_args.output_dir}.")
    return result


def _train(arguments: JudgeTrainArguments, *others: Any) -> dict[str, Any]:
    """Trains a judge of the kind that is asked for. Imports torch only here."""
    if arguments.kind == "discriminative":
        from trl_sgpo.judge_training.discriminative import train_classifier

        return train_classifier(arguments, *others)
    from trl_sgpo.judge_training.generative import train_generative

    return train_generative(arguments, *others)


def show(result: dict[str, Any]) -> None:
    """Prints the numbers of a judge."""
    print(f"\nOn {result['dev_rows']} solutions of problems that were not trained on:")
    for key, text in NUMBERS.items():
        if key in result:
            print(f"  {key:20} {result[key]:.3f}   {text}")
    print(f"  {'seconds':20} {result['seconds']:.0f}")


def main(argv: Sequence[str] | None = None, prog: str = "python -m trl_sgpo.scripts.judge_train") -> None:
    run(*parse(make_parser(prog), "trl_sgpo.scripts.judge_train", argv))


if __name__ == "__main__":
    main()
