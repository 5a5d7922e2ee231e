"""The world of the theory page: against the theorem's closed form, and against groups that are sampled and paid by the package."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks.dynamics import learning, world
from benchmarks.dynamics.learning import (
    adam_step,
    adam_step_per_logit,
    learn,
    mean_until,
    noise_limited_step,
    sample_gradients,
    simulate,
    updates_until,
)
from benchmarks.dynamics.world import (
    ARMS,
    JUDGED,
    NOISE_KINDS,
    advantages,
    batch,
    false_credit,
    logit,
    moments,
    multisets,
    noise_behind,
    normalised,
    one_skill,
    prefix_lengths,
    prepare,
    scores,
    start_probability,
    two_step_accuracy,
    two_step_gradient,
    verdict_matrix,
)
from trl_sgpo.credit import StepTokens
from trl_sgpo.groups import group_advantages, group_kinds, rts_to_reward
from trl_sgpo.treatments.prefix import prefix_credit
from trl_sgpo.treatments.sequence import fill_failed_groups, fill_mixed_groups


P = np.array([0.6, 0.3, 0.5])
BEHIND = np.array([0.5, 0.7, 0.2])


def failed_share(p_H, group_size, luck=0.0):
    """The share of groups in which no outcome is right: `(1 - P)^G`."""
    right = float(np.prod(p_H))
    return (1 - right - luck * (1 - right)) ** group_size


def sampled(arm, p, behind, group_size, n_groups, noise=0.0, kind="uniform", luck=0.0, seed=0):
    """Gradients of sampled groups, shape (n_groups, 2H), paid by the functions that the trainer calls."""
    rng = np.random.default_rng(seed)
    n_steps = len(p)
    right = rng.random((n_groups, group_size, n_steps)) < p
    bits = rng.random(right.shape) < behind
    t = np.cumprod(right, axis=-1).sum(axis=-1)
    outcome = torch.tensor((t == n_steps) | (rng.random(t.shape) < luck)).double()
    named = np.minimum(t, n_steps - 1)
    lowest, highest = {
        "uniform": (0 * named, 0 * named + n_steps),
        "earlier": (0 * named, named),
        "later": (named + 1, 0 * named + n_steps),
    }[kind]
    replaced = (rng.random(t.shape) < noise) & (highest > lowest)
    named = np.where(replaced, rng.integers(lowest, np.maximum(highest, lowest + 1)), named)

    kinds = group_kinds(outcome, 0.5)
    wrong = outcome < 0.5
    rts = torch.tensor(named / n_steps).masked_fill(~wrong, torch.nan)
    reward = outcome.clone()
    if arm.startswith("sgpo"):
        column = fill_failed_groups(outcome, rts, rts_to_reward(rts), kinds.failed_P).column_PG
        if arm == "sgpo_all_incorrect":
            mixed = fill_mixed_groups(outcome, rts_to_reward(rts), outcome, kinds.mixed_P, 0.5, 1.0)
            column = torch.where(torch.isnan(column), mixed, column)
        reward = reward + column.nan_to_num(nan=0.0)
    advantage = group_advantages(reward)
    failed = kinds.failed_P.unsqueeze(1)
    if arm == "sign":
        advantage = torch.where(failed, -1.0, advantage)
    if arm == "ngrpo":
        imagined = torch.cat([outcome, torch.ones(n_groups, 1)], dim=1).double()
        advantage = torch.where(failed, group_advantages(imagined)[:, :-1], advantage)
    paid = advantage.unsqueeze(-1).expand(-1, -1, n_steps)
    if arm.startswith("prefix"):
        # One row per step that can be named; the right ones have none
        places = [None, *(StepTokens(((0, r),), (r, r + 1), (0,)) for r in range(n_steps))]
        rows = prefix_credit(places, [[], *([0.3] * max(r, 1) + [-1.0] for r in range(n_steps))], n_steps).double()
        credit = rows[torch.where(wrong, torch.tensor(named) + 1, 0)]
        paid = torch.where(failed.unsqueeze(-1), credit, paid)
        if arm == "prefix_all_incorrect":
            paid = torch.where(~failed.unsqueeze(-1) & (credit > 0) & (paid < 0), 0.0, paid)
    paid = paid.numpy()
    step = np.arange(n_steps)
    before = (step <= t[..., None]) * (right - p)
    after = (step > t[..., None]) * (bits - behind)
    return np.concatenate([paid * before, paid * after], axis=-1).mean(axis=1)


def assert_same_moments(gradients, exact):
    n = len(gradients)
    mean, spread = gradients.mean(axis=0), gradients.std(axis=0, ddof=1)
    np.testing.assert_array_less(np.abs(mean - exact.mean_K), 4 * spread / math.sqrt(n) + 1e-12)
    centred = gradients - gradients.mean(axis=0)
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(axis=0) / math.sqrt(n)
    np.testing.assert_array_less(np.abs(products.mean(axis=0) - exact.covariance_KK), 4.5 * error + 1e-4)


class TestTheorem:
    @pytest.mark.parametrize("arm", ["sgpo", "grpo"])
    @pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.1, 0.1), (0.02, 0.02), (0.3, 0.8), (0.9, 0.05)])
    def test_enumeration_gives_the_closed_form(self, arm, p, q):
        group = moments(prepare(arm, n_steps=2, group_size=2), np.array([p, q]))
        # The unbiased standard deviation of two values is larger by the square root of 2 than the theorem's; the 1e-4 in
        # the divisor is the only other difference, which shows where larger terms cancel
        assert group.mean_K[:2] * 2**0.5 == pytest.approx(two_step_gradient(p, q, arm), rel=2e-2)
        assert group.mean_K[2:] == pytest.approx([0, 0])

    @pytest.mark.parametrize("arm", ["sgpo", "grpo"])
    def test_the_package_s_advantages_give_the_closed_form(self, arm):
        p, q = 0.3, 0.8
        probability, score = prefix_lengths(np.array([p, q])), scores(np.array([p, q]))
        pairs = list(itertools.product(range(3), repeat=2))
        reward = {"sgpo": [0.0, 0.5, 1.0], "grpo": [0.0, 0.0, 1.0]}[arm]
        paid = group_advantages(torch.tensor([[reward[t] for t in pair] for pair in pairs], dtype=torch.float64))
        gradient = sum(
            probability[a] * probability[b] * (pa * score[a] + pb * score[b]) / 2
            for (a, b), (pa, pb) in zip(pairs, paid.tolist(), strict=True)
        )
        assert gradient * 2**0.5 == pytest.approx(two_step_gradient(p, q, arm), rel=1e-3)

    @pytest.mark.parametrize(("start", "sgpo", "grpo"), [(0.5, 28, 30), (0.1, 52, 102), (0.02, 140, 1389)])
    def test_iterations_until_solved(self, start, sgpo, grpo):
        for arm, expected in (("sgpo", sgpo), ("grpo", grpo)):
            accuracy = two_step_accuracy(start, arm, 1400)
            assert int(np.argmax(accuracy > 0.9)) == expected
            enumerated = learn(
                prepare(arm, n_steps=2, group_size=2), np.full(2, start), learning_rate=2**0.5, until=0.9
            )
            assert len(enumerated) - 1 == pytest.approx(expected, abs=1 + expected / 500)

    def test_other_arms_are_not_in_the_theorem(self):
        with pytest.raises(ValueError, match="must be 'sgpo' or 'grpo'"):
            two_step_gradient(0.5, 0.5, "sign")


class TestMoments:
    @pytest.mark.parametrize(
        ("arm", "noise", "kind", "luck"),
        [
            *[(arm, noise, "uniform", luck) for arm in ARMS for noise, luck in ((0.0, 0.0), (0.4, 0.1))],
            *[(arm, 0.5, kind, 0.2) for arm in JUDGED for kind in ("earlier", "later")],
        ],
    )
    def test_enumeration_equals_sampled_groups(self, arm, noise, kind, luck):
        gradients = sampled(arm, P, BEHIND, 4, 8000, noise, kind, luck, seed=ARMS.index(arm))
        exact = moments(prepare(arm, 3, 4, noise=noise, noise_kind=kind, luck=luck), P, BEHIND)
        assert_same_moments(gradients, exact)
        assert exact.live == pytest.approx((gradients != 0).any(axis=1).mean(), abs=0.03)

    @pytest.mark.parametrize("arm", ["grpo", "grpo_live", "sgpo", "prefix_all_incorrect"])
    def test_batches_and_the_sampler(self, arm):
        world = prepare(arm, 3, 4, noise=0.3, luck=0.1)
        start = np.tile(P, (6000, 1)), np.tile(BEHIND, (6000, 1))
        gradients = sample_gradients(world, *start, n_groups=3, rng=np.random.default_rng(0))
        assert_same_moments(gradients, batch(world, moments(world, P, BEHIND), 3))

    def test_one_skill_is_the_sum_of_the_gradients(self):
        gradients = sampled("sgpo", P, BEHIND, 4, 8000, 0.3).sum(axis=1, keepdims=True)
        assert_same_moments(gradients, one_skill(moments(prepare("sgpo", 3, 4, noise=0.3), P, BEHIND)))

    def test_leaving_dead_groups_out_only_rescales_large_batches(self):
        start = np.full(5, 0.4)
        grpo, live = (batch(arm, moments(arm, start), None) for arm in map(prepare, ("grpo", "grpo_live")))
        assert live.mean_K == pytest.approx(grpo.mean_K / (1 - failed_share(start, 8)), rel=1e-9)
        assert adam_step(live) == pytest.approx(adam_step(grpo))

    def test_all_groups_tied_teach_nothing(self):
        certain = np.array([0.7, 1e-15, 0.5])  # every solution fails at the first or at the second step
        for arm in ("grpo", "grpo_live"):
            assert moments(prepare(arm, 3, 4), certain).mean_K == pytest.approx(np.zeros(6), abs=1e-12)
        one_kind = np.array([1e-15, 0.5, 0.5])  # all fail at the first step
        for arm in ("sgpo", "sgpo_all_incorrect"):
            group = moments(prepare(arm, 3, 4), one_kind)
            assert group.mean_K == pytest.approx(np.zeros(6), abs=1e-12)
            assert group.live == pytest.approx(0, abs=1e-12)
        # Local blame needs no differences, but p (1 - p) is what blame on a wrong choice moves: nothing at p = 0
        assert moments(prepare("prefix", 3, 4), one_kind).live == pytest.approx(1)

    def test_a_random_judge(self):
        noise = {"noise": 1.0}
        # SGPO: the advantages of a failed group sum to zero and have nothing to do with what was written
        sgpo, grpo = (moments(prepare(arm, 3, 4, **noise), P) for arm in ("sgpo", "grpo"))
        assert sgpo.mean_K == pytest.approx(grpo.mean_K, abs=1e-12)
        assert sgpo.noise > 1.5 * grpo.noise
        # Prefix credit: what a step is paid on average, times the gradient that lies in the group having failed at all
        prefix, sign = (moments(prepare(arm, 3, 4, **noise), P) for arm in ("prefix", "sign"))
        paid_H = np.array([0.3 * (2 - h) / 3 - 1 / 3 for h in range(3)])
        assert (prefix.mean_K - grpo.mean_K)[:3] == pytest.approx(-paid_H * (sign.mean_K - grpo.mean_K)[:3], abs=1e-12)
        # which is nothing where all groups fail
        hopeless = np.array([0.6, 0.3, 1e-15])
        assert moments(prepare("prefix", 3, 4, **noise), hopeless).mean_K == pytest.approx(np.zeros(6), abs=1e-12)

    def test_constant_blame_has_grpo_s_direction(self):
        grpo, *others = (moments(prepare(arm), np.full(5, 0.4)).mean_K for arm in ("grpo", "sign", "ngrpo"))
        for other in others:
            assert other / np.linalg.norm(other) == pytest.approx(grpo / np.linalg.norm(grpo))

    def test_tokens_behind_the_error(self):
        for arm in ARMS:
            assert moments(prepare(arm, noise=0.3), np.full(5, 0.4)).mean_K[5:] == pytest.approx(np.zeros(5))
        shares = {arm: noise_behind(moments(prepare(arm), np.full(5, 0.36))) for arm in ("sgpo", "prefix")}
        assert shares["prefix"] < 0.1 < 0.3 < shares["sgpo"]

    def test_false_credit(self):
        p = np.full(5, 0.364)
        assert false_credit(prepare("sgpo"), p) == pytest.approx(0)
        assert 0.4 < false_credit(prepare("sgpo", noise=0.2), p) < false_credit(prepare("sgpo", noise=0.4), p)


class TestPieces:
    def test_multisets(self):
        counts, log_orders = multisets(8, 6)
        assert counts.shape == (1287, 6)
        assert (counts.sum(axis=1) == 8).all()
        assert len(np.unique(counts, axis=0)) == 1287
        assert np.exp(log_orders).sum() == pytest.approx(6**8)

    def test_normalised_equals_the_package(self):
        counts, _ = multisets(4, 3)
        reward = np.array([0.1, 0.7, 1.0])
        ours = normalised(reward, counts)
        rows = torch.tensor(np.array([np.repeat(reward, row) for row in counts]))
        for row, paid, count in zip(ours, group_advantages(rows).numpy(), counts, strict=True):
            assert np.repeat(row, count) == pytest.approx(paid, abs=1e-9)

    @pytest.mark.parametrize("kind", NOISE_KINDS)
    def test_verdict_matrix(self, kind):
        matrix = verdict_matrix(5, 0.3, kind)
        assert matrix.sum(axis=1) == pytest.approx(np.ones(5))
        assert (verdict_matrix(5, 0.0, kind) == np.eye(5)).all()
        if kind != "uniform":
            outside = np.triu(matrix, 1) if kind == "earlier" else np.tril(matrix, -1)
            assert (outside == 0).all()

    @pytest.mark.parametrize(("share", "luck"), [(0.05, 0.0), (0.95, 0.0), (0.9, 1 / 216)])
    def test_start_probability(self, share, luck):
        p = start_probability(share, n_steps=5, group_size=8, luck=luck)
        assert failed_share(np.full(5, p), 8, luck) == pytest.approx(share)

    def test_worked_examples(self):
        parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
        names = {**vars(world), **vars(learning)}
        for name, value in names.items():
            if getattr(value, "__module__", None) in (world.__name__, learning.__name__) and value.__doc__:
                text = value.__doc__.replace("```python", "").replace("```", "")
                runner.run(parser.get_doctest(text, dict(names), name, None, 0))
        found = runner.summarize(verbose=False)
        assert found.attempted > 15
        assert found.failed == 0

    def test_errors(self):
        with pytest.raises(ValueError, match=r"guesses alone leave at most 0\.964"):
            start_probability(0.99, n_steps=5, group_size=8, luck=1 / 216)
        with pytest.raises(ValueError, match="kind='often' is unknown"):
            verdict_matrix(3, 0.1, "often")
        with pytest.raises(ValueError, match="arm='ppo' is unknown"):
            advantages("ppo", np.array([[1, 1]]), 2)


class TestLearning:
    def test_steps(self):
        of_batch = batch(prepare("sgpo"), moments(prepare("sgpo"), np.full(5, 0.4)), 4)
        snr = of_batch.snr
        assert np.linalg.norm(adam_step(of_batch)) == pytest.approx(snr / math.sqrt(1 + snr**2))
        assert np.linalg.norm(noise_limited_step(of_batch)) == pytest.approx(snr)
        exact = batch(prepare("sgpo"), moments(prepare("sgpo"), np.full(5, 0.4)), None)
        assert adam_step_per_logit(exact)[:5] == pytest.approx(np.ones(5))

    def test_a_rare_gradient_counts_the_root_of_its_share(self):
        arm = prepare("grpo")
        rare, rarer = (
            batch(arm, moments(arm, np.full(5, start_probability(share, 5, 8))), 1) for share in (0.99, 0.9975)
        )
        assert rare.live / rarer.live == pytest.approx(4, rel=0.01)
        ratio = np.linalg.norm(adam_step(rare)) / np.linalg.norm(adam_step(rarer))
        # A lower p also makes each right step a larger surprise, which moves the ratio a little
        assert ratio == pytest.approx(2, rel=0.05)

    @pytest.mark.parametrize(("name", "shared"), [("grpo", False), ("sgpo", True)])
    def test_mean_steps_follow_sampled_adam(self, name, shared):
        arm, start = prepare(name, n_steps=3, group_size=4), np.full(3, 0.4)
        expected = learn(arm, start, 4, adam_step, learning_rate=0.05, until=0.5, shared=shared)
        runs = simulate(arm, start, n_groups=4, n_updates=140, learning_rate=0.05, n_runs=12, shared=shared)
        found = np.median([updates_until(run, 0.5) for run in runs])
        assert found == pytest.approx(updates_until(expected, 0.5), rel=0.15)

    def test_curves(self):
        assert updates_until(np.array([0.1, 0.3, 0.5]), 0.4) == pytest.approx(1.5)
        assert updates_until(np.array([0.5]), 0.4) == 0
        assert math.isnan(updates_until(np.array([0.1, 0.2]), 0.4))
        assert mean_until(np.array([0.0, 0.5, 1.0]), 1.5) == pytest.approx(0.375)
        assert mean_until(np.array([0.0, 1.0]), 4) == pytest.approx(0.875)

    def test_starts_where_it_should(self):
        curve = learn(prepare("grpo"), np.full(5, 0.4), until=0.02)
        assert curve[0] == pytest.approx(0.4**5)
        assert logit(0.5) == 0
