"""The trained classifier, with a memory: one pass over the data serves both modes and every rule."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import read_lines
from trl_sgpo.analysis.jsonable import append_lines
from trl_sgpo.judges import JudgeItem
from trl_sgpo.judges.prm import PRMJudge


def batch_tokens() -> int:
    """Tokens of a batch when a judge is asked. A processor is nearly twice as fast if a batch fits into its cache."""
    return 16384 if torch.cuda.is_available() else 2048


class KeptScoresJudge(PRMJudge):
    """A [`PRMJudge`] that keeps the scores of all steps in the file `scores`."""

    def __init__(self, model: str, scores: str, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.path = Path(scores)
        self.known = {line["key"]: line["scores"] for line in read_lines(self.path)}

    def _key(self, item: JudgeItem) -> str:
        text = json.dumps([self._version, str(self._body.dtype), item.problem, item.steps])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def score_steps(self, items: Sequence[JudgeItem]) -> list[list[float] | str]:
        keys = [self._key(item) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self.known}
        if new:
            found = dict(zip(new, super().score_steps(list(new.values())), strict=True))
            append_lines(self.path, [{"key": key, "scores": scores} for key, scores in found.items()])
            self.known |= found
        return [self.known[key] for key in keys]
