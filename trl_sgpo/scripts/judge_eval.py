r"""
Evaluates a step-wise judge on solutions whose first wrong step is annotated.

    python -m trl_sgpo.scripts.judge_eval --judge arithmetic --data Qwen/ProcessBench --output outputs/arithmetic
    python -m trl_sgpo.scripts.judge_eval --judge openai --data my_solutions.jsonl --robustness --output outputs/m \
        --judge_args '{"model": "m", "base_url": "http://localhost:8000/v1"}'

Standard mode asks about every row and does not say whether the solution is right. It gives ProcessBench's F1.
Known-wrong mode asks again about every row with an error and says that the answer is wrong. It gives the error of the
RTS and the order inside groups. It leaves out solutions with an error and a right final answer (`final_answer_correct`
is true), because training counts these as solved. `--robustness` adds perturbed completions and injected instructions,
on a sample. Every verdict is kept as soon as it is there: the same command continues a run that was ended, and asks
nothing twice.

`--data` takes names of the Hub and local files (JSON, JSON lines, Parquet) with these fields:

    problem   `problem`, `question`, `prompt`, or Mr-Ben's `Question` and `Options`
    steps     `steps`, `completions`, `Model_Solution_Steps`: a list of strings
    label     `label`, `first_error`, `first_error_step`: 0-based index of the first wrong step, -1 for none;
              or `labels`, one boolean per step; or `Model_Solution_First_Error_Step`, 1-based, "N/A" for none

and, optionally, `id`, `source`, `subset`, `final_answer_correct` and a reference. The judge sees the problem and the
steps, and nothing else of the row without `--reference` or `--columns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class JudgeEvalArguments:
    """
    Arguments of the evaluation of a judge. Each field's `help` says what it is. Beyond that: of a `StepwiseJudge` the
    inner judge is evaluated. Runs of one judge on other data may share `output`, and `cache` too. Results with
    `reference` can be compared only with each other. A run that is killed loses at most one batch.
    """

    judge: str = field(
        metadata={"help": "A short name such as 'arithmetic' or 'openai', or the dotted path of a judge."}
    )
    data: list[str] = field(metadata={"help": "Names of the Hub or local files."})
    output: str = field(metadata={"help": "Folder for the results. It belongs to one judge."})
    judge_args: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments for the constructor of a judge class, a mapping in a YAML file, JSON on the command line."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Split of a dataset of the Hub. All by default."})
    limit: int | None = field(
        default=None, metadata={"help": "At most this many rows, a random sample that keeps problems together."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples and of the bootstrap."})
    reference: bool = field(
        default=False, metadata={"help": "Show the judge the reference answer, which changes what is measured."}
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Other columns that the judge may see. Never one that reveals the label."}
    )
    robustness: bool = field(
        default=False, metadata={"help": "Try perturbed completions and injected instructions too."}
    )
    robustness_rows: int = field(default=100, metadata={"help": "Rows with an error that are perturbed."})
    injection_rows: int = field(default=6, metadata={"help": "Rows for each payload."})
    batch_size: int = field(default=64, metadata={"help": "Completions per call of the judge."})
    cache: str | None = field(
        default=None,
        metadata={"help": "SQLite file for verdicts. OUTPUT/verdicts.sqlite by default, 'none' for none."},
    )
    retry_abstained: bool = field(
        default=False, metadata={"help": "Ask again if the judge abstained in an earlier run."}
    )
    resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap for the 95 %% intervals."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "robustness_rows", "injection_rows", "resamples", "limit"):
            value, least = getattr(self, name), 0 if name == "resamples" else 1
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if isinstance(self.data, str):  # a single name in a YAML file
            self.data = [self.data]


def make_parser(prog: str = "python -m trl_sgpo.scripts.judge_eval") -> "TrlParser":
    from trl import TrlParser

    configs: list[Any] = [JudgeEvalArguments]
    return TrlParser(configs, prog=prog)


def main(argv: Sequence[str] | None = None, prog: str = "python -m trl_sgpo.scripts.judge_eval") -> None:
    from trl_sgpo.judge_evaluation.evaluation import evaluate
    from trl_sgpo.judge_evaluation.tables import show

    (args,) = make_parser(prog).parse_args_and_config(argv, fail_with_unknown_args=True)
    show(evaluate(args))
    names = ("results.json", "verdicts.jsonl", "judge.png")
    print(f"Written to {args.output}: {', '.join(name for name in names if (Path(args.output) / name).exists())}")


if __name__ == "__main__":
    main()
