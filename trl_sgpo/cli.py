"""
The command `trl-sgpo`: one name for the scripts of the package. Each is also `python -m trl_sgpo.scripts.NAME`. `train`
starts its script through `accelerate launch`, as the command `trl` does.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from subprocess import CalledProcessError
from typing import Any

from trl_sgpo import __version__


# Name -> script, and what it does
COMMANDS = {
    "train": ("sgpo", "train a model with SGPO, or with GRPO if no judge is named"),
    "judge": ("judge", "try a judge on one problem and one completion"),
    "judge-eval": ("judge_eval", "evaluate a judge on solutions whose first wrong step is annotated"),
    "judge-train": ("judge_train", "train a judge on such solutions"),
    "evaluate": ("evaluate", "evaluate a base and its checkpoints on maths benchmarks"),
    "report": ("report", "make a page about one or more training runs"),
    "env": ("env", "print what a bug report needs"),
}


def launch_training(argv: Sequence[str]) -> int:
    """
    Starts the training script through `accelerate launch`. Arguments that the script does not have are accelerate's, on the
    command line and in the config file alike: `--num_processes 2`, `--accelerate_config zero2`.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from trl_sgpo.command_line import LAUNCHED, of_accelerate, without
    from trl_sgpo.scripts.sgpo import make_parser

    parsed: tuple[Any, ...] = make_parser(prog="trl-sgpo train").parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    of_file, of_line = parsed[-2:]
    (from_file, unknown), (from_line, also_unknown) = of_accelerate(of_file, in_file=True), of_accelerate(of_line)
    launching = [*from_file, *from_line]
    if unknown or also_unknown:
        raise ValueError(
            f"unknown arguments: {' '.join([*unknown, *also_unknown])}. Neither the training script nor `accelerate launch` has them: "
            "see `trl-sgpo train --help` and `accelerate launch --help`."
        )
    launch_args = resolve_accelerate_config_argument([word for option in launching for word in option])
    os.environ[LAUNCHED] = "1"
    script_args = ["-m", "trl_sgpo.scripts.sgpo", *without(argv, of_line)]
    try:
        launch_command(launch_command_parser().parse_args([*launch_args, *script_args]))
    except CalledProcessError as error:  # the script has said what is wrong
        return error.returncode
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    listed = "\n".join(f"  {name:<12} {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-sgpo",
        usage="trl-sgpo COMMAND ...",
        description=f"Stepwise Guided Policy Optimization for TRL.\n\ncommands, each with its own --help:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl-sgpo {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help=argparse.SUPPRESS)
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    command = parser.parse_args(argv[:1]).command
    try:
        if command == "train":
            return launch_training(argv[1:])
        script = import_module(f"trl_sgpo.scripts.{COMMANDS[command][0]}")
        return script.main(argv[1:], prog=f"trl-sgpo {command}") or 0
    except (ValueError, TypeError) as error:
        if os.environ.get("TRL_SGPO_TRACEBACK"):
            raise
        print(f"trl-sgpo {command}: {error}\n(TRL_SGPO_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
