"""
Tries a judge on one problem and one completion: the steps, what the judge is asked, its verdict, the RTS and the reward.

    trl-sgpo judge --judge arithmetic --problem "What is 2 * 3 + 4?" --completion "2 * 3 = 6. So 6 + 4 = 11."
    trl-sgpo judge --config recipes/gsm8k/sgpo.yaml --problem @problem.txt --completion @completion.txt

With `--config` the judge is the one of a training run. `@FILE` reads a text from a file, and `-` reads it from the standard
input. The exit code is 0 for a verdict and 1 for an abstention.
"""

import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import TrlParser

    from trl_sgpo.judges import JudgeItem, StepJudge, StepwiseJudge
    from trl_sgpo.judges.stepwise import StepScore


@dataclass
class JudgeArguments:
    """Arguments of a trial of a judge. Each field's `help` says what it is."""

    problem: str = field(metadata={"help": "The problem: a text, @FILE, or - for the standard input."})
    completion: str = field(metadata={"help": "The completion to judge: a text, @FILE, or - for the standard input."})
    judge: str | None = field(
        default=None,
        metadata={
            "help": "A short name (arithmetic, reference, openai, generative, prm, vllm_pooling) or the dotted path of "
            "a judge function, a judge class or instance, or a ready StepwiseJudge."
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
        metadata={"help": "Arguments of StepwiseJudge, a mapping in a YAML file, JSON on the command line."},
    )
    row: dict | str | None = field(
        default=None,
        metadata={"help": 'The other columns of the dataset row, such as the reference: {"solution": "10"}.'},
    )
    maybe_right: bool = field(
        default=False,
        metadata={"help": "Do not tell the judge that the answer is wrong, as training does in a failed group."},
    )
    hide_request: bool = field(default=False, metadata={"help": "Do not print what the judge is asked."})


def make_parser(prog: str = "python -m trl_sgpo.scripts.judge") -> "TrlParser":
    from trl import TrlParser

    configs: list[Any] = [JudgeArguments]
    return TrlParser(configs, prog=prog)


def try_judge(args: JudgeArguments) -> int:
    """Asks the judge, prints what came out, and returns the exit code."""
    from trl_sgpo.arguments import check_judge_columns
    from trl_sgpo.loading import as_mapping, load_stepwise_judge

    if args.judge is None:
        raise ValueError(
            "judge is not given. Name one, for instance `--judge arithmetic`, or give a `--config` with it."
        )
    judge = load_stepwise_judge(args.judge, args.judge_args, args.stepwise_judge_args)
    row = as_mapping(args.row, "row", '{"solution": "10"}')
    check_judge_columns(judge, row, "--row")
    if args.problem == args.completion == "-":
        raise ValueError("problem and completion are both -, and the standard input is one text. Give one as @FILE.")
    problem, completion = _text(args.problem, "problem"), _text(args.completion, "completion")
    start = time.perf_counter()
    score, item = ask_one(judge, problem, completion, row, not args.maybe_right)
    seconds = time.perf_counter() - start
    show(judge, score, item, seconds, with_request=not args.hide_request)
    return int(score.status == "abstain")


def ask_one(
    judge: "StepwiseJudge", problem: str, completion: str, row: dict[str, Any], known_wrong: bool
) -> "tuple[StepScore, JudgeItem | None]":
    """The score of one completion, and what the judge was asked; `None` if it was not asked."""
    from trl_sgpo.judges import StepJudge

    asked: list[JudgeItem] = []

    class Listening(StepJudge):
        @property
        def name(self) -> str:
            return judge.judge.name

        def judge(self, items: "Sequence[JudgeItem]") -> list[Any]:
            asked.extend(items)
            return judge.judge.judge(items)

    listening = copy.copy(judge)
    listening.judge = Listening()
    (score,) = listening.score([problem], [completion], [row], known_wrong)
    return score, asked[0] if asked else None


def requests(judge: "StepJudge", item: "JudgeItem") -> Iterator[tuple[str, str]]:
    """What each judge is asked, by its name: the messages to a model, or the item itself."""
    inner = [judge.wrapped] if hasattr(judge, "wrapped") else getattr(judge, "judges", [])
    for one in inner:
        yield from requests(one, item)
    if inner:
        return
    if hasattr(judge, "prompt"):
        as_json = getattr(judge, "output", "text") != "text"
        messages = judge.prompt.ask(item, as_json, getattr(judge, "max_characters", None)).messages
        yield judge.name, "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
    else:
        shown = {"problem": item.problem, "steps": item.steps, "reference": item.reference, "row": item.row}
        yield judge.name, json.dumps(shown, ensure_ascii=False, indent=1, default=str)


def show(
    judge: "StepwiseJudge", score: "StepScore", item: "JudgeItem | None", seconds: float, with_request: bool
) -> None:
    """Prints the request, the steps with the verdict, and what it is worth."""
    from trl_sgpo.terminal import fitted

    if item is not None and with_request:
        for name, text in requests(judge.judge, item):
            print(f"Asked of {name}:\n\n{text}\n")
    steps = item.steps if item is not None else ()
    print(f"{len(steps)} step{'s' if len(steps) != 1 else ''}:")
    for i, (mark, step) in enumerate(zip(_marks(score, len(steps)), steps, strict=True), start=1):
        for number, line in enumerate(step.strip().splitlines()):
            print(fitted(line, f"{i:>4}  {mark:<5}  " if number == 0 else " " * 13, " " * 13))
    verdict = {"no_error": "no error", "abstain": "the judge abstains"}.get(score.status, "the completion is empty")
    if score.first_error is not None:
        verdict = f"step {score.first_error + 1} is the first wrong one"
    print(f"\nVerdict: {verdict} ({seconds:.1f} s)")
    if score.reason:
        print(fitted(score.reason, "Reason: ", " " * 8))
    if score.rts_steps is None or score.rts_characters is None:
        print("RTS: none, so this completion gets its group's mean")
        return
    import torch

    reward = judge.rewards(torch.tensor(judge.rts(score), dtype=torch.float64)).item()
    rule = f"beta={judge.beta:g}, gamma={judge.gamma:g}" if judge.transform == "logistic" else "the RTS itself"
    print(f"RTS: {score.rts_steps:.3f} by steps, {score.rts_characters:.3f} by characters")
    print(f"Reward: {reward:.3f} (of the RTS by {judge.unit}; {rule})")


def _marks(score: "StepScore", n_steps: int) -> list[str]:
    """What the verdict says of each step; `?` where nobody knows."""
    if score.first_error is None:
        return ["ok" if score.rts_steps == 1 and i not in score.unchecked else "?" for i in range(n_steps)]
    before = ["?" if i in score.unchecked else "ok" for i in range(score.first_error)]
    return [*before, "WRONG", *["-"] * (n_steps - score.first_error - 1)]


def _text(given: str, argument: str) -> str:
    if given == "-":
        return sys.stdin.read()
    if not given.startswith("@"):
        return given
    path = Path(given[1:])
    if not path.is_file():
        raise ValueError(f"{argument}={given!r} names the file {path}, which does not exist. Give a text, @FILE or -.")
    return path.read_text(encoding="utf-8-sig")


def main(argv: Sequence[str] | None = None, prog: str = "python -m trl_sgpo.scripts.judge") -> int:
    # A config file may be that of a training run: what else it holds is not this command's business
    parsed = make_parser(prog).parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    args, unknown = parsed[0], parsed[-1]
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(map(str, unknown))}. Run with --help to see those that exist.")
    return try_judge(args)


if __name__ == "__main__":
    sys.exit(main())
