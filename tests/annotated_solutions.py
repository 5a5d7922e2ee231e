"""Judges and annotated solutions with known contents, for the tests of judge evaluation."""

import json
from pathlib import Path

from trl_sgpo.judge_evaluation.evaluation import evaluate
from trl_sgpo.scripts.judge_eval import JudgeEvalArguments


# One counter per process would not see the other process, so every call leaves a line in a file
JUDGES = '''
import re
import time
from trl_sgpo import StepJudge, StepwiseJudge, Verdict


def note(text):
    with open("calls.txt", "a") as file:
        file.write(text + "\\n")


def by_mark(problem, steps, **row):
    """Finds the step with a "!"; sees whatever columns it is given."""
    note(str(sorted(row)))
    return next((i for i, step in enumerate(steps) if "!" in step), None)


def wants_the_label(problem, steps, label):
    return label if label >= 0 else None


class Slow(StepJudge):
    def judge(self, items):
        time.sleep(0.05)
        for item in items:
            note(item.problem)
        return [Verdict.abstain("slow")] * len(items)


class Stops(StepJudge):
    """Ctrl-C in the third batch."""
    calls = 0

    def judge(self, items):
        Stops.calls += 1
        if Stops.calls == 3:
            raise KeyboardInterrupt
        for item in items:
            note(item.problem)
        return [Verdict.error(0)] * len(items)


class Obedient(StepJudge):
    """Does whatever a line `FIRST_ERROR: k` in a completion says, else finds the mark."""
    def __init__(self, offset=0):
        self.offset = offset
        self.usage = {"prompt_tokens": 0}

    def judge(self, items):
        verdicts = []
        for item in items:
            self.usage["prompt_tokens"] += 10 * len(item.steps)
            text = "\\n".join(item.steps)
            lines = re.findall(r"FIRST_ERROR: (\\d+)", text)
            if lines:
                k = int(lines[-1])
                verdicts.append(Verdict.error(min(k, len(item.steps)) - 1) if k else Verdict.no_error())
            else:
                found = [i for i, step in enumerate(item.steps) if "!" in step]
                verdicts.append(Verdict.error(found[0]) if found else Verdict.no_error())
        return verdicts


class Keyed(Stops):
    cache_key = "model m, prompt 2"

    def __init__(self, port):
        self.port = port


def half_done(problem, steps):
    return Verdict.abstain("odd") if len(problem) % 2 else 0


ready = StepwiseJudge(Obedient())
'''


def made_up_rows(n_problems=12, per_problem=3):
    """Wrong steps bear a "!". Every third solution is right."""
    rows = []
    for p in range(n_problems):
        for s in range(per_problem):
            label = -1 if (p + s) % 3 == 0 else (p + 2 * s) % 4
            steps = [f"Step {i} of {p}.{s}. It holds." + ("!" if i == label else "") for i in range(4 + s)]
            row = {"id": f"{p}.{s}", "subset": "ab"[p % 2], "problem": f"Problem {p}?", "steps": steps, "label": label}
            rows.append({**row, "final_answer_correct": label == -1, "reference_answer": "7", "hint": p})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(judge, data=("rows.jsonl",), output="out", **arguments):
    return evaluate(JudgeEvalArguments(judge, list(map(str, data)), str(output), **{"resamples": 20, **arguments}))


def calls():
    path = Path("calls.txt")
    return path.read_text().splitlines() if path.exists() else []
