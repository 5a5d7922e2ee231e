"""
SGPO with a trained judge, against SGPO with the task's own step checker and against GRPO.

    python recipes/judge/make_data.py
    python -m trl_sgpo.scripts.judge_train --config recipes/judge/rewrite_chain.yaml
    python -m benchmarks.trained_judge.run

The setup is the quickstart's. The record also has: how often the judge agrees with the checker on the completions that it
judges, how good it is on fresh solutions, what it costs, and whether it could solve the problems itself. The judge is a
fine-tuned copy of the base policy. So its own solve rate before the training is that of the base. After the training it is
that of the judge's body with the output embeddings that it still has.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.common import provenance, write_results
from recipes.judge.judges import FinishedPRMJudge
from recipes.quickstart.run import BASE, GROUP_SIZE, N_EVALUATED, N_OPERATIONS, TOKENS, LearningCurve, quiet_trainer
from trl_sgpo.judge_evaluation.data import read_rows
from trl_sgpo.judge_evaluation.metrics import NO_ERROR, first_error_f1
from trl_sgpo.judges import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.prm import PRMJudge
from trl_sgpo.tasks.rewrite_chain import Problem, evaluate, first_wrong_block, load_or_pretrain, make_dataset


ROOT = Path(__file__).parents[2]
ARMS = ("grpo", "oracle", "trained", "trained_finished")


class Witness(StepJudge):
    """Asks a judge, and notes where the step checker would have said something else. The verdicts are the judge's."""

    def __init__(self, judge: StepJudge) -> None:
        self.inner = judge
        self.exact = self.off_by_rts = self.asked = self.answered = 0.0
        self.seconds = 0.0

    @property
    def name(self) -> str:
        return self.inner.name

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        start = time.perf_counter()
        verdicts = self.inner.judge(items)
        self.seconds += time.perf_counter() - start
        for item, verdict in zip(items, verdicts, strict=True):
            gold = first_wrong_block(item.problem, item.steps)
            self.asked += 1
            if verdict.first_error is not None and gold is not None:
                self.answered += 1
                self.exact += verdict.first_error == gold
                self.off_by_rts += abs(verdict.first_error - gold) / len(item.steps)
        return verdicts


def train(arm: str, seed: int, args: argparse.Namespace, base: Path, problems: Path, prompts: list[str]) -> dict:
    config = ROOT / "recipes" / "quickstart" / ("grpo.yaml" if arm == "grpo" else "sgpo.yaml")
    overrides = {
        "model_name_or_path": base,
        "dataset_name": problems,
        "output_dir": args.output / f"{arm}-seed{seed}",
        "seed": seed,
        "disable_tqdm": "true",
        "max_steps": 10_000,  # the run ends when its tokens are spent
    }
    trainer = quiet_trainer(config, overrides)
    witness = None
    if arm != "grpo":
        if arm != "oracle":
            judge = (FinishedPRMJudge if arm == "trained_finished" else PRMJudge)(str(args.judge), device="cpu")
            trainer.stepwise_judge.judge = judge
        witness = Witness(trainer.stepwise_judge.judge)
        trainer.stepwise_judge.judge = witness
    curve = LearningCurve(arm, trainer, prompts, args.tokens)
    trainer.add_callback(curve)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    log = [entry for entry in trainer.state.log_history if "sgpo/accuracy" in entry]
    result = {
        "arm": arm,
        "seed": seed,
        "updates": len(log),
        "generated_tokens": curve.generated,
        "seconds": seconds,
        "mean_length_last_updates": statistics.mean(entry["completions/mean_length"] for entry in log[-20:]),
        "curve": [{"generated_tokens": tokens, **asdict(point)} for tokens, point in curve.points],
    }
    if witness is not None:
        n = max(witness.answered, 1)
        result["judge"] = {
            "calls": witness.asked,
            "seconds": witness.seconds,
            "share_of_run": witness.seconds / seconds,
            "milliseconds_per_completion": 1000 * witness.seconds / max(witness.asked, 1),
            "answered": witness.answered / max(witness.asked, 1),
            "same_as_checker": witness.exact / n,
            "rts_mae": witness.off_by_rts / n,
        }
    return result


def fresh_numbers(judge: PRMJudge, folder: Path) -> dict:
    """First-error scores on solutions of problems that the judge was not trained on."""
    numbers = {}
    for name in ("test_noise", "test_policy"):
        rows, _ = read_rows([str(folder / f"{name}.jsonl")])
        start = time.perf_counter()
        verdicts = judge.judge([JudgeItem(row.problem, row.steps, known_wrong=False) for row in rows])
        seconds = time.perf_counter() - start
        predicted = [NO_ERROR if v.first_error is None else v.first_error for v in verdicts]
        numbers[name] = {
            **first_error_f1(predicted, [row.label for row in rows]),
            "rows": len(rows),
            "with_error": sum(row.label >= 0 for row in rows),
            "milliseconds_per_completion": 1000 * seconds / len(rows),
        }
    return numbers


def solved_in_its_layout(judge: PRMJudge, folder: Path, prompts: list[str], temperature: float) -> float:
    """
    Share of problems that the judge's body solves in the layout of its training: its text is cut after every block, and the
    separator is put in for it. It never learnt to end, so its answer is what it writes as the last block.
    """
    tokenizer = judge.tokenizer
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    cut, separator = (tokenizer.convert_tokens_to_ids(token) for token in (";", judge.spec.separator))
    torch.manual_seed(0)
    solved = 0
    for prompt in prompts:
        problem = Problem.from_prompt(prompt)
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        written: list[list[int]] = [[]]
        while len(written) <= len(problem.operations) and sum(map(len, written)) < 60:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[separator] = -torch.inf
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax())
            ids.append(token)
            written[-1].append(token)
            if token == cut:
                ids.append(separator)
                written.append([])
            if len(written) == len(problem.operations) and len(written[-1]) == len(problem.letters):
                break
        solved += tokenizer.decode(written[-1]).split() == problem.gold_blocks()[-1].split() and (
            len(written) == len(problem.operations)
        )
    return solved / len(prompts)


def solve_rates(judge_path: Path, base: Path, prompts: list[str]) -> dict:
    """Could the judge's model solve the problems? As the base it was, and with the body it has now."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = AutoModelForCausalLM.from_pretrained(base)
    after = LlamaForCausalLM.from_pretrained(judge_path)  # the output embeddings are tied to the input's
    return {
        "before_training_to_judge": asdict(evaluate(before, tokenizer, prompts, n_samples=GROUP_SIZE)),
        "after_training_to_judge": asdict(evaluate(after, tokenizer, prompts, n_samples=GROUP_SIZE)),
        "after_training_led_through_its_layout": {
            "accuracy": solved_in_its_layout(PRMJudge(judge_path, device="cpu"), judge_path, prompts, temperature=1.0),
            "greedy_accuracy": solved_in_its_layout(
                PRMJudge(judge_path, device="cpu"), judge_path, prompts, temperature=0.0
            ),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--judge", type=Path, default=Path("outputs/judge/prm"))
    parser.add_argument("--data", type=Path, default=Path("outputs/judge"))
    parser.add_argument("--base", type=Path, default=Path("outputs/quickstart/base"))
    parser.add_argument("--output", type=Path, default=Path("outputs/trained_judge"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens that each run generates")
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results.json")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)

    base = load_or_pretrain(args.base, BASE)
    problems = args.output / "problems.jsonl"
    make_dataset(4000, N_OPERATIONS, seed=1, length=BASE.length).to_json(problems)
    prompts = make_dataset(N_EVALUATED, N_OPERATIONS, seed=2, length=BASE.length)["prompt"]
    judge = PRMJudge(args.judge, device="cpu")
    record = {
        **provenance(("trl", "transformers", "torch", "accelerate"), threads=torch.get_num_threads()),
        "command": " ".join(["python", "-m", "benchmarks.trained_judge.run", *sys.argv[1:]]),
        "judge": {
            "threshold": judge.threshold,
            "training": json.loads((args.judge / "judge_train.json").read_text()),
            "fresh_solutions": fresh_numbers(judge, args.data),
            "solve_rate": solve_rates(args.judge, base, prompts),
        },
        "runs": [],
    }
    print(json.dumps(record["judge"], indent=1), flush=True)
    for seed in args.seeds:
        for arm in args.arms:
            run = train(arm, seed, args, base, problems, prompts)
            record["runs"].append(run)
            last = run["curve"][-1]
            print(
                f"{arm:17} seed {seed}: accuracy {last['accuracy']:.3f}, right prefix {last['right_prefix']:.3f}, "
                f"length {run['mean_length_last_updates']:.1f}, {run['seconds']:.0f} s, judge {run.get('judge')}",
                flush=True,
            )
            write_results(args.record, record)  # after each: a run that ends early is kept


if __name__ == "__main__":
    main()
