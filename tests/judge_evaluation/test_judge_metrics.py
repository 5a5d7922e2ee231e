"""Every metric against a plain loop over its definition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.judge_evaluation.metrics import (
    ABSTAIN,
    NO_ERROR,
    best_constant,
    bootstrap_intervals,
    first_error_f1,
    group_summary,
    index_histogram,
    kendall_tau_b,
    known_wrong_summary,
    pair_counts,
    standard_summary,
)


def share(hits):
    hits = list(hits)
    return sum(hits) / len(hits) if hits else math.nan


def same(a, b):
    return a == pytest.approx(b, nan_ok=True)


verdicts = st.lists(st.tuples(st.integers(-2, 4), st.integers(-1, 4), st.sampled_from("ab")), min_size=1, max_size=30)


@given(verdicts)
def test_f1_is_processbench_s(rows):
    """As ProcessBench's own evaluation writes it, an abstention being a prediction that equals no label."""
    acc1 = share(p == y for p, y, _ in rows if y != -1)
    acc2 = share(p == y for p, y, _ in rows if y == -1)
    f1 = 0.0 if acc1 + acc2 == 0 else 2 * acc1 * acc2 / (acc1 + acc2)
    scores = first_error_f1([p for p, _, _ in rows], [y for _, y, _ in rows])
    assert same(scores["acc_error"], acc1)
    assert same(scores["acc_correct"], acc2)
    assert same(scores["f1"], f1)
    assert same(scores["acc_error_within_1"], share(p >= 0 and abs(p - y) <= 1 for p, y, _ in rows if y != -1))
    assert same(scores["false_alarm_rate"], share(p >= 0 for p, y, _ in rows if y == -1))
    assert same(scores["abstain_rate"], share(p == ABSTAIN for p, _, _ in rows))


@given(verdicts)
@settings(max_examples=30)
def test_the_mean_over_subsets_is_not_weighted(rows):
    predicted, label, subset = zip(*rows, strict=True)
    summary = standard_summary(predicted, label, subset, range(len(rows)), resamples=5)
    parts = [first_error_f1(*zip(*[(p, y) for p, y, s in rows if s == name], strict=True)) for name in set(subset)]
    for score in ("f1", "acc_error", "acc_correct", "acc_error_within_1", "abstain_rate"):
        known = [part[score] for part in parts if not math.isnan(part[score])]
        assert same(summary[score], sum(known) / len(known) if known else math.nan)
    pooled = first_error_f1(predicted, label)
    assert all(same(summary["pooled"][name], value) for name, value in pooled.items())
    assert sum(part["n"] for part in summary["subsets"].values()) == len(rows)


def test_an_abstention_never_helps():
    label = [0, 1, -1, -1]
    assert first_error_f1([0, 1, -1, -1], label)["f1"] == 1
    assert first_error_f1([0, 1, -1, ABSTAIN], label)["f1"] == pytest.approx(2 / 3)
    assert first_error_f1([0, ABSTAIN, -1, -1], label)["f1"] == pytest.approx(2 / 3)
    assert first_error_f1([ABSTAIN] * 4, label)["f1"] == 0


known_wrong_rows = st.lists(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.integers(-2, n - 1), st.integers(0, n - 1), st.just(n))),
    min_size=1,
    max_size=30,
)


@given(known_wrong_rows)
def test_the_known_wrong_mode(rows):
    predicted, label, n_steps = zip(*rows, strict=True)
    summary = known_wrong_summary(predicted, label, n_steps, range(len(rows)), resamples=5)
    answered = [(p / n, y / n) for p, y, n in rows if p >= 0]
    assert same(summary["acc_error"], share(p == y for p, y, _ in rows))
    assert same(summary["acc_error_within_1"], share(p >= 0 and abs(p - y) <= 1 for p, y, _ in rows))
    assert same(summary["rts_mae"], share(abs(p - y) for p, y in answered))
    assert same(summary["rts_bias"], share(p - y for p, y in answered))
    assert summary["coverage"] + summary["abstain_rate"] + summary["no_error_rate"] == pytest.approx(1)
    # The constants are the best there are: no RTS that occurs does better
    gold = [y / n for _, y, n in rows]
    every = [share(abs(c - y) for y in gold) for c in gold]
    assert summary["rts_mae_constant_all"] == pytest.approx(min(every))
    if answered:
        assert summary["rts_mae_constant"] == pytest.approx(
            min(share(abs(c - y) for _, y in answered) for _, c in answered)
        )
    steps = [(min(round(summary["constant"] * n), n - 1), y, n) for p, y, n in rows if p >= 0]
    assert same(summary["rts_mae_constant_step"], share(abs(p / n - y / n) for p, y, n in steps))
    fill = summary["constant_all"]
    assert same(summary["rts_mae_all"], share(abs((p / n if p >= 0 else fill) - y / n) for p, y, n in rows))
    assert sum(summary["histogram_predicted"].values()) == sum(summary["histogram_gold"].values()) == len(rows)


def test_who_abstains_on_everything_is_as_good_as_the_constant():
    summary = known_wrong_summary([ABSTAIN, NO_ERROR, ABSTAIN], [0, 1, 3], [4, 4, 4], range(3))
    assert math.isnan(summary["rts_mae"])
    assert summary["rts_mae_all"] == summary["rts_mae_constant_all"] == pytest.approx((0.25 + 0 + 0.5) / 3)
    assert summary["n_answered"] == 0


def test_histogram():
    counts = index_histogram([0, 0, 2, 11, 10, NO_ERROR, ABSTAIN, ABSTAIN])
    assert {name: n for name, n in counts.items() if n} == {"0": 2, "2": 1, "10+": 2, "no_error": 1, "abstain": 2}


def naive_tau_b(x, y):
    concordant = discordant = ties_x = ties_y = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2):
        concordant += (a - c) * (b - d) > 0
        discordant += (a - c) * (b - d) < 0
        ties_x += a == c
        ties_y += b == d
    pairs = len(x) * (len(x) - 1) / 2
    product = (pairs - ties_x) * (pairs - ties_y)
    return (concordant - discordant) / math.sqrt(product) if product else math.nan


levels = st.sampled_from([0.0, 1 / 3, 0.5, 2 / 3])


@given(st.lists(st.tuples(levels, levels), max_size=8))
def test_kendall(pairs):
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    assert same(kendall_tau_b(x, y), naive_tau_b(x, y))


def test_kendall_of_known_rankings():
    assert kendall_tau_b(range(5), range(5)) == 1
    assert kendall_tau_b(range(5), range(5)[::-1]) == -1
    # Worked by hand: 5 pairs agree, none disagree, one is tied on the left
    assert kendall_tau_b([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert math.isnan(kendall_tau_b([1, 1], [1, 2]))


@given(st.lists(st.tuples(levels, st.one_of(levels, st.just(math.nan))), max_size=8))
def test_pairs(rows):
    total = both = right = 0
    for (g, p), (h, q) in itertools.combinations(rows, 2):
        if g == h:
            continue
        total += 1
        if not math.isnan(p) and not math.isnan(q):
            both += 1
            right += 0.5 if p == q else (p > q) == (g > h)
    assert pair_counts([g for g, _ in rows], [p for _, p in rows]) == (total, both, right)


@given(st.lists(st.tuples(levels, st.one_of(levels, st.just(math.nan)), st.sampled_from("abc")), min_size=1))
@settings(max_examples=50)
def test_group_mode(rows):
    gold, predicted, group = zip(*rows, strict=True)
    summary = group_summary(gold, predicted, group, resamples=3)
    total = both = groups = 0
    right, taus = 0.0, []
    for name in set(group):
        own = [(g, p) for g, p, x in rows if x == name]
        counts = pair_counts([g for g, _ in own], [p for _, p in own])
        total, both, right = total + counts[0], both + counts[1], right + counts[2]
        groups += counts[0] > 0
        known = [(g, p) for g, p in own if not math.isnan(p)]
        if len({g for g, _ in known}) > 1:
            tau = naive_tau_b([g for g, _ in known], [p for _, p in known])
            taus.append(0.0 if math.isnan(tau) else tau)
    assert (summary["n_groups"], summary["n_pairs"], summary["n_pairs_answered"]) == (groups, total, both)
    assert same(summary["pairwise_accuracy"], right / both if both else math.nan)
    assert same(summary["pairwise_accuracy_all"], (right + (total - both) / 2) / total if total else math.nan)
    assert summary["n_groups_tau"] == len(taus)
    assert same(summary["kendall_tau_b"], share(taus))


def test_one_answer_for_all_orders_nothing():
    summary = group_summary([0.0, 0.5, 0.2, 0.2, 0.7], [0.4] * 5, ["a", "a", "b", "b", "c"])
    assert summary["pairwise_accuracy"] == 0.5
    assert summary["kendall_tau_b"] == 0
    assert summary["n_groups"] == 1  # b is tied in gold, c has one row


class TestBootstrap:
    def mean(self, sums):
        return {"mean": sums[..., 0] / sums[..., 1]}

    def test_it_draws_problems_not_rows(self):
        """Against a loop that draws whole problems; and wider than an interval that takes the rows for independent."""
        rng = np.random.default_rng(1)
        problem = np.repeat(np.arange(40), 5)
        values = rng.normal(size=40)[problem] + 0.1 * rng.normal(size=200)
        columns = np.stack([values, np.ones(200)], axis=1)
        low, high = bootstrap_intervals(columns, problem, self.mean, resamples=4000, seed=0)["mean"]
        means = [
            np.concatenate([values[problem == g] for g in rng.integers(0, 40, size=40)]).mean() for _ in range(4000)
        ]
        assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
        rows_low, rows_high = bootstrap_intervals(columns, range(200), self.mean, resamples=1000)["mean"]
        assert high - low > 1.7 * (rows_high - rows_low)

    def test_seed(self):
        columns = np.stack([np.arange(30.0), np.ones(30)], axis=1)
        ends = [bootstrap_intervals(columns, range(30), self.mean, seed=seed)["mean"] for seed in (0, 0, 1)]
        assert ends[0] == ends[1] != ends[2]

    def test_chunks_do_not_matter(self, monkeypatch):
        columns = np.stack([np.arange(30.0), np.ones(30)], axis=1)
        whole = bootstrap_intervals(columns, range(30), self.mean, resamples=250)
        monkeypatch.setattr("trl_sgpo.judge_evaluation.metrics._CHUNK", 7)
        assert bootstrap_intervals(columns, range(30), self.mean, resamples=250) == whole

    def test_nothing_to_draw(self):
        ends = bootstrap_intervals(np.zeros((0, 2)), [], lambda sums: {"x": sums[..., 0]})["x"]
        assert all(map(math.isnan, ends))


def test_bad_input():
    with pytest.raises(ValueError, match=r"predicted has shape \(1,\) and label \(2,\)"):
        first_error_f1([0], [0, 1])
    with pytest.raises(ValueError, match="predicted holds -3 or a fraction"):
        first_error_f1([-3], [0])
    with pytest.raises(ValueError, match="label holds -1 or a fraction: it must be whole numbers from 0 on"):
        known_wrong_summary([0], [-1], [2], [0])
    with pytest.raises(ValueError, match="lies after the last step"):
        known_wrong_summary([2], [0], [2], [0])


def test_best_constant():
    assert best_constant([0.1, 0.2, 0.9]) == 0.2
    assert math.isnan(best_constant([]))
