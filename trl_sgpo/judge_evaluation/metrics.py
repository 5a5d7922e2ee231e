"""
How good a step-wise judge is, as pure functions of arrays. A verdict is an integer: the 0-based index of the first
wrong step, `NO_ERROR` or `ABSTAIN`. Labels are the same without `ABSTAIN`. Every score is a function of sums over
rows, so one bootstrap serves all. It draws problems, not rows, because solutions of one problem are not independent.
Shapes: `_G` problems, `_S` sums, `_B` resamples.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trl_sgpo.analysis.metrics import percentile_interval


NO_ERROR = -1
ABSTAIN = -2

_LEVEL = 0.95  # of the intervals
# Resamples that are drawn at a time, which bounds the memory for many problems
_CHUNK = 100


def verdict_index(status: str, first_error: int | None) -> int:
    """The status and first wrong step of a [`Verdict`] as one integer."""
    return first_error if first_error is not None else (NO_ERROR if status == "no_error" else ABSTAIN)


# ProcessBench's scores that are shares. `false_alarm_rate` is of the rows without an error
_ACCURACIES = ("acc_error", "acc_correct", "acc_error_within_1", "false_alarm_rate", "abstain_rate")


def _accuracy_columns(predicted: ArrayLike, label: ArrayLike) -> np.ndarray:
    predicted, label = _integers(predicted=predicted, label=label, lowest=(ABSTAIN, NO_ERROR))
    wrong, named = label != NO_ERROR, predicted >= 0
    shares = (
        (wrong & (predicted == label), wrong),
        (~wrong & (predicted == NO_ERROR), ~wrong),
        (wrong & named & (abs(predicted - label) <= 1), wrong),
        (~wrong & named, ~wrong),
        (predicted == ABSTAIN, np.ones(len(label))),
    )
    return _columns(shares)


def _accuracy_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """`_ACCURACIES`, and `f1`, the harmonic mean of the first two (0 if both are 0)."""
    scores = _shares(_ACCURACIES, sums)
    acc_error, acc_correct = scores["acc_error"], scores["acc_correct"]
    total = acc_error + acc_correct
    return {"f1": np.where(total == 0, 0.0, ratio(2 * acc_error * acc_correct, total)), **scores}


def first_error_f1(predicted: ArrayLike, label: ArrayLike) -> dict[str, float]:
    """
    ProcessBench's F1 and its parts (arXiv 2412.06559) on the rows of one subset:
    `acc_error = mean(pred == label | label != -1)`, `acc_correct = mean(pred == -1 | label == -1)`, their harmonic mean
    `f1`, `acc_error_within_1`, `false_alarm_rate` and `abstain_rate`. An abstention is wrong on every row. A score
    without rows is NaN.

    Example:

    ```python
    >>> first_error_f1(predicted=[2, 1, -1, -2], label=[2, 2, -1, -1])["f1"]
    0.5
    ```
    """
    return _floats(_accuracy_scores(_accuracy_columns(predicted, label).sum(axis=0)))


def standard_summary(
    predicted: ArrayLike,
    label: ArrayLike,
    subset: Sequence[str],
    problem: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Standard mode: ProcessBench's scores of each subset, their *unweighted* means over the subsets that have them, the
    scores of all rows pooled, and 95 % intervals by a bootstrap that draws problems.
    """
    columns = _accuracy_columns(predicted, label)
    width = columns.shape[1]
    names = sorted(set(subset))
    place = np.array([names.index(name) for name in subset])
    # One block of columns per subset, so that a resample yields the scores of each
    by_subset = np.zeros((len(columns), len(names), width))
    by_subset[np.arange(len(columns)), place] = columns
    blocks = by_subset.reshape(len(columns), -1)

    def means(sums: np.ndarray) -> dict[str, np.ndarray]:
        sums = sums.reshape(*sums.shape[:-1], len(names), width)
        scores = {name: _mean(value) for name, value in _accuracy_scores(sums).items()}
        pooled = _accuracy_scores(sums.sum(axis=-2))
        return {**scores, **{f"pooled/{name}": value for name, value in pooled.items()}}

    values = _with_intervals(blocks, problem, means, resamples, seed)
    subsets = {}
    for i, name in enumerate(names):
        rows = columns[place == i]
        own_problem = [p for p, here in zip(problem, place == i, strict=True) if here]
        own = _with_intervals(rows, own_problem, _accuracy_scores, resamples, seed)
        n_error = int(rows[:, 1].sum())  # what `acc_error` divides by
        subsets[name] = {"n": len(rows), "n_error": n_error, **own}
    return {
        **{key: value for key, value in values.items() if "/" not in key},
        "pooled": {key.removeprefix("pooled/"): value for key, value in values.items() if "/" in key},
        "n": len(columns),
        "subsets": subsets,
    }


def best_constant(gold: ArrayLike) -> float:
    """
    The constant RTS with the smallest mean absolute error on these rows: their median. NaN without rows. A constant
    reads nothing, so a judge that is not better gives SGPO nothing.
    """
    gold = np.asarray(gold, dtype=np.float64)
    return float(np.median(gold)) if len(gold) else math.nan


def known_wrong_summary(
    predicted: ArrayLike,
    label: ArrayLike,
    n_steps: ArrayLike,
    problem: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Known-wrong mode: where is the first error of solutions that have one? A label that is no step raises a
    `ValueError`.

    Accuracies and rates are over all rows. "No error" cannot be right here, so it counts as no answer, as in training.

    - `rts_mae` is the RTS error over the answered rows.
    - `rts_mae_constant` is the error of the best constant *for those same rows*, the strictest constant there is.
    - `rts_mae_constant_step` is the error of the step nearest to that constant. A judge that names steps is on the
      same grid as the annotators, and that alone is worth a little.
    - `rts_mae_all` is over all rows. An unanswered row counts as the best constant of all rows
      (`rts_mae_constant_all`), so that no judge gains by abstaining.

    The bootstrap draws problems, and each resample keeps the constants of all rows.
    """
    predicted, label = _integers(predicted=predicted, label=label, lowest=(ABSTAIN, 0))
    n_steps = np.asarray(n_steps, dtype=np.int64)
    if (np.maximum(label, predicted) >= n_steps).any():
        raise ValueError("a first wrong step lies after the last step: indices are 0-based, and below n_steps.")
    answered = predicted >= 0
    gold, rts = label / n_steps, predicted / n_steps
    constant, constant_all = best_constant(gold[answered]), best_constant(gold)
    filled = np.where(answered, rts, constant_all)
    step = np.minimum(np.round(np.nan_to_num(constant) * n_steps), n_steps - 1) / n_steps
    every = np.ones(len(label))
    of_answered = {
        "rts_mae": abs(rts - gold),
        "rts_mae_constant": abs(constant - gold),
        "rts_mae_constant_step": abs(step - gold),
        "rts_mae_minus_constant": abs(rts - gold) - abs(constant - gold),
        "rts_bias": rts - gold,
    }
    shares = {
        "acc_error": (predicted == label, every),
        "acc_error_within_1": (answered & (abs(predicted - label) <= 1), every),
        "coverage": (answered, every),
        "abstain_rate": (predicted == ABSTAIN, every),
        "no_error_rate": (predicted == NO_ERROR, every),
        **{name: (np.where(answered, values, 0.0), answered) for name, values in of_answered.items()},
        "rts_mae_all": (abs(filled - gold), every),
        "rts_mae_constant_all": (abs(constant_all - gold), every),
    }
    return {
        **_shares_with_intervals(shares, problem, resamples, seed),
        "constant": constant,
        "constant_all": constant_all,
        "rts_gold_mean": float(gold.mean()) if len(gold) else math.nan,
        "n": len(label),
        "n_answered": int(answered.sum()),
        "histogram_predicted": index_histogram(predicted),
        "histogram_gold": index_histogram(label),
    }


def index_histogram(index: ArrayLike) -> dict[str, int]:
    """How often each 0-based step was named (those from 10 on together), and the two other answers."""
    index = np.asarray(index, dtype=np.int64)
    counts = {str(i): int((index == i).sum()) for i in range(10)}
    counts["10+"] = int((index >= 10).sum())
    return counts | {"no_error": int((index == NO_ERROR).sum()), "abstain": int((index == ABSTAIN).sum())}


def pair_counts(gold: ArrayLike, predicted: ArrayLike) -> tuple[int, int, float]:
    """
    The pairs of one group whose gold RTS differ: how many there are, in how many the judge answered both, and how many
    of these it put in the right order. A tie of the judge is half right. NaN means no answer.

    Example:

    ```python
    >>> pair_counts(gold=[0.0, 0.5, 0.5], predicted=[0.2, 0.2, 0.4])
    (2, 2, 1.5)
    ```
    """
    gold, predicted = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    above = gold[:, None] > gold[None, :]  # each pair once, as (higher, lower)
    difference = predicted[:, None] - predicted[None, :]
    both = above & ~np.isnan(difference)
    right = (both & (difference > 0)).sum() + 0.5 * (both & (difference == 0)).sum()
    return int(above.sum()), int(both.sum()), float(right)


def kendall_tau_b(x: ArrayLike, y: ArrayLike) -> float:
    """
    Kendall's tau-b, the rank correlation with a correction for ties; NaN if one side is constant.

    Example:

    ```python
    >>> kendall_tau_b([1, 2, 3], [1, 3, 2])
    0.3333333333333333
    ```
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    upper = np.triu_indices(len(x), k=1)
    sign_x = np.sign(x[:, None] - x[None, :])[upper]
    sign_y = np.sign(y[:, None] - y[None, :])[upper]
    # The root of the product, not the product of the roots, because it is exact if the orders agree completely
    denominator = math.sqrt(int(abs(sign_x).sum()) * int(abs(sign_y).sum()))
    return float((sign_x * sign_y).sum() / denominator) if denominator else math.nan


def group_summary(
    gold: ArrayLike, predicted: ArrayLike, group: Sequence[Any], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """
    Group mode: does the judge order the wrong solutions of one problem as the annotators do? NaN in `predicted` means
    no answer. Groups without two different gold RTS are left out. The bootstrap draws groups.

    `pairwise_accuracy` is over the pairs that the judge answered. Pairs with equal gold RTS are left out, and a tie of
    the judge is half right. `pairwise_accuracy_all` counts an unanswered pair as half right too. `kendall_tau_b` is
    the mean over the groups whose answered rows differ in gold RTS. A group counts as 0 if the judge gives all of
    these rows the same RTS.
    """
    gold, predicted = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    members: dict[Any, list[int]] = {}
    for i, name in enumerate(group):
        members.setdefault(name, []).append(i)
    rows = []
    for own in members.values():
        pairs, answered, right = pair_counts(gold[own], predicted[own])
        if not pairs:  # one row, or all gold RTS equal: there is no order to find
            continue
        known = np.array(own)[~np.isnan(predicted[own])]
        has_order = len(set(gold[known])) > 1
        tau = kendall_tau_b(gold[known], predicted[known]) if has_order else 0.0
        rows.append((pairs, answered, right, has_order, 0.0 if math.isnan(tau) else tau))
    n_pairs, n_answered, n_right, ordered, taus = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    shares = {
        "pairwise_accuracy": (n_right, n_answered),
        "pairwise_accuracy_all": (n_right + 0.5 * (n_pairs - n_answered), n_pairs),
        "pair_coverage": (n_answered, n_pairs),
        "kendall_tau_b": (taus, ordered),
    }
    return {
        **_shares_with_intervals(shares, range(len(rows)), resamples, seed),
        "n_groups": len(rows),
        "n_pairs": int(n_pairs.sum()),
        "n_pairs_answered": int(n_answered.sum()),
        "n_groups_tau": int(ordered.sum()),
    }


def bootstrap_intervals(
    columns: np.ndarray,
    problem: Sequence[Any],
    scores: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """
    95 % percentile bootstrap of scores that are functions of sums over rows. It draws problems with replacement, each
    with all its rows. If it drew rows, it would treat the solutions of one problem as independent, and the interval
    would be too short. [`~trl_sgpo.analysis.metrics.bootstrap`] takes any statistic and calls it once per resample.
    Here one call scores a hundred of them.

    Args:
        columns (`np.ndarray` of shape `(N, S)`):
            What each row adds to each sum.
        scores (`Callable`):
            From sums of shape `(..., S)` to scores of shape `(...)` by name. A resample in which a score is NaN is
            left out of its interval. An interval is NaN if the score was never defined.
    """
    ids = {name: i for i, name in enumerate(dict.fromkeys(problem))}
    sums_GS = np.zeros((len(ids), columns.shape[1]))
    np.add.at(sums_GS, [ids[name] for name in problem], columns)
    if not len(ids) or resamples < 1:
        return dict.fromkeys(scores(columns.sum(axis=0)), (math.nan, math.nan))
    rng = np.random.default_rng(seed)
    chunks = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        counts_BG = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=size)
        chunks.append(scores(counts_BG @ sums_GS))
    values = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: percentile_interval(own, (1 - _LEVEL) / 2) for name, own in values.items()}


def _columns(shares: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """What each row adds to the part and to the whole of each share: shape `(N, 2 * number of shares)`."""
    return np.stack([column for pair in shares for column in pair], axis=-1).astype(np.float64)


def _shares(names: Sequence[str], sums: np.ndarray) -> dict[str, np.ndarray]:
    """The shares by name, from the sums of their columns."""
    return {name: ratio(sums[..., 2 * i], sums[..., 2 * i + 1]) for i, name in enumerate(names)}


def _shares_with_intervals(
    shares: Mapping[str, tuple[np.ndarray, np.ndarray]], problem: Sequence[Any], resamples: int, seed: int
) -> dict[str, Any]:
    return _with_intervals(_columns(shares.values()), problem, partial(_shares, tuple(shares)), resamples, seed)


def _with_intervals(
    columns: np.ndarray,
    problem: Sequence[Any],
    scores: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The scores of all rows, and `intervals`."""
    intervals = bootstrap_intervals(columns, problem, scores, resamples, seed)
    return {**_floats(scores(columns.sum(axis=0))), "intervals": intervals}


def _floats(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, NaN if `whole` is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(part.shape, math.nan), where=whole != 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN if there is nothing else."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def _integers(predicted: ArrayLike, label: ArrayLike, lowest: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    predicted, label = np.asarray(predicted), np.asarray(label)
    if predicted.shape != label.shape or predicted.ndim != 1:
        raise ValueError(
            f"predicted has shape {predicted.shape} and label {label.shape}: give one number per row for both."
        )
    for name, values, least in zip(("predicted", "label"), (predicted, label), lowest, strict=True):
        if len(values) and not (np.equal(values, values.astype(np.int64)).all() and values.min() >= least):
            raise ValueError(
                f"{name} holds {values.min()} or a fraction: it must be whole numbers from {least} on, the 0-based "
                f"index of a step, NO_ERROR={NO_ERROR} or ABSTAIN={ABSTAIN} if these make sense."
            )
    return predicted.astype(np.int64), label.astype(np.int64)
