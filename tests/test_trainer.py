"""Real `trainer.train()` runs on a tiny model."""

import asyncio
import inspect
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    assert_every_parameter_moved,
    assert_same_parameters,
    by_kind,
    length_reward,
    letters_reward,
    logged,
    parameters,
    record_advantages,
    words_as_steps,
)
from toys import CountingJudge, FixedJudge, all_failed, all_mixed, stepwise
from trl import GRPOConfig, GRPOTrainer

import trl_sgpo
from trl_sgpo import SGPOConfig, SGPOTrainer, StepJudge, StepwiseJudge, Verdict
from trl_sgpo.groups import group_advantages
from trl_sgpo.round_log import JUDGE_COLUMNS


def never(problem, steps, **row):
    raise AssertionError("the judge was asked")


class TestWhereGRPOIsEnough:
    """Where there is nothing to rescue, SGPO is GRPO, bit for bit."""

    @pytest.mark.parametrize("scale_rewards", ["group", "none"])
    @pytest.mark.parametrize("others", [[], [length_reward], [length_reward, letters_reward]])
    @pytest.mark.parametrize("position", ["first", "last"])
    def test_no_failed_group(self, make_trainer, scale_rewards, others, position):
        config = {"scale_rewards": scale_rewards, "max_steps": 2}
        weights = [1.0, 0.3, 0.7][: 1 + len(others)]
        grpo = make_trainer([all_mixed, *others], GRPOTrainer, GRPOConfig, reward_weights=weights, **config)
        grpo.train()
        judge = stepwise(never)
        funcs = [judge, all_mixed, *others] if position == "first" else [all_mixed, *others, judge]
        weights = [0.9, *weights] if position == "first" else [*weights, 0.9]
        sgpo = make_trainer(funcs, outcome_reward="all_mixed", reward_weights=weights, **config)
        before = parameters(sgpo)
        sgpo.train()
        assert_same_parameters(grpo, sgpo)
        assert_every_parameter_moved(before, sgpo)
        assert set(logged(sgpo, "sgpo/judge_calls")) == {0.0}

    def test_no_judge(self, make_trainer):
        grpo = make_trainer([by_kind], GRPOTrainer, GRPOConfig)
        grpo.train()
        sgpo = make_trainer([by_kind])
        sgpo.train()
        assert_same_parameters(grpo, sgpo)
        assert "sgpo/judge_calls" not in sgpo.state.log_history[0]
        # The metrics that need outcomes only are there all the same
        assert logged(sgpo, "sgpo/accuracy") == logged(grpo, "rewards/by_kind/mean")

    def test_plain_config_and_positional_arguments(self, make_model, tokenizer, dataset, tmp_path):
        args = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=4,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = SGPOTrainer(
            make_model(), [by_kind, stepwise()], args, dataset, dataset, tokenizer, None, None, (None, None), None
        )
        trainer.train()
        assert (args.success_threshold, args.judge_scope, args.judge_until) == (0.5, "failed_groups", 1.0)
        assert args.exclude_dead_groups is False
        assert trainer.treatment.name == args.failed_groups == "sgpo"
        assert logged(trainer, "train_runtime")

    def test_two_rewards_and_no_judge(self, make_trainer):
        trainer = make_trainer([by_kind, length_reward], SGPOTrainer, GRPOConfig, max_steps=1)
        trainer.train()
        assert trainer.outcome_indices == []
        assert "sgpo/accuracy" not in trainer.state.log_history[0]

    def test_arguments_are_those_of_grpo_in_their_order(self):
        ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (SGPOTrainer, GRPOTrainer))
        assert list(ours) == [*theirs, "treatment"]
        assert ours["treatment"].kind is inspect.Parameter.KEYWORD_ONLY

    def test_reward_functions_given_are_not_changed(self, make_trainer):
        judge = stepwise()
        given = [by_kind, judge]
        trainer = make_trainer(given)
        assert given == [by_kind, judge]
        assert trainer.reward_funcs is not given
        assert trainer.reward_func_names == ["by_kind", "stepwise_judge"]

    def test_the_same_list_runs_in_a_plain_grpo_trainer(self, make_trainer):
        judge = CountingJudge()
        trainer = make_trainer([by_kind, stepwise(judge)], GRPOTrainer, GRPOConfig, max_steps=1)
        trainer.train()
        assert judge.calls == 8  # there it judges everything
        assert logged(trainer, "rewards/stepwise_judge/mean")


def outcome_none(prompts, completions, kind, **kwargs):
    rows = by_kind(prompts, completions, kind)
    return [None if i % 4 == 3 else value for i, value in enumerate(rows)]


def outcome_minus_one(prompts, completions, kind, **kwargs):
    return [2 * value - 1 for value in by_kind(prompts, completions, kind)]


def outcome_fraction(prompts, completions, kind, **kwargs):
    return [0.4 * value + 0.03 * (i % 3) + 0.1 for i, value in enumerate(by_kind(prompts, completions, kind))]


def outcome_negative(prompts, completions, kind, **kwargs):
    return [value - 2.0 for value in by_kind(prompts, completions, kind)]


class TestFailedGroups:
    @pytest.mark.parametrize(
        ("outcome", "threshold"),
        [
            (by_kind, 0.5),
            (outcome_none, 0.5),
            (outcome_minus_one, 0.5),
            (outcome_fraction, 0.45),
            (outcome_negative, -1.5),
        ],
    )
    @pytest.mark.parametrize("scale_rewards", ["group", "none"])
    @pytest.mark.parametrize("extra", [[], [length_reward], [length_reward, letters_reward]])
    def test_mixed_groups_keep_their_advantages(self, make_trainer, outcome, threshold, scale_rewards, extra):
        config = {"scale_rewards": scale_rewards, "max_steps": 1, "per_device_train_batch_size": 32}
        grpo = make_trainer([outcome, *extra], GRPOTrainer, GRPOConfig, **config)
        expected = record_advantages(grpo)
        grpo.train()
        sgpo = make_trainer(
            [outcome, *extra, stepwise()], outcome_reward=outcome.__name__, success_threshold=threshold, **config
        )
        actual = record_advantages(sgpo)
        sgpo.train()
        kinds = sgpo.state.log_history[0]
        assert kinds["sgpo/groups/failed"] == kinds["sgpo/groups/mixed"] == 0.5
        # Where a completion without an outcome has other rewards, its group stays as it is
        uneven = outcome is outcome_none and bool(extra)
        assert (kinds["sgpo/groups/rescued"] == 0) if uneven else (kinds["sgpo/groups/rescued"] > 0)
        # Which rows are of a failed group is not known here, but all differences must be theirs
        same = (expected[0] == actual[0]).view(-1, 4).all(dim=1)
        assert same.float().mean().item() == 1 - kinds["sgpo/groups/rescued"]
        if outcome is outcome_none and not extra:
            assert (actual[0].view(-1, 4)[:, 3] == 0).all()  # unscorable stays unscorable

    def test_rescued_groups_teach(self, make_trainer):
        grpo = make_trainer([all_failed], GRPOTrainer, GRPOConfig)
        start = parameters(grpo)
        grpo.train()
        assert_same_parameters(start, grpo)  # GRPO learns nothing
        sgpo = make_trainer([all_failed, stepwise()])
        sgpo.train()
        assert_every_parameter_moved(start, sgpo)
        assert set(logged(sgpo, "sgpo/groups/failed")) == {1.0}

    @pytest.mark.parametrize("n_generations", [3, 6, 8])
    def test_tied_groups_are_exactly_dead(self, make_trainer, n_generations):
        # Written into the matrix, the equal rewards of some group sizes would leave a residue that Adam blows up
        sgpo = make_trainer(
            [all_failed, stepwise(lambda problem, steps: 0)],
            num_generations=n_generations,
            per_device_train_batch_size=2 * n_generations,
        )
        start = parameters(sgpo)
        sgpo.train()
        assert_same_parameters(start, sgpo)
        assert set(logged(sgpo, "sgpo/groups/tied")) == {1.0}
        assert min(logged(sgpo, "sgpo/judge_calls")) > 0

    def test_equal_rewards_would_not_be_dead(self):
        residue = group_advantages(torch.full((1, 6), 0.0067)).abs().max().item()
        assert 0 < residue < 1e-3

    def test_other_rewards_still_teach_in_tied_groups(self, make_trainer):
        funcs = [all_failed, length_reward]
        grpo = make_trainer(funcs, GRPOTrainer, GRPOConfig)
        grpo.train()
        sgpo = make_trainer([*funcs, stepwise(lambda problem, steps: 0)], outcome_reward="all_failed")
        sgpo.train()
        assert_same_parameters(grpo, sgpo)
        assert max(logged(sgpo, "sgpo/groups/tied_other_rewards")) > 0

    def test_failed_group_weight(self, make_trainer):
        runs = {}
        for weight in (0.0, 0.5, 1.0):
            trainer = make_trainer([by_kind, stepwise()], failed_group_weight=weight, max_steps=1)
            runs[weight] = record_advantages(trainer)
            trainer.train()
        grpo = make_trainer([by_kind], GRPOTrainer, GRPOConfig, max_steps=1)
        plain = record_advantages(grpo)
        grpo.train()
        assert torch.equal(runs[0.0][0], plain[0])
        torch.testing.assert_close(runs[0.5][0], (runs[0.0][0] + runs[1.0][0]) / 2)
        assert not torch.equal(runs[1.0][0], plain[0])

    @pytest.mark.parametrize("scale_rewards", ["group", "none"])
    def test_weight_zero_is_grpo_beside_other_rewards(self, make_trainer, scale_rewards):
        funcs, config = [by_kind, length_reward], {"scale_rewards": scale_rewards, "max_steps": 1}
        grpo = make_trainer(funcs, GRPOTrainer, GRPOConfig, **config)
        plain = record_advantages(grpo)
        grpo.train()
        sgpo = make_trainer([*funcs, stepwise()], outcome_reward="by_kind", failed_group_weight=0.0, **config)
        weighted = record_advantages(sgpo)
        sgpo.train()
        assert sgpo.state.log_history[0]["sgpo/groups/rescued"] > 0
        torch.testing.assert_close(weighted[0], plain[0], rtol=1e-4, atol=1e-6)

    def test_logged_advantages_are_those_that_train(self, make_trainer):
        trainer = make_trainer([all_failed, stepwise()], failed_group_weight=0.5, log_completions=True, max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
        assert table["advantage"].tolist() == pytest.approx(rounds[0].tolist())

    def test_all_incorrect(self, make_trainer):
        judge = CountingJudge()
        trainer = make_trainer([by_kind, stepwise(judge)], judge_scope="all_incorrect", max_steps=1)
        trainer.train()
        # Every wrong completion: all four of a failed group and two of a mixed one
        n_failed = 2 * trainer.state.log_history[0]["sgpo/groups/failed"]
        assert judge.calls == 4 * n_failed + 2 * (2 - n_failed)

    def test_all_incorrect_keeps_right_above_wrong(self, make_trainer):
        # A judge that weighs five times the outcome and finds nothing wrong before the last step
        judge = stepwise(lambda problem, steps: len(steps) - 1)
        trainer = make_trainer([all_mixed, judge], judge_scope="all_incorrect", reward_weights=[1.0, 5.0], max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "rewards/stepwise_judge/mean")[0] > 0
        for group in rounds[0].view(-1, 4):
            assert group[1::2].min() >= group[0::2].max() - 1e-6

    def test_the_judge_sees_the_row(self, make_trainer):
        judge = CountingJudge()
        trainer = make_trainer([all_failed, stepwise(judge)], max_steps=1)
        trainer.train()
        item = judge.items[0]
        assert item.problem.endswith("=")
        assert item.known_wrong
        assert item.reference == item.row["solution"]
        assert item.row["kind"] in ("failed", "mixed")
        assert "prompt" not in item.row


class RaisingJudge(StepJudge):
    def judge(self, items):
        raise RuntimeError("no route to the judge")


def cancelled(items):
    raise asyncio.CancelledError


BROKEN_JUDGES = {
    "raises": RaisingJudge(),
    "index out of range": FixedJudge(lambda items: [Verdict.error(len(item.steps)) for item in items]),
    "negative index": FixedJudge(lambda items: [Verdict.error(-1) for _ in items]),
    "float index": FixedJudge(lambda items: [Verdict.error(0.0) for _ in items]),
    "boolean index": FixedJudge(lambda items: [Verdict.error(True) for _ in items]),
    "boolean tensor": FixedJudge(lambda items: [Verdict.error(torch.tensor(True)) for _ in items]),
    "index is nan": FixedJudge(lambda items: [Verdict.error(math.nan) for _ in items]),
    "index is text": FixedJudge(lambda items: [Verdict.error("2") for _ in items]),
    "unknown status": FixedJudge(lambda items: [Verdict("wrong", 0) for _ in items]),
    "no verdict": FixedJudge(lambda items: [0 for _ in items]),
    "none": FixedJudge(lambda items: None),
    "too few verdicts": FixedJudge(lambda items: [Verdict.error(0)] * (len(items) - 1)),
    "too many verdicts": FixedJudge(lambda items: [Verdict.error(0)] * (len(items) + 1)),
    "other number of steps": FixedJudge(lambda items: [Verdict.error(0, n_steps=99) for _ in items]),
    "array for the number of steps": FixedJudge(
        lambda items: [Verdict.error(0, n_steps=np.array([2, 2]))] * len(items)
    ),
    "array for a status": FixedJudge(lambda items: [Verdict(np.array(["error", "error"]), 0)] * len(items)),
    "huge index": FixedJudge(lambda items: [Verdict.error(10**5000)] * len(items)),
    "cancelled": FixedJudge(cancelled),
    "abstains": FixedJudge(lambda items: [Verdict.abstain("too hard") for _ in items]),
}


class TestJudgeFailures:
    @pytest.mark.parametrize("name", BROKEN_JUDGES)
    def test_a_broken_judge_leaves_grpo(self, make_trainer, name, caplog):
        grpo = make_trainer([by_kind], GRPOTrainer, GRPOConfig, max_steps=3)
        grpo.train()
        with caplog.at_level(logging.WARNING):
            sgpo = make_trainer([by_kind, stepwise(BROKEN_JUDGES[name])], max_steps=3)
            sgpo.train()
        assert_same_parameters(grpo, sgpo)
        assert set(logged(sgpo, "sgpo/abstain_rate")) == {1.0}
        assert "THE JUDGE GAVE NO USABLE VERDICT" in caplog.text
        assert caplog.text.count("Traceback") == (1 if name in ("raises", "none", "cancelled") else 0)

    def test_no_error_on_known_wrong_completions(self, make_trainer, caplog):
        judge = stepwise(lambda problem, steps: None)
        trainer = make_trainer([all_failed, judge], max_steps=1)
        start = parameters(trainer)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert_same_parameters(start, trainer)
        assert logged(trainer, "sgpo/no_error_rate") == [1.0]
        assert logged(trainer, "sgpo/abstain_rate") == [0.0]
        assert "found no error in 100 %" in caplog.text

    @pytest.mark.parametrize("n_abstain", [1, 2, 3])
    @pytest.mark.parametrize("scale_rewards", ["group", "none"])
    def test_some_abstentions(self, make_trainer, n_abstain, scale_rewards):
        rts = []

        def judge(items):
            verdicts = []
            for i, item in enumerate(items):
                if i % 4 < n_abstain:
                    verdicts.append(Verdict.abstain("too hard"))
                    rts.append(math.nan)
                else:
                    verdicts.append(Verdict.error(i % 4 % len(item.steps)))
                    rts.append(i % 4 % len(item.steps) / len(item.steps))
            return verdicts

        trainer = make_trainer(
            [all_failed, stepwise(FixedJudge(judge), transform="identity")], max_steps=1, scale_rewards=scale_rewards
        )
        rounds = record_advantages(trainer)
        trainer.train()
        for advantages, scores in zip(rounds[0].view(-1, 4), torch.tensor(rts).view(-1, 4), strict=True):
            judged = ~torch.isnan(scores)
            if n_abstain == 3 or len(set(scores[judged].tolist())) == 1:
                assert (advantages == 0).all()  # fewer than half judged, or a tie: as GRPO leaves it
            else:
                expected = group_advantages(scores[judged].unsqueeze(0), scale_rewards)[0]
                torch.testing.assert_close(advantages[judged], expected, rtol=2e-3, atol=2e-3)
                assert advantages[~judged].abs().max() < 1e-5
        assert logged(trainer, "sgpo/abstain_rate") == [n_abstain / 4]

    def test_a_function_that_raises_sometimes(self, make_trainer, caplog):
        def judge(problem, steps):
            if len("".join(steps)) % 2:
                raise ZeroDivisionError("odd")
            return 0 if len(steps) % 3 else len(steps) - 1

        with caplog.at_level(logging.WARNING):
            trainer = make_trainer([all_failed, stepwise(judge)])
            trainer.train()
        assert caplog.text.count("ZeroDivisionError: odd") == 1
        assert 0 < np.mean(logged(trainer, "sgpo/abstain_rate")) < 1


class TestWhen:
    def test_off_in_evaluation(self, make_trainer, dataset):
        judge = CountingJudge()
        trainer = make_trainer(
            [by_kind, stepwise(judge)],
            trainer_args={"eval_dataset": dataset},
            eval_strategy="steps",
            eval_steps=1,
            max_steps=2,
            log_completions=True,
        )
        trainer.evaluate()
        assert judge.calls == 0
        trainer.train()
        assert judge.calls == sum(logged(trainer, "sgpo/judge_calls"))
        assert logged(trainer, "eval_sgpo/accuracy") == logged(trainer, "eval_rewards/by_kind/mean")
        assert logged(trainer, "eval_sgpo/groups/failed") == [0.5] * 2
        assert not any(key.startswith("eval_sgpo/judge") for entry in trainer.state.log_history for key in entry)

    def test_off_in_evaluation_after_a_generation_that_ends_in_training_mode(self, make_trainer, dataset):
        """As with TRL's continuous batching. The mode of a round is the one that TRL took before."""
        judge = CountingJudge()
        trainer = make_trainer([by_kind, stepwise(judge)], trainer_args={"eval_dataset": dataset}, eval_strategy="no")
        generate, compute_loss = trainer._generate, trainer.compute_loss

        def ends_in_training_mode(*args, **kwargs):
            result = generate(*args, **kwargs)
            trainer.model.train()
            return result

        def in_evaluation(model, *args, **kwargs):  # TRL's loss reads the mode again
            return compute_loss(model.eval(), *args, **kwargs)

        trainer._generate, trainer.compute_loss = ends_in_training_mode, in_evaluation
        trainer.evaluate()
        assert judge.calls == 0
        assert logged(trainer, "eval_sgpo/groups/failed") == [0.5]

    @pytest.mark.parametrize(
        ("until", "n_updates", "n_judged"), [(0.25, 12, 3), (0.7, 10, 7), (1.0, 3, 3), (0.01, 4, 1)]
    )
    def test_judge_until(self, make_trainer, until, n_updates, n_judged):
        trainer = make_trainer([all_failed, stepwise()], judge_until=until, max_steps=n_updates)
        trainer.train()
        calls = logged(trainer, "sgpo/judge_calls")
        assert [count > 0 for count in calls] == [True] * n_judged + [False] * (n_updates - n_judged)
        unjudged = logged(trainer, "sgpo/groups/unjudged")
        assert unjudged == [0.0] * n_judged + [1.0] * (n_updates - n_judged)

    def resumed(self, make_trainer, tmp_path, reward_funcs, trainer_class, config_class, save_at, **config):
        """Parameters of an uninterrupted run, and of one that is stopped after `save_at` updates and resumed."""
        config = {"max_steps": 8, "save_strategy": "steps", "save_steps": save_at, **config}
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        whole = make_trainer(reward_funcs, trainer_class, config_class, **config)
        whole.train()
        resumed = make_trainer(reward_funcs, trainer_class, config_class, **config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{save_at}"))
        return whole, resumed

    def test_resume_at_a_generation_boundary_is_exact(self, make_trainer, tmp_path):
        whole, resumed = self.resumed(
            make_trainer,
            tmp_path,
            [by_kind, stepwise()],
            SGPOTrainer,
            SGPOConfig,
            save_at=2,
            judge_until=0.375,
            steps_per_generation=2,
            per_device_train_batch_size=4,
        )
        assert_same_parameters(whole, resumed)
        # The schedule goes on where it stopped; the log history is part of the checkpoint
        calls = [[count > 0 for count in logged(trainer, "sgpo/judge_calls")] for trainer in (whole, resumed)]
        assert calls == [[True, True, False, False]] * 2

    def test_resume_elsewhere_is_as_inexact_as_grpos(self, make_trainer, tmp_path):
        # In the middle of a generation batch TRL generates anew on resuming, whatever the trainer
        config = {"save_at": 3, "steps_per_generation": 2, "per_device_train_batch_size": 4}
        gaps = {}
        for name, funcs, classes in (
            ("grpo", [by_kind], (GRPOTrainer, GRPOConfig)),
            ("sgpo", [by_kind, stepwise()], (SGPOTrainer, SGPOConfig)),
        ):
            whole, resumed = self.resumed(make_trainer, tmp_path, funcs, *classes, **config)
            whole, resumed = parameters(whole), parameters(resumed)
            gaps[name] = max((whole[key] - resumed[key]).abs().max().item() for key in whole)
        assert gaps["grpo"] > 0
        # Both are gaps between two random courses of training, not errors of a computation: the same size, not equal
        assert gaps["sgpo"] <= 1.5 * gaps["grpo"]


class TestLogs:
    def test_metrics_equal_a_naive_count(self, make_trainer):
        judge = CountingJudge()
        trainer = make_trainer(
            [by_kind, stepwise(judge)],
            max_steps=1,
            per_device_train_batch_size=32,
            generation_kwargs={"suppress_tokens": [0, 1]},  # no empty completions, which are scored without a call
        )
        trainer.train()
        log = trainer.state.log_history[0]
        by_problem = {}
        for item in judge.items:
            first = sum(map(len, item.steps)) % len(item.steps)
            lengths = list(map(len, item.steps))
            by_problem.setdefault(item.problem, []).append(
                (first / len(lengths), sum(lengths[:first]) / sum(lengths), len(lengths))
            )
        scores = [score for group in by_problem.values() for score in group]
        spreads = [max(s[0] for s in group) - min(s[0] for s in group) for group in by_problem.values()]
        assert log["sgpo/accuracy"] == 0.25
        assert log["sgpo/groups/solved"] == 0
        assert log["sgpo/groups/mixed"] == log["sgpo/groups/failed"] == 0.5
        assert log["sgpo/groups/rescued"] == sum(s > 0 for s in spreads) / 8
        assert log["sgpo/groups/tied"] == sum(s == 0 for s in spreads) / 8
        assert log["sgpo/groups/unjudged"] == 0
        assert log["sgpo/judge_calls"] == judge.calls == len(scores)
        assert log["sgpo/rts"] == pytest.approx(np.mean([s[0] for s in scores]), rel=1e-5)
        assert log["sgpo/rts_gap"] == pytest.approx(np.mean([s[0] - s[1] for s in scores]), abs=1e-6)
        assert log["sgpo/unchecked_steps"] == 0
        assert log["sgpo/rts_spread"] == pytest.approx(np.mean(spreads), rel=1e-5)
        assert log["sgpo/steps_per_completion"] == pytest.approx(np.mean([s[2] for s in scores]), rel=1e-5)
        assert log["sgpo/abstain_rate"] == log["sgpo/no_error_rate"] == 0
        assert log["sgpo/judge_seconds"] > 0
        # Two of four are right in half of the groups: pass@2 there is 1 - 1/6
        assert (log["sgpo/pass@1"], log["sgpo/pass@2"], log["sgpo/pass@4"]) == pytest.approx((0.25, 5 / 12, 0.5))

    def test_rounds_without_a_failed_group_count_in_the_means(self, make_trainer):
        rounds = iter([0.0, 0.0, 1.0, 1.0])

        def sometimes(prompts, completions, **kwargs):
            right = next(rounds)
            return [right if i % 2 else 0.0 for i in range(len(completions))]

        trainer = make_trainer([sometimes, stepwise()], logging_steps=4)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["sgpo/groups/failed"] == 0.5
        assert log["sgpo/groups/rescued"] + log["sgpo/groups/tied"] == pytest.approx(0.5)

    def test_a_reason_that_is_no_text_of_a_file(self, make_trainer):
        judge = FixedJudge(lambda items: [Verdict.error(0, reason="half an emoji \ud83d " * 1000)] * len(items))
        trainer = make_trainer([all_failed, stepwise(judge)], log_completions=True, max_steps=1)
        trainer.train()
        table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
        assert table["judge_reason"].str.len().max() == 2000

    def test_completions_table(self, make_trainer, dataset):
        judge = StepwiseJudge(
            FixedJudge(lambda items: [Verdict.error(0, reason=f"says {len(item.steps)}") for item in items]),
            segmenter=words_as_steps,
        )
        trainer = make_trainer(
            [by_kind, judge],
            trainer_args={"eval_dataset": dataset},
            log_completions=True,
            judge_until=0.5,
            eval_strategy="steps",
            eval_steps=4,
        )
        trainer.train()
        folder = Path(trainer.args.output_dir) / "completions"
        for step in range(1, 4):
            table = pd.read_parquet(folder / f"completions_{step:05d}.parquet")
            wrong = table["by_kind"] == 0
            failed = table.groupby("prompt")["by_kind"].transform("max") == 0
            judged = table["judge_status"] != ""
            assert (judged == (failed if step <= 2 else False)).all()
            assert table.dtypes[["judge_first_error", "judge_n_steps", "judge_rts"]].tolist() == ["float64"] * 3
            assert {"stepwise_judge", *JUDGE_COLUMNS} <= set(table.columns)
            for _, row in table[judged].iterrows():
                assert row["judge_first_error"] == 0
                assert row["judge_reason"] == f"says {len(row['completion'].split())}"
            assert wrong[judged].all()
        assert len(pd.read_parquet(folder)) > 0  # the files of a run can be read together

    def test_the_completions_say_which_reward_is_the_outcome(self, make_trainer, tmp_path):
        trainer = make_trainer(
            [length_reward, by_kind, stepwise()], outcome_reward="by_kind", log_completions=True, max_steps=1
        )
        trainer.train()
        settings = json.loads((tmp_path / "run" / "sgpo.json").read_text())
        assert settings == {
            "outcome_reward": "by_kind",
            "success_threshold": 0.5,
            "failed_groups": "sgpo",
        }

    def test_model_card(self, make_trainer, tmp_path):
        trainer = make_trainer([by_kind, stepwise(gamma=0.3)], judge_until=0.25)
        trainer.create_model_card(model_name="tiny")
        text = (tmp_path / "run" / "README.md").read_text()
        assert "trained with SGPO" in text
        assert "a fine-tuned version of a local model." in text
        assert 'pipeline("text-generation", model="run"' in text
        assert "None" not in text
        assert "papers/2505.11595" in text
        assert "@article{chen2026stepwise" in text
        assert "conftest.first_long_word" in text
        assert "gamma=0.3" in text
        assert "first 25% of the updates" in text
        assert f"- TRL-SGPO: {trl_sgpo.__version__}" in text
        header = text.split("---")[1]
        assert "- sgpo" in header
        assert "- trl" in header
        assert "- grpo" not in header


def named(name):
    def reward(prompts, completions, **kwargs):
        return [0.0] * len(completions)

    reward.__name__ = name
    return reward


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "value"), [("failed_group_weight", -1.0), ("judge_scope", "all"), ("failed_groups", "typo")]
    )
    def test_settings_that_were_set_later_are_checked(self, make_trainer, name, value):
        class Late(GRPOConfig):
            def __post_init__(self):
                super().__post_init__()
                setattr(self, name, value)

        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            make_trainer([by_kind, stepwise()], SGPOTrainer, Late)

    @pytest.mark.parametrize(
        ("funcs", "config", "message"),
        [
            ([by_kind, stepwise(), stepwise()], {}, r"reward_funcs holds 2 StepwiseJudges, at the positions \[1, 2\]"),
            ([stepwise()], {}, "The StepwiseJudge in reward_funcs has to know .* no outcome reward"),
            (stepwise(), {}, "The StepwiseJudge in reward_funcs has to know .* no outcome reward"),
            (
                [by_kind, length_reward, stepwise()],
                {},
                r"\('by_kind', 'length_reward'\), and outcome_reward is not set.*outcome_reward='by_kind'",
            ),
            ([by_kind, stepwise()], {"outcome_reward": "accuracy"}, "outcome_reward='accuracy' is not the name"),
            ([by_kind], {"outcome_reward": "accuracy"}, "outcome_reward='accuracy' is not the name"),
            ([by_kind, by_kind, stepwise()], {"outcome_reward": "by_kind"}, "is the name of several"),
            ([by_kind, stepwise()], {"outcome_reward": "stepwise_judge"}, "'stepwise_judge' is not the name"),
            (
                [by_kind, length_reward],
                {"failed_groups": "nsr"},
                r"failed_groups='nsr' has to know .* several reward functions \('by_kind', 'length_reward'\), and "
                r"outcome_reward is not set.*outcome_reward='by_kind'",
            ),
            ([], {"failed_groups": "lens"}, "failed_groups='lens' has to know .* no outcome reward"),
            (
                [stepwise()],
                {"failed_groups": "nsr"},
                "failed_groups='nsr' has to know .* no outcome reward",
            ),
            (
                [by_kind, named("stepwise_judge"), stepwise()],
                {},
                "a function called 'stepwise_judge' beside the StepwiseJudge",
            ),
            ([by_kind], {"failed_groups": "prefix"}, "failed_groups='prefix' asks a judge, and reward_funcs holds no"),
            ([by_kind, stepwise()], {"reward_weights": [1.0, -0.5]}, "gives the judge a negative weight"),
            (
                [by_kind, stepwise()],
                {"judge_scope": "all_incorrect", "multi_objective_aggregation": "normalize_then_sum"},
                "judge_scope='all_incorrect' cannot be combined",
            ),
        ],
    )
    def test_reward_functions(self, make_trainer, monkeypatch, funcs, config, message):
        # Before any weight is touched: super is not reached
        monkeypatch.setattr(GRPOTrainer, "__init__", never)
        with pytest.raises(ValueError, match=message):
            make_trainer(funcs, **config)

    @pytest.mark.parametrize("installed", ["0.19.0", "1.15.2", "2.0.0"])
    def test_unsupported_trl(self, monkeypatch, installed):
        # Said on import, before anything is asked of a release that may lack it
        monkeypatch.setattr("trl_sgpo.versions.version", lambda name: installed)
        with pytest.raises(ValueError, match=rf"TRL {installed} is installed, but .* supports TRL from 1.16 up to"):
            _ = trl_sgpo.SGPOTrainer


class TestOptionsOfTRL:
    @pytest.mark.parametrize(
        "config",
        [
            {"num_iterations": 2},
            {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
            {"steps_per_generation": 4, "num_iterations": 2, "per_device_train_batch_size": 2},
            {"bf16": True},
            {"scale_rewards": "none"},
            {"scale_rewards": "batch"},
            {"multi_objective_aggregation": "normalize_then_sum"},
            {"loss_type": "dr_grpo"},
            {"importance_sampling_level": "sequence", "loss_type": "grpo"},
            {"reward_weights": [1.0, 0.5]},
            {"num_generations": 8},
        ],
        ids=lambda config: "-".join(map(str, config.items())),
    )
    def test_trains(self, make_trainer, config):
        trainer = make_trainer([by_kind, stepwise()], **config)
        start = parameters(trainer)
        trainer.train()
        assert_every_parameter_moved(start, trainer)
        assert sum(logged(trainer, "sgpo/judge_calls")) > 0

    def test_kl(self, make_trainer, make_model, tmp_path):
        make_model().save_pretrained(tmp_path / "base")
        trainer = make_trainer(
            [by_kind, stepwise()], trainer_args={"model": str(tmp_path / "base")}, beta=0.04, max_steps=2
        )
        trainer.train()
        assert len(logged(trainer, "kl")) == 2

    def test_streaming(self, make_trainer, dataset):
        trainer = make_trainer(
            [by_kind, stepwise()],
            trainer_args={"train_dataset": dataset.to_iterable_dataset()},
            judge_until=0.5,
        )
        trainer.train()
        assert [count > 0 for count in logged(trainer, "sgpo/judge_calls")][2:] == [False, False]

    def test_lora(self, make_trainer):
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = make_trainer([all_failed, stepwise()], trainer_args={"peft_config": peft_config})
        start = parameters(trainer)
        trainer.train()
        moved = {name for name, value in parameters(trainer).items() if not torch.equal(value, start[name])}
        assert moved == {name for name in start if "lora_" in name}

    def test_conversation_with_a_tool_turn(self, make_trainer, chat_tokenizer, make_chat_model):
        from datasets import Dataset

        def multiply(a: int, b: int) -> int:
            """
            Multiplies two numbers.

            Args:
                a: The first number.
                b: The second number.
            """
            return a * b

        rows = Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": "What is 6 times 7?"}]] * 4, "solution": ["42"] * 4}
        )
        judge = CountingJudge()

        def wrong(prompts, completions, **kwargs):
            return [0.0] * len(completions)

        trainer = make_trainer(
            [wrong, StepwiseJudge(judge)],
            trainer_args={
                "model": make_chat_model(),
                "processing_class": chat_tokenizer,
                "train_dataset": rows,
                "tools": [multiply],
            },
            max_completion_length=400,
            max_steps=1,
            log_completions=True,
        )
        # The model is random: what it writes is given to it, the tool loop and all that follows are real
        call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call><|im_end|>'
        answers = [
            "The tool says 42.\n\nSo it is 43.<|im_end|>",
            "First I look.\n\nThen I add.\n\nIt is 40.<|im_end|>",
        ]
        turns = iter([["Let me multiply.\n" + call] * 8, [answers[i % 2] for i in range(8)]])
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
            [chat_tokenizer(text)["input_ids"] for text in next(turns)],
            None,
        )
        trainer.train()
        assert judge.calls == 8
        texts = ["".join(item.steps) for item in judge.items]
        assert all("Let me multiply." in text and 'multiply({"a": 6, "b": 7})' in text for text in texts)
        assert all(item.context and "42" in "".join(item.context.values()) for item in judge.items)
        assert {item.problem for item in judge.items} == {"What is 6 times 7?"}
        assert {item.reference for item in judge.items} == {"42"}
        assert logged(trainer, "tools/call_frequency") == [1.0]
        assert logged(trainer, "sgpo/groups/rescued") == [1.0]

    def test_a_rollout_function_that_writes_what_the_policy_did_not(self, make_trainer, tokenizer, caplog):
        def rollout(prompts, trainer):
            ids = [tokenizer("b c [V]")["input_ids"] for _ in prompts]
            return {
                "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
                "completion_ids": ids,
                "logprobs": None,
                "env_mask": [[1, 0, 1] for _ in ids],
            }

        trainer = make_trainer([all_failed, stepwise()], trainer_args={"rollout_func": rollout}, max_steps=2)
        trainer.train()
        assert caplog.text.count("rollout_func returns env_mask") == 1

    def test_environment_reward_is_an_outcome(self, make_trainer, chat_tokenizer, make_chat_model):
        from datasets import Dataset

        class Game:
            def reset(self, **kwargs):
                return " Begin."

            def get_reward(self):
                return 0.0

        judge = CountingJudge()
        rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Play."}]] * 4})
        trainer = make_trainer(
            [StepwiseJudge(judge, segmenter=words_as_steps)],
            trainer_args={
                "model": make_chat_model(),
                "processing_class": chat_tokenizer,
                "train_dataset": rows,
                "environment_factory": Game,
            },
            max_steps=1,
        )
        trainer.train()
        assert trainer.reward_func_names == ["stepwise_judge", "Game"]
        assert logged(trainer, "sgpo/groups/failed") == [1.0]
        # The judge sees the prompt as the environment rewrote it
        assert {item.problem for item in judge.items} <= {"Play. Begin."}
