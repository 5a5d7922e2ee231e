"""
The two tasks. A problem has a question, an answer, and a worked solution that ends with `#### answer`.

- `chains`: arithmetic that is written out. "Start with 6. Add 16. Subtract 14. What is the result?", one equation per line.
  The number of operations decides how many groups fail.
- `gsm8k`: grade-school word problems, from the Hub or from a folder with train.jsonl and test.jsonl.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from recipes.gsm8k.prepare import row_to_prompt
from trl_sgpo.judges import ArithmeticJudge, CallableJudge, EarliestError, ReferenceJudge, StepJudge


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
GSM8K = "openai/gsm8k"


@dataclass(frozen=True)
class Problem:
    """A question, the text of its answer, and a worked solution that ends with `#### answer`."""

    question: str
    answer: str
    solution: str

    def row(self) -> dict[str, Any]:
        """What the trainer reads."""
        prompt = [{"role": "user", "content": self.question}]
        return {"prompt": prompt, "answer": self.answer, "reference": self.solution}

    def sft_row(self) -> dict[str, Any]:
        completion = [{"role": "assistant", "content": self.solution}]
        return {"prompt": self.row()["prompt"], "completion": completion}


def _number(text: str) -> str:
    value = text.replace(",", "")
    return value.rstrip("0").rstrip(".") if "." in value else value


def strict_answer(text: str) -> str | None:
    """The number after the last `####`."""
    _, mark, after = text.rpartition("####")
    found = NUMBER.match(after.strip()) if mark else None
    return _number(found.group()) if found else None


def lenient_answer(text: str) -> str | None:
    """The last number, wherever it stands."""
    found = NUMBER.findall(text)
    return _number(found[-1]) if found else None


def accuracy_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 if the number after `####` is the answer, else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(strict_answer(text) == right) for text, right in zip(texts, answer, strict=True)]


def make_chain(rng: random.Random, n_operations: int) -> Problem:
    x = rng.randint(2, 20)
    words, lines = [f"Start with {x}."], []
    for _ in range(n_operations):
        operator = rng.choice("+-*" if abs(x) < 60 else "+-")
        y = rng.randint(2, 9 if operator == "*" else 20)
        if operator == "-" and y > x:
            operator = "+"
        result = {"+": x + y, "-": x - y, "*": x * y}[operator]
        words.append({"+": f"Add {y}.", "-": f"Subtract {y}.", "*": f"Multiply by {y}."}[operator])
        lines.append(f"{x} {operator} {y} = {result}")
        x = result
    question = " ".join([*words, "What is the result?"])
    return Problem(question, str(x), "\n".join([*lines, f"#### {x}"]))


def make_chains(n: int, operations: Sequence[int], seed: int, without: Sequence[Problem] = ()) -> list[Problem]:
    """Different problems, none of them among `without`; the numbers of operations take turns."""
    rng = random.Random(seed)
    known = {problem.question for problem in without}
    problems: list[Problem] = []
    while len(problems) < n:
        problem = make_chain(rng, operations[len(problems) % len(operations)])
        if problem.question not in known:
            known.add(problem.question)
            problems.append(problem)
    return problems


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def right_lines(solution: str, text: str) -> float:
    """The share of the solution's lines that the text begins with. The line with the answer counts."""
    want, wrote = _lines(solution), _lines(text)
    first_wrong = next((i for i, (a, b) in enumerate(zip(want, wrote, strict=False)) if a != b), None)
    return (min(len(want), len(wrote)) if first_wrong is None else first_wrong) / len(want)


def first_wrong_step(problem: str, steps: Sequence[str], reference: str, **row: Any) -> int | None:
    """The exact judge of a chain: the first step with a line that is not the solution's; the last one if lines are missing."""
    want = _lines(reference)
    done = 0
    for i, step in enumerate(steps):
        for line in _lines(step):
            if done == len(want) or line != want[done]:
                return i
            done += 1
    return None if done == len(want) else len(steps) - 1


def random_step(problem: str, steps: Sequence[str], **row: Any) -> int:
    """A judge that knows nothing: any step, the same one for the same text."""
    return random.Random("\n".join((problem, *steps))).randrange(len(steps))


@dataclass(frozen=True)
class Task:
    """
    A task: its problems, and its judges.

    Args:
        to_imitate (`list[Problem]`):
            For the supervised fine-tuning of the base, which gives it the format.
        to_train (`list[Problem]`):
            For reinforcement learning.
        to_test (`list[Problem]`):
            Held out.
        judge ([`~trl_sgpo.judges.StepJudge`]):
            The task's best judge.
        max_completion_length (`int`):
            In tokens.
    """

    to_imitate: list[Problem]
    to_train: list[Problem]
    to_test: list[Problem]
    judge: StepJudge
    max_completion_length: int


def chains() -> Task:
    test = make_chains(400, (4, 5), seed=1)
    return Task(
        to_imitate=make_chains(960, (1, 2, 3), seed=2),
        to_train=make_chains(8000, (4, 5), seed=3, without=test),
        to_test=test,
        judge=CallableJudge(first_wrong_step),
        max_completion_length=72,
    )


def _read_gsm8k(folder: Path | None, split: str) -> list[Problem]:
    if folder is None:
        rows: Any = load_dataset(GSM8K, "main", split=split)
    else:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    problems = []
    for row in rows:
        solution = row_to_prompt(row)["reference"]  # without the marks of the calculator
        problems.append(Problem(row["question"], strict_answer(solution) or "", solution))
    return problems


def gsm8k(folder: Path | None) -> Task:
    train, test = _read_gsm8k(folder, "train"), _read_gsm8k(folder, "test")
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(test)
    third = len(train) // 3
    return Task(
        to_imitate=train[:third],
        to_train=train[third:],
        to_test=test,
        judge=EarliestError([ArithmeticJudge(), ReferenceJudge()]),
        max_completion_length=256,
    )


def get_task(name: str, gsm8k_folder: Path | None = None) -> Task:
    return chains() if name == "chains" else gsm8k(gsm8k_folder)


def dataset(problems: Sequence[Problem], for_sft: bool = False) -> Dataset:
    return Dataset.from_list([problem.sft_row() if for_sft else problem.row() for problem in problems])
