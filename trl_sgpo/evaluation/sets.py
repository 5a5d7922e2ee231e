"""Problems with a final answer: benchmarks by their short names, datasets of the Hub, local files."""

import ast
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_sgpo.judge_evaluation.data import field_of, problem_of
from trl_sgpo.loading import read_records


# Short name -> dataset of the Hub, config, split
KNOWN_SETS: dict[str, tuple[str, str | None, str]] = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
}
ANSWER_FIELDS = ("answer", "final_answer", "solution")

_WITH_N = re.compile(r"(.+?)(?:@(\d+))?", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class Benchmark:
    """A set of problems, and how each is answered: `n` times by sampling, or once and greedily if `n` is 0."""

    name: str
    source: str
    n: int

    @property
    def kind(self) -> str:
        return f"avg@{self.n}" if self.n else "greedy"


@dataclass(frozen=True)
class Problem:
    """
    One problem. `index` is its place in the set, from 0 on. `gold` is what math-verify compares with, `row` what a reward
    function gets.
    """

    index: int
    text: str
    gold: str
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def parse_benchmark(written: str, n: int) -> Benchmark:
    """
    The benchmark that `NAME`, `SOURCE` or `NAME=SOURCE` stands for, each with or without `@N`. `n` holds without it.

    Example:

    ```python
    >>> parse_benchmark("aime24@16", n=0)
    Benchmark(name='aime24', source='aime24', n=16)
    >>> parse_benchmark("kaoyan=data/kaoyan.jsonl", n=0)
    Benchmark(name='kaoyan', source='data/kaoyan.jsonl', n=0)
    ```
    """
    name, source = split_name(written)
    found = _WITH_N.fullmatch(source)
    if found is None:
        raise ValueError(f"sets: {written!r} is empty. Write NAME, NAME=SOURCE or NAME@16, such as aime24@16.")
    source, own = found.groups()
    name = name or (source if source in KNOWN_SETS else short_name(source))
    return Benchmark(name, source, n if own is None else int(own))


def split_name(written: str) -> tuple[str | None, str]:
    """Name and rest of `NAME=REST`. A path or a name of the Hub that holds an equals sign has none."""
    name, equals, rest = written.partition("=")
    if not equals or "/" in name or Path(written).exists():
        return None, written
    return name, rest


def short_name(source: str) -> str:
    """A name for a path or a dataset or model of the Hub: its last part, without the ending of a file."""
    path = Path(source)
    last = path.resolve().name if path.exists() else source.rstrip("/").rpartition("/")[2]
    return re.sub(r"\.(jsonl?|parquet|csv)$", "", last) or source


def read_set(
    benchmark: Benchmark, split: str | None = None, needs_answer: bool = True
) -> tuple[list[Problem], dict[str, Any]]:
    """
    The problems of a benchmark, and what is known of their source. Without `split` it is the split `test`, or the only one
    there is. A row without a problem, or without an answer that is needed, raises a `ValueError` that names it.
    """
    source, config, known_split = KNOWN_SETS.get(benchmark.source, (benchmark.source, None, None))
    argument = f"sets: {benchmark.name}"
    try:
        parts = list(read_records(source, known_split or split, argument, config))
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{argument}={source!r} could not be loaded: {error}. Without a network give a local file (JSON, JSON lines "
            f"or Parquet) with the columns `problem` and `answer`: {benchmark.name}=path/to/{benchmark.name}.jsonl"
        ) from error
    if len(parts) > 1:
        parts = [part for part in parts if part[0].get("split") == "test"] or parts
    if len(parts) > 1:
        splits = [known.get("split") for known, _ in parts]
        raise ValueError(f"{argument}={source!r} has the splits {splits}, and none is called 'test'. Give --split.")
    [(known, records)] = parts
    problems = [_problem(i, record, place, needs_answer) for i, (place, record) in enumerate(records)]
    if not problems:
        raise ValueError(
            f"{argument}={source!r} holds no problem. Give a set with the columns `problem` and `answer`."
        )
    content = json.dumps([[problem.text, problem.gold] for problem in problems])
    return problems, {**known, "problems": len(problems), "hash": hashlib.sha256(content.encode()).hexdigest()[:16]}


def sample_problems(problems: Sequence[Problem], limit: int | None, seed: int) -> list[Problem]:
    """At most `limit` problems, in their order. A larger limit keeps those that a smaller one has drawn."""
    if limit is None or limit >= len(problems):
        return list(problems)
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    return [problems[i] for i in sorted(order[:limit])]


def gold_text(answer: Any) -> str:
    r"""
    The final answer of a row as the scorer reads it, in `\boxed{}`: of GSM8K's worked answers what follows the last
    `####`, of OlympiadBench's lists all entries. A text that holds `\boxed` already stays as it is.

    Example:

    ```python
    >>> print(gold_text("48 / 2 = 24\n#### 1,024"), gold_text(["$\\frac{1}{2}$"]), gold_text(27.0))
    \boxed{1024} \boxed{\frac{1}{2}} \boxed{27}
    ```
    """
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if isinstance(answer, str) and answer.startswith("['"):  # a list that a file has written as a text
        with suppress(SyntaxError, ValueError):
            answer = ast.literal_eval(answer)
    if isinstance(answer, list | tuple):
        answer = ", ".join(str(part).strip().strip("$") for part in answer)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str(answer).strip()
    if "####" in text:
        text = _THOUSANDS.sub("", text.rpartition("####")[2].strip())
    if "\\boxed" in text:
        return text
    if len(text) > 2 and text.startswith("$") and text.endswith("$") and "$" not in text[1:-1]:
        text = text[1:-1]
    return f"\\boxed{{{text}}}"


def _problem(index: int, record: Any, place: str, needs_answer: bool) -> Problem:
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: it is {type(record).__name__}, not an object with fields. Write one per problem.")
    if not needs_answer:
        gold = next((str(record[name]) for name in ANSWER_FIELDS if record.get(name) is not None), "")
        return Problem(index, problem_of(record, place), gold, record)
    name, answer = field_of(record, ANSWER_FIELDS, "answer", place)
    if answer is None or str(answer).strip() in ("", "[]"):
        raise ValueError(f"{place}: {name} is empty. Give the final answer, or leave the row out.")
    return Problem(index, problem_of(record, place), gold_text(answer), record)
