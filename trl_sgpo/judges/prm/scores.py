"""
From the scores of the steps to a verdict ([`verdict_from_scores`]), the best threshold on labelled rows
([`best_threshold`]), and the base class of the judges that score steps ([`StepScorer`]).
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.prm.encoder import EncodedSteps, PRMEncoder
from trl_sgpo.judges.prm.spec import PRMSpec


KNOWN_WRONG_RULES = ("threshold", "argmin", "median")

logger = logging.getLogger(__name__)


def verdict_from_scores(
    scores: Sequence[float],
    n_steps: int,
    threshold: float,
    known_wrong: bool = True,
    known_wrong_rule: str = "threshold",
) -> Verdict:
    """
    The verdict on a completion, from the scores of its steps.

    The first step whose score is below the threshold is the error. If no score is below it, there is no error. But if
    some steps have no score, the verdict is then an abstention, because the error may be one of them.

    `scores` are probabilities that a step is right, for the first of `n_steps` steps, as many as could be scored. If
    the answer is known to be wrong, the rule decides. With `"argmin"` the verdict is never "no error": without a score
    below the threshold, the step with the lowest score is the error. With `"median"` the threshold does not count: the
    error is the step of [`median_step`]. The confidence is the probability that the model gives the verdict: one minus
    the score of the wrong step, the share of the median, or the lowest score of all.

    Example:

    ```python
    >>> verdict_from_scores([0.9, 0.25, 0.1], n_steps=3, threshold=0.5).first_error
    1
    >>> verdict_from_scores([0.9, 0.8], n_steps=3, threshold=0.5).reason
    'only the first 2 of 3 steps fit into the model, and it finds no error in them'
    ```
    """
    if len(scores) > n_steps:
        return Verdict.abstain(f"the model gave {len(scores)} scores for {n_steps} steps")
    if any(math.isnan(score) for score in scores):
        return Verdict.abstain("the model gave scores that are no numbers (NaN)")
    if not scores:
        return Verdict.abstain(f"the problem is too long for the model: none of {n_steps} steps fits into it")
    if known_wrong and known_wrong_rule == "median":
        found = median_step(scores, n_steps)
        if found is not None:
            i, share = found
            return Verdict.error(i, n_steps, share, f"step {i + 1} is the median of the first wrong step")
        if len(scores) < n_steps:
            return Verdict.abstain(
                f"only the first {len(scores)} of {n_steps} steps fit into the model, and the median of the first wrong step "
                "comes after them"
            )
    else:
        for i, score in enumerate(scores):
            if score < threshold:
                return Verdict.error(i, n_steps, 1 - score, f"score {score:.3g} of step {i + 1} < {threshold:.3g}")
    if len(scores) < n_steps:
        return Verdict.abstain(
            f"only the first {len(scores)} of {n_steps} steps fit into the model, and it finds no error in them"
        )
    lowest = min(scores)
    if known_wrong and known_wrong_rule == "argmin":
        i = scores.index(lowest)
        return Verdict.error(i, n_steps, 1 - lowest, f"score {lowest:.3g} of step {i + 1} is the lowest")
    return Verdict.no_error(n_steps, lowest, f"lowest score {lowest:.3g} >= {threshold:.3g}")


def median_step(scores: Sequence[float], n_steps: int) -> tuple[int, float] | None:
    """
    The median of the first wrong step of a completion that is known to be wrong, and the probability of that step. If
    the scores are calibrated, the median has the smallest expected error of the RTS.

    The score of a step is read as the probability that it is right if all steps before it are. So a step is the first
    wrong one with a probability proportional to one minus its score, times the scores before it. If only the first
    steps have a score, the others share what is left of 1. `None` if the median is one of these, or if every score is 1.

    Example:

    ```python
    >>> step, share = median_step([0.7, 0.7, 0.8], n_steps=3)  # probabilities 0.30, 0.21 and 0.10 of 0.61
    >>> step, round(share, 2)
    (1, 0.35)
    >>> median_step([0.9, 0.9, 0.9], n_steps=30) is None
    True
    ```
    """
    right, shares = 1.0, []
    for score in scores:
        shares.append(right * (1 - score))
        right *= score
    total = sum(shares) if len(scores) == n_steps else 1.0
    for i, reached in enumerate(accumulate(shares)):
        if total and reached >= total / 2:
            return i, shares[i] / total
    return None


@dataclass(frozen=True)
class Calibration:
    """A threshold and its accuracy on labelled rows."""

    threshold: float
    f1: float  # harmonic mean of the two accuracies, or the one that there is
    accuracy_error: float | None  # share of the rows with an error whose first error is found exactly
    accuracy_correct: float | None  # share of the rows without one in which none is found


def best_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> Calibration:
    """
    The threshold with the best ProcessBench F1 (arXiv 2412.06559): the harmonic mean of the exact accuracy on rows
    with an error and the accuracy on rows without one.

    A row is its steps' scores and a label: the 0-based first wrong step, or -1 for no error. The thresholds that judge
    a row correctly form one interval. For a row with an error it goes from the score of the first wrong step to the
    lowest score before that step. For a row without an error it goes up to the lowest score of all. A sweep over the
    ends of these intervals finds the best threshold exactly, in the time of one sort. If several ranges are equally
    good, the result is the middle of the widest one.

    Example:

    ```python
    >>> best_threshold([[0.9, 0.8], [0.9, 0.3, 0.1]], [-1, 1])
    Calibration(threshold=0.55, f1=1.0, accuracy_error=1.0, accuracy_correct=1.0)
    ```
    """
    if not scores or len(scores) != len(labels):
        raise ValueError(
            f"scores has {len(scores)} rows and labels has {len(labels)}: give one label per row, and a row at least."
        )
    changes: tuple[Counter[float], ...] = Counter(), Counter()  # of the hits, if the threshold passes a score
    hits, totals = [0, 0], [0, 0]  # of rows with an error, and without one
    for row, label in zip(scores, labels, strict=True):
        if not len(row) or not all(0 <= score <= 1 for score in row):
            raise ValueError(
                f"scores has a row without scores, or some are no probabilities: {list(row)!r}. Leave it out."
            )
        kind = int(label < 0)
        totals[kind] += 1
        if label < len(row):
            low = -math.inf if label < 0 else row[label]
            high = min(row if label < 0 else row[:label], default=math.inf)
            if low < high:
                changes[kind][low] += 1
                changes[kind][high] -= 1

    best = (-1.0, 0.0)
    result = Calibration(0.5, 0.0, None, None)
    ends = sorted({float(score) for row in scores for score in row})
    for low, high in zip([-math.inf, *ends], [*ends, 1.0], strict=True):
        hits = [hit + change[low] for hit, change in zip(hits, changes, strict=True)]
        if low >= high:  # no threshold is above a score of 1
            continue
        accuracies = [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        f1 = len(known) / sum(1 / accuracy for accuracy in known) if all(known) else 0.0
        low = max(low, 0.0)
        if (f1, high - low) > best:
            best = (f1, high - low)
            middle = (low + high) / 2
            # Neighbouring floats have no middle, and a threshold equal to `low` belongs to the range before
            result = Calibration(middle if middle > low else high, f1, *accuracies)
    return result


def checked_rule(known_wrong_rule: str) -> str:
    """The rule, if there is one of that name."""
    if known_wrong_rule not in KNOWN_WRONG_RULES:
        raise ValueError(f"known_wrong_rule={known_wrong_rule!r} is unknown: give one of {list(KNOWN_WRONG_RULES)}.")
    return known_wrong_rule


class StepScorer(StepJudge):
    """
    Base class of the judges with a process reward model: from completions to scores and verdicts, and the threshold.

    A subclass sets `spec`, `encoder` and `known_wrong_rule`, and writes `_score_encoded`.
    """

    spec: PRMSpec
    encoder: PRMEncoder
    known_wrong_rule: str = "threshold"

    def _score_encoded(
        self, items: Sequence[JudgeItem], encoded: dict[int, EncodedSteps]
    ) -> dict[int, list[float] | str]:
        """By index of the item, the scores of its first steps, or the reason why there are none."""
        raise NotImplementedError

    def score_steps(self, items: Sequence[JudgeItem]) -> list[list[float] | str]:
        """Per item the scores of its first steps, as many as fit into the model, or the reason why there are none."""
        results: list[list[float] | str] = [[] for _ in items]
        encoded: dict[int, EncodedSteps] = {}
        for i, one in enumerate(self.encoder.encode(items)):
            if isinstance(one, Exception):
                results[i] = f"the completion could not be encoded: {type(one).__name__}: {one}"
            elif one.positions:
                encoded[i] = one
        for i, scores in self._score_encoded(items, encoded).items():
            results[i] = scores
        return results

    def _layout_text(self) -> str:
        """The layout and the threshold, for a cache."""
        return json.dumps({**self.spec.to_config(), "max_length": self.encoder.max_length}, sort_keys=True)

    @property
    def threshold(self) -> float:
        """A step is wrong if its score is below this. In [0, 1]."""
        return self.spec.threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self.spec = replace(self.spec, threshold=threshold)

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [
            Verdict.abstain(scores)
            if isinstance(scores, str)
            else verdict_from_scores(scores, len(item.steps), self.threshold, item.known_wrong, self.known_wrong_rule)
            for item, scores in zip(items, self.score_steps(items), strict=True)
        ]

    def scores(self, items: Sequence[JudgeItem]) -> list[list[float]]:
        """
        Per item, the score of every step: the probability that it is right. NaN for steps that could not be scored,
        for instance because the completion is too long.
        """
        known = [[] if isinstance(scores, str) else scores for scores in self.score_steps(items)]
        return [own + [math.nan] * (len(item.steps) - len(own)) for item, own in zip(items, known, strict=True)]

    def calibrate(self, items: Sequence[JudgeItem], labels: Sequence[int]) -> Calibration:
        """
        Sets the threshold with the best ProcessBench F1 on labelled completions, and returns it with its accuracies.
        See [`~trl_sgpo.judges.prm.best_threshold`]. `judge.spec.to_config()` holds it, for the model's config.

        Each completion is scored once. A completion is left out if not all of its steps can be scored. Calibrate on
        completions like those that will be judged, but not on those that test the judge.

        Args:
            items, labels (`Sequence[JudgeItem]` and `Sequence[int]`):
                The completions, and per completion its 0-based first wrong step, or -1 for no error.

        Raises:
            ValueError: If labels and items differ in number, or if no completion could be scored in full.
        """
        if len(items) != len(labels):
            raise ValueError(f"labels has {len(labels)} entries for {len(items)} items: give one label per item.")
        rows = [
            (scores, label)
            for scores, label in zip(self.scores(items), labels, strict=True)
            if scores and not any(map(math.isnan, scores))
        ]
        if not rows:
            raise ValueError(f"none of the {len(items)} items could be scored in full: `judge.judge(items)` says why.")
        if left_out := len(items) - len(rows):
            logger.info("%d of %d items could not be scored in full and are left out.", left_out, len(items))
        calibration = best_threshold(*zip(*rows, strict=True))
        self.threshold = calibration.threshold
        return calibration
