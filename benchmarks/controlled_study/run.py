"""
The controlled study: GRPO, SGPO, per-token credit and the remedies without a judge, at equal generated tokens.

    python benchmarks/controlled_study/run.py bases tune main          # one table after the other
    python benchmarks/controlled_study/run.py all                      # everything: a night on 2 cores
    python benchmarks/controlled_study/run.py main --seeds 0 --tokens-factor 0.1 --output /tmp/trial     # a look

Each finished run is one line of results/runs.jsonl; what is recorded there is not run again, so a study that was broken off
goes on where it stopped. `report.py` makes the tables and pictures.
"""

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from controlled_study.records import Records, best_learning_rate  # noqa: E402
from controlled_study.settings import ARMS, DIALS, Run  # noqa: E402
from controlled_study.tables import TABLES  # noqa: E402


def _provenance() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "hardware": f"{platform.machine()} CPU, 1 thread",
    }


def _work(task: tuple[str, Any, Path]) -> dict[str, Any]:
    """In a process of its own: one run, or the description of one base."""
    kind, what, folder = task
    from controlled_study import training

    if kind == "base":
        return {"base": what, **training.describe_base(what, folder), **_provenance()}
    try:
        return {"key": what.key, **asdict(what), **training.train(what, folder), **_provenance()}
    except Exception as error:  # one run that breaks must not lose the night
        return {"key": what.key, "error": f"{type(error).__name__}: {error}"}


def _quiet_worker() -> None:
    """One thread each: two torch processes that share two cores slow each other down many times otherwise."""
    import torch

    torch.set_num_threads(1)


def execute(tasks: list[tuple[str, Any, Path]], records: Records, workers: int) -> None:
    from tqdm.auto import tqdm

    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _quiet_worker, maxtasksperchild=8) as pool:
        bar = tqdm(pool.imap_unordered(_work, tasks), total=len(tasks), unit="run")
        for record in bar:
            name = record.get("key", f"base {record.get('base')}")
            if "error" in record:
                bar.write(f"FAILED {name}: {record['error']}")
                continue
            records.append(record)
            last = record["curve"][-1]["accuracy"] if "curve" in record else record["accuracy"]
            bar.set_postfix_str(f"{name}: {last:.2f}")


def wanted(table: str, records: Records, args: argparse.Namespace) -> Iterator[Run]:
    """The runs of a table, each with the learning rate that tuning chose for its arm where it has none yet."""
    for run in TABLES[table].runs():
        if (args.seeds and run.seed not in args.seeds) or (args.arms and run.arm not in args.arms):
            continue
        if run.learning_rate == 0:
            run = replace(run, learning_rate=best_learning_rate(records, run))
        yield replace(run, tokens=round(run.tokens * args.tokens_factor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=["all", "bases", *TABLES], help="what to run, in this order")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these arms")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--tokens-factor", type=float, default=1.0, help="shorter runs, for a look; give --output too")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the records")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/controlled_study"), help="folder of the base models"
    )
    args = parser.parse_args()
    if args.tokens_factor != 1 and args.output == HERE / "results":
        parser.error("--tokens-factor shortens the runs: give --output, so that they do not mix with the full ones.")
    os.environ["OMP_NUM_THREADS"] = "1"
    records = Records(args.output)
    for table in ["bases", *TABLES] if "all" in args.tables else args.tables:
        if table == "bases":
            tasks = [("base", dial, args.work) for dial in DIALS if dial not in records.bases]
        else:
            runs = {run.key: run for run in wanted(table, records, args) if run.key not in records.runs}
            tasks = [("run", run, args.work) for run in runs.values()]
        print(f"{table}: {len(tasks)} to do", flush=True)
        if tasks:
            execute(tasks, records, args.workers)


if __name__ == "__main__":
    main()
