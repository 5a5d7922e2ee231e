"""From the scores of the steps to a verdict, and the best threshold: against every step and every threshold."""

import math
import random
from itertools import pairwise

import pytest

from trl_sgpo import Verdict
from trl_sgpo.judges.prm import best_threshold, median_step, verdict_from_scores


def test_verdicts():
    assert verdict_from_scores([0.9, 0.5], 2, 0.5).status == "no_error"  # at the threshold is not under it
    verdict = verdict_from_scores([0.9, 0.25, 0.1], 3, 0.5)
    assert (verdict.first_error, verdict.n_steps, verdict.confidence) == (1, 3, 0.75)
    verdict = verdict_from_scores([0.9, 0.6, 0.6], 3, 0.5, known_wrong=True, known_wrong_rule="argmin")
    assert (verdict.first_error, verdict.confidence) == (1, pytest.approx(0.4))
    assert verdict_from_scores([0.9, 0.6], 2, 0.5, known_wrong=False, known_wrong_rule="argmin").status == "no_error"
    assert verdict_from_scores([0.9], 2, 0.5, known_wrong_rule="argmin").status == "abstain"
    assert verdict_from_scores([0.9, 0.1, 0.1], 2, 0.5).status == "abstain"
    assert verdict_from_scores([0.1, math.nan], 2, 0.5).status == "abstain"
    assert verdict_from_scores([], 2, 0.5).status == "abstain"


def test_the_median_has_the_smallest_expected_error():
    """Against every step, with the expectation written out."""
    rng = random.Random(0)
    for _ in range(300):
        scores = [rng.random() ** rng.choice((0.1, 1, 3)) for _ in range(rng.randint(1, 8))]
        shares = [math.prod(scores[:k]) * (1 - scores[k]) for k in range(len(scores))]
        errors = [sum(p * abs(i - k) for k, p in enumerate(shares)) for i in range(len(scores))]
        step, share = median_step(scores, len(scores))
        assert errors[step] == pytest.approx(min(errors))
        assert share == pytest.approx(shares[step] / sum(shares))


def test_verdicts_by_the_median():
    def verdict(scores, n_steps, threshold=0.5, known_wrong=True):
        return verdict_from_scores(scores, n_steps, threshold, known_wrong, "median")

    for threshold in (0.0, 0.5, 1.0):  # it does not count
        assert verdict([0.7, 0.7, 0.8], 3, threshold).first_error == 1
    assert verdict([0.7, 0.7, 0.8], 3).confidence == pytest.approx(0.21 / 0.608)
    assert verdict([0.7, 0.4, 0.8], 3, known_wrong=False).confidence == pytest.approx(0.6)  # by the threshold
    assert verdict([0.0, 0.2], 2).first_error == 0
    assert verdict([1.0, 1.0], 2).status == "no_error"
    # The steps that do not fit share what is left of 1: 0.40, then 0.54. A low score does not decide alone
    assert verdict([0.8, 0.5], 9).first_error == 1
    reason = "only the first 2 of 9 steps fit into the model, and the median of the first wrong step comes after them"
    assert verdict([0.9, 0.6], 9, threshold=0.7) == Verdict.abstain(reason)


def f1_at(threshold, scores, labels):
    hits = ([], [])
    for row, label in zip(scores, labels, strict=True):
        prediction = next((i for i, score in enumerate(row) if score < threshold), -1)
        hits[label < 0].append(prediction == label)
    accuracies = [sum(hit) / len(hit) for hit in hits if hit]
    return 0.0 if not all(accuracies) else len(accuracies) / sum(1 / accuracy for accuracy in accuracies)


def test_best_threshold_is_that_of_brute_force():
    rng = random.Random(0)
    for _ in range(300):
        scores = [
            [rng.choice([rng.random(), rng.randint(0, 4) / 4]) for _ in range(rng.randint(1, 6))]
            for _ in range(rng.randint(1, 12))
        ]
        labels = [rng.randint(-1, len(row) - 1) for row in scores]
        found = best_threshold(scores, labels)
        values = sorted({0.0, 1.0, *(score for row in scores for score in row)})
        candidates = [*values, *((a + b) / 2 for a, b in pairwise(values))]
        assert found.f1 == pytest.approx(max(f1_at(t, scores, labels) for t in candidates))
        assert f1_at(found.threshold, scores, labels) == pytest.approx(found.f1)
        assert 0 <= found.threshold <= 1


def test_best_threshold_refuses_what_it_cannot_use():
    for scores, labels in (([], []), ([[0.5]], [0, 1])):
        with pytest.raises(ValueError, match="one label per row"):
            best_threshold(scores, labels)
    for row in ([], [math.nan], [1.5]):
        with pytest.raises(ValueError, match="no probabilities"):
            best_threshold([row], [0])
