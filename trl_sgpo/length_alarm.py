"""
[`LengthAlarm`]: notices that completions grow longer and not better.

A reward for wrong completions can teach length instead of the task: if the judge finds errors too late, more steps earn a
higher score. This happened in a public run with such a reward, where accuracy fell from 0.715 to 0.10 in 40 updates
(https://github.com/verl-project/verl-recipe/pull/125).
"""

import statistics
from collections import deque
from collections.abc import Iterable


WINDOW = 20  # rounds
GROWTH = 1.3


class LengthAlarm:
    """Compares the last 20 judged rounds with the first 20 that it was told of."""

    def __init__(self) -> None:
        self._first: list[tuple[float, float]] = []
        self._last: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, length: float, accuracy: float) -> str | None:
        """
        Takes in one judged round.

        Args:
            length (`float`):
                Mean number of tokens of the completions of failed groups.
            accuracy (`float`):
                Share of correct completions in the round.

        Returns:
            `str` or `None`: What has happened, if the mean length has grown by 30 % and accuracy has not risen.
        """
        if len(self._first) < WINDOW:
            self._first.append((length, accuracy))
            return None
        self._last.append((length, accuracy))
        if len(self._last) < WINDOW:
            return None
        (length_before, accuracy_before), (length_now, accuracy_now) = _means(self._first), _means(self._last)
        if not length_now >= GROWTH * length_before or accuracy_now > accuracy_before:
            return None
        return (
            f"The completions of failed groups have grown from {length_before:.0f} to {length_now:.0f} tokens (means of {WINDOW} "
            f"rounds), and accuracy has not risen ({accuracy_before:.3f}, now {accuracy_now:.3f}). The judge's reward may "
            "teach length: a judge that blames late steps pays for more steps. Read some completions with their verdicts "
            "(`log_completions=True`), measure the judge (`trl-sgpo judge-eval`), and lower "
            "`failed_group_weight` or set `judge_until` if it is at fault. This is said once."
        )


def _means(rounds: Iterable[tuple[float, float]]) -> tuple[float, float]:
    lengths, accuracies = zip(*rounds, strict=True)
    return statistics.fmean(lengths), statistics.fmean(accuracies)
