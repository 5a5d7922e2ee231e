"""
The groups of a run, from the logged completions: which rows belong together, and what became of each group. TRL writes
the rows of a group next to each other, with equal prompts, but it does not write the group size. The size is found
from the runs of equal prompts. If a prompt was drawn twice in a row, its run is two groups long.
"""

from dataclasses import dataclass

import numpy as np

from trl_sgpo.analysis.metrics import answer_entropy
from trl_sgpo.analysis.report.completions import VERDICTS, Rows


# What a group can become. The five in the middle are failed groups.
KINDS = ("solved", "mixed", "rescued", "other_rewards", "tied", "abstained", "unjudged", "unscored")
FAILED_KINDS = ("rescued", "other_rewards", "tied", "abstained", "unjudged")

# Equal rewards leave a rounding error in TRL's advantages: a tiny difference over a standard deviation of 0 + 1e-4
_ADVANTAGE_TOLERANCE = 1e-4
_REGULAR_SHARE = 0.9
_LIVE_BATCHES = 5  # so many must agree before advantages count more than prompts


@dataclass
class Groups:
    """The groups of a run, one entry per group, in the order of training."""

    size: int  # completions of a group, G
    step: np.ndarray  # the update at which the group was logged
    n_scored: np.ndarray  # completions with an outcome
    n_correct: np.ndarray
    kind: np.ndarray  # index in `KINDS`; always that of "unscored" if there is no outcome
    live: np.ndarray  # whether the group teaches, that is, whether some advantage is not zero
    entropy: np.ndarray  # of the answers, in nats
    distinct: np.ndarray  # number of distinct answers
    length: np.ndarray  # of all completions together
    live_length: np.ndarray  # of the completions with an advantage
    rts_step: np.ndarray  # this and the next have one entry per *completion* with a score
    rts: np.ndarray
    n_left_out: int  # rows that are part of no whole group

    def share(self, *kinds: str) -> np.ndarray:
        """1.0 per group that is of one of these kinds, else 0.0."""
        return np.isin(self.kind, [KINDS.index(kind) for kind in kinds]).astype(np.float64)


def prompt_runs(file: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    First row and length of each run of equal prompts within a file.

    ```python
    >>> prompt_runs(np.array([0, 0, 0, 1]), np.array([7, 7, 8, 8]))
    (array([0, 2, 3]), array([2, 1, 1]))
    ```
    """
    if not len(file):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    new = np.r_[True, (file[1:] != file[:-1]) | (prompt[1:] != prompt[:-1])]
    first = np.flatnonzero(new)
    return first, np.diff(np.r_[first, len(file)])


def infer_group_size(file: np.ndarray, prompt: np.ndarray, advantage: np.ndarray) -> tuple[int, str]:
    """
    The group size G: the largest number that divides the runs of equal prompts. The runs of nine rows in ten are
    enough, because an evaluation may leave part of a group in a file.

    If no file has two different prompts, a run may be many groups. Then G is the smallest number for which the
    advantages of every G rows sum to zero, because the advantages of a group do. If G is a guess, a sentence says so.
    """
    first, length = prompt_runs(file, prompt)
    if not len(length):
        return 0, ""
    candidates = sorted({d for n in set(length.tolist()) for d in range(1, n + 1) if n % d == 0}, reverse=True)
    size = next(d for d in candidates if length[length % d == 0].sum() >= _REGULAR_SHARE * length.sum())
    n_files = len(np.unique(file))
    if len(length) > n_files or size < 4:
        return size, ""
    live = [
        advantage[start : start + n]
        for start, n in zip(first, length, strict=True)
        if n % size == 0 and (np.abs(advantage[start : start + n]) > _ADVANTAGE_TOLERANCE).any()
    ]
    for d in range(2, size):
        if size % d == 0 and all(np.abs(a.reshape(-1, d).sum(axis=1)).max() < 1e-2 for a in live):
            if len(live) >= _LIVE_BATCHES:
                return d, (
                    f"No file holds two different prompts. A group has {d} completions, to judge by the advantages: they "
                    "sum to zero in every such group. --group-size sets it."
                )
            return size, (
                f"No file holds two different prompts, and too few advantages differ from zero to tell groups of {size} "
                f"completions from smaller ones; {size} is taken. --group-size sets it."
            )
    return size, ""


def split_groups(file: np.ndarray, prompt: np.ndarray, size: int) -> np.ndarray:
    """
    The row numbers of whole groups, shape (P, G). A file keeps the last rows of training. So the first run of a file
    may lack its first rows, and any other run may lack its last rows.
    """
    first, length = prompt_runs(file, prompt)
    begins = np.r_[True, file[first[1:]] != file[first[:-1]]] if len(first) else np.zeros(0, dtype=bool)
    start = np.where(begins, first + length % size, first)
    count = length // size
    starts = [s + size * np.arange(n) for s, n in zip(start, count, strict=True) if n]
    flat = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
    return flat[:, None] + np.arange(size)[None, :]


def make_groups(
    rows: Rows, size: int, outcome: str | None, success_threshold: float = 0.5, treatment: str = "sgpo"
) -> Groups:
    """
    What became of each group of `size` completions. Without an `outcome`, groups have no kind. A failed group that
    teaches is rescued if the judge gave its completions different rewards (treatment "sgpo"), or if some completion
    has a right step (any other treatment).
    """
    index_PG = split_groups(rows.file, rows.prompt, size)
    n_rows, n_groups = len(rows.step), len(index_PG)
    outcome_PG = rows.rewards[outcome][index_PG] if outcome else np.full(index_PG.shape, np.nan)
    n_scored, n_correct = (~np.isnan(outcome_PG)).sum(axis=1), (outcome_PG >= success_threshold).sum(axis=1)
    judge_PG, rts_PG, verdict_PG = rows.judge[index_PG], rows.rts[index_PG], rows.verdict[index_PG]
    spread_P = _spread(judge_PG)
    if rows.has_advantage:
        teaches_PG = np.abs(np.nan_to_num(rows.advantage[index_PG])) > _ADVANTAGE_TOLERANCE
        live = teaches_PG.any(axis=1)
    else:  # as if TRL gave each reward the same weight
        live = (spread_P > 0) | np.any([_spread(column[index_PG]) > 0 for column in rows.rewards.values()], axis=0)
        teaches_PG = np.repeat(live[:, None], size, axis=1)

    judged_P = (~np.isnan(rts_PG) | ~np.isnan(judge_PG)).sum(axis=1)
    silent_P = (
        (verdict_PG == VERDICTS.index("abstain")) | ((verdict_PG == VERDICTS.index("no_error")) & np.isnan(rts_PG))
    ).sum(axis=1)
    scored = n_scored >= 2
    failed = scored & (n_correct == 0)
    differs_P = (np.nan_to_num(rts_PG) > 0).any(axis=1) if treatment != "sgpo" else spread_P > 0
    of_failed = [
        (live & differs_P, "rescued"),
        (live, "other_rewards"),
        ((judged_P >= 2) & (2 * judged_P >= size), "tied"),
        (silent_P > 0, "abstained"),
        (np.ones(n_groups, dtype=bool), "unjudged"),
    ]
    kind = np.select(
        [~scored, n_correct == n_scored, n_correct > 0, *(failed & condition for condition, _ in of_failed)],
        [KINDS.index(name) for name in ("unscored", "solved", "mixed", *(name for _, name in of_failed))],
        KINDS.index("unscored"),
    )
    answers = rows.answer[index_PG].tolist()
    length_PG = rows.length[index_PG]
    scores = ~np.isnan(rows.rts)
    return Groups(
        size=size,
        step=rows.step[index_PG[:, 0]] if n_groups else np.zeros(0, dtype=np.int64),
        n_scored=n_scored,
        n_correct=n_correct,
        kind=kind.astype(np.int8),
        live=live,
        entropy=np.array([answer_entropy(group) for group in answers], dtype=np.float64),
        distinct=np.array([len(set(group)) for group in answers], dtype=np.float64),
        length=length_PG.sum(axis=1),
        live_length=(length_PG * teaches_PG).sum(axis=1),
        rts_step=rows.step[scores],
        rts=rows.rts[scores],
        n_left_out=n_rows - index_PG.size,
    )


def _spread(values_PG: np.ndarray) -> np.ndarray:
    """Largest minus smallest value of each group, NaN left out; 0 for fewer than two values."""
    high = np.where(np.isnan(values_PG), -np.inf, values_PG).max(axis=1, initial=-np.inf)
    low = np.where(np.isnan(values_PG), np.inf, values_PG).min(axis=1, initial=np.inf)
    return np.where(high > low, high - low, 0.0)
