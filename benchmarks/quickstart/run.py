"""
Does SGPO learn where GRPO cannot? The quickstart, with a record of its results.

    python -m benchmarks.quickstart.run --seeds 0 1 2
    python -m benchmarks.quickstart.run --seeds 0 1 2 --learning-rate 3e-5 --record benchmarks/quickstart/learning_rate_3e-5
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import provenance, write_results
from recipes.quickstart.run import BASE, arguments, draw, study


def main() -> None:
    parser = arguments()
    parser.description = __doc__
    parser.add_argument("--record", type=Path, default=Path(__file__).parent, help="folder of the record")
    args = parser.parse_args()
    made_with = provenance(("trl", "transformers", "torch", "accelerate"), threads=torch.get_num_threads())
    base, runs = study(args)
    record = {
        **made_with,
        "command": " ".join(["python", "-m", "benchmarks.quickstart.run", *sys.argv[1:]]),
        "base": {"config": asdict(BASE), **asdict(base)},
        "runs": runs,
    }
    write_results(args.record / "results.json", record)
    draw(runs, args.record / "curves.png")


if __name__ == "__main__":
    main()
