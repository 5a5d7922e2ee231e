"""
Everything that needs a GPU, by one command: the tests of tests/gpu, then the study of this folder with several runs side by
side, then its tables. The machine needs no network.

    python benchmarks/pretrained/on_gpu.py --weights FOLDER --gsm8k FOLDER --output FOLDER --minutes 8

It ends after `--minutes`, or when all is done. Called again it goes on: what has passed and what is recorded is not done
again, and a run that was stopped goes on from its checkpoint in `--work`. If the command itself is killed, its runs lose at
most ten updates each.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).parents[2]
SMOKE = "tests_gpu.log"
PASSED = "tests_gpu.passed"


def call(command: Sequence[str | Path], environment: dict[str, str], log: Path | None = None) -> int:
    """Runs a Python command in the repository, its output here and in a file."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if log:
        log.write_text("".join(lines))
    return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder, or GGUF file (see weights.py)")
    parser.add_argument(
        "--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl; without it no word problems"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, without their requirements")
    parser.add_argument("--minutes", type=float, required=True, help="time after which runs stop with a checkpoint")
    parser.add_argument("--workers", type=int, default=10, help="runs at a time")
    parser.add_argument("--output", type=Path, required=True, help="folder of records, tables and logs")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/on_gpu", help="folder of bases and checkpoints")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    output, work = args.output.resolve(), args.work.resolve()
    weights = args.weights.resolve()
    for folder in (output, work):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT)]
    if args.wheels:
        site = work / "site"
        wheels = sorted(args.wheels.resolve().glob("*.whl"))
        if not site.exists():
            install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, *wheels]
            if code := call(install, environment):
                raise SystemExit(code)
        paths.append(str(site))
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])

    if not (output / PASSED).exists():
        smoke = ["-m", "pytest", "tests/gpu", "-rs", "-p", "no:cacheprovider"]
        if call(smoke, environment, output / SMOKE) == 0:
            (output / PASSED).touch()
    if weights.suffix == ".gguf":
        converted = work / "weights"
        if not (converted / "source.json").exists():
            call(["-m", "benchmarks.pretrained.weights", weights, converted], environment)
        weights = converted
    study = ["base", "tune", "main", "others"]
    options: list[str | Path] = [
        "--weights",
        weights,
        "--workers",
        str(args.workers),
        "--output",
        output,
        "--work",
        work,
    ]
    if args.gsm8k:
        study.append("gsm8k")
        options += ["--gsm8k", args.gsm8k.resolve()]
    minutes = (end - time.monotonic()) / 60
    call(["-m", "benchmarks.pretrained.run", *study, *options, "--minutes", f"{minutes:.2f}"], environment)
    call(["-m", "benchmarks.pretrained.report", "--output", output], environment)


if __name__ == "__main__":
    main()
