"""
Makes a report of one or more runs, finished or not: one HTML page, pictures, and all numbers as JSON.

    python -m trl_sgpo.scripts.report outputs/grpo-seed0 outputs/sgpo-seed0 --output outputs/report

Reads a run's folder and starts nothing. It uses `trainer_state.json`, the parquet files of `log_completions=True` (of
any TRL run, plain GRPO too) and, if they are there, the probes of `SharpeningCallback`. The report says what is
missing. The pictures need the extra `plots`. Without it the page has its words and tables.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def make_parser(prog: str = "python -m trl_sgpo.scripts.report") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="the method of a run, once per RUN and in the same order; runs with the same label are seeds of one method, shown "
        "as mean and range (default: the folder's name without its seed)",
    )
    parser.add_argument("--outcome", metavar="NAME", help="the reward that says right or wrong, if a run has several")
    parser.add_argument(
        "--success-threshold",
        type=float,
        metavar="X",
        help="a completion is correct if its outcome reaches this (0.5)",
    )
    parser.add_argument(
        "--group-size", type=int, metavar="G", help="completions per prompt (default: found from the prompts)"
    )
    parser.add_argument(
        "--answer",
        metavar="PATH",
        help="dotted path of a function from a completion to its answer (default: \\boxed, the text after ####, the last "
        "number, the last line)",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="count tokens with it; without it lengths are characters")
    parser.add_argument(
        "--guess", type=float, metavar="P", help="probability that one guess is right: draws the chance level"
    )
    parser.add_argument("--domain", metavar="NAME", help="use only the probe prompts of this domain")
    parser.add_argument("--title", default="Training report", help="title of the page")
    return parser


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """
    Reads the runs, writes the report and returns its summary. Raises `NoRunError` if none of the folders holds a run,
    and `ValueError` if the arguments do not fit together.
    """
    import trl_sgpo
    from trl_sgpo.analysis.jsonable import write_json
    from trl_sgpo.analysis.report.answers import extract_answer
    from trl_sgpo.analysis.report.page import render
    from trl_sgpo.analysis.report.plots import figures
    from trl_sgpo.analysis.report.runs import NoRunError, Run, read_run
    from trl_sgpo.analysis.report.summary import summarise
    from trl_sgpo.loading import load_object

    _check(args)
    extract = load_object(args.answer, "--answer") if args.answer else extract_answer
    count_tokens = _token_counter(args.tokenizer) if args.tokenizer else None
    missing: list[str] = []
    runs: list[Run] = []
    for name, label, path in _named(args, missing):
        try:
            run = read_run(
                path, name, label, args.outcome, args.success_threshold, args.group_size, extract, count_tokens
            )
        except NoRunError as error:
            missing.append(str(error))
            continue
        runs.append(run)
    if not runs:
        raise NoRunError("\n".join(missing))
    has_plots = find_spec("matplotlib") is not None
    if not has_plots:
        missing.append("matplotlib is not installed, so there are no pictures: pip install 'trl-sgpo[plots]'.")
    if count_tokens is None and any(run.groups for run in runs):
        missing.append("No --tokenizer, so effective tokens are counted by characters.")
    summary = summarise(runs, missing, args.guess, count_tokens is not None, trl_sgpo.__version__, args.domain)
    pictures = figures(summary) if has_plots else {}
    args.output.mkdir(parents=True, exist_ok=True)
    for figure in (figure for section in pictures.values() for figure in section):
        (args.output / f"{figure.key.replace('@', '_at_')}.png").write_bytes(figure.png)
    write_json(args.output / "summary.json", summary)
    (args.output / "index.html").write_text(render(summary, pictures, args.title), encoding="utf-8")
    return summary


def _check(args: argparse.Namespace) -> None:
    if args.label and len(args.label) != len(args.runs):
        raise ValueError(
            f"--label was given {len(args.label)} times for {len(args.runs)} runs: give one for each run, in their order, "
            "or none."
        )
    if args.group_size is not None and args.group_size < 1:
        raise ValueError(
            f"--group-size={args.group_size} must be at least 1: it is the number of completions per prompt."
        )
    if args.guess is not None and not 0 <= args.guess <= 1:
        raise ValueError(f"--guess={args.guess} must lie in [0, 1]: it is the probability that one guess is right.")


def _named(args: argparse.Namespace, missing: list[str]) -> list[tuple[str, str, Path]]:
    """Name, label and folder of each run; a folder that is given twice counts once."""
    from trl_sgpo.analysis.report.runs import label_of, run_folder

    found: dict[Path, tuple[str, Path]] = {}
    for i, given in enumerate(args.runs):
        path = run_folder(given)
        if path.resolve() in found:
            missing.append(f"{given} is the same run as {found[path.resolve()][1]}: it is counted once.")
            continue
        found[path.resolve()] = (args.label[i] if args.label else label_of(path), path)
    named: list[tuple[str, str, Path]] = []
    folders = [path.name for path in found]
    for resolved, (label, path) in found.items():
        # The parents' names distinguish sgpo/seed0 and grpo/seed0
        name = resolved.name if folders.count(resolved.name) == 1 else f"{resolved.parent.name}/{resolved.name}"
        taken = [n for n, _, _ in named]
        named.append((name if name not in taken else f"{name} ({len(named) + 1})", label, path))
    return named


def _token_counter(name: str) -> Callable[[list[str]], Sequence[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what it raises depends on the hub, the files and the version
        raise ValueError(
            f"--tokenizer={name!r} could not be loaded: {str(error).strip().splitlines()[0]}. Give a Hub name or a folder with a "
            "tokenizer (a checkpoint has one), or leave it out to count characters."
        ) from error
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def show(summary: dict[str, Any]) -> None:
    """Prints the comparison and the findings."""
    from trl_sgpo.analysis.report import tables
    from trl_sgpo.analysis.report.diagnosis import LOSS_IS_ZERO
    from trl_sgpo.terminal import fitted, print_table

    for table in (tables.comparison(summary), tables.group_shares(summary), tables.judge_cost(summary)):
        if table:
            print_table(table.title, table.header, table.rows, table.note)
    print()
    print(fitted(LOSS_IS_ZERO))
    for run in summary["runs"]:
        print(fitted(f"{run['name']}: {run['finding']}", others="  "))
        for text in (*run["finding"].caveats, run["diagnosis"]["answer"]):
            print(fitted(text, "  ", "  "))
        for text in run["diagnosis"]["advice"]:
            print(fitted(text, "  - ", "    "))
    if summary["missing"]:
        print("What is missing, and why:")
        for text in summary["missing"]:
            print(fitted(text, "  - ", "    "))


def main(argv: Sequence[str] | None = None, prog: str = "python -m trl_sgpo.scripts.report") -> None:
    from trl_sgpo.analysis.report.runs import NoRunError

    args = make_parser(prog).parse_args(argv)
    try:
        summary = make_report(args)
    except (NoRunError, ValueError) as error:
        raise SystemExit(f"No report: {error}") from None
    show(summary)
    written = "index.html, summary.json and the pictures" if find_spec("matplotlib") else "index.html and summary.json"
    print(f"Written to {args.output}: {written}")


if __name__ == "__main__":
    main()
