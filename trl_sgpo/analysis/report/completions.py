"""
Reads the parquet files that any TRL run with `log_completions=True` leaves in `<output_dir>/completions`, one per
logging event, into rows of numbers. A file holds the last generation batch before the event. It does not tell the
settings of the run, the tokens of a completion, or whether an evaluation at the same step has overwritten the file.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trl_sgpo.analysis.report.answers import Extractor, extract_answer


# Columns that are not rewards, with and without our trainer
TEXT_COLUMNS = ("prompt", "completion")
JUDGE_COLUMN = "stepwise_judge"
OWN_COLUMNS = ("judge_first_error", "judge_n_steps", "judge_rts", "judge_status", "judge_reason")
_NOT_REWARDS = {"step", "advantage", "images", JUDGE_COLUMN, *TEXT_COLUMNS, *OWN_COLUMNS}
VERDICTS = ("", "error", "no_error", "abstain")


@dataclass
class Rows:
    """The completions of a run as columns, one entry per completion, in the order of the files."""

    step: np.ndarray  # the update at which the row was logged
    file: np.ndarray  # index of its file
    prompt: np.ndarray  # equal for equal prompts of a file
    rewards: dict[str, np.ndarray]  # without the judge's; NaN for no reward
    advantage: np.ndarray  # this and the next two are NaN if a file has no such column
    judge: np.ndarray
    rts: np.ndarray
    verdict: np.ndarray  # index in `VERDICTS`; 0 if no judge was asked
    answer: np.ndarray  # equal for equal answers of a file; -1 for none
    length: np.ndarray  # tokens, or characters if there is no tokenizer
    has_judge: bool  # whether any file has that column
    has_advantage: bool


@dataclass
class CompletionsRead:
    """What was read from a folder: the rows (`None` if there are none), the number of files, and what was wrong."""

    rows: Rows | None
    n_files: int
    notes: list[str] = field(default_factory=list)


def read_completions(
    folder: Path,
    reward_names: Sequence[str] | None = None,
    extract: Extractor = extract_answer,
    count_tokens: Callable[[list[str]], Sequence[int]] | None = None,
) -> CompletionsRead:
    """
    Reads all `completions_*.parquet` of a folder. A file that cannot be read is left out and noted. So is a file with
    the same completions as the file before it, because TRL writes a batch again if there are several updates per
    generation batch (`num_iterations`, `steps_per_generation`).

    Args:
        reward_names (`Sequence[str]`, *optional*):
            The reward functions, if the log names them. Otherwise every column of numbers is a reward, except those
            that TRL or this package makes.
        count_tokens (`Callable`, *optional*):
            From texts to their numbers of tokens. Without it lengths are characters.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("completions_*.parquet"), key=lambda path: (_number(path), path.name))
    columns: list[dict[str, Any]] = []
    unreadable, repeated, failures = [], 0, 0
    previous = None
    for path in paths:
        try:
            table = pq.ParquetFile(path).read()
            missing = {"prompt", "completion"} - set(table.column_names)
            if missing:
                raise ValueError(f"no column {' and '.join(sorted(missing))}")
            prompts = _texts(table.column("prompt"))
            completions = _texts(table.column("completion"))
        except (OSError, ValueError, pa.ArrowException) as error:
            unreadable.append(f"{path.name} ({str(error).strip().splitlines()[0][:120]})")
            continue
        content = hash((tuple(prompts), tuple(completions)))
        if not prompts or content == previous:
            repeated += bool(prompts)
            continue
        previous = content
        answers: list[Any] = []
        for text in completions:
            try:
                answers.append(extract(text))
            except Exception:  # a user's function got a text that it did not expect
                failures += 1
                answers.append(None)
        columns.append(
            {
                **_numbers(table, reward_names),
                "step": _steps(table, path),
                "prompt": _codes(prompts),
                "answer": _codes(answers),
                "length": np.asarray(count_tokens(completions) if count_tokens else list(map(len, completions))),
            }
        )
    notes = []
    if unreadable:
        shown = "; ".join(unreadable[:3]) + (f"; and {len(unreadable) - 3} more" if len(unreadable) > 3 else "")
        notes.append(
            f"{len(unreadable)} of {len(paths)} completions files could not be read and are left out: {shown}."
        )
    if repeated:
        notes.append(
            f"{repeated} completions files repeat the file before (several updates per generation batch): counted once."
        )
    if failures:
        notes.append(
            f"The answer extractor raised on {failures} completions: they count as completions without an answer."
        )
    return CompletionsRead(_join(columns) if columns else None, len(paths), notes)


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _steps(table: Any, path: Path) -> np.ndarray:
    if "step" in table.column_names:
        return np.asarray(table.column("step").to_pylist(), dtype=np.int64)
    return np.full(table.num_rows, _number(path), dtype=np.int64)


def _texts(column: Any) -> list[str]:
    """Texts as they are; the assistant's words of a conversation; anything else as JSON."""
    return [value if isinstance(value, str) else _flat(value) for value in column.to_pylist()]


def _flat(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        written = [turn["content"] for turn in value if isinstance(turn.get("content"), str)]
        if len(written) == len(value) and all(turn.get("role") == "assistant" for turn in value):
            return "\n".join(written)
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)


def _numbers(table: Any, reward_names: Sequence[str] | None) -> dict[str, Any]:
    import pyarrow as pa

    rewards, own = {}, {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        numeric = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        # A reward function that always returned None leaves a column of nulls
        if not numeric and not pa.types.is_null(kind):
            continue
        if name in ("advantage", JUDGE_COLUMN, "judge_rts"):
            own[name] = _floats(table.column(name))
        elif name in reward_names if reward_names is not None else name not in _NOT_REWARDS:
            rewards[name] = _floats(table.column(name))
    verdicts = table.column("judge_status").to_pylist() if "judge_status" in table.column_names else []
    known = {name: i for i, name in enumerate(VERDICTS)}
    return {
        "rewards": rewards,
        "own": own,
        "verdict": np.array([known.get(v or "", 0) for v in verdicts] or [0] * table.num_rows, dtype=np.int8),
    }


def _floats(column: Any) -> np.ndarray:
    return np.array([np.nan if value is None else float(value) for value in column.to_pylist()], dtype=np.float64)


def _codes(values: Sequence[Any]) -> np.ndarray:
    """Small integers, equal for equal values; -1 for None."""
    seen: dict[Any, int] = {}
    return np.array([-1 if v is None else seen.setdefault(v, len(seen)) for v in values], dtype=np.int32)


def _join(files: list[dict[str, Any]]) -> Rows:
    sizes = [len(one["step"]) for one in files]

    def joined(name: str, part: str | None = None) -> np.ndarray:
        columns = [one if part is None else one[part] for one in files]
        return np.concatenate(
            [c[name] if name in c else np.full(n, np.nan) for c, n in zip(columns, sizes, strict=True)]
        )

    return Rows(
        **{name: joined(name) for name in ("step", "prompt", "verdict", "answer")},
        file=np.repeat(np.arange(len(files)), sizes),
        rewards={
            name: joined(name, "rewards") for name in dict.fromkeys(name for one in files for name in one["rewards"])
        },
        advantage=joined("advantage", "own"),
        judge=joined(JUDGE_COLUMN, "own"),
        rts=joined("judge_rts", "own"),
        length=joined("length").astype(np.float64),
        has_judge=any(JUDGE_COLUMN in one["own"] for one in files),
        has_advantage=any("advantage" in one["own"] for one in files),
    )
