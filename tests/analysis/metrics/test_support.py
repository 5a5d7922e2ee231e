"""Support, saturation and tilt line against enumeration, naive loops and simulated policies."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.analysis.metrics import sampling_efficiency_gap, saturation, support_table, tilt_gain, tilt_line


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simulate(rng, n_prompts, beta=0.0, slope=1.0, n=64, spread=1.5, mean=-1.0):
    """Counts of a base, and of a policy whose logits lie on a line."""
    logit = rng.normal(mean, spread, n_prompts)
    size = np.full(n_prompts, n)
    return size, rng.binomial(n, sigmoid(logit)), size, rng.binomial(n, sigmoid(beta + slope * logit))


@pytest.mark.slow
class TestTiltLine:
    @pytest.mark.parametrize(("beta", "slope"), [(0.0, 1.0), (1.5, 1.0), (1.0, 0.5)])
    def test_line_is_covered_by_its_interval(self, beta, slope):
        rng, hits = np.random.default_rng(3), []
        for _ in range(200):
            line = tilt_line(*simulate(rng, 100, beta, slope))
            hits.append(
                (line.slope.low <= slope <= line.slope.high, line.intercept.low <= beta <= line.intercept.high)
            )
        assert (np.mean(hits, axis=0) >= 0.92).all()
        assert (np.mean(hits, axis=0) <= 0.985).all()

    def test_few_samples_do_not_flatten_the_line(self):
        # Through the raw points the slope would come out near .8
        rng = np.random.default_rng(4)
        slopes = [tilt_line(*simulate(rng, 200, 1.0, n=8)).slope.value for _ in range(40)]
        assert np.mean(slopes) == pytest.approx(1.0, abs=0.05)

    def test_planted_expansion_has_a_smaller_slope(self):
        rng = np.random.default_rng(5)
        base_n, base_c, policy_n, policy_c = simulate(rng, 100, beta=0.5)
        policy_c = np.where(np.arange(100) < 40, rng.binomial(64, 0.6, 100), policy_c)
        base_c = np.where(np.arange(100) < 40, 0, base_c)
        assert tilt_line(base_n, base_c, policy_n, policy_c).slope.high < 0.8

    def test_no_line_without_different_prompts(self):
        assert math.isnan(tilt_line([8] * 20, [0] * 20, [8] * 20, [3] * 20).slope.value)

    @pytest.mark.parametrize("correct", [0, 8])
    def test_no_line_to_a_policy_that_solves_all_or_nothing(self, correct):
        line = tilt_line([8] * 20, list(range(5)) * 4, [8] * 20, [correct] * 20)
        assert math.isnan(line.slope.value)

    def test_gain_is_what_the_tilt_adds(self):
        q = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
        tilted = q * math.exp(1.3) / (q * math.exp(1.3) + 1 - q)
        assert tilt_gain(q, 1.3) == pytest.approx(tilted - q)


def test_efficiency_gap():
    estimate = sampling_efficiency_gap([8] * 4, [1, 1, 0, 8], [8] * 4, [4, 4, 0, 8], k=8)
    assert estimate.value == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)


class TestSupport:
    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
    @settings(max_examples=50, deadline=None)
    def test_counts_equal_loop(self, rows):
        table = support_table(*zip(*rows, strict=True), base_n=4)
        kinds = Counter((b > 0, p > 0) for b, p in rows)
        counts = table.preserved, table.expanded, table.shrunk, table.out_of_reach
        assert counts == (kinds[True, True], kinds[False, True], kinds[True, False], kinds[False, False])
        if kinds[True, True] + kinds[True, False]:
            assert table.srr.value == pytest.approx(table.preserved / (table.preserved + table.shrunk))
        else:
            assert math.isnan(table.srr.value)

    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3))
    @settings(max_examples=25, deadline=None)
    def test_null_equals_enumeration(self, rows):
        # Every way to deal a prompt's six samples to base and policy is equally likely
        laws = []
        for b, p in rows:
            samples = [1] * (b + p) + [0] * (6 - b - p)
            deals = [sum(samples[i] for i in deal) for deal in itertools.combinations(range(6), 3)]
            laws.append(sum(of_base == 0 and b + p > 0 for of_base in deals) / len(deals))
        table = support_table(*zip(*rows, strict=True), base_n=3)
        assert table.expanded_null == pytest.approx(sum(laws))
        chance = sum(
            math.prod(law if hit else 1 - law for law, hit in zip(laws, hits, strict=True))
            for hits in itertools.product([True, False], repeat=len(rows))
            if sum(hits) >= table.expanded
        )
        assert table.p_expanded == pytest.approx(chance)

    @pytest.mark.slow
    def test_base_against_base_is_no_change(self):
        rng, alarms = np.random.default_rng(0), 0
        for _ in range(200):
            p = sigmoid(rng.normal(-3, 2, 100))
            base, again = rng.binomial(32, p), rng.binomial(32, p)
            alarms += bool(support_table(base, again, 32).changes())
        assert alarms <= 10

    def test_a_planted_change_is_found(self):
        rng = np.random.default_rng(1)
        p = sigmoid(rng.normal(-1, 2, 100))
        gone, new = np.arange(100) < 15, np.arange(100) >= 85
        base = rng.binomial(32, np.where(new, 0, np.maximum(p, 0.2)))
        policy = rng.binomial(32, np.where(gone, 0, np.where(new, 0.3, np.maximum(p, 0.2))))
        assert support_table(base, policy, 32).changes() == ["expanded", "shrunk"]
        assert support_table(base, policy, 32).unseen_rate == pytest.approx(1 - 0.05 ** (1 / 32))

    @pytest.mark.slow
    def test_unequal_numbers_of_samples_are_no_change(self):
        rng, alarms = np.random.default_rng(2), 0
        for _ in range(100):
            p = sigmoid(rng.normal(-3, 2, 80))
            alarms += bool(support_table(rng.binomial(8, p), rng.binomial(64, p), 8, 64).changes())
        assert alarms <= 8

    def test_bad_input(self):
        with pytest.raises(ValueError, match="both must be"):
            support_table([0, 1], [0], 4)


class TestSaturation:
    def test_base_against_base_shows_no_gain(self):
        # Bucketed and measured with the same samples, the lowest and the highest bucket would be off
        rng = np.random.default_rng(0)
        p = rng.beta(0.5, 0.5, 3000)
        n = np.full(3000, 8)
        for bucket in saturation(n, rng.binomial(8, p), n, rng.binomial(8, p)):
            if bucket.n_prompts:
                assert abs(bucket.gain.value) < 0.025

    def test_a_tilt_is_a_hump(self):
        rng = np.random.default_rng(1)
        q = rng.uniform(0, 1, 4000)
        n = np.full(4000, 64)
        policy = rng.binomial(64, q + tilt_gain(q, 1.0))
        gains = [bucket.gain.value for bucket in saturation(n, rng.binomial(64, q), n, policy)]
        assert max(gains) == max(gains[2:4])
        assert gains[0] < 0.1 > gains[-1]

    def test_every_prompt_is_counted_once(self):
        buckets = saturation([8, 8, 4], [0, 3, 4], [8, 8, 8], [1, 2, 3])
        assert sum(bucket.n_prompts for bucket in buckets) == pytest.approx(3)
        with pytest.raises(ValueError, match="must rise from 0 to 1"):
            saturation([8], [1], [8], [1], edges=(0, 0.5))
        with pytest.raises(ValueError, match="base_n=1 is too small"):
            saturation([1], [1], [8], [1])

    def test_equals_all_halvings(self):
        n, c, m, k = 4, 2, 4, 3
        gains, bases, shares = np.zeros(2), np.zeros(2), np.zeros(2)
        samples = [1] * c + [0] * (n - c)
        for half in itertools.combinations(range(n), 2):
            taken = sum(samples[i] for i in half)
            bucket = int(taken / 2 >= 0.5)
            shares[bucket] += 1 / 6
            bases[bucket] += (c - taken) / 2 / 6
            gains[bucket] += (k / m - (c - taken) / 2) / 6
        buckets = saturation([n], [c], [m], [k], (0, 0.5, 1))
        for bucket, gain, base, share in zip(buckets, gains, bases, shares, strict=True):
            assert bucket.n_prompts == pytest.approx(share)
            assert bucket.base == pytest.approx(base / share)
            assert bucket.gain.value == pytest.approx(gain / share)
