"""Completions about which nobody is asked: those without a loss, and groups that cannot be compared."""

import math

import pytest
import torch
from conftest import assert_same_parameters, logged, record_advantages
from toys import CountingJudge, all_failed, all_mixed, fixed, stepwise, tensor
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo.rounds import Round
from trl_sgpo.treatments import Treatment
from trl_sgpo.treatments.sequence import fill_failed_groups, fill_mixed_groups


NAN = math.nan
MASKED = {"mask_truncated_completions": True, "max_steps": 1}


class Plain(Treatment):
    """Asks the judge, and leaves the advantages to GRPO: what it sorts is the base class's."""

    asks_judge = True

    def advantages(self, round, policy):
        return round.advantages_B


def ending(trainer, *ends):
    """The trainer's completions are two groups of four, each of a few words and its end: EOS, padding or none of them."""
    tokenizer = trainer.processing_class
    last = {"eos": [tokenizer.eos_token_id], "pad": [tokenizer.pad_token_id], "cut": []}

    def generate(prompt_ids, *args, **kwargs):
        return [[*range(4, 8 + i % 4), *last[ends[i % len(ends)]]] for i in range(len(prompt_ids))], None

    trainer._generate_single_turn = generate
    return trainer


class TestTruncatedAndMasked:
    @pytest.mark.parametrize("failed_groups", ["sgpo", "prefix", Plain()])
    def test_if_all_are_nobody_is_asked(self, make_trainer, failed_groups, caplog):
        judge = CountingJudge()
        own = isinstance(failed_groups, Treatment)
        given = {"trainer_args": {"treatment": failed_groups}} if own else {"failed_groups": failed_groups}
        trainer = ending(make_trainer([all_failed, stepwise(judge)], **MASKED | {"max_steps": 2}, **given), "cut")
        trainer.train()
        assert judge.calls == 0
        for name, share in {"failed": 1.0, "rescued": 0.0, "tied": 0.0, "unjudged": 1.0, "not_asked": 1.0}.items():
            assert logged(trainer, f"sgpo/groups/{name}") == [share] * 2
        assert logged(trainer, "sgpo/judge_calls") == [0.0] * 2
        said = "mask_truncated_completions=True: 8 of 8 wrong completions of this round were truncated."
        assert caplog.text.count(said) == 1
        assert "THE JUDGE GAVE NO USABLE VERDICT" not in caplog.text
        grpo = ending(make_trainer([all_failed], GRPOTrainer, GRPOConfig, **MASKED | {"max_steps": 2}), "cut")
        grpo.train()
        assert_same_parameters(grpo, trainer)

    def test_the_others_are_asked_about_and_taught(self, make_trainer):
        judge = fixed(1, 3)  # with four words and EOS, and with five: RTS 1/5 and 3/6
        trainer = ending(make_trainer([all_failed, judge], **MASKED), "eos", "pad", "cut", "cut")
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/judge_calls") == [4.0]
        assert logged(trainer, "sgpo/groups/rescued") == [1.0]
        assert logged(trainer, "sgpo/groups/not_asked") == [0.0]
        # Two verdicts teach as two verdicts among four do, and a masked row has the mean of its group
        half = 1 / math.sqrt(2)
        assert rounds[0].tolist() == pytest.approx([-half, half, 0.0, 0.0] * 2, abs=2e-3)

    def test_what_is_masked_is_what_trl_masks(self, make_trainer):
        trainer = ending(make_trainer([all_failed, stepwise()], **MASKED), "eos", "cut", "pad", "cut")
        found = []
        trainer.round_observers.append(lambda round, output: found.append((round, round.own_BT.any(dim=1))))
        trainer.train()
        ((round, has_loss),) = found
        assert round.masked_B == [not loss for loss in has_loss.tolist()] == [False, True] * 4
        assert [score is None for score in round.judged.scores] == round.masked_B

    @pytest.mark.parametrize(("failed_groups", "rescued"), [("sgpo", 0.0), ("prefix", 1.0)])
    def test_one_verdict_of_one_that_was_asked(self, make_trainer, failed_groups, rescued):
        trainer = make_trainer([all_failed, fixed(2)], failed_groups=failed_groups, **MASKED)
        ending(trainer, "eos", "cut", "cut", "cut").train()
        assert logged(trainer, "sgpo/judge_calls") == [2.0]
        assert logged(trainer, "sgpo/groups/rescued") == [rescued]  # one reward has nothing to be compared with

    def test_of_mixed_groups(self, make_trainer):
        judge = CountingJudge()
        trainer = make_trainer([all_mixed, stepwise(judge)], judge_scope="all_incorrect", **MASKED)
        ending(trainer, "eos", "eos", "cut", "eos").train()  # the first and the third one are wrong
        assert judge.calls == 2

    def test_without_the_setting_all_are_asked_about(self, make_trainer, caplog):
        judge = CountingJudge()
        trainer = ending(make_trainer([all_failed, stepwise(judge)], max_steps=1), "cut")
        trainer.train()
        assert judge.calls == 8
        assert "mask_truncated_completions" not in caplog.text

    @pytest.mark.parametrize("masked", [[False] * 4, [False, False, True, True], [False, True, True, True]])
    def test_the_columns_of_groups(self, masked):
        """A masked row is filled in as an abstention is, and the half that needs a verdict is half of the others."""
        masked_PG, failed = torch.tensor([masked]), torch.zeros(1, 4)
        rts = tensor([[0.25, 0.5, None, None]]).masked_fill(masked_PG, NAN)
        groups = fill_failed_groups(failed, rts, rts, torch.tensor([True]), masked_PG)
        few = sum(masked) == 3
        assert groups.rescued_P.tolist() == [not few]
        column = tensor([[None] * 4 if few else [0.25, 0.5, 0.375, 0.375]])
        torch.testing.assert_close(groups.column_PG, column, equal_nan=True)
        outcome = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        masked_PG = torch.tensor([[False, True, True, False]])
        rewards = tensor([[0.25, None, None, None]])
        mixed = (outcome, rewards, outcome, torch.tensor([True]), 0.5, 1.0)
        assert torch.isnan(fill_mixed_groups(*mixed)).all()
        torch.testing.assert_close(
            fill_mixed_groups(*mixed, masked_PG), tensor([[0.25, 0.25, 0.25, None]]), equal_nan=True
        )


def first_has_none(prompts, completions, kind, **kwargs):
    """Groups of the kind `failed`: the first completion has no outcome. All others failed."""
    return [None if k == "failed" and i % 4 == 0 else 0.0 for i, k in enumerate(kind)]


def right_but_first(prompts, completions, kind, **kwargs):
    """As `first_has_none`, and the last one of each group is right."""
    return [1.0 if i % 4 == 3 else outcome for i, outcome in enumerate(first_has_none(prompts, completions, kind))]


def for_all(prompts, completions, **kwargs):
    return [0.1 * (i % 3) for i in range(len(completions))]


def only_with_an_outcome(prompts, completions, kind, **kwargs):
    outcomes = first_has_none(prompts, completions, kind)
    return [None if outcome is None else 0.1 * (i % 3) for i, outcome in enumerate(outcomes)]


class TestAnOutcomeThatIsMissingBesideAnotherReward:
    config = {"generation_kwargs": {"suppress_tokens": [0, 1]}}
    twice = {**config, "per_device_train_batch_size": 16, "max_steps": 2}

    def test_the_group_is_not_asked_about(self, make_trainer, caplog):
        judge = CountingJudge()
        funcs = [first_has_none, for_all]
        trainer = make_trainer([*funcs, stepwise(judge)], outcome_reward="first_has_none", **self.twice)
        rounds = record_advantages(trainer)
        trainer.train()
        assert judge.calls == 16  # the groups of the other kind
        assert {item.row["kind"] for item in judge.items} == {"mixed"}
        assert logged(trainer, "sgpo/groups/failed") == [1.0] * 2
        assert logged(trainer, "sgpo/groups/not_asked") == [0.5] * 2
        assert logged(trainer, "sgpo/groups/unjudged") == [0.5] * 2
        assert caplog.text.count("50 % of the groups of this round failed and were not judged, because") == 1
        assert "('first_has_none' gave None)" in caplog.text
        grpo = make_trainer(funcs, GRPOTrainer, GRPOConfig, **{**self.twice, "max_steps": 1})
        plain = record_advantages(grpo)
        grpo.train()
        equal = [torch.equal(a, b) for a, b in zip(rounds[0].view(4, 4), plain[0].view(4, 4), strict=True)]
        assert sorted(equal) == [False, False, True, True]

    def test_if_it_is_so_in_every_group_it_is_said_too(self, make_trainer, caplog):
        def outcome(prompts, completions, **kwargs):
            return [None if i % 4 == 0 else 0.0 for i in range(len(completions))]

        judge = CountingJudge()
        trainer = make_trainer([outcome, for_all, stepwise(judge)], outcome_reward="outcome", **self.twice)
        trainer.train()
        assert judge.calls == 0
        assert logged(trainer, "sgpo/groups/not_asked") == logged(trainer, "sgpo/groups/unjudged") == [1.0] * 2
        assert caplog.text.count("100 % of the groups of this round failed and were not judged") == 1

    def test_credit_per_token_needs_no_comparison(self, make_trainer, caplog):
        judge = CountingJudge()
        trainer = make_trainer(
            [first_has_none, for_all, stepwise(judge)],
            outcome_reward="first_has_none",
            failed_groups="prefix",
            **self.twice,
        )
        trainer.train()
        assert judge.calls == 28  # all that have an outcome
        assert logged(trainer, "sgpo/groups/not_asked") == [0.0] * 2
        assert "failed and were not judged" not in caplog.text

    def test_without_the_other_reward_the_rest_of_the_group_is_judged(self, make_trainer, caplog):
        judge = CountingJudge()
        funcs = [first_has_none, only_with_an_outcome, stepwise(judge)]
        trainer = make_trainer(funcs, outcome_reward="first_has_none", **self.twice)
        trainer.train()
        assert judge.calls == 28
        assert logged(trainer, "sgpo/groups/not_asked") == [0.0] * 2
        assert "failed and were not judged" not in caplog.text

    def test_mixed_groups(self, make_trainer):
        judge = CountingJudge()
        trainer = make_trainer(
            [right_but_first, for_all, stepwise(judge)],
            outcome_reward="right_but_first",
            judge_scope="all_incorrect",
            **self.twice,
        )
        trainer.train()
        assert judge.calls == 2 * 2 * 3
        assert {item.row["kind"] for item in judge.items} == {"mixed"}

    def test_after_the_judges_share_of_the_run_it_is_not_said(self, make_trainer, caplog):
        n_rounds = 0

        def outcome(prompts, completions, **kwargs):
            nonlocal n_rounds
            n_rounds += 1
            return [None if i % 4 == 0 and n_rounds == 2 else 0.0 for i in range(len(completions))]

        trainer = make_trainer([outcome, for_all, stepwise()], outcome_reward="outcome", judge_until=0.5, **self.twice)
        trainer.train()
        assert logged(trainer, "sgpo/groups/not_asked") == logged(trainer, "sgpo/groups/unjudged") == [0.0, 1.0]
        assert "failed and were not judged" not in caplog.text


def test_uneven_groups():
    outcome, other = [[0.0, None], [0.0, None], [0.0, 0.0]], [[1.0, 1.0], [1.0, None], [1.0, None]]
    rewards = torch.stack([tensor(outcome), tensor(other)], dim=2)
    round = Round(training=True).fill(rewards, torch.ones(2), tensor(outcome))
    assert round.uneven_P.tolist() == [True, False, False]
