"""Treatments without a judge: the formulas against naive loops, and real runs against GRPO."""

import logging
import math
import statistics
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import (
    assert_every_parameter_moved,
    assert_same_parameters,
    by_kind,
    length_reward,
    logged,
    parameters,
    record_advantages,
    record_rounds,
)
from toys import CountingJudge, all_failed, all_mixed, stepwise
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo.groups import group_advantages
from trl_sgpo.treatments.without_judge import (
    LENS_MARGIN,
    lens_advantages,
    lens_rewards,
    ngrpo_advantages,
    nsr_advantages,
    sequence_likelihood,
    zvp_advantages,
)


NAN = math.nan
NAMES = ["nsr", "ngrpo", "zvp", "lens"]


def random_outcomes(seed, n_groups=6, size=5):
    """Wrong outcomes, some equal, some graded, some missing."""
    torch.manual_seed(seed)
    outcome = torch.randint(0, 3, (n_groups, size)).float() * (torch.rand(n_groups, 1) < 0.5) * 0.2
    return outcome.masked_fill(torch.rand(n_groups, size) < 0.2, NAN)


class TestFormulas:
    @pytest.mark.parametrize("seed", range(5))
    def test_nsr_equals_loop(self, seed):
        outcome = random_outcomes(seed)
        for row, found in zip(outcome.tolist(), nsr_advantages(outcome).tolist(), strict=True):
            assert found == [0.0 if math.isnan(value) else -1.0 for value in row]

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("max_reward", [1.0, 2.0])
    def test_ngrpo_equals_loop(self, seed, max_reward):
        outcome = random_outcomes(seed)
        for row, found in zip(outcome.tolist(), ngrpo_advantages(outcome, max_reward).tolist(), strict=True):
            rewards = [value for value in row if not math.isnan(value)] + [max_reward]
            if len(rewards) < 2:
                assert not any(found)
                continue
            mean, std = statistics.mean(rewards), statistics.stdev(rewards)
            expected = [0.0 if math.isnan(value) else (value - mean) / (std + 1e-4) for value in row]
            assert found == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("n", [2, 4, 8, 16])
    @pytest.mark.parametrize("reward", [0.0, -1.0])
    def test_ngrpo_of_equal_rewards_is_the_papers(self, n, reward):
        assert ngrpo_advantages(torch.full((1, n), reward))[0].tolist() == pytest.approx(
            [-1 / math.sqrt(n + 1)] * n, rel=1e-3
        )

    @pytest.mark.parametrize("seed", range(5))
    def test_zvp_equals_loop(self, seed):
        torch.manual_seed(seed)
        entropy, mask = 3 * torch.rand(6, 9), torch.rand(6, 9) < 0.6
        mask[0] = False
        found = zvp_advantages(entropy, mask, alpha=0.2)
        for i in range(6):
            own = [entropy[i, t].item() for t in range(9) if mask[i, t]]
            for t in range(9):
                expected = -0.2 * (max(own) - entropy[i, t].item()) if mask[i, t] else 0.0
                assert found[i, t].item() == pytest.approx(expected, abs=1e-6)
        assert (found <= 0).all()

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("difficulty", [1.0, 0.6])
    def test_lens_equals_loop(self, seed, difficulty):
        torch.manual_seed(seed)
        likelihood = torch.rand(6, 5).masked_fill(torch.rand(6, 5) < 0.2, NAN)
        found = lens_advantages(likelihood, difficulty)
        for row, advantages in zip(likelihood.tolist(), found.tolist(), strict=True):
            rewards = {}
            for i, pi in enumerate(row):
                if not math.isnan(pi):
                    pi = min(pi, difficulty * (1 - LENS_MARGIN))
                    rewards[i] = -pi / (difficulty - pi)
            values = list(rewards.values())
            for i, advantage in enumerate(advantages):
                expected = 0.0
                if i in rewards and len(values) > 1:
                    expected = (rewards[i] - statistics.mean(values)) / (statistics.stdev(values) + 1e-4)
                assert advantage == pytest.approx(expected, abs=1e-3)

    def test_lens_blames_the_surest_most(self):
        likelihood = torch.tensor([[0.1, 0.9, 0.5, 1.0, 0.3]])
        advantage = lens_advantages(likelihood)[0]
        assert advantage.argsort().tolist() == likelihood[0].argsort(descending=True).tolist()

    @pytest.mark.parametrize("size", [3, 6, 7, 8])
    def test_lens_ties_are_exactly_dead(self, size):
        likelihood = torch.full((1, size), 0.3)
        assert not lens_advantages(likelihood).any()
        rounded = likelihood + torch.linspace(0, 1e-7, size)
        assert group_advantages(lens_rewards(rounded)).any()
        assert not lens_advantages(rounded).any()
        # Equal because all reach the pole
        assert not lens_advantages(likelihood + torch.linspace(0.1, 0.2, size), difficulty=0.3).any()
        assert lens_advantages(likelihood + torch.linspace(0, 1e-3, size)).any()

    def test_likelihood_is_normalised_by_length(self):
        logps = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -2.0, -3.0], [-1.0, -2.0, NAN]])
        mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
        found = sequence_likelihood(logps, mask)
        assert found[:2].tolist() == pytest.approx([math.exp(-1.5), math.exp(-2)])
        assert math.isnan(found[2])


def expected_advantages(name, found):
    """What a treatment gives each completion (or token) of a round if its group failed with outcomes of 0, by a loop."""
    n_rows, length = found["completion_ids"].shape
    own = [[t for t in range(length) if found["completion_mask"][i, t]] for i in range(n_rows)]
    if name == "nsr":
        return torch.full((n_rows,), -1.0)
    if name == "ngrpo":
        return torch.full((n_rows,), -1 / math.sqrt(5))
    if name == "zvp":
        expected = torch.zeros(n_rows, length)
        for i in range(n_rows):
            highest = max(found["entropy"][i, t] for t in own[i])
            for t in own[i]:
                expected[i, t] = -0.1 * (highest - found["entropy"][i, t])
        return expected
    pi = [math.exp(statistics.mean(found["logps"][i, t].item() for t in own[i])) for i in range(n_rows)]
    rewards = [-p / (1 - p) for p in pi]
    expected = []
    for i in range(n_rows):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        expected.append((rewards[i] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4))
    return torch.tensor(expected)


class TestTraining:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_group_fails(self, make_trainer, name):
        trainer = make_trainer([all_failed], failed_groups=name, max_steps=1, log_completions=True)
        rounds = record_rounds(trainer)
        start = parameters(trainer)
        trainer.train()
        assert_every_parameter_moved(start, trainer)
        (found,) = rounds
        expected = expected_advantages(name, found)
        torch.testing.assert_close(found["advantages"], expected, rtol=2e-3, atol=1e-5)
        if name == "zvp":
            expected = expected.sum(dim=1) / found["completion_mask"].sum(dim=1)
        table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
        assert table["advantage"].tolist() == pytest.approx(expected.tolist(), rel=2e-3, abs=1e-5)
        assert "judge_status" not in table.columns
        log = trainer.state.log_history[0]
        assert log["sgpo/groups/failed"] == 1
        assert not [key for key in log if "rescued" in key or "judge" in key or "groups/dead" in key]

    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_added_to_what_the_rewards_give_failed_groups_only(self, make_trainer, name):
        funcs = [by_kind, length_reward]
        config = {"per_device_train_batch_size": 16, "max_steps": 1, "reward_weights": [1.0, 0.3]}
        grpo = make_trainer(funcs, GRPOTrainer, GRPOConfig, **config)
        plain = record_rounds(grpo)
        grpo.train()
        trainer = make_trainer(funcs, outcome_reward="by_kind", failed_groups=name, failed_group_weight=0.5, **config)
        rounds = record_rounds(trainer)
        trainer.train()
        plain, found = plain[0]["advantages"], rounds[0]
        kinds = trainer.state.log_history[0]
        assert kinds["sgpo/groups/failed"] == kinds["sgpo/groups/mixed"] == 0.5
        # A mixed group of four has two completions that are more than 0.8 above the mean: length matters little
        failed = (plain.view(-1, 4).abs().amin(dim=1) < 0.8).repeat_interleave(4)
        advantages = found["advantages"]
        if name == "zvp":
            failed, plain = failed.unsqueeze(1), plain.unsqueeze(1).expand_as(advantages)
        expected = torch.where(failed, plain + 0.5 * expected_advantages(name, found), plain)
        torch.testing.assert_close(advantages, expected, rtol=2e-3, atol=1e-5)
        kept = ~failed.expand_as(advantages)
        assert kept.float().mean() == 0.5
        assert torch.equal(advantages[kept], plain[kept])  # bit for bit
        assert not torch.equal(advantages, plain)

    @pytest.mark.parametrize("name", NAMES)
    def test_no_failed_group(self, make_trainer, name):
        grpo = make_trainer([all_mixed], GRPOTrainer, GRPOConfig, max_steps=2)
        grpo.train()
        trainer = make_trainer([all_mixed, stepwise()], failed_groups=name, max_steps=2)
        monitored, n_forward = trainer._get_per_token_logps_and_entropies, []
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
            n_forward.append(torch.is_grad_enabled()) or monitored(*args, **kwargs)
        )
        trainer.train()
        assert_same_parameters(grpo, trainer)
        assert n_forward == [True, True]  # those of the loss, none for the treatment

    def test_none_is_grpo_and_asks_no_judge(self, make_trainer):
        config = {"max_steps": 2, "log_completions": True}
        grpo = make_trainer([by_kind, length_reward], GRPOTrainer, GRPOConfig, **config)
        grpo.train()
        judge = CountingJudge()
        trainer = make_trainer(
            [by_kind, stepwise(judge), length_reward], outcome_reward="by_kind", failed_groups="none", **config
        )
        trainer.train()
        assert judge.calls == 0
        assert_same_parameters(grpo, trainer)
        assert trainer.state.log_history[0]["sgpo/groups/failed"] > 0
        assert not [key for key in trainer.state.log_history[0] if "rescued" in key or "judge_" in key]
        table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00002.parquet")
        assert "judge_status" not in table.columns

    def test_a_judge_in_the_list_is_not_asked(self, make_trainer, caplog):
        runs, judge = [], CountingJudge()
        with caplog.at_level(logging.INFO, logger="trl_sgpo.trainer"):
            for funcs in ([by_kind], [stepwise(judge), by_kind]):
                # What would be refused or warned of with a judge is nothing to a treatment without one
                trainer = make_trainer(
                    funcs, failed_groups="nsr", max_steps=1, multi_objective_aggregation="normalize_then_sum"
                )
                rounds = record_advantages(trainer)
                trainer.train()
                runs.append(rounds[0])
        assert judge.calls == 0
        assert torch.equal(*runs)
        assert (runs[0] == -1).sum() == 4 * 2 * logged(trainer, "sgpo/groups/failed")[0]
        assert caplog.text.count("failed_groups='nsr': the StepwiseJudge in reward_funcs is not asked") == 1

    @pytest.mark.parametrize("name", NAMES)
    def test_completions_without_an_outcome(self, make_trainer, name):
        def sometimes(prompts, completions, **kwargs):
            return [None if i % 4 == 3 else 0.0 for i in range(len(completions))]

        # RL-ZVP gives a completion of one token nothing
        full_length = {"suppress_tokens": [0, 1]}
        trainer = make_trainer([sometimes], failed_groups=name, max_steps=1, generation_kwargs=full_length)
        rounds = record_rounds(trainer)
        trainer.train()
        advantages = rounds[0]["advantages"].view(2, 4, -1)
        assert not advantages[:, 3].any()
        assert advantages[:, :3].flatten(2).any(dim=2).all()
        if name == "ngrpo":
            torch.testing.assert_close(advantages[:, :3], torch.full((2, 3, 1), -0.5), rtol=1e-3, atol=0)
        if name == "lens":
            assert advantages.sum(dim=1).abs().max() < 1e-3  # the mean is that of the three

    @pytest.mark.parametrize("name", ["zvp", "lens"])
    def test_tool_tokens(self, make_trainer, monkeypatch, name):
        inner = GRPOTrainer._generate_and_score_completions

        def with_tools(self, inputs):
            output = inner(self, inputs)
            output["tool_mask"] = torch.ones_like(output["completion_mask"])
            output["tool_mask"][:, 1:4] = 0
            return output

        monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_tools)
        trainer = make_trainer(
            [all_failed], failed_groups=name, max_steps=1, generation_kwargs={"suppress_tokens": [0, 1]}
        )
        rounds = record_rounds(trainer)
        trainer.train()
        (found,) = rounds
        found["completion_mask"] = found["completion_mask"] * found["tool_mask"]
        torch.testing.assert_close(found["advantages"], expected_advantages(name, found), rtol=2e-3, atol=1e-5)
        if name == "zvp":
            assert not found["advantages"][:, 1:4].any()

    def test_not_in_evaluation(self, make_trainer, dataset):
        trainer = make_trainer(
            [all_failed], trainer_args={"eval_dataset": dataset}, failed_groups="zvp", exclude_dead_groups=True
        )
        rounds = record_advantages(trainer)
        trainer.evaluate()
        assert rounds
        assert not any(advantages.any() for advantages in rounds)

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("zvp", {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}),
            ("lens", {"num_iterations": 2}),  # there the log-probabilities are there already
            ("zvp", {"mask_truncated_completions": True, "loss_type": "grpo"}),
            ("lens", {"mask_truncated_completions": True, "bf16": True}),
        ],
        ids=lambda value: value if isinstance(value, str) else "-".join(value),
    )
    def test_options_of_trl(self, make_trainer, name, config):
        trainer = make_trainer([all_failed], failed_groups=name, max_steps=2, **config)
        forward_sizes = []
        inner = trainer._get_per_token_logps_and_entropies

        def recorded(model, input_ids, *args, batch_size=None, **kwargs):
            forward_sizes.append(batch_size or len(input_ids))
            return inner(model, input_ids, *args, batch_size=batch_size, **kwargs)

        trainer._get_per_token_logps_and_entropies = recorded
        start = parameters(trainer)
        trainer.train()
        assert_every_parameter_moved(start, trainer)
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
        assert max(forward_sizes) <= trainer.args.per_device_train_batch_size
        if name == "lens" and "num_iterations" in config:
            assert len(forward_sizes) == 3  # TRL's own for the round, and one per update

    def test_model_card(self, make_trainer, tmp_path):
        trainer = make_trainer([by_kind, stepwise()], failed_groups="ngrpo")
        trainer.create_model_card(model_name="tiny")
        text = (tmp_path / "run" / "README.md").read_text()
        assert "advantages of the treatment `ngrpo`" in text
        assert "judged step by step" not in text

    def test_sequence_ratios_are_warned_of(self, make_trainer):
        with pytest.warns(UserWarning, match="the treatment 'zvp' no longer tells the tokens apart"):
            make_trainer([by_kind], failed_groups="zvp", importance_sampling_level="sequence")
