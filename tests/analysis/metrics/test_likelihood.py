"""Numbers from log-probabilities against naive loops; the tilt strength against simulated tilts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.analysis.metrics import (
    kl_k1,
    likelihood_displacement,
    normalised_ranks,
    perplexity,
    rank_of_correct,
    tilt_fit,
    uplift_by_rank,
)


floats = st.floats(-5, 5)


class TestLogProbabilities:
    @given(st.lists(st.tuples(floats, floats, st.booleans()), min_size=1, max_size=10))
    def test_equal_loops(self, rows):
        before, after, correct = map(list, zip(*rows, strict=True))
        assert kl_k1(after, before) == pytest.approx(sum(a - b for b, a, _ in rows) / len(rows), abs=1e-9)
        moved = [a - b for b, a, right in rows if right]
        value = likelihood_displacement(before, after, correct)
        assert math.isnan(value) if not moved else value == pytest.approx(sum(moved) / len(moved), abs=1e-9)
        assert perplexity(before, [2] * len(rows)) == pytest.approx(math.exp(-sum(before) / (2 * len(rows))))

    def test_kl_is_that_of_two_dice(self):
        rng = np.random.default_rng(0)
        p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
        draws = rng.choice(3, size=200_000, p=p)
        exact = (p * np.log(p / q)).sum()
        assert kl_k1(np.log(p)[draws], np.log(q)[draws]) == pytest.approx(exact, abs=0.01)

    @given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.sampled_from("xy")), min_size=2, max_size=12))
    def test_ranks_equal_loop(self, rows):
        values, correct, prompt = map(list, zip(*rows, strict=True))
        ranks = normalised_ranks(values, prompt)
        for i, (value, _, label) in enumerate(rows):
            others = [v for j, (v, _, p) in enumerate(rows) if p == label and j != i]
            if not others:
                assert np.isnan(ranks[i])
            else:
                below = sum(v < value for v in others) + 0.5 * sum(v == value for v in others)
                assert ranks[i] == pytest.approx(below / len(others))
        mixed = [p for p in "xy" if len({c for c, q in zip(correct, prompt, strict=True) if q == p}) == 2]
        mine = [r for r, c, p in zip(ranks, correct, prompt, strict=True) if c and p in mixed]
        value = rank_of_correct(values, correct, prompt).value
        assert math.isnan(value) if not mine else value == pytest.approx(np.mean(mine))

    def test_rank_without_bias_is_a_half(self):
        rng = np.random.default_rng(1)
        estimate = rank_of_correct(rng.normal(size=4000), rng.random(4000) < 0.3, np.repeat(np.arange(500), 8))
        assert estimate.low < 0.5 < estimate.high
        assert estimate.high - estimate.low < 0.1

    def test_uplift_by_rank(self):
        before = [0.0, 1.0, 2.0, 3.0]
        shares = uplift_by_rank(before, [1.0, 2.0, 1.0, 4.0], [True] * 4, [0] * 4, n_bins=2)
        assert shares.tolist() == [1.0, 0.5]
        assert np.isnan(uplift_by_rank(before, before, [False] * 4, [0] * 4)).all()


class TestTilt:
    def tilted(self, rng, beta, n_prompts=40, n_samples=16):
        """Samples of `pi = q exp(beta R) / Z` over small discrete answer spaces."""
        delta, correct, prompt = [], [], []
        for x in range(n_prompts):
            q = rng.dirichlet(np.ones(12))
            reward = np.arange(12) < rng.integers(1, 6)
            pi = q * np.exp(beta * reward)
            z = pi.sum()
            draws = rng.choice(12, size=n_samples, p=pi / z)
            delta += (beta * reward - math.log(z))[draws].tolist()
            correct += reward[draws].tolist()
            prompt += [x] * n_samples
        return np.array(delta), np.array(correct), np.array(prompt)

    def test_recovers_a_pure_tilt_exactly(self):
        fit = tilt_fit(*self.tilted(np.random.default_rng(0), beta=1.7))
        assert fit.beta.value == pytest.approx(1.7)
        assert max(fit.sd_correct, fit.sd_incorrect) == pytest.approx(0, abs=1e-7)

    @pytest.mark.slow
    def test_recovers_a_noisy_tilt_within_its_interval(self):
        rng, hits = np.random.default_rng(1), []
        for _ in range(300):
            delta, correct, prompt = self.tilted(rng, beta=0.8)
            fit = tilt_fit(delta + rng.normal(0, 0.7, delta.size), correct, prompt)
            hits.append(fit.beta.low <= 0.8 <= fit.beta.high)
        assert fit.sd_correct == pytest.approx(0.7, rel=0.15)
        assert 0.92 <= np.mean(hits) <= 0.98

    def test_one_prompt(self):
        fit = tilt_fit([1.0, 2.0, 0.0], [True, True, False], [0, 0, 0])
        assert (fit.beta.value, fit.n_prompts) == (1.5, 1)
        assert math.isnan(tilt_fit([1.0, 2.0], [True, True], [0, 0]).beta.value)

    def test_hard_prompts_do_not_leak_into_beta(self):
        # Each prompt has its own log Z; pooled, the difference of the means would be off by far
        delta, correct, prompt = self.tilted(np.random.default_rng(2), beta=1.0)
        shifted = delta + 10 * (prompt % 2)
        keep = ~((prompt % 2 == 1) & correct & (np.arange(prompt.size) % 2 == 0))
        assert tilt_fit(shifted[keep], correct[keep], prompt[keep]).beta.value == pytest.approx(1.0)
        assert abs(tilt_fit(shifted[keep], correct[keep], 0 * prompt[keep]).beta.value - 1.0) > 0.5
