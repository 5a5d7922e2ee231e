"""
Asks a judge about annotated solutions and keeps every verdict in a file, so that a run that was ended continues and
nothing is asked twice.
"""

import hashlib
import inspect
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from trl_sgpo.analysis.jsonable import append_lines, whole_lines
from trl_sgpo.judge_evaluation.data import Row


if TYPE_CHECKING:
    from trl_sgpo.judge_evaluation.robustness import Perturbed
    from trl_sgpo.judges import JudgeItem, StepJudge, Verdict


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationItem:
    """
    One judgement: a row, in standard or known-wrong mode, as it is or perturbed. `variant` names the perturbation.
    """

    row: Row
    known_wrong: bool
    variant: str = ""
    perturbed: "Perturbed | None" = None

    @property
    def steps(self) -> tuple[str, ...]:
        return self.row.steps if self.perturbed is None else self.perturbed.steps

    @property
    def label(self) -> int:
        """The first right answer; -1 if no step is wrong."""
        if self.perturbed is None or self.row.label == -1:
            return self.row.label
        places = self.perturbed.places(self.row.label)
        return places[0] if places else -1

    def for_judge(self, reference: bool) -> "JudgeItem":
        """What the judge sees; the reference answer only if `reference`."""
        from trl_sgpo.judges import JudgeItem

        return JudgeItem(
            problem=self.row.problem,
            steps=self.steps,
            reference=self.row.reference if reference else None,
            known_wrong=self.known_wrong,
            row=self.row.columns,
        )


def judge_identity(judge: "StepJudge", name: str, judge_args: Any) -> str:
    """
    What tells two judges apart. A judge with a `cache_key` says itself what its verdicts depend on. Any other one is
    known by its name on the command line, its arguments and the file that defines it: an edited function is a new
    judge.
    """
    from trl_sgpo.judges import CallableJudge
    from trl_sgpo.judges.base import identity

    known_by = identity(judge)
    if isinstance(getattr(judge, "cache_key", None), str):
        return known_by
    if isinstance(judge_args, str):  # the same arguments from a command line and from a YAML file
        judge_args = json.loads(judge_args)
    made_by = judge.function if isinstance(judge, CallableJudge) else type(judge)
    try:
        source = hashlib.sha256(Path(inspect.getsourcefile(made_by) or "").read_bytes()).hexdigest()
    except (TypeError, OSError):
        source = ""
    return json.dumps([known_by, name, judge_args, source], sort_keys=True, default=str)


class Record:
    """
    The verdicts of one judge in a JSON-lines file that only grows: one line per distinct completion and mode, written
    as soon as its batch is judged. It keeps abstentions too, which a [`CachedJudge`] does not: a judge that rightly
    abstains on most rows must not be asked again in every run. `judge` is the hash of the judge's identity. A file
    with verdicts of another judge raises a `ValueError`.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self.path = path
        self.judge = judge
        self.lines: dict[str, dict[str, Any]] = {}
        for number, text in enumerate(whole_lines(path), start=1):
            try:
                line = json.loads(text)
                key, writer = line["key"], line["judge"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number} is not a verdict ({error}). Remove that line, or give another `--output`."
                ) from error
            if writer != judge:
                raise ValueError(
                    f"output={str(path.parent)!r} holds verdicts of another judge (or of this one before its code, "
                    "prompt or settings changed), and verdicts of two judges must not be mixed. Give another "
                    f"`--output`, or delete {path.name} and verdicts.sqlite in that folder."
                )
            self.lines[key] = line

    def key(self, item: "JudgeItem") -> str:
        parts = [item.problem, item.steps, item.reference, item.known_wrong, item.row]
        text = json.dumps([self.judge, *parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        append_lines(self.path, lines)
        # Only in memory: these are not asked again in this run, even if abstentions of earlier runs are
        self.lines.update({line["key"]: {**line, "asked_now": True} for line in lines})


def ask_all(
    judge: "StepJudge",
    items: Sequence[EvaluationItem],
    record: Record,
    *,
    batch_size: int,
    reference: bool = False,
    retry_abstained: bool = False,
    usage_of: Any = None,
    description: str = "",
) -> list[dict[str, Any]]:
    """
    The lines of the record for all items, in their order. Items that the record does not hold are asked, in batches,
    and items of one problem should follow each other, for servers with prefix caching. An interrupt raises
    `SystemExit`, and the verdicts until then are kept.

    Args:
        retry_abstained (`bool`, *optional*, defaults to `False`):
            Whether to ask again if the judge abstained in an earlier run.
        usage_of (*optional*):
            An object that may have an attribute `usage`, a mapping of counters: the judge inside the cache.
    """
    from tqdm.auto import tqdm

    from trl_sgpo.judges.base import ask
    from trl_sgpo.judges.log_once import LogOnce

    judged = [item.for_judge(reference) for item in items]
    keys = [record.key(item) for item in judged]
    waiting: dict[str, int] = {}
    for i, key in enumerate(keys):
        line = record.lines.get(key)
        if line is None or (retry_abstained and line["status"] == "abstain" and not line.get("asked_now")):
            waiting.setdefault(key, i)
    pending = list(waiting.values())
    log_once = LogOnce(logger)

    def show_traceback(failed: "StepJudge") -> None:
        log_once.traceback("The judge %s raised an exception; its batch counts as abstained.", failed.name)

    with tqdm(total=len(pending), desc=description, unit="completion", disable=not pending) as bar:
        try:
            for start in range(0, len(pending), batch_size):
                batch = pending[start : start + batch_size]
                used, began = _usage(usage_of), perf_counter()
                verdicts = ask(judge, [judged[i] for i in batch], show_traceback)
                # A batch's time and tokens are shared out, so that sums over any rows come out about right
                cost: dict[str, Any] = {"seconds": (perf_counter() - began) / len(batch)}
                usage = {name: (n - used.get(name, 0)) / len(batch) for name, n in _usage(usage_of).items()}
                if usage:
                    cost["usage"] = usage
                record.add(
                    [
                        {"key": keys[i], "judge": record.judge, **_described(items[i], verdict), **cost}
                        for i, verdict in zip(batch, verdicts, strict=True)
                    ]
                )
                bar.update(len(batch))
        except KeyboardInterrupt:
            raise SystemExit(
                f"Interrupted. {len(record.lines)} verdicts are kept in {record.path}; run the same command again to "
                "continue from there."
            ) from None
    return [record.lines[key] for key in keys]


def _described(item: EvaluationItem, verdict: "Verdict") -> dict[str, Any]:
    try:
        confidence = float(verdict.confidence)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # None, or an odd type of a judge of one's own
        confidence = math.nan
    return {
        "file": item.row.file,
        "subset": item.row.subset,
        "id": item.row.id,
        "known_wrong": item.known_wrong,
        "variant": item.variant,
        "n_steps": len(item.steps),
        "label": item.label,
        "status": verdict.status,
        "first_error": verdict.first_error,
        "confidence": confidence if math.isfinite(confidence) else None,
        "reason": verdict.reason[:2000],
    }


def _usage(judge: Any) -> dict[str, float]:
    usage = getattr(judge, "usage", None)
    if not isinstance(usage, Mapping):
        return {}
    return {str(name): count for name, count in usage.items() if isinstance(count, int | float)}
