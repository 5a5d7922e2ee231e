"""What all records share: where they come from (commit, versions, hardware), their files, and the processes that make them."""

import json
import multiprocessing
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from trl_sgpo.analysis.jsonable import jsonable, whole_lines


JOBS_PER_PROCESS = 8  # what a process does not give back is kept small


def commit() -> str:
    """
    The commit of this checkout. It ends in "-dirty" if tracked files other than recorded results differ from it. "unknown"
    without git or outside of a repository.
    """

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=7", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/*/results*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def hardware(threads: int | None = None) -> str:
    """The CUDA device if there is one, otherwise the CPU with torch's threads. With `threads`: the CPU with so many."""
    import torch

    if threads is None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = threads or torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def provenance(packages: Sequence[str], threads: int | None = None) -> dict[str, Any]:
    """What a record begins with. Give `threads` for work that never goes to a CUDA device: the hardware is then the CPU."""
    return {
        "commit": commit(),
        "versions": {name: version(name) for name in packages},
        "hardware": hardware(threads),
    }


def write_results(path: Path, record: Mapping[str, Any]) -> None:
    """
    Writes a record as JSON with few lines and readable diffs: one line per entry of the record, and one per item of an entry
    that holds lists or dicts itself. NaN and infinity, which JSON does not know, become null.

        {
         "commit": "abc",
         "runs": [
          {"seed": 0},
          {"seed": 1}
         ]
        }
    """

    def lines(value: Any, depth: int) -> str:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if depth == 0 or not any(isinstance(item, dict | list) for item in items):
            return json.dumps(value)
        inner, outer = "\n" + " " * (3 - depth), "\n" + " " * (2 - depth)
        if isinstance(value, dict):
            parts = [f"{json.dumps(key)}: {lines(item, depth - 1)}" for key, item in value.items()]
            return "{" + inner + ("," + inner).join(parts) + outer + "}"
        return "[" + inner + ("," + inner).join(lines(item, depth - 1) for item in value) + outer + "]"

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(jsonable(record), depth=2) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines. One that was cut off by an interruption is left out: its run is made again."""
    return [json.loads(line) for line in whole_lines(path)]


def _start(threads: int) -> None:
    """In a new process, which ends with the command that started it, however that ends."""
    import torch

    def follow() -> None:
        parent.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)


def record_all(
    work: Callable[[Any], dict[str, Any] | None],
    jobs: Sequence[Any],
    keep: Callable[[dict[str, Any]], str],
    workers: int,
    threads: int = 1,
) -> int:
    """
    Does all jobs, each in a process of its own, several at a time. `keep` stores a record as soon as it is there, and returns
    what the progress bar shows of it. A record with `error` is said and not kept; the result is how many there were. A job that
    was stopped before its end has none. One torch thread for each by default: two torch processes that share two cores slow
    each other down many times otherwise.
    """
    from tqdm.auto import tqdm

    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    mine = threading.local()  # each thread has a process, and another one when it was killed
    ended = threading.Event()
    starts = threading.Lock()

    def in_process(job: Any) -> dict[str, Any] | None:
        try:
            with starts:
                if ended.is_set():
                    return None
                if not getattr(mine, "jobs_left", 0):
                    mine.process, mine.jobs_left = (
                        ProcessPoolExecutor(1, context, _start, (threads,)),
                        JOBS_PER_PROCESS,
                    )
                mine.jobs_left -= 1
                future = mine.process.submit(work, job)
            return future.result()
        except (BrokenProcessPool, OSError, SystemExit, KeyboardInterrupt) as error:
            mine.jobs_left = 0
            said = (
                "its process was killed. Was the memory used up?"
                if isinstance(error, BrokenProcessPool)
                else repr(error)
            )
            return {"key": str(job)[:200], "error": said}

    failed = 0
    with ThreadPool(workers) as pool:
        bar = tqdm(pool.imap_unordered(in_process, jobs), total=len(jobs), unit="run")
        try:
            for record in bar:
                if record is None:
                    continue
                if "error" in record:
                    failed += 1
                    bar.write(f"FAILED {record['key']}: {record['error']}")
                else:
                    bar.set_postfix_str(keep(record))
        except BaseException:  # an interrupt, or a full disk
            with starts:
                ended.set()
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
            raise
    return failed
