"""
GRPO, SGPO and per-token credit on a pretrained language model, SmolLM2-135M-Instruct, at equal generated tokens.

    python -m benchmarks.pretrained.run base tune main others         # chains of arithmetic
    python -m benchmarks.pretrained.run base gsm8k --gsm8k FOLDER     # word problems, from local files
    python -m benchmarks.pretrained.run main --weights FOLDER         # weights without a Hub: see weights.py
    python -m benchmarks.pretrained.run gsm8k_judge --judge FOLDER    # with the judge of benchmarks/real_judge

Each finished run is one line of results/runs.jsonl, and is not run again. An interrupted run goes on from its last
checkpoint, at most ten updates back. `--minutes` ends the command in time, with a checkpoint of each run. `report.py` makes
the tables. On a CUDA device give `--workers 6` or so: they share it.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import provenance, read_lines, record_all
from benchmarks.pretrained.report import best_rate, mean_accuracy
from benchmarks.pretrained.settings import ARMS, TABLES, TUNED, Run
from benchmarks.pretrained.weights import MODEL
from trl_sgpo.analysis.jsonable import append_lines


HERE = Path(__file__).parent


def _same_base(task: str, base: str, output: Path) -> None:
    """Runs from two bases may not stand in one table."""
    for record in read_lines(output / "bases.jsonl"):
        if record["task"] == task and record["base_weights"] != base:
            raise ValueError(
                f"the records in {output} are of base {record['base_weights']}, and --work holds {base}. Give another --output."
            )


def _work(job: tuple[Run | str, argparse.Namespace, dict[str, Any]]) -> dict[str, Any] | None:
    """In a process of its own: one run, or the description of one base. None if the time is over before its end."""
    what, args, made_with = job
    if args.until and time.time() > args.until:
        return None
    import torch
    import transformers

    from benchmarks.pretrained.tasks import get_task
    from benchmarks.pretrained.training import describe_base, fingerprint, make_base, precision, train

    transformers.utils.logging.set_verbosity_error()
    if precision() == torch.bfloat16:
        # The gradient of the output layer is a product of bf16 numbers that is summed in 32 bits: this multiplies them as such
        torch.set_float32_matmul_precision("medium")
    name = what if isinstance(what, str) else what.task
    task = get_task(name, args.gsm8k)
    if isinstance(what, str):
        return {"task": name, **describe_base(name, task, args.weights, args.work), **made_with}
    base = make_base(name, task, args.weights, args.work)
    try:
        _same_base(name, fingerprint(base), args.output)
        record = train(what, task, base, args.work, args.until, args.judge)
        return record and {"key": what.key, **record, **made_with}
    except Exception as error:  # one run that breaks must not lose the others
        return {"key": what.key, "error": f"{type(error).__name__}: {error}"}


def execute(what: Sequence[Run | str], args: argparse.Namespace) -> int:
    """Does it, and returns how many runs failed."""
    import torch

    # The runs have their own number of threads
    made_with = provenance(("trl", "transformers", "torch"), None if torch.cuda.is_available() else args.threads)

    def keep(record: dict[str, Any]) -> str:
        append_lines(args.output / ("runs.jsonl" if "key" in record else "bases.jsonl"), [record])
        return f"{record['key']}: {mean_accuracy(record):.3f}" if "key" in record else "base"

    return record_all(_work, [(item, args, made_with) for item in what], keep, args.workers, args.threads)


def wanted(table: str, args: argparse.Namespace) -> list[Run]:
    """The runs of a table that are not recorded yet, each with its learning rate."""
    recorded = read_lines(args.output / "runs.jsonl")
    runs = []
    for run in TABLES[table].runs():
        if (args.arms and run.arm not in args.arms) or (args.seeds and run.seed not in args.seeds):
            continue
        if run.learning_rate == TUNED:
            rate = best_rate(recorded, run.arm)
            if rate is None:
                raise SystemExit(f"{run.arm} has no tuned learning rate yet: run the table `tune` first.")
            run = replace(run, learning_rate=rate)
        runs.append(replace(run, tokens=args.tokens or run.tokens))
    done = {record["key"] for record in recorded}
    return [run for run in runs if run.key not in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=["base", *TABLES], help="what to run, in this order")
    parser.add_argument("--weights", default=MODEL, help="name on the Hub, or folder")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl; from the Hub by default")
    parser.add_argument("--judge", type=Path, help="folder of the trained judge, for the table gsm8k_judge")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these arms")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--tokens", type=int, help="generated tokens of each run; give --output too")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each run")
    parser.add_argument("--minutes", type=float, help="time after which runs stop with a checkpoint")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the records")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/pretrained"), help="folder of bases and checkpoints"
    )
    args = parser.parse_args()
    if args.tokens and args.output == HERE / "results":
        parser.error("--tokens changes the runs: give --output, so that they do not mix with the others.")
    if "gsm8k_judge" in args.tables and args.judge is None:
        parser.error("gsm8k_judge needs --judge FOLDER: benchmarks/real_judge trains one.")
    args.until = time.time() + 60 * args.minutes if args.minutes else None
    args.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for table in args.tables:
        if table == "base":
            described = {record["task"] for record in read_lines(args.output / "bases.jsonl")}
            tasks = ("chains", "gsm8k") if args.gsm8k or "gsm8k" in args.tables else ("chains",)
            what: list[Any] = [name for name in tasks if name not in described]
        else:
            what = wanted(table, args)
        print(f"{table}: {len(what)} to do", flush=True)
        if what:
            failed += execute(what, args)
        if args.until and time.time() > args.until:
            print("The time is over. The same command goes on.")
            break
    if failed:
        raise SystemExit(f"{failed} failed, see above. The same command tries again.")


if __name__ == "__main__":
    main()
