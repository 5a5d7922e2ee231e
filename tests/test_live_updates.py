"""Trainings in which compute and updates go only where there is credit."""

import itertools

import pytest
import torch
from conftest import assert_every_parameter_moved, assert_same_parameters, by_kind, logged, parameters
from toys import all_failed, all_mixed, stepwise
from transformers import MixtralConfig, MixtralForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.live_tokens import RESIDUE
from trl_sgpo.live_updates import check_skipping


def all_the_same(prompts, completions, **kwargs):
    """Eight times 0.7 leaves the mean a little off."""
    return [0.7] * len(completions)


def first_round_mixed():
    """Mixed groups in the first round, and failed ones in all others."""
    rounds = iter([1.0])

    def outcome(prompts, completions, **kwargs):
        best = next(rounds, 0.0)
        return [best * float(i % 2) for i in range(len(completions))]

    return outcome


def forward_tokens(trainer):
    """The number of tokens, padding included, of every forward pass with a gradient."""
    sizes = []
    inner = trainer._get_per_token_logps_and_entropies

    def counting(model, input_ids, *args, **kwargs):
        if torch.is_grad_enabled():
            sizes.append(input_ids.numel())
        return inner(model, input_ids, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = counting
    return sizes


class TestDeadTokens:
    @pytest.mark.parametrize(
        "config",
        [
            {"failed_groups": "none"},
            {"failed_groups": "prefix"},
            {"failed_groups": "prefix", "loss_type": "grpo"},
            {"failed_groups": "prefix", "loss_type": "bnpo"},
            {"failed_groups": "sgpo", "loss_type": "dr_grpo", "exclude_dead_groups": True},
            # Updates of 6, 2, 6 and 2 micro-batches: they straddle rounds, and each epoch ends in an incomplete one
            {"gradient_accumulation_steps": 6, "num_iterations": 1, "max_steps": -1, "num_train_epochs": 2},
        ],
    )
    def test_training_is_the_same(self, make_trainer, config):
        """Two updates for each round, each of two micro-batches, and every round is trained on twice."""
        batches = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "num_iterations": 2,
        }
        trainers, sizes = {}, {}
        for skip in (False, True):
            settings = {"max_steps": 6, **batches, **config}
            trainer = make_trainer([by_kind, stepwise()], skip_dead_tokens=skip, **settings)
            before = parameters(trainer)
            sizes[skip] = forward_tokens(trainer)
            trainer.train()
            trainers[skip] = trainer
        assert_every_parameter_moved(before, trainers[True])
        for a, b in zip(*(trainer.model.parameters() for trainer in trainers.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        assert len(sizes[True]) == len(sizes[False]) == (12 if settings["max_steps"] == 6 else 16)
        assert sum(sizes[True]) < sum(sizes[False])
        # Logged once for each of the rounds, which are of different sizes
        shares = logged(trainers[True], "sgpo/trained_tokens")
        assert min(shares) < sum(sizes[True]) / sum(sizes[False]) < max(shares)
        assert not logged(trainers[False], "sgpo/trained_tokens")
        assert logged(trainers[True], "loss") == pytest.approx(logged(trainers[False], "loss"), abs=1e-4)

    def test_equal_rewards_are_dead_whatever_residue_the_mean_leaves(self, make_trainer):
        config = {"per_device_train_batch_size": 8, "num_generations": 8, "max_steps": 1}
        rounds = []
        for skip in (False, True):
            trainer = make_trainer([all_the_same], failed_groups="none", skip_dead_tokens=skip, **config)
            sizes = forward_tokens(trainer)
            before = parameters(trainer)
            trainer.train()
            assert logged(trainer, "sgpo/dead_updates") == [1.0]
            rounds.append(sizes[0])
            moved = any(not torch.equal(before[name], value) for name, value in parameters(trainer).items())
            assert moved is not skip  # Adam makes a full step of the residue
            advantages = trainer._buffered_inputs[0]["advantages"]
            assert bool((advantages == 0).all()) is skip
        assert rounds[1] < 30  # one row, and one token of its completion
        assert logged(trainer, "sgpo/trained_tokens") == [rounds[1] / rounds[0]]

    def test_batches_have_nothing_more_than_those_of_trl(self, make_trainer):
        trainer = make_trainer([all_mixed], failed_groups="none", max_steps=1)
        trainer.train()
        assert all(RESIDUE not in batch for batch in trainer._buffered_inputs)


class TestDeadUpdates:
    def train(self, make_trainer, **config):
        trainer = make_trainer([first_round_mixed()], failed_groups="none", weight_decay=0.1, **config)
        seen = []
        inner = trainer.training_step

        def recording(*args):
            seen.append(parameters(trainer))
            return inner(*args)

        trainer.training_step = recording
        trainer.train()
        return trainer, [*seen, parameters(trainer)]

    def test_weights_wait_and_the_schedule_goes_on(self, make_trainer):
        trainer, seen = self.train(make_trainer, skip_dead_updates=True, lr_scheduler_type="linear")
        assert_every_parameter_moved(seen[0], seen[1])
        for after in seen[2:]:
            assert_same_parameters(seen[1], after)
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}
        assert logged(trainer, "sgpo/dead_updates") == [0.0, 1.0, 1.0, 1.0]
        assert trainer.state.global_step == 4
        rates = logged(trainer, "learning_rate")
        assert rates == sorted(rates, reverse=True)
        assert len(set(rates)) == 4

    def test_without_the_option_momentum_moves_them(self, make_trainer):
        trainer, seen = self.train(make_trainer)
        for before, after in itertools.pairwise(seen[1:]):
            assert_every_parameter_moved(before, after)
        assert logged(trainer, "sgpo/dead_updates") == [0.0, 1.0, 1.0, 1.0]

    def test_an_update_is_alive_if_one_of_its_micro_batches_is(self, make_trainer, dataset):
        """One group in each micro-batch, of which the first one in each update failed."""
        rows = dataset.select([i for kind in range(2) for i in range(8) if (i % 2 == 1) == bool(kind)][2:6])
        config = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
        trainer = make_trainer(
            [by_kind],
            failed_groups="none",
            skip_dead_updates=True,
            shuffle_dataset=False,
            trainer_args={"train_dataset": rows},
            **config,
        )
        before = parameters(trainer)
        trainer.train()
        kinds = rows["kind"]
        assert kinds == ["failed", "failed", "mixed", "mixed"]
        assert logged(trainer, "sgpo/dead_updates") == [1.0, 0.0]
        assert_every_parameter_moved(before, trainer)

    def test_without_failed_groups_it_is_grpo(self, make_trainer):
        grpo = make_trainer([all_mixed], GRPOTrainer, GRPOConfig)
        grpo.train()
        sgpo = make_trainer([all_mixed, stepwise()], skip_dead_updates=True)
        sgpo.train()
        assert_same_parameters(grpo, sgpo)
        assert set(logged(sgpo, "sgpo/dead_updates")) == {0.0}

    def test_a_treatment_makes_them_alive(self, make_trainer):
        trainer = make_trainer([all_failed, stepwise()], skip_dead_updates=True, max_steps=2)
        before = parameters(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/dead_updates") == [0.0, 0.0]
        assert_every_parameter_moved(before, trainer)


class TestSubclasses:
    both = {"failed_groups": "none", "skip_dead_tokens": True, "skip_dead_updates": True, "max_steps": 1}

    def test_advantages_that_they_change_count(self, make_trainer):
        class Changes(SGPOTrainer):
            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                return {**output, "advantages": torch.ones_like(output["advantages"])}

        trainer = make_trainer([all_failed], Changes, **self.both)
        before = parameters(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/dead_updates") == [0.0]
        assert_every_parameter_moved(before, trainer)

    def test_they_may_hand_on_what_grpo_has_only(self, make_trainer):
        class Bare(SGPOTrainer):
            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                return {name: value for name, value in output.items() if name != RESIDUE}

        trainer = make_trainer([first_round_mixed()], Bare, **{**self.both, "max_steps": 2})
        trainer.train()
        assert logged(trainer, "sgpo/dead_updates") == [0.0, 1.0]

    def test_nothing_is_left_out_of_batches_of_their_own(self, make_trainer):
        class Own(SGPOTrainer):
            def _prepare_inputs(self, generation_batch):
                return GRPOTrainer._prepare_inputs(self, generation_batch)

        trainer = make_trainer([all_mixed], Own, **self.both)
        before = parameters(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/dead_updates") == []
        assert_every_parameter_moved(before, trainer)


REFUSED = [
    ({"skip_dead_tokens": True, "beta": 0.04}, "skip_dead_tokens=True cannot be combined with beta=0.04"),
    ({"skip_dead_updates": True, "beta": 0.04}, "skip_dead_updates=True cannot be combined with beta=0.04"),
    ({"skip_dead_tokens": True, "entropy_coef": 0.1}, "entropy_coef=0.1"),
    ({"skip_dead_updates": True, "use_adaptive_entropy": True}, "use_adaptive_entropy=True"),
    ({"skip_dead_tokens": True, "top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2"),
    ({"skip_dead_tokens": True, "loss_type": "other"}, "loss_type='other'"),
    ({"skip_dead_updates": True, "deepspeed_plugin": object()}, "DeepSpeed"),
    ({"skip_dead_updates": True, "optim": "adalomo"}, "optim='adalomo'"),
    ({"skip_dead_updates": True, "optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
    ({"skip_dead_updates": True, "fp16": True, "max_grad_norm": 0.0}, "max_grad_norm=0.0"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused_where_nothing_may_be_left_out(tmp_path, settings, message):
    args = SGPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    check_skipping(args)
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        check_skipping(args)


def test_an_entropy_quantile_does_not_keep_updates_alive(tmp_path):
    args = SGPOConfig(str(tmp_path), use_cpu=True, bf16=False, skip_dead_updates=True, top_entropy_quantile=0.2)
    check_skipping(args)


def test_it_is_refused_before_weights_are_loaded(tmp_path):
    args = SGPOConfig(str(tmp_path), use_cpu=True, bf16=False, skip_dead_tokens=True, beta=0.1)
    with pytest.raises(ValueError, match=r"Set beta=0\.0, or leave skip_dead_tokens out"):
        SGPOTrainer("no such model", [all_failed], args)


@pytest.mark.parametrize("option", ["skip_dead_tokens", "skip_dead_updates"])
def test_refused_with_a_router_loss(make_trainer, tokenizer, option):
    def model():
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
            )
        )

    with pytest.raises(ValueError, match=r"Set router_aux_loss_coef=0\.0"):
        make_trainer([all_failed], trainer_args={"model": model()}, router_aux_loss_coef=0.01, **{option: True})
    make_trainer([all_failed], trainer_args={"model": model()}, router_aux_loss_coef=0.0, **{option: True})
