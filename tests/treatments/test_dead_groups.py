"""The exclusion of dead groups: the gradient is that of a batch without them."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import (
    assert_same_parameters,
    by_kind,
    logged,
    parameters,
    record_advantages,
    record_rounds,
)
from toys import all_failed, all_mixed, stepwise
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SGPOConfig
from trl_sgpo.groups import group_advantages
from trl_sgpo.treatments.dead_groups import exclusion_factor


class TestFactor:
    def test_exclusion_factor(self):
        size = torch.tensor([[3.0, 5.0], [2.0, 2.0], [1.0, 7.0]])
        assert exclusion_factor(torch.tensor([True, True, True]), size) == 1
        assert exclusion_factor(torch.tensor([False, False, False]), size) == 1
        assert exclusion_factor(torch.tensor([False, True, True]), size) == pytest.approx(20 / 12)
        assert exclusion_factor(torch.tensor([True, False]), torch.tensor([[0, 0], [1, 2]])) == 1  # live, all masked


class TestDeadGroups:
    @pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "bnpo", "grpo", "sapo", "dr_grpo", "luspo"])
    @pytest.mark.filterwarnings("ignore")
    def test_gradient_is_that_of_a_batch_without_them(self, make_trainer, loss_type):
        # Two micro-batches, save for the loss that divides by the tokens of each
        split = {} if loss_type == "bnpo" else {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
        n_parts = len(split) or 1
        trainer = make_trainer(
            [by_kind],
            exclude_dead_groups=True,
            loss_type=loss_type,
            per_device_train_batch_size=16 // n_parts,
            max_steps=1,
            **split,
        )
        inner, parts, ours = trainer._compute_loss, [], []

        def gradient(model, inputs):
            return torch.autograd.grad(inner(model, inputs), list(model.parameters()), retain_graph=True)

        def compared(model, inputs):
            # Ratios on both sides of the clipping range
            generator = torch.Generator().manual_seed(len(parts))
            shape = inputs["completion_ids"].shape
            inputs = {**inputs, "old_per_token_logps": -3 + torch.randn(shape, generator=generator)}
            parts.append(inputs)
            ours.append(gradient(model, inputs))
            if len(parts) == n_parts:
                live = {key: torch.cat([part[key] for part in parts]) for key in inputs if inputs[key].dim()}
                alive = live["advantages"] != 0
                live = {key: value[alive] for key, value in live.items()}
                assert len(alive) == 2 * len(live["advantages"]) == 16
                # A mixed group holds 0, 1, 0, 1
                live["advantages"] = live["advantages"].sign() * group_advantages(torch.tensor([[0.0, 1, 0, 1]]))[0, 1]
                live["num_items_in_batch"] = live["completion_mask"].sum()
                trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
                theirs = gradient(model, live)
                total = [sum(gradients) for gradients in zip(*ours, strict=True)]
                for a, b in zip(total, theirs, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
                assert max(value.abs().max() for value in theirs) > 1e-3
                compared.done = True
                trainer.args.steps_per_generation = n_parts
            return inner(model, inputs)

        trainer._compute_loss = compared
        trainer.train()
        assert compared.done
        assert logged(trainer, "sgpo/groups/dead") == [0.5]

    def test_nothing_is_dead(self, make_trainer):
        grpo = make_trainer([all_mixed], GRPOTrainer, GRPOConfig, max_steps=2)
        grpo.train()
        trainer = make_trainer([all_mixed], exclude_dead_groups=True, max_steps=2)
        trainer.train()
        assert_same_parameters(grpo, trainer)
        assert logged(trainer, "sgpo/groups/dead") == [0.0, 0.0]

    def test_nothing_is_alive(self, make_trainer):
        trainer = make_trainer([all_failed], exclude_dead_groups=True, max_steps=1)
        start = parameters(trainer)
        trainer.train()
        assert_same_parameters(start, trainer)
        assert logged(trainer, "sgpo/groups/dead") == [1.0]

    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    def test_what_rounding_leaves_is_no_advantage(self, make_trainer, aggregation):
        def equal(prompts, completions, **kwargs):
            return [0.3] * len(completions)

        def half(prompts, completions, kind, **kwargs):
            return [float(i % 2) if k == "mixed" else 0.3 for i, k in enumerate(kind)]

        config = {
            "num_generations": 6,
            "per_device_train_batch_size": 24,
            "max_steps": 1,
            "multi_objective_aggregation": aggregation,
        }
        grpo = make_trainer([equal, half], GRPOTrainer, GRPOConfig, **config)
        plain = record_advantages(grpo)
        grpo.train()
        trainer = make_trainer([equal, half], exclude_dead_groups=True, log_completions=True, **config)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/groups/dead") == [0.5]
        dead = rounds[0] == 0
        assert dead.sum() == 12
        assert 0 < plain[0][dead].abs().max() < 1e-2  # no group is dead to TRL
        factor = rounds[0][~dead] / plain[0][~dead]
        assert factor.max() - factor.min() < 1e-5
        assert factor[0] > 1.5
        table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
        assert table["advantage"].tolist() == pytest.approx(rounds[0].tolist())

    @pytest.mark.parametrize("treatment", ["sgpo", "prefix"])
    def test_with_a_judge(self, make_trainer, treatment):
        # Wrong from the first step on: such groups are tied. A right step each: with credit per token they teach
        first_error = 0 if treatment == "sgpo" else 1
        trainer = make_trainer(
            [by_kind, stepwise(lambda problem, steps: min(first_error, len(steps) - 1))],
            exclude_dead_groups=True,
            failed_groups=treatment,
            per_device_train_batch_size=16,
            max_steps=1,
        )
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/groups/dead") == [0.5 if treatment == "sgpo" else 0.0]
        largest = rounds[0].abs().view(16, -1).amax(dim=1)
        if treatment == "sgpo":
            assert sorted(largest.tolist())[8:] == pytest.approx([largest.max().item()] * 8)
            assert largest.max() > 1.1
        else:
            assert largest.max() == SGPOConfig.prefix_reward  # nobody is dead, so nothing is scaled

    def test_advantages_per_token(self, make_trainer):
        def failed_or_solved(prompts, completions, kind, **kwargs):
            return [0.0 if k == "failed" else 1.0 for k in kind]

        runs = []
        for exclude in (False, True):
            trainer = make_trainer(
                [failed_or_solved],
                failed_groups="zvp",
                log_completions=True,
                exclude_dead_groups=exclude,
                per_device_train_batch_size=16,
                max_steps=1,
            )
            rounds = record_rounds(trainer)
            trainer.train()
            runs.append(rounds[0])
        without, found = runs
        live_groups = without["advantages"].view(4, -1).any(dim=1)
        assert live_groups.sum() == 2
        lengths = found["completion_mask"].view(4, -1).sum(dim=1)
        factor = lengths.sum() / lengths[live_groups].sum()
        assert factor > 1
        torch.testing.assert_close(found["advantages"], factor * without["advantages"])
        torch.testing.assert_close(found["logged"], factor * without["logged"])
        assert without["logged"].any()

    def test_without_the_setting_nothing_is_counted(self, make_trainer):
        trainer = make_trainer([all_failed], max_steps=1)
        trainer.train()
        assert not logged(trainer, "sgpo/groups/dead")

    def test_an_unknown_loss_is_refused(self, make_trainer, monkeypatch):
        # Before any weight is touched: super is not reached
        monkeypatch.setattr(GRPOTrainer, "__init__", lambda *args, **kwargs: pytest.fail("super was reached"))
        message = (
            r"exclude_dead_groups=True cannot be combined with loss_type='new_loss'.*Use one of \['bnpo', 'cispo'"
        )
        with pytest.raises(ValueError, match=message):
            make_trainer([by_kind], exclude_dead_groups=True, loss_type="new_loss")
