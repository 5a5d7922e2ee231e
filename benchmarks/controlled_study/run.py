"""
The controlled study: GRPO, SGPO, per-token credit and the methods without a judge, at equal generated tokens.

    python -m benchmarks.controlled_study.run bases tune main          # one table after the other
    python -m benchmarks.controlled_study.run all                      # everything: a night on 2 cores
    python -m benchmarks.controlled_study.run tune main --arms grpo sgpo prefix --tokens-factor 0.1 --output trial     # a look

Each finished run is one line of results/runs.jsonl. What is recorded there is not run again, so an interrupted study continues
where it stopped. `report.py` makes the tables and pictures.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import provenance, record_all
from benchmarks.controlled_study.records import Records, best_learning_rate
from benchmarks.controlled_study.settings import ARMS, DIALS, TUNING_SEEDS, Run, base_folder
from benchmarks.controlled_study.tables import TABLES


HERE = Path(__file__).parent


def _work(task: tuple[str, Any, Path, dict[str, Any]]) -> dict[str, Any]:
    """In a process of its own: one run, or the description of one base."""
    kind, what, folder, made_with = task
    from benchmarks.controlled_study import training

    if kind == "base":
        return {"base": what, **training.describe_base(what, folder), **made_with}
    try:
        return {"key": what.key, **asdict(what), **training.train(what, folder), **made_with}
    except Exception as error:  # one run that breaks must not lose the night
        return {"key": what.key, "error": f"{type(error).__name__}: {error}"}


def execute(kind: str, what: Sequence[Any], folder: Path, records: Records, workers: int) -> int:
    """Does it, and returns how many runs failed."""
    made_with = provenance(("trl", "transformers", "torch"), threads=1)

    def keep(record: dict[str, Any]) -> str:
        records.append(record)
        last = record["curve"][-1]["accuracy"] if "curve" in record else record["accuracy"]
        return f"{record.get('key', 'base')}: {last:.2f}"

    return record_all(_work, [(kind, item, folder, made_with) for item in what], keep, workers)


def wanted(table: str, records: Records, args: argparse.Namespace) -> Iterator[Run]:
    """The runs of a table, each with the learning rate that tuning chose for its arm where it has none yet."""
    for run in TABLES[table].runs():
        wanted_seed = not args.seeds or run.seed in (*args.seeds, *TUNING_SEEDS)
        if not wanted_seed or ARMS[run.arm].retired or (args.arms and run.arm not in args.arms):
            continue
        if run.learning_rate == 0:
            rate = best_learning_rate(records, run.dial, run.arm, run.judge, run.completions_per_update)
            if rate is None:
                raise SystemExit(
                    f"{run.arm} on dial {run.dial} has no tuned learning rate yet: run the table `tune` first."
                )
            run = replace(run, learning_rate=rate)
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
    retired = [arm for arm in args.arms or () if ARMS[arm].retired]
    if retired:
        parser.error(f"--arms {retired[0]}: the package has lost the option that it tried. Its recorded runs stay.")
    if args.tokens_factor != 1 and args.output == HERE / "results":
        parser.error("--tokens-factor shortens the runs: give --output, so that they do not mix with the full ones.")
    records = Records(args.output)
    failed = 0
    for table in ["bases", *TABLES] if "all" in args.tables else args.tables:
        runs: list[Run] = [] if table == "bases" else list(wanted(table, records, args))
        # Before the runs, which would make their bases each by itself
        dials = dict.fromkeys(DIALS if table == "bases" else (run.dial for run in runs))
        made = {dial for dial in dials if (base_folder(dial, args.work) / "pretrain_config.json").exists()}
        bases = [dial for dial in dials if dial not in records.bases or dial not in made]
        missing = {run.key: run for run in runs if not records.done(run)}
        print(f"{table}: {len(bases)} bases and {len(missing)} runs to do", flush=True)
        for kind, what in (("base", bases), ("run", list(missing.values()))):
            if what:
                failed += execute(kind, what, args.work, records, args.workers)
    if failed:
        raise SystemExit(f"{failed} failed, see above. The same command tries again.")


if __name__ == "__main__":
    main()
