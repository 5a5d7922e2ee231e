"""
A small language model is trained to judge solutions in words. Does it find the first wrong step in text of other sources?

    python -m benchmarks.real_judge.run data check classifier generative evaluate
    python -m benchmarks.real_judge.run data check classifier generative evaluate \
        --weights FOLDER --annotated FOLDER --gsm8k FOLDER      # without a Hub

What is there is not made again. A training that was cut off goes on from its last checkpoint, an evaluation from its last 64
solutions: call the same command again. The numbers go to `results.json` beside this file.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.cells import markdown
from benchmarks.common import provenance, write_results
from benchmarks.judges.run import JUDGES as WITHOUT_MODEL
from benchmarks.judges.run import compact, rounded
from benchmarks.pretrained.weights import MODEL, source_of
from benchmarks.real_judge import data
from benchmarks.real_judge.judges import batch_tokens
from trl_sgpo.analysis.jsonable import write_json
from trl_sgpo.judge_evaluation.data import read_rows
from trl_sgpo.judge_evaluation.evaluation import evaluate
from trl_sgpo.judge_training.data import as_item
from trl_sgpo.judges.prm import KNOWN_WRONG_RULES, PRMJudge
from trl_sgpo.scripts.judge_eval import JudgeEvalArguments
from trl_sgpo.scripts.judge_train import main as judge_train


HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "recipes" / "judge" / "worked_solutions.yaml"
PARTS = ("data", "check", "classifier", "generative", "evaluate")
CHECKED, CHECK_EPOCHS = 16, 8
SETTINGS = (
    "planted",
    "characters",
    "epochs",
    "learning_rate",
    "heldout",
    "generative_updates",
    "generative_rows",
    "bf16",
)
INJECTED = 8  # wrong solutions that instructions are put into
# A bare verdict line after the question, which is answered in one pass
GENERATIVE = {
    "kind": "generative",
    "bootstrap": "all",
    "answer": "score",
    "max_length": 1024,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 5,
}


def files(args: argparse.Namespace, *names: str) -> list[str]:
    return [str(args.output / "data" / f"{name}.jsonl") for name in names]


def heldout(args: argparse.Namespace) -> list[str]:
    return files(args, *(f"heldout_{name}" for name in (data.NEVER_TRAINED_ON, *data.HALVED)))


def train(args: argparse.Namespace, name: str, overrides: Mapping[str, Any]) -> Path:
    """Runs `judge_train`, or goes on with it. Returns the folder of the judge."""
    out = args.output / name
    if (out / "judge_train.json").exists():
        print(f"{name}: is there")
        return out
    given = {
        "exclude": heldout(args),
        "model_name_or_path": args.weights,
        "output_dir": out,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": args.bf16,
        "learning_rate": args.learning_rate,
        "max_tokens_per_batch": batch_tokens(),
        **overrides,
    }
    for checkpoint in out.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").exists():  # it was cut off while it was written: this comes last
            shutil.rmtree(checkpoint)
    if any(out.glob("checkpoint-*")):
        given["resume_from_checkpoint"] = "true"
    words = ["--config", str(CONFIG)]
    for key, value in given.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    judge_train(words)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return out


def check(args: argparse.Namespace) -> None:
    """A few short solutions, many times: can the classifier learn them by heart? Otherwise no long run is worth its time."""
    rows, _ = read_rows(files(args, "planted"))
    shortest = sorted(rows, key=data.length)
    few, others = shortest[:CHECKED], shortest[CHECKED : CHECKED + 2]
    folder = args.output / "check"
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("few", few), ("others", others)):
        data.write(folder / f"{name}.jsonl", [data.plain(row) for row in some])
    overrides = {
        "data": [folder / "few.jsonl"],
        "dev_data": [folder / "others.jsonl"],
        "num_train_epochs": CHECK_EPOCHS,
        "per_device_train_batch_size": 4,
        "warmup_steps": 4,
        "save_strategy": "no",
    }
    judge = PRMJudge(train(args, "check/judge", overrides), device="cpu")
    found = judge.calibrate([as_item(row) for row in few], [row.label for row in few])
    print(
        f"check: F1 {found.f1:.2f} on the {CHECKED} solutions that it was trained on {CHECK_EPOCHS} times (1.00 is expected)"
    )


def train_classifier(args: argparse.Namespace) -> None:
    train(args, "classifier", {"data": files(args, "planted", "annotated"), "num_train_epochs": args.epochs})


def train_generative(args: argparse.Namespace) -> None:
    # Only the planted ones: with the question they have 500 tokens, the annotated ones twice as many
    overrides = {"data": files(args, "planted"), "max_steps": args.generative_updates, **GENERATIVE}
    train(args, "generative", overrides)


def judges(args: argparse.Namespace) -> dict[str, JudgeEvalArguments]:
    """What is evaluated: those without a model, and those that have been trained."""
    out = args.output / "evaluation"

    def asked(name: str, judge: str, judge_args: dict[str, Any] | None = None, **kwargs: Any) -> JudgeEvalArguments:
        folder = out / name.replace(", ", "-").replace(" ", "-")
        return JudgeEvalArguments(judge, kwargs.pop("rows", heldout(args)), str(folder), judge_args, **kwargs)

    found = {name: asked(name, judge) for name, judge in WITHOUT_MODEL.items()}
    shared: dict[str, Any] = {"max_tokens_per_batch": batch_tokens(), **({"dtype": "bfloat16"} if args.bf16 else {})}
    if (args.output / "classifier" / "judge_train.json").exists():
        own = {**shared, "model": str(args.output / "classifier"), "scores": str(out / "scores.jsonl")}
        for rule in KNOWN_WRONG_RULES:
            name = f"classifier, {rule}"
            path = "benchmarks.real_judge.judges.KeptScoresJudge"
            found[name] = asked(name, path, {**own, "known_wrong_rule": rule})
    if (args.output / "generative" / "judge_train.json").exists():
        own = {**shared, "model": str(args.output / "generative"), "answer": "score", "batch_deadline": None}
        injected = {"robustness": True, "robustness_rows": INJECTED, "injection_rows": 1}
        rows = heldout(args)[:1]
        found["generative"] = asked("generative", "generative", own, rows=rows, limit=args.generative_rows, **injected)
    return found


def table(found: Mapping[str, Any], subset: str) -> str:
    """One row per judge, on one set."""
    rows = []
    for name, scores in found.items():
        standard, known = scores["standard"].get(subset), scores["known_wrong"].get(subset)
        if known is None:
            continue
        exact = [f"{100 * known[key]:.1f}" for key in ("acc_error", "acc_error_within_1", "coverage")]
        errors = [known[key] for key in ("rts_mae", "rts_mae_constant_step", "rts_mae_all", "rts_bias")]
        shown = ["-" if error is None or error != error else f"{error:.3f}" for error in errors]
        rows.append([name, f"{100 * standard['f1']:.1f}", *exact, *shown, str(known["n"])])
    header = [
        "judge",
        "F1",
        "exact",
        "within 1",
        "answered",
        "RTS error",
        "best constant step",
        "RTS error of all",
        "bias",
    ]
    return markdown([*header, "wrong solutions"], rows)


def groups_table(found: Mapping[str, Any]) -> str:
    """The order of wrong solutions of one problem, over all sets, and how often an injected instruction is obeyed."""
    rows = []
    for name, scores in found.items():
        groups, injection = scores["groups"], scores.get("injection")
        values = [groups[key] for key in ("pairwise_accuracy", "pairwise_accuracy_all", "kendall_tau_b")]
        values += [injection[part]["rate"] if injection else None for part in ("overall", "control")]
        shown = ["-" if value is None or value != value else f"{value:.2f}" for value in values]
        rows.append([name, *shown, str(groups["n_pairs"])])
    header = [
        "judge",
        "pairs in order",
        "unanswered as half",
        "Kendall's tau",
        "injected: obeyed",
        "harmless text: the same",
        "pairs",
    ]
    return markdown(header, rows)


def evaluate_all(args: argparse.Namespace) -> None:
    record: dict[str, Any] = {
        **provenance(("trl", "transformers", "torch"), None if torch.cuda.is_available() else args.threads),
        "weights": source_of(args.weights),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "rows": json.loads((args.output / "data" / "rows.json").read_text()),
        "training": {},
        "judges": {},
    }
    for name in ("classifier", "generative"):
        path = args.output / name / "judge_train.json"
        if path.exists():
            record["training"][name] = rounded(json.loads(path.read_text()))
    for name, asked in judges(args).items():
        print(f"\n{name}", flush=True)
        record["judges"][name] = rounded(compact(evaluate(asked)))
        write_results(args.record, record)  # after each: what is there is kept if the next one is cut off
    subsets = sorted({subset for scores in record["judges"].values() for subset in scores["known_wrong"]})
    for subset in subsets:
        print(f"\n{subset}\n\n{table(record['judges'], subset)}")
    print(f"\n{groups_table(record['judges'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to do, in this order")
    parser.add_argument("--weights", default=MODEL, help="name on the Hub, or folder")
    parser.add_argument(
        "--annotated", type=Path, help="folder with mrben_math.jsonl and so on; from the Hub by default"
    )
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl; from the Hub by default")
    parser.add_argument("--planted", type=int, default=600, help="solutions with planted errors")
    parser.add_argument("--characters", type=int, default=1250, help="most characters of an annotated solution")
    parser.add_argument("--epochs", type=float, default=1, help="of the classifier")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--heldout", type=int, default=150, help="most rows of each held-out half")
    parser.add_argument("--generative-updates", type=int, default=36, help="of 8 solutions")
    parser.add_argument(
        "--generative-rows", type=int, default=100, help="rows on which the generative judge is evaluated"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bf16, for processors that can")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", type=Path, default=Path("outputs/real_judge"), help="folder of data and judges")
    parser.add_argument("--record", type=Path, default=HERE / "results.json", help="file of the numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    for part in args.parts:
        if part == "data":
            if not (args.output / "data" / "rows.json").exists():
                sizes = (args.planted, args.characters, args.heldout)
                counts = data.make(args.output / "data", args.annotated, args.gsm8k, *sizes)
                write_json(args.output / "data" / "rows.json", counts)
            print("data:", json.loads((args.output / "data" / "rows.json").read_text()))
        else:
            {"check": check, "classifier": train_classifier, "generative": train_generative, "evaluate": evaluate_all}[
                part
            ](args)


if __name__ == "__main__":
    main()
