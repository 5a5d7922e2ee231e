# /// script
# dependencies = [
#     "trl-sgpo[peft]",
#     "trackio",
# ]
# ///
"""
Trains a model with SGPO, or with GRPO if no judge is named.

    python -m trl_sgpo.scripts.sgpo --config recipes/gsm8k/sgpo.yaml
    accelerate launch -m trl_sgpo.scripts.sgpo --config recipes/gsm8k/sgpo.yaml

Takes every argument of `trl grpo` (a GRPO YAML file loads unchanged), those of `SGPOConfig`, and the judge. Options of
`accelerate launch`, which the `trl` command takes too, are refused with the command to use instead.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trl.scripts.grpo import GRPOScriptArguments


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_sgpo import SGPOConfig, SGPOTrainer


@dataclass
class SGPOScriptArguments(GRPOScriptArguments):
    """
    Script arguments for the SGPO training script: those of TRL's GRPO script, and the judge. `stepwise_judge_args` say
    how a verdict becomes a reward (`beta`, `gamma`, `transform`, `unit`), how a completion is cut (`segmenter`), what
    the judge sees (`reference_column`, `include_thinking`), and so on.
    """

    judge: str | None = field(
        default=None,
        metadata={
            "help": "The step-wise judge: a short name (arithmetic, reference, openai, generative, prm, vllm_pooling), or the dotted path of a "
            "judge function, a judge class or instance, or a ready StepwiseJudge. Without one the run is plain GRPO. Its reward is the last "
            "one; if reward_weights leaves it out, its weight is 1."
        },
    )
    judge_args: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments for the constructor of a judge class, a mapping in a YAML file, JSON on the command line."
        },
    )
    stepwise_judge_args: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Arguments of StepwiseJudge, a mapping in YAML, or JSON on the command line: {"gamma": 0.3, "include_thinking": true}. '
            "`segmenter` and `problem` are given by their dotted paths."
        },
    )
    dataset_map: str | None = field(
        default=None,
        metadata={"help": "Dotted path of a function from a dataset row to the columns to add, such as `prompt`."},
    )


def _reward_functions(script_args: SGPOScriptArguments) -> list[Any]:
    """The outcome and other rewards, named as in TRL's GRPO script."""
    import trl.rewards

    from trl_sgpo.loading import JUDGE_NAMES, load_object

    names = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
    found: list[Any] = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    for name in script_args.reward_funcs or []:
        if name in names:
            found.append(getattr(trl.rewards, name))
        elif name == "get_soft_overlong_punishment":
            found.append(trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))
        elif "." in name:
            found.append(load_object(name, "reward_funcs"))
        else:
            judge = " A judge is no reward function: name it by `judge`." if name in JUDGE_NAMES else ""
            raise ValueError(
                f"reward_funcs={name!r} is unknown: it must be one of {[*names, 'get_soft_overlong_punishment']} or a "
                f"dotted path, for instance 'my_project.rewards.exact_match'.{judge}"
            )
    return found


def _splits(script_args: SGPOScriptArguments, dataset_args: "DatasetMixtureConfig") -> Any:
    """The dataset's splits, with the columns that `dataset_map` adds."""
    from trl import get_dataset

    from trl_sgpo.loading import load_object, load_rows

    if dataset_args.datasets:
        splits = get_dataset(dataset_args)
    elif script_args.dataset_name:
        splits = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    else:
        raise ValueError(
            "Neither dataset_name nor datasets is given, so there is nothing to train on. Give a Hub name or a path "
            "as `--dataset_name`, or a list of them as `datasets:` in the YAML file."
        )
    if script_args.dataset_map:
        splits = splits.map(load_object(script_args.dataset_map, "dataset_map"))
    return splits


def make_trainer(
    script_args: SGPOScriptArguments,
    training_args: "SGPOConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> "SGPOTrainer":
    """
    The trainer that the arguments describe, ready for `train()`.

    Raises:
        ValueError: If an argument names something that cannot be found, or the settings do not fit together.
    """
    from trl import get_peft_config, get_quantization_config

    from trl_sgpo import SGPOTrainer
    from trl_sgpo.command_line import find_checkpoint
    from trl_sgpo.loading import load_stepwise_judge

    training_args.resume_from_checkpoint = find_checkpoint(training_args)
    reward_funcs = _reward_functions(script_args)
    if script_args.judge:
        if len(training_args.reward_weights or ()) == len(reward_funcs) > 0:
            # A GRPO file does not know of the judge, which this script puts at the end
            training_args.reward_weights = [*cast(list, training_args.reward_weights), 1.0]
        reward_funcs.append(
            load_stepwise_judge(script_args.judge, script_args.judge_args, script_args.stepwise_judge_args)
        )
    elif script_args.judge_args or script_args.stepwise_judge_args:
        raise ValueError(
            "judge_args or stepwise_judge_args is given, but no judge, so the run would be plain GRPO. Name one, for "
            "instance `judge: arithmetic`, or leave them out."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast(dict, training_args.model_init_kwargs or {}),
    }
    splits = _splits(script_args, dataset_args)
    return SGPOTrainer(
        model=cast(str, model_args.model_name_or_path),
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        eval_dataset=splits[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def train_and_save(trainer: "SGPOTrainer", dataset_name: str | None = None) -> None:
    """Trains, and saves the model with its card to `output_dir`; pushes it if the arguments say so."""
    from huggingface_hub.constants import ENDPOINT

    args = trainer.args
    if dataset_name and Path(dataset_name).exists():
        dataset_name = None  # a path on this machine is not the Hub's name that a card links to
    if args.resume_from_checkpoint:
        trainer.accelerator.print(f"Training goes on from {args.resume_from_checkpoint}.")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_state()
    trainer.save_model(args.output_dir)
    trainer.create_model_card(model_name=Path(cast(str, args.output_dir)).name, dataset_name=dataset_name)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Model pushed to {ENDPOINT}/{trainer.hub_model_id}.")


def main() -> None:
    import transformers
    from packaging.version import Version

    from trl_sgpo.command_line import parse

    script_args, *others = parse(make_parser(), "trl_sgpo.scripts.sgpo")
    trainer = make_trainer(script_args, *others)
    train_and_save(trainer, script_args.dataset_name)
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()  # finishes the trackers and destroys the process group


def make_parser(prog: str = "python -m trl_sgpo.scripts.sgpo") -> "TrlParser":
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_sgpo import SGPOConfig

    configs: list[Any] = [SGPOScriptArguments, SGPOConfig, ModelConfig, DatasetMixtureConfig]
    return TrlParser(configs, prog=prog)


if __name__ == "__main__":
    main()
