"""
[`LengthAlarm`]: notices that completions grow longer or shorter and not better.

A reward for wrong completions can teach length instead of the task. If the judge finds errors too late, more steps earn a
higher score. This happened in a public run with such a reward, where accuracy fell from 0.715 to 0.10 in 40 updates
(https://github.com/verl-project/verl-recipe/pull/125). And a share of a completion's steps is higher without the steps that
would be wrong. This happened in benchmarks/pretrained, where a policy learnt to stop early.
"""

import statistics
from collections import deque
from collections.abc import Collection
from typing import Literal, NamedTuple


ROUNDS, COMPLETIONS = 10, 512  # that a mean is made of, at least
GROWTH = 1.3
SHRINKAGE = 0.9
FALL = 0.7  # of the accuracy, with fewer tokens: a policy that learns to be brief may be as good as before


def changed_for_nothing(
    length_before: float, length_now: float, accuracy_before: float, accuracy_now: float
) -> Literal["longer", "shorter"] | None:
    """How completions have changed, if they are 30 % longer and no better, or 10 % shorter and 30 % worse. NaN is unknown."""
    if length_now >= GROWTH * length_before and accuracy_now <= accuracy_before:
        return "longer"
    if length_now <= SHRINKAGE * length_before and accuracy_now <= FALL * accuracy_before and accuracy_before > 0:
        return "shorter"
    return None


class _Round(NamedTuple):
    n: int
    length: float
    accuracy: float


class LengthAlarm:
    """Compares the last judged rounds with the first ones that it was told of: at least 10 of each, and 512 completions."""

    def __init__(self) -> None:
        self._first: list[_Round] = []
        self._last: deque[_Round] = deque()

    def add(self, n: int, length: float, accuracy: float) -> tuple[str, str] | None:
        """
        Takes in one judged round.

        Args:
            n (`int`):
                Number of completions of failed groups.
            length (`float`):
                Their mean number of tokens.
            accuracy (`float`):
                Share of correct completions in the round.

        Returns:
            `tuple[str, str]` or `None`: What has happened, in a word, as [`changed_for_nothing`] has it, and in full.
        """
        new = _Round(n, length, accuracy)
        if not _enough(self._first):
            self._first.append(new)
            return None
        self._last.append(new)
        while _enough(list(self._last)[1:]):
            self._last.popleft()
        if not _enough(self._last):
            return None
        (length_before, accuracy_before), (length_now, accuracy_now) = _means(self._first), _means(self._last)
        changed = (
            f"from {length_before:.0f} to {length_now:.0f} tokens (means of the first {len(self._first)} and the last "
            f"{len(self._last)} rounds), and accuracy has %s ({accuracy_before:.3f}, now {accuracy_now:.3f}). "
        )
        how = changed_for_nothing(length_before, length_now, accuracy_before, accuracy_now)
        if how == "longer":
            return how, (
                f"The completions of failed groups have grown {changed % 'not risen'}The judge's reward may teach length: a judge "
                "that blames late steps pays for more steps. Read some completions with their verdicts "
                "(`log_completions=True`), measure the judge (`trl-sgpo judge-eval`), and lower "
                "`failed_group_weight` or set `judge_until` if it is at fault. This is said once."
            )
        if how == "shorter":
            return how, (
                f"The completions of failed groups have become shorter, {changed % 'fallen'}The policy may learn to stop early. "
                "Read some completions (`log_completions=True`). With failed_groups='sgpo' the reward is a share of a "
                "completion's steps, which is higher without the steps that would be wrong; failed_groups='prefix' or "
                "rts_share_of='longest' takes that away. This is said once."
            )
        return None


def _enough(rounds: Collection[_Round]) -> bool:
    return len(rounds) >= ROUNDS and sum(one.n for one in rounds) >= COMPLETIONS


def _means(rounds: Collection[_Round]) -> tuple[float, float]:
    lengths = statistics.fmean([one.length for one in rounds], [one.n for one in rounds])
    return lengths, statistics.fmean(one.accuracy for one in rounds)
