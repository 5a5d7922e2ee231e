"""
Does SGPO learn from real text where GRPO cannot? A language model from scratch on GSM8K, and three ways to train it on.

    python benchmarks/real_text/run.py judge    --data openai/gsm8k                     # how good is the judge? no model
    python benchmarks/real_text/run.py pretrain --data openai/gsm8k                     # the base model
    python benchmarks/real_text/run.py train    --arm grpo sgpo prefix --seed 0         # one run per arm and seed
    python benchmarks/real_text/run.py report   [--record]

`--data` is a folder with train.jsonl and test.jsonl (columns `question` and `answer`), or openai/gsm8k. Everything is written to
`--output` (outputs/real_text). `pretrain` goes on where it was broken off; a run that is finished is not repeated.

The training questions of GSM8K are split once, by `pretrain`: most teach the base model, some watch its loss, and the rest is for
reinforcement learning and unknown to the base. Test questions are for evaluation alone, with nothing chosen by them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.real_text.data import HUB_NAME
from benchmarks.real_text.judge_evaluation import judge
from benchmarks.real_text.pretraining import pretrain
from benchmarks.real_text.report import report
from benchmarks.real_text.training import ARMS, train


HERE = Path(__file__).parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own.add_argument("--output", type=Path, default=Path("outputs/real_text"), help="where everything is written")
        own.set_defaults(function=function)
        return own

    def add_sampling(own: argparse.ArgumentParser) -> None:
        own.add_argument("--max-completion", type=int, default=240, help="tokens of a completion at most")
        own.add_argument(
            "--generation-rows", type=int, default=1024, help="completions generated at once in an evaluation"
        )

    data = {"required": True, "help": f"folder with train.jsonl and test.jsonl, or {HUB_NAME}"}
    own = command("judge", judge, "measure the judge on right, corrupted and annotated solutions")
    own.add_argument("--data", **data)
    own.add_argument(
        "--first-error", type=Path, help="JSON lines with `problem`, `steps` and `label`, as ProcessBench has them"
    )

    own = command("pretrain", pretrain, "make the base model")
    own.add_argument("--data", **data)
    own.add_argument("--minutes", type=float, default=5.0, help="of training at most, over all restarts")
    own.add_argument("--updates", type=int, default=1500, help="of training at most")
    own.add_argument("--layers", type=int, default=8, help="of the Llama")
    own.add_argument("--width", type=int, default=512, help="of the Llama")
    own.add_argument("--heads", type=int, default=8, help="of the Llama")
    own.add_argument("--vocabulary", type=int, default=4096, help="tokens of the byte-level BPE")
    own.add_argument("--batch-size", type=int, default=64, help="questions per update")
    own.add_argument("--learning-rate", type=float, default=6e-4, help="peak, after a warm-up; then a cosine")
    own.add_argument("--validate-every", type=int, default=50, help="updates between two validations")
    own.add_argument(
        "--rl-questions", type=int, default=2000, help="training questions kept from the base for `train`"
    )
    own.add_argument(
        "--validation-questions", type=int, default=200, help="training questions that watch the base's loss"
    )
    own.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches")
    add_sampling(own)

    own = command("train", train, "train the base with one or more arms")
    own.add_argument("--arm", nargs="+", choices=list(ARMS), required=True, help="one run for each")
    own.add_argument("--seed", type=int, nargs="+", default=[0], help="one run for each")
    own.add_argument("--tokens", type=int, default=1_500_000, help="that each run generates in training")
    own.add_argument("--learning-rate", type=float, default=5e-5, help="constant")
    own.add_argument("--prompts-per-update", type=int, default=32, help="groups of an update")
    own.add_argument("--group-size", type=int, default=8, help="completions of a group")
    own.add_argument("--micro-batch", type=int, default=256, help="completions per forward and backward pass")
    own.add_argument("--evaluations", type=int, default=10, help="points of the learning curve after the first")
    own.add_argument("--evaluation-questions", type=int, default=256, help="test questions of the learning curve")
    own.add_argument("--evaluation-samples", type=int, default=4, help="completions of each")
    own.add_argument("--probe-questions", type=int, default=128, help="test questions for pass@k")
    own.add_argument("--probe-samples", type=int, default=64, help="completions of each, of base and policy")
    add_sampling(own)

    own = command("report", report, "table, learning curves and the page of the sharpening report")
    own.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=HERE / "results.json",
        help="keep the results: in benchmarks/real_text/results.json, or in the file that is given",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    try:
        args.function(args)
    except ValueError as error:
        raise SystemExit(f"{args.command}: {error}") from None


if __name__ == "__main__":
    main()
