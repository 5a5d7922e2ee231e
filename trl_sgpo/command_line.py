"""What a training script reads from its command line and its YAML file, beyond what `TrlParser` does."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import TrlParser


LAUNCHED = "TRL_SGPO_LAUNCHED"  # set by `trl-sgpo train` for the processes that it starts


def parse(parser: "TrlParser", module: str, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    The dataclasses that a command line describes, by default that of this process. The `trl` command takes options of
    `accelerate launch` too, such as `num_processes` and `accelerate_config`. A script cannot start processes, so they
    are a `ValueError` that says how `module` is launched. `trl-sgpo train` has read those in the file already.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    *configs, of_file, of_line = parser.parse_args_and_config(
        words, return_remaining_strings=True, separate_remaining_strings=True
    )
    if of_file or of_line:
        (from_file, _), (from_line, _) = of_accelerate(of_file, in_file=True), of_accelerate(of_line)
        if os.environ.get(LAUNCHED) and not of_line:
            return tuple(configs)
        if from_file or from_line:
            raise ValueError(_how_to_launch(from_file, from_line, words, module))
        parser.parse_args_and_config(words, fail_with_unknown_args=True)  # raises
    return tuple(configs)


def find_checkpoint(args: "TrainingArguments") -> str | None:
    """
    The folder of the checkpoint that training goes on from, found before any model is loaded: the given one, or for `true`
    the latest one in `output_dir`. None if training begins anew.
    """
    from transformers.hf_argparser import string_to_bool
    from transformers.trainer_utils import get_last_checkpoint

    given: Any = args.resume_from_checkpoint
    if given is None or os.path.isdir(str(given)):
        return given
    try:
        latest = string_to_bool(given)
    except Exception:
        raise ValueError(
            f"resume_from_checkpoint={given!r} is no folder. Give a checkpoint's folder, such as "
            f"{args.output_dir}/checkpoint-500, or true for the latest one in output_dir."
        ) from None
    if not latest:
        return None
    folder = Path(str(args.output_dir))
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise ValueError(
            f"resume_from_checkpoint={given!r} asks for the latest checkpoint, and output_dir={str(folder)!r} holds none. "
            "Check output_dir, or leave resume_from_checkpoint out to begin anew."
        )
    return found


def _launch_options() -> dict[str, bool]:
    """The options of `accelerate launch` and `trl`: whether each takes a value."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    found = {name: action.nargs != 0 for action in actions for name in action.option_strings}
    return {**found, "--accelerate_config": True}


def of_accelerate(words: list[str], in_file: bool = False) -> tuple[list[list[str]], list[str]]:
    """
    Those of the words that are options of `accelerate launch`, each with its value, if it takes one; and the other words.
    In a file a switch has a value too, and null leaves an option out.
    """
    options, found, others, i = _launch_options(), [], [], 0
    while i < len(words):
        word = words[i]
        name, equals, _ = word.partition("=")
        i += 1
        if not word.startswith("--") or name not in options:
            others.append(word)
            continue
        after = words[i : i + 1] if not equals and (options[name] or in_file) else []
        after = [value for value in after if not value.startswith("--")]
        i += len(after)
        if not (in_file and (after == ["None"] or (not options[name] and after == ["False"]))):
            found.append([word, *after] if options[name] else [word])
    return found, others


def without(words: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The words but those that are `taken`, which stand among them in the same order."""
    left, kept = list(taken), []
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            kept.append(word)
    return kept


def _how_to_launch(from_file: list[list[str]], from_line: list[list[str]], words: list[str], module: str) -> str:
    """The message for options of `accelerate launch`, with the command to use instead."""
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    of_line = {option[0].partition("=")[0] for option in from_line}
    given = [word for option in from_file if option[0] not in of_line for word in option]
    given += [word for option in from_line for word in option]
    launch = [part for word in given for part in (word.split("=", 1) if word.startswith("--") else [word])]
    script = without(words, [word for option in from_line for word in option])
    names = dict.fromkeys(option[0].partition("=")[0].lstrip("-") for option in (*from_file, *from_line))
    remedy = "Use"
    if from_file:
        keys = ", ".join(option[0].lstrip("-") for option in from_file)
        remedy = f"Take {keys} out of {words[words.index('--config') + 1]}, and use"
    command = shlex.join(["accelerate", "launch", *resolve_accelerate_config_argument(launch), "-m", module, *script])
    return (
        f"{', '.join(names)}: this is for `accelerate launch`, which starts the processes; a script that is started by itself "
        f"cannot. `trl-sgpo train` takes it as the `trl` command does. {remedy}:\n\n    {command}\n"
    )
