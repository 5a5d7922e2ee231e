"""Rates against enumeration or a naive loop; intervals against simulated prompts."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.analysis.metrics import (
    answer_entropy,
    bootstrap,
    chance_pass_at_k,
    cover_at,
    maj_at_k,
    mean_estimate,
    pass_at_k,
    rates,
    sign_flip_p,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class TestCounts:
    @pytest.mark.parametrize("n", [1, 2, 5, 7])
    def test_pass_at_k_equals_enumeration(self, n):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * c + [False] * (n - c)
            draws = list(itertools.combinations(samples, k))
            assert pass_at_k([n], [c], k)[0] == pytest.approx(sum(map(any, draws)) / len(draws))

    def test_undefined_for_more_draws_than_samples(self):
        values = pass_at_k([2, 8], [1, 1], 4)
        assert np.isnan(values[0])
        assert not np.isnan(values[1])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="k=0 must be at least 1"):
            pass_at_k([2], [1], 0)
        with pytest.raises(ValueError, match=r"c=\[3\] must lie between 0 and n=\[2\]"):
            pass_at_k([2], [3], 1)
        with pytest.raises(ValueError, match="tau=0 must lie in"):
            cover_at([2], [1], 0)
        with pytest.raises(ValueError, match=r"guess=2 must lie in \[0, 1\]"):
            chance_pass_at_k(2, 4)

    @given(st.integers(0, 20), st.integers(0, 20), st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0]))
    def test_cover_at(self, n, c, tau):
        c = min(n, c)
        value = cover_at([n], [c], tau)[0]
        if n == 0:
            assert np.isnan(value)
        else:
            assert value == float(round(c / n, 9) >= tau)

    @given(
        st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), min_size=1, max_size=6), st.data()
    )
    @settings(max_examples=60, deadline=None)
    def test_maj_at_k_equals_enumeration(self, samples, data):
        # "No answer" is never correct, and equal answers are equally correct
        correct = [answer == "a" for answer, _ in samples]
        answers = [answer for answer, _ in samples]
        k = data.draw(st.integers(1, len(samples)))
        chances = []
        for draw in itertools.combinations(range(len(samples)), k):
            votes = Counter(answers[i] for i in draw if answers[i] is not None)
            best = [answer for answer, count in votes.items() if count == max(votes.values())]
            chances.append(best.count("a") / len(best) if best else 0.0)
        assert maj_at_k(answers, correct, k) == pytest.approx(sum(chances) / len(chances))
        assert np.isnan(maj_at_k(answers, correct, len(samples) + 1))

    def test_correct_answers_count_as_one(self):
        assert maj_at_k(["1/2", "0.5", "3", "3"], [True, True, False, False], 4) == pytest.approx(0.5)

    def test_chance(self):
        assert chance_pass_at_k(1 / 6, 2) == pytest.approx(11 / 36)

    @given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
    def test_entropy(self, answers):
        shares = [answers.count(x) / len(answers) for x in set(answers)]
        assert answer_entropy(answers) == pytest.approx(-sum(p * math.log(p) for p in shares))
        assert math.isnan(answer_entropy([]))


@pytest.mark.slow
class TestIntervals:
    @pytest.mark.parametrize("n_prompts", [20, 60])
    @pytest.mark.parametrize(
        "metric",
        [lambda n, c: pass_at_k(n, c, 1), lambda n, c: pass_at_k(n, c, 4), lambda n, c: cover_at(n, c, 0.25)],
        ids=["pass@1", "pass@4", "cover@.25"],
    )
    def test_means_over_prompts_are_covered(self, metric, n_prompts):
        rng = np.random.default_rng(7)
        n = np.full(200_000, 8)
        truth = float(metric(n, rng.binomial(n, sigmoid(rng.normal(-1, 1.5, n.size)))).mean())
        hits = []
        for i in range(600):
            c = rng.binomial(8, sigmoid(rng.normal(-1, 1.5, n_prompts)))
            estimate = mean_estimate(metric(n[:n_prompts], c), n_resamples=400, seed=i)
            hits.append(estimate.low <= truth <= estimate.high)
        assert 0.92 <= np.mean(hits) <= 0.98

    def test_few_prompts_have_no_interval(self):
        estimate = mean_estimate([0.0, 1.0])
        assert estimate.value == 0.5
        assert math.isnan(estimate.low)
        assert math.isnan(mean_estimate([]).value)
        with pytest.raises(ValueError, match="one row per prompt"):
            bootstrap(lambda a, b: 0.0, [1], [1, 2])

    @pytest.mark.parametrize(
        ("degrees", "quantile"), [(3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272), (200, 1.971896)]
    )
    def test_students_t(self, degrees, quantile):
        assert rates._t_quantile(0.975, degrees) == pytest.approx(quantile, rel=0.015)


class TestSignFlips:
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_enumeration(self, seed):
        differences = np.random.default_rng(seed).choice([-1, -0.5, 0, 0.25, 1], size=9)
        sums = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=9)]
        assert sign_flip_p(differences) == pytest.approx(np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9))

    @pytest.mark.parametrize(("better", "worse"), [(12, 3), (20, 20), (40, 15)])
    def test_many_differences_of_one_are_mcnemars_exact_test(self, better, worse):
        n = better + worse
        exact = min(1.0, 2 * sum(math.comb(n, k) for k in range(max(better, worse), n + 1)) / 2**n)
        p = sign_flip_p([1] * better + [-1] * worse + [0] * 30)
        assert p == pytest.approx(exact, abs=0.02 if exact > 0.01 else 0.001)
        assert sign_flip_p([-1] * better + [1] * worse) == pytest.approx(p, abs=0.02)

    def test_edges(self):
        assert sign_flip_p([]) == sign_flip_p([0, 0]) == sign_flip_p([1]) == 1
        assert 0 < sign_flip_p([1] * 200) < 0.001
