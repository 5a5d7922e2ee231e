"""GSM8K: loading it, splitting its questions, and the files of lines that the parts are kept in."""

import json
import random
from pathlib import Path
from typing import Any

from datasets import load_dataset

from benchmarks.real_text.judge import final_answer


HUB_NAME = "openai/gsm8k"
PROMPT = "Question: {question}\nAnswer:\n"


def load_gsm8k(data: str) -> dict[str, list[dict[str, str]]]:
    """The rows of `train` and `test` as `question` and `answer`. Raises `ValueError` for anything else."""
    splits = {}
    for name in ("train", "test"):
        if data == HUB_NAME:
            rows = load_dataset(HUB_NAME, "main", split=name).to_list()
        else:
            path = Path(data) / f"{name}.jsonl"
            if not path.is_file():
                raise ValueError(
                    f"--data={data!r}: there is no file {path}. Give a folder with train.jsonl and test.jsonl (one JSON object "
                    f"per line, with `question` and `answer`), or the Hub name {HUB_NAME}."
                )
            rows = read_lines(path)
        for i, row in enumerate(rows):
            if not all(isinstance(row.get(column), str) for column in ("question", "answer")):
                raise ValueError(
                    f"--data={data!r}: row {i} of {name} has the columns {sorted(row)}, but `question` and `answer` are "
                    "needed, both texts."
                )
            if final_answer(row["answer"]) is None:
                raise ValueError(
                    f"--data={data!r}: the answer of row {i} of {name} does not end in '#### ' and a number, so nothing can be "
                    f"compared with it: {row['answer'][-60:]!r}."
                )
        splits[name] = [{"question": row["question"].strip(), "answer": row["answer"].strip()} for row in rows]
    return splits


def split_questions(splits: dict[str, list[dict]], n_rl: int, n_validation: int, seed: int) -> dict[str, list[dict]]:
    """The four parts, as rows for a trainer: `prompt` and `solution`, GSM8K's answer with its marks."""
    train = list(splits["train"])
    if n_rl < 1 or n_validation < 1 or n_rl + n_validation >= len(train):
        raise ValueError(
            f"--rl-questions={n_rl} and --validation-questions={n_validation} leave {len(train) - n_rl - n_validation} of "
            f"{len(train)} training questions for pretraining. Each part needs at least one."
        )
    random.Random(seed).shuffle(train)
    parts = {
        "rl": train[:n_rl],
        "validation": train[n_rl : n_rl + n_validation],
        "pretrain": train[n_rl + n_validation :],
        "test": splits["test"],
    }
    return {
        name: [{"prompt": PROMPT.format(question=row["question"]), "solution": row["answer"]} for row in rows]
        for name, rows in parts.items()
    }


def read_parts(output: Path) -> dict[str, list[dict]]:
    return {path.stem: read_lines(path) for path in (output / "data").glob("*.jsonl")}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
