"""The pure functions of the paper's method against naive loops; test_treatments.py has the real runs."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FixedJudge, all_failed, matrix, stepwise, tensor

from trl_sgpo import SGPOConfig, Verdict
from trl_sgpo.card import describe_run
from trl_sgpo.groups import group_advantages, group_kinds, rts_to_reward, weighted_sum
from trl_sgpo.rounds import of_longest_completion
from trl_sgpo.treatments.sequence import SequenceReward, blend_advantages, fill_failed_groups, fill_mixed_groups


NAN = math.nan


def naive_fill_failed(outcomes, rts, rewards, failed):
    """The rules of `fill_failed_groups`, one group and one row at a time."""
    column, kinds, factors = [], [], []
    for outcome_row, rts_row, reward_row, is_failed in zip(outcomes, rts, rewards, failed, strict=True):
        scored = [i for i, outcome in enumerate(outcome_row) if outcome is not None and is_failed]
        judged = [i for i in scored if rts_row[i] is not None]
        if not is_failed or len(judged) < 2 or 2 * len(judged) < len(scored):
            kind = "unjudged"
        elif len({rts_row[i] for i in judged}) == 1 or len({reward_row[i] for i in judged}) == 1:
            kind = "tied"
        else:
            kind = "rescued"
        cells = [None] * len(outcome_row)
        if kind == "rescued":
            mean = sum(reward_row[i] for i in judged) / len(judged)
            for i in scored:
                cells[i] = reward_row[i] if i in judged else mean
        column.append(cells)
        kinds.append(kind)
        factors.append(math.sqrt((len(judged) - 1) / (len(scored) - 1)) if kind == "rescued" else 1.0)
    return column, kinds, factors


class TestFillFailedGroups:
    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_equals_loop(self, data):
        outcomes = data.draw(matrix(st.sampled_from([None, 0.0, 0.0, 0.0, 1.0])))
        shape = [len(row) for row in outcomes]
        # Binary fractions, so that float32 and Python agree on ties
        values = st.sampled_from([None, 0.0, 0.125, 0.25, 0.5, 0.75])
        rts = [data.draw(st.lists(values, min_size=n, max_size=n)) for n in shape]
        failed = group_kinds(tensor(outcomes), 0.5).failed_P
        groups = fill_failed_groups(tensor(outcomes), tensor(rts), tensor(rts), failed)
        column, kinds, factors = naive_fill_failed(outcomes, rts, rts, failed.tolist())
        torch.testing.assert_close(groups.column_PG, tensor(column), equal_nan=True)
        assert groups.rescued_P.tolist() == [kind == "rescued" for kind in kinds]
        assert groups.tied_P.tolist() == [kind == "tied" for kind in kinds]
        assert groups.spread_factor_P.tolist() == pytest.approx(factors)

    def test_equal_rewards_of_different_scores_are_a_tie(self):
        rts = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
        reward = rts_to_reward(rts, beta=2000.0)  # flat to machine precision on this side
        groups = fill_failed_groups(torch.zeros(1, 4), rts, reward, torch.tensor([True]))
        assert groups.tied_P.item()
        assert torch.isnan(groups.column_PG).all()

    @pytest.mark.parametrize("n_judged", [4, 5, 7, 8])
    def test_abstentions_change_nobodys_advantage_but_their_own(self, n_judged):
        torch.manual_seed(n_judged)
        rts = torch.rand(1, 8)
        rts[0, n_judged:] = NAN
        groups = fill_failed_groups(torch.zeros(1, 8), rts, rts, torch.tensor([True]))
        scaled = blend_advantages(group_advantages(groups.column_PG), torch.zeros(1, 8), groups.spread_factor_P)
        alone = group_advantages(rts[:, :n_judged])
        torch.testing.assert_close(scaled[:, :n_judged], alone, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(scaled[:, n_judged:], torch.zeros(1, 8 - n_judged), rtol=0, atol=1e-5)

    def test_two_verdicts_among_eight_rows_leave_the_group_alone(self):
        rts = tensor([[0.0, 0.5, *[None] * 6]])
        groups = fill_failed_groups(torch.zeros(1, 8), rts, rts, torch.tensor([True]))
        assert torch.isnan(groups.column_PG).all()
        assert not groups.rescued_P.item()
        assert not groups.tied_P.item()


class TestFillMixedGroups:
    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_the_judge_never_lifts_a_wrong_completion_above_a_correct_one(self, data):
        low, high = data.draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 0.5), (-5.0, 0.6), (0.0, 100.0)]))
        outcomes = data.draw(matrix(st.sampled_from([None, low, low, (low + high) / 4, high])))
        size = len(outcomes[0])
        rewards = [data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)) for _ in outcomes]
        extra = [data.draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size)) for _ in outcomes]
        outcome_weight, judge_weight = data.draw(st.floats(0, 3)), data.draw(st.floats(0, 5))
        outcome_PG, reward_PG, extra_PG = tensor(outcomes), tensor(rewards), tensor(extra)
        others_PG = weighted_sum(torch.stack([outcome_PG, extra_PG], dim=-1), torch.tensor([outcome_weight, 1.0]))
        mixed_P = group_kinds(outcome_PG, 0.5).mixed_P
        column_PG = fill_mixed_groups(outcome_PG, reward_PG, others_PG, mixed_P, 0.5, judge_weight)
        total_PG = others_PG + judge_weight * column_PG.nan_to_num(nan=0.0)
        assert torch.isnan(column_PG[~mixed_P]).all()
        for p in mixed_P.nonzero().flatten().tolist():
            correct = outcome_PG[p] >= 0.5
            assert torch.isnan(column_PG[p][correct]).all()
            for i in (outcome_PG[p] < 0.5).nonzero().flatten().tolist():
                for j in correct.nonzero().flatten().tolist():
                    was_below = others_PG[p, i] <= others_PG[p, j]
                    assert not was_below or total_PG[p, i] <= total_PG[p, j] + 1e-5

    def test_usual_scales_give_equation_2(self):
        outcome = torch.tensor([[1.0, 0.0, 0.0]])
        reward = torch.tensor([[0.9, 0.2, 0.8]])
        column = fill_mixed_groups(outcome, reward, outcome, torch.tensor([True]), 0.5, judge_weight=1.0)
        torch.testing.assert_close(column, tensor([[None, 0.2, 0.8]]), equal_nan=True)

    def test_abstentions(self):
        outcome = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        reward = tensor([[None, 0.2, 0.4, None], [None, None, 0.4, None]])
        column = fill_mixed_groups(outcome, reward, outcome, torch.tensor([True, True]), 0.5, judge_weight=1.0)
        torch.testing.assert_close(column, tensor([[None, 0.2, 0.4, 0.3], [None] * 4]), equal_nan=True)


class TestShareOfTheLongest:
    @given(st.data())
    @settings(max_examples=200, deadline=None)
    def test_equals_loop(self, data):
        size = data.draw(st.integers(1, 6))
        steps = st.none() | st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))
        rows = data.draw(st.lists(st.lists(steps, min_size=size, max_size=size), min_size=1, max_size=3))
        found = of_longest_completion(
            tensor([[s and s[0] / s[1] for s in row] for row in rows]),
            tensor([[s and s[1] for s in row] for row in rows]),
        )
        longest = [max((s[1] for s in row if s), default=1) for row in rows]
        expected = [[s and s[0] / n for s in row] for row, n in zip(rows, longest, strict=True)]
        torch.testing.assert_close(found, tensor(expected), rtol=0, atol=0, equal_nan=True)  # ties stay ties

    @pytest.mark.parametrize("unit", ["steps", "characters"])
    def test_in_training(self, make_trainer, unit):
        """Only what is right before the first error counts, whatever comes after it."""
        judge = stepwise(FixedJudge(lambda items: [Verdict.error(len(i.steps) // 2) for i in items]), unit=unit)
        trainer = make_trainer([all_failed, judge], rts_share_of="longest", max_steps=1, max_completion_length=48)
        rounds = []
        trainer.round_observers.append(lambda round, output: rounds.append(round))
        trainer.train()
        (judged,) = [round.judged for round in rounds]
        right, whole = [], []
        for score in judged.scores:
            lengths = [1.0 if unit == "steps" else end - start for start, end in score.cut.spans]
            right.append(sum(lengths[: score.first_error]))
            whole.append(sum(lengths))
        assert len(set(whole)) > 1
        longest = torch.tensor(whole).view(2, 4).amax(dim=1, keepdim=True)
        assert longest[0] != longest[1]
        assert "(treatment `sgpo`, shares of the longest completion)" in describe_run(
            trainer.treatment, trainer.stepwise_judge, trainer.args
        )
        right_PG = torch.tensor(right).view(2, 4)
        torch.testing.assert_close(judged.reward_PG, rts_to_reward(right_PG / longest))
        torch.testing.assert_close(judged.rts_PG, right_PG / torch.tensor(whole).view(2, 4))
        assert trainer.state.log_history[0]["sgpo/rts"] == pytest.approx(judged.rts_PG.mean().item())
        torch.testing.assert_close(
            rounds[0].judge_rewards_PG,
            torch.where(rounds[0].groups.rescued_P[:, None], judged.reward_PG, NAN),
            equal_nan=True,
        )

    def test_equal_shares_of_different_lengths_are_no_tie(self):
        rts_PG, size_PG = torch.full((1, 4), 0.5), torch.tensor([[2.0, 4.0, 2.0, 4.0]])
        reward_PG = of_longest_completion(rts_PG, size_PG)
        groups = fill_failed_groups(torch.zeros(1, 4), rts_PG, reward_PG, torch.tensor([True]))
        assert groups.rescued_P.item()
        assert groups.column_PG.tolist() == [[0.25, 0.5, 0.25, 0.5]]

    def test_empty_completions_have_nothing_right(self):
        judge = stepwise(unit="characters")
        (score,) = judge.score(["2 + 2?"], [""], [{}], known_wrong=True)
        assert judge.size(score) == 0
        nothing = torch.zeros(1, 4)
        assert torch.equal(of_longest_completion(nothing, nothing), nothing)


def test_a_factor_of_one_keeps_the_bits_and_zero_gives_grpo():
    torch.manual_seed(0)
    with_judge, without = torch.randn(3, 8), torch.randn(3, 8)
    blended = blend_advantages(with_judge, without, torch.tensor([1.0, 0.0, 0.5]))
    assert torch.equal(blended[0], with_judge[0])
    assert torch.equal(blended[1], without[1])
    torch.testing.assert_close(blended[2], (with_judge[2] + without[2]) / 2)


@pytest.mark.parametrize("config", [{"prefix_baseline": "group"}, {"prefix_reward": 0.5}, {"error_penalty": 0.0}])
def test_settings_of_credit_per_token_are_warned_of(config):
    ((name, value),) = config.items()
    args = SGPOConfig("out", report_to="none", use_cpu=True, bf16=False, **config)
    with pytest.warns(UserWarning, match=f"{name}={value!r} has no effect with failed_groups='sgpo'"):
        SequenceReward().setup(args)


def test_the_defaults_warn_of_nothing():
    args = SGPOConfig("out", report_to="none", use_cpu=True, bf16=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SequenceReward().setup(args)
