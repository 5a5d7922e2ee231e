"""Credit against the group's own baseline: its pure functions against naive loops, and real runs against a loop over the table."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import assert_same_parameters, by_kind, logged, parameters, record_advantages
from hypothesis import given
from hypothesis import strategies as st
from toys import FixedJudge, all_failed, all_mixed, fixed, stepwise, tensor
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SGPOConfig, Verdict
from trl_sgpo.judges.stepwise import StepScore
from trl_sgpo.rounds import verified_steps
from trl_sgpo.steps import rts_by_steps
from trl_sgpo.treatments.prefix import credited_groups
from trl_sgpo.treatments.prefix_baseline import centred_credit


def naive_credit(group, error, reward=1.0, penalty=1.0):
    """
    What each verified step of a completion earns, and then the first wrong one, whose index is `error`. `group` holds that
    index for each completion: infinite if there is none, None without a verdict.
    """
    earned = []
    for k in range(error + 1):
        here = [other for other in group if other is not None and other >= k]
        p = sum(other > k for other in here) / len(here)
        earned.append(reward * (1 - p) if k < error else -penalty * p)
    return earned


def gathered(scores):
    """What all ranks know of a group's scores, in the precision in which they know it."""
    steps, n_steps = tensor([[score.rts_steps, score.n_steps] if score else [None] * 2 for score in scores]).T
    return SimpleNamespace(
        rts_steps_PG=steps[None], n_steps_PG=n_steps[None], n_unchecked_PG=torch.zeros(1, len(scores))
    )


def score_of(error, n_steps):
    return StepScore("error", error, n_steps, rts_by_steps(error, n_steps), 0.0, "", True)


@given(st.lists(st.sampled_from([None, math.inf, *range(7)]), min_size=1, max_size=8))
def test_credit_equals_a_naive_loop(group):
    scores = [None if error in (None, math.inf) else score_of(error, error + 3) for error in group]
    (verified,) = verified_steps(gathered(scores))
    verified[torch.tensor([error == math.inf for error in group])] = torch.inf
    for score, error in zip(scores, group, strict=True):
        if score is not None:
            found = centred_credit(verified, error, 0.7, 0.4)
            assert found.tolist() == pytest.approx(naive_credit(group, error, 0.7, 0.4), abs=1e-6)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_the_credit_of_a_step_sums_to_zero(n_verified):
    verified = torch.tensor(n_verified, dtype=torch.float32)
    earned = [centred_credit(verified, n).tolist() for n in n_verified]
    for k in range(max(n_verified) + 1):
        assert sum(values[k] for values in earned if k < len(values)) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 99), st.integers(1, 16))
def test_where_all_get_equally_far_nothing_is_left(error, size):
    """Not even a rounding residue, which Adam would turn into a full-size step."""
    (verified,) = verified_steps(gathered([score_of(error, error + 1)] * size))
    assert not centred_credit(verified, error, 0.3, 0.7).any()


def test_a_step_that_all_get_right_earns_nothing():
    verified = torch.tensor([3.0, 7.0, 4.0, math.nan, math.inf])
    for n in (3, 7, 4):
        assert not centred_credit(verified, n)[:3].any()


@given(st.integers(1, 4_000_000), st.data())
def test_the_number_of_verified_steps_is_exact(n_steps, data):
    first_error = data.draw(st.integers(0, n_steps - 1))
    assert verified_steps(gathered([score_of(first_error, n_steps)])).item() == first_error


def test_an_empty_completion_and_no_verdict():
    empty = StepScore("error", None, 0, 0.0, 0.0, "", called=False)
    abstains = StepScore("abstain", None, 3, None, None, "", True)
    verified = verified_steps(gathered([empty, abstains, None]))
    assert verified[0, 0] == 0
    assert torch.isnan(verified[0, 1:]).all()


def test_a_group_in_which_all_get_equally_far_is_tied():
    verified = tensor([[2, 2, None], [2, 1, None], [0, 0, 0], [3, None, None]])
    groups = credited_groups(torch.zeros(4, 3), verified, torch.ones(4, dtype=torch.bool), relative=True)
    assert groups.rescued_P.tolist() == [False, True, False, False]
    assert groups.tied_P.tolist() == [True, False, True, False]


@pytest.fixture
def make_trainer(make_trainer, tokenizer):
    """As everywhere, our trainers with the baseline, and no completion ends before its length: each token is a step."""
    full_length = {"suppress_tokens": [tokenizer.pad_token_id, tokenizer.eos_token_id]}

    def make(funcs, *classes, **config):
        ours = {} if classes else {"failed_groups": "prefix", "prefix_baseline": "group"}
        return make_trainer(funcs, *classes, **{"generation_kwargs": full_length, **ours, **config})

    return make


def random_verdicts(items):
    rng = random.Random(5)
    return [
        Verdict.abstain("no idea") if rng.random() < 0.45 else Verdict.error(rng.randrange(5) % len(item.steps))
        for item in items
    ]


def random_outcome(prompts, completions, **kwargs):
    """Failed and mixed groups in turn, with a None here and there."""
    rng = random.Random(5)
    return [
        None if rng.random() < 0.1 else float(i // 4 % 2 and (i % 4 == 0 or rng.random() < 0.2))
        for i in range(len(completions))
    ]


def reference(table, plain, length, config):
    """The advantages of each token, by a loop over the groups of the completions table."""
    reward, penalty = config.get("prefix_reward", 1.0), config.get("error_penalty", 1.0)
    weight = config.get("failed_group_weight", 1.0)
    expected = plain.unsqueeze(1).repeat(1, length)
    kinds = []
    for i in range(0, len(table), 4):
        rows = range(i, i + 4)
        scored = [j for j in rows if not math.isnan(table["random_outcome"][j])]
        right = [j for j in scored if table["random_outcome"][j] >= 0.5]
        group, judged = [], []
        for j in rows:
            error = table["judge_first_error"][j]
            if j in right:
                group.append(math.inf)
            elif table["judge_status"][j] == "error":
                judged.append(j)
                group.append(0 if math.isnan(error) else int(error))
            else:
                group.append(None)
        wrong = [j for j in scored if j not in right]
        if len(scored) < 2 or not judged or 2 * len(judged) < len(wrong):
            kinds.append("too few in a mixed group" if right and judged else "left")
            continue
        if not right and len({group[j - i] for j in judged}) == 1:
            kinds.append("tied")
            continue
        kinds.append("mixed" if right else "rescued")
        for j in judged:
            if right:
                expected[j] = expected[j].clamp(min=0)
            for t, value in enumerate(naive_credit(group, group[j - i], reward, penalty)):
                expected[j, t] += value * (1.0 if right else weight)
    return expected, kinds


CONFIGS = [{}, {"failed_group_weight": 0.5}, {"error_penalty": 0.3, "prefix_reward": 2.0}]


class TestTrainer:
    def test_a_worked_example(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(1, 0, 3, 2)], max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        third = 1 / 3
        expected = torch.tensor(
            [[0.25, -2 * third, 0, 0], [-0.75, 0, 0, 0], [0.25, third, 0.5, 0], [0.25, third, -0.5, 0]] * 2
        )
        torch.testing.assert_close(rounds[0][:, :4], expected)
        assert not rounds[0][:, 4:].any()
        assert logged(trainer, "sgpo/groups/rescued") == [1.0]
        # Of 6 verified tokens of each group none is right in all completions
        assert logged(trainer, "sgpo/credit/silent") == [0.0]
        assert logged(trainer, "sgpo/credit/size") == pytest.approx([expected.abs().sum().item() / (8 * 12)])

    @pytest.mark.parametrize("scope", ["failed_groups", "all_incorrect"])
    @pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())) or "default")
    def test_equals_a_loop_over_the_table(self, make_trainer, scope, config):
        settings = {"per_device_train_batch_size": 32, "max_steps": 1, "max_completion_length": 8}
        ours = make_trainer(
            [random_outcome, stepwise(FixedJudge(random_verdicts))],
            judge_scope=scope,
            log_completions=True,
            **settings,
            **config,
        )
        theirs = make_trainer([random_outcome], GRPOTrainer, GRPOConfig, **settings)
        found, plain = record_advantages(ours), record_advantages(theirs)
        ours.train()
        theirs.train()
        table = pd.read_parquet(Path(ours.args.output_dir) / "completions" / "completions_00001.parquet")
        expected, kinds = reference(table, plain[0], 8, config)
        assert {"rescued", "left"} <= set(kinds)
        in_mixed_groups = {"mixed", "too few in a mixed group"}
        assert in_mixed_groups & set(kinds) == (in_mixed_groups if scope == "all_incorrect" else set())
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
        left = torch.tensor([kind not in ("rescued", "mixed") for kind in kinds for _ in range(4)])
        assert torch.equal(found[0][left], plain[0][left].unsqueeze(1).expand(-1, 8))  # bit for bit
        for kind in ("rescued", "tied"):
            assert logged(ours, f"sgpo/groups/{kind}") == [kinds.count(kind) / 8]
        failed = torch.tensor([not (table["random_outcome"][i // 4 * 4 :][:4] >= 0.5).any() for i in range(32)])
        rescued = torch.tensor([kind == "rescued" for kind in kinds for _ in range(4)])
        assert logged(ours, "sgpo/credit/size") == pytest.approx([expected[rescued].abs().mean().item()], rel=1e-5)
        silent = [
            (expected[j, t] == 0).item()
            for j in range(32)
            if failed[j] and not math.isnan(table["judge_first_error"][j])
            for t in range(int(table["judge_first_error"][j]))
        ]
        assert logged(ours, "sgpo/credit/silent") == pytest.approx([sum(silent) / len(silent)])

    def test_in_a_mixed_group_no_token_ends_above_a_right_completion(self, make_trainer):
        """Also if most of the group is right, so that a right completion has a small advantage."""

        def one_wrong(prompts, completions, **kwargs):
            return [float(i % 4 > 0) for i in range(len(completions))]

        trainer = make_trainer([one_wrong, fixed(5)], judge_scope="all_incorrect", scale_rewards="none", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        wrong = torch.arange(8) % 4 == 0
        assert (rounds[0][~wrong] == 0.25).all()
        assert not rounds[0][wrong][:, :5].any()
        assert (rounds[0][wrong][:, 5] == -0.75).all()

    def test_a_group_in_which_all_get_equally_far_stays_as_grpo_leaves_it(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(1)], max_steps=1)
        before = parameters(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/groups/tied") == [1.0]
        assert logged(trainer, "sgpo/credit/silent") == [1.0]
        assert logged(trainer, "sgpo/credit/size") == []
        assert_same_parameters(trainer, before)

    def test_ending_at_once_is_blamed(self, make_trainer, tokenizer):
        ends_often = {
            "sequence_bias": [[[tokenizer.eos_token_id], 2.0]],
            "suppress_tokens": [tokenizer.pad_token_id],
        }
        trainer = make_trainer([all_failed, fixed(1)], max_steps=1, generation_kwargs=ends_often, num_generations=8)
        outputs, inner = [], trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: outputs.append(inner(inputs)) or outputs[-1]
        trainer.train()
        empty = outputs[0]["completion_mask"].sum(dim=1) == 1
        assert 0 < empty.sum() < 8
        assert (outputs[0]["advantages"][empty][:, 0] < 0).all()

    def test_without_a_failed_group_it_is_grpo(self, make_trainer):
        ours = make_trainer([all_mixed, fixed(0)], max_steps=2)
        ours.train()
        theirs = make_trainer([all_mixed], GRPOTrainer, GRPOConfig, max_steps=2)
        theirs.train()
        assert_same_parameters(ours, theirs)

    def test_no_error_that_stands_for_the_last_step(self, make_trainer):
        """The last of twelve steps is the wrong one, unless the judge names the first."""

        def first_or_none(items):
            return [Verdict.error(0) if i % 4 == 0 else Verdict.no_error() for i in range(len(items))]

        judge = stepwise(FixedJudge(first_or_none), no_error="last_step")
        trainer = make_trainer([all_failed, judge], max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        expected = torch.zeros(8, 12)
        expected[:, 0] = 0.25
        expected[::4, 0] = -0.75  # beyond the first step all get equally far
        torch.testing.assert_close(rounds[0], expected)

    def test_plain_credit_logs_its_size_too(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(2)], prefix_baseline="none", max_steps=1)
        trainer.train()
        assert logged(trainer, "sgpo/credit/size") == pytest.approx([2.5 / 12])
        assert logged(trainer, "sgpo/credit/silent") == [0.0]

    @pytest.mark.parametrize(
        "config",
        [
            {"loss_type": "grpo"},
            {"mask_truncated_completions": True},
            {"exclude_dead_groups": True},
            {"judge_scope": "all_incorrect"},
        ],
        ids=lambda config: "-".join(map(str, config.items())),
    )
    def test_trains(self, make_trainer, config):
        trainer = make_trainer([by_kind, fixed(1, 2)], generation_kwargs=None, **config)
        trainer.train()
        assert sum(logged(trainer, "sgpo/judge_calls")) > 0
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"prefix_baseline": "batch"},
                r"prefix_baseline='batch' is unknown: it must be one of \['none', 'group'\]",
            ),
            ({"prefix_baseline": "group", "error_penalty": -1.0}, "error_penalty=-1.0 must be a finite number"),
        ],
    )
    def test_bad_settings(self, config, message):
        with pytest.raises(ValueError, match=message):
            SGPOConfig("out", report_to="none", use_cpu=True, bf16=False, **config)
