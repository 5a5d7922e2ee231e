"""Per-token credit: its pure functions against naive loops, and real runs."""

import pytest
import torch
from conftest import assert_same_parameters, by_kind, logged, record_advantages, words_as_steps
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from toys import FixedJudge, all_failed, all_mixed, fixed, matrix, stepwise, tensor
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SGPOConfig, StepwiseJudge, Verdict
from trl_sgpo.credit import StepTokens
from trl_sgpo.treatments.prefix import credited_groups, prefix_credit


def test_credit_equals_loop():
    places = [StepTokens(((0, 1), (2, 4)), (4, 5), (0, 2)), None, StepTokens((), (0, 2))]
    earned = [[0.3, 0.3, 0.7, 0.7, -1.0], [0.3, -1.0], [-0.5]]
    credit = prefix_credit(places, earned, 6)
    for row, place, values in zip(credit.tolist(), places, earned, strict=True):
        for t, value in enumerate(row):
            expected = 0.0
            for step, (start, end) in zip(place.steps, place.verified, strict=True) if place else []:
                if start <= t < end:
                    expected = values[step]
            if place and place.error[0] <= t < place.error[1]:
                expected = values[-1]
            assert value == pytest.approx(expected)


@given(matrix(st.sampled_from([None, 0.0, 0.25, 0.5])))
def test_credited_groups_equal_their_rules(rts):
    outcome = torch.zeros(len(rts), len(rts[0]))
    groups = credited_groups(outcome, tensor(rts), torch.ones(len(rts), dtype=torch.bool))
    for i, row in enumerate(rts):
        given_rts = [value for value in row if value is not None]
        enough = 2 * len(given_rts) >= len(row)
        pays = enough and max(given_rts) > 0
        assert groups.rescued_P[i] == pays
        assert groups.tied_P[i] == (enough and not pays)
    none = credited_groups(outcome, tensor(rts), torch.zeros(len(rts), dtype=torch.bool))
    assert not none.rescued_P.any()
    assert not none.tied_P.any()


@pytest.fixture
def make_trainer(make_trainer, tokenizer):
    """As everywhere, but no completion ends before its length, since what is checked of each row needs several steps."""
    full_length = {"suppress_tokens": [tokenizer.pad_token_id, tokenizer.eos_token_id]}
    return lambda *args, **config: make_trainer(*args, **{"generation_kwargs": full_length, **config})


def error_at_three(*checked):
    """A StepwiseJudge that blames the fourth step and says which steps it has checked, one completion after the other."""

    def answer(items):
        return [Verdict.error(3, checked=checked[i % len(checked)]) for i in range(len(items))]

    return stepwise(FixedJudge(answer))


class TestTrainer:
    def test_equal_verdicts_teach_where_the_error_is(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(1)], failed_groups="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert (rounds[0][:, 0] == 1).all()
        assert (rounds[0][:, 1] == -0.5).all()
        assert not rounds[0][:, 2:].any()

    def test_a_group_without_a_right_step_stays_as_grpo_leaves_it(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(0)], failed_groups="prefix", max_steps=1)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        assert logged(trainer, "sgpo/groups/tied") == [1.0]
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    def test_ending_at_once_is_blamed(self, make_trainer, tokenizer):
        """Else a policy whose every step is blamed learns to write nothing."""
        ends_often = {
            "sequence_bias": [[[tokenizer.eos_token_id], 2.0]],
            "suppress_tokens": [tokenizer.pad_token_id],  # it has no text, so it is part of no step
        }
        trainer = make_trainer(
            [all_failed, fixed(1)], failed_groups="prefix", max_steps=1, generation_kwargs=ends_often
        )
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/credit/unlocated") == [0.0]
        n_written = logged(trainer, "sgpo/judge_calls")[0]
        assert 0 < n_written < len(rounds[0])
        first_PG = rounds[0][:, 0].view(-1, 4)
        taught_P = (first_PG == 1).any(dim=1)  # those with a right step
        assert taught_P.any()
        assert (first_PG[taught_P] != 0).all()
        assert not first_PG[~taught_P].any()

    def test_what_no_step_was_found_in_is_not_blamed(self, make_trainer):
        def finds_steps_at_times(text):
            return [] if sum(map(ord, text)) % 2 else words_as_steps(text)

        judge = StepwiseJudge(fixed(1).judge, segmenter=finds_steps_at_times)
        trainer = make_trainer([all_failed, judge], failed_groups="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        n_judged = logged(trainer, "sgpo/judge_calls")[0]
        assert 0 < n_judged < len(rounds[0])
        assert rounds[0].any(dim=1).sum() <= n_judged

    def test_the_judge_has_no_part_in_the_rewards(self, make_trainer):
        """So it moves no other group, however the rewards are put together."""
        for config in ({"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}):
            ours = make_trainer([by_kind, fixed(1, 2)], failed_groups="prefix", max_steps=1, **config)
            theirs = make_trainer([by_kind], GRPOTrainer, GRPOConfig, max_steps=1, **config)
            rounds_a, rounds_b = record_advantages(ours), record_advantages(theirs)
            ours.train()
            theirs.train()
            mixed = rounds_b[0] != 0
            assert mixed.any()
            assert not mixed.all()
            assert torch.equal(rounds_a[0][mixed][:, 0], rounds_b[0][mixed])
            assert rounds_a[0][~mixed].any()

    def test_groups_of_equal_scores_are_rescued(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(1)], failed_groups="prefix", max_steps=1)
        trainer.train()
        assert logged(trainer, "sgpo/groups/rescued") == [1.0]
        assert logged(trainer, "sgpo/groups/tied") == [0.0]

    def test_no_error_that_stands_for_the_last_step_is_an_error(self, make_trainer):
        blind = FixedJudge(lambda items: [Verdict.no_error() for _ in items])
        judge = stepwise(blind, no_error="last_step")
        trainer = make_trainer([all_failed, judge], failed_groups="prefix", max_steps=1, log_completions=True)
        rounds = record_advantages(trainer)
        trainer.train()
        assert (rounds[0][:, 0] == 1).all()
        assert (rounds[0] == -0.5).any(dim=1).all()
        assert (torch.tensor(list(trainer._logs["advantages"])) != 0).all()

    def test_a_group_with_few_verdicts_stays_as_grpo_leaves_it(self, make_trainer):
        def silent(items):
            return [Verdict.error(1) if i % 4 == 0 else Verdict.abstain("no vote") for i in range(len(items))]

        trainer = make_trainer([all_failed, stepwise(FixedJudge(silent))], failed_groups="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/groups/unjudged") == [1.0]
        assert not rounds[0].any()

    def test_the_verified_prefix_is_rewarded(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(2)], failed_groups="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/credit/unlocated") == [0.0]
        for row in rounds[0].tolist():
            assert row[:4] == pytest.approx([1.0, 1.0, -0.5, 0.0])
            assert not any(row[3:])

    def test_what_was_not_checked_earns_nothing(self, make_trainer):
        trainer = make_trainer([all_failed, error_at_three([1])], failed_groups="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/unchecked_steps") == [pytest.approx(2 / 3)]
        for row in rounds[0].tolist():
            assert row[:4] == [0.0, 1.0, 0.0, -0.5]
            assert not any(row[4:])

    def test_a_group_in_which_nothing_right_was_checked_is_tied(self, make_trainer):
        trainer = make_trainer([all_failed, error_at_three([])], failed_groups="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/groups/tied") == [1.0]
        assert not rounds[0].any()

    def test_what_was_not_checked_is_not_spared_in_a_mixed_group(self, make_trainer):
        trainer = make_trainer(
            [all_mixed, error_at_three([1])], failed_groups="prefix", max_steps=1, judge_scope="all_incorrect"
        )
        rounds = record_advantages(trainer)
        trainer.train()
        blamed = rounds[0][rounds[0][:, 0] < 0]
        assert len(blamed) == len(rounds[0]) // 2
        assert not blamed[:, 1].any()
        assert (blamed[:, 2:4] < 0).all()

    def test_with_a_baseline_the_checked_steps_are_counted(self, make_trainer):
        judge = error_at_three([1], [0, 1, 2])
        config = {"failed_groups": "prefix", "prefix_baseline": "group", "max_steps": 1}
        trainer = make_trainer([all_failed, judge], **config)
        rounds = record_advantages(trainer)
        trainer.train()
        # All get their first checked step right, half the second one, and those also the third one
        assert {tuple(row[:4]) for row in rounds[0].tolist()} == {(0.0, 0.0, 0.0, -0.5), (0.0, 0.5, 0.0, 0.0)}

    def test_a_conversation_with_thinking_and_a_tool(self, make_trainer, chat_tokenizer, make_chat_model):
        def double(x: int) -> int:
            """
            Doubles a number.

            Args:
                x: The number.
            """
            return 2 * x

        rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "What is 2 times 6?"}]] * 4})
        trainer = make_trainer(
            [all_failed, StepwiseJudge(fixed(2, 0).judge)],
            trainer_args={
                "model": make_chat_model(),
                "processing_class": chat_tokenizer,
                "train_dataset": rows,
                "tools": [double],
            },
            failed_groups="prefix",
            max_completion_length=400,
            max_steps=1,
        )
        # The model is random: what it writes is given to it, the tool loop, TRL's parser and all that follows are real
        call = '<tool_call>\n{"name": "double", "arguments": {"x": 6}}\n</tool_call><|im_end|>'
        answer = "<think>\nDouble it. So it is 13.\n</think>\n\nSo it is 13.\n\nDone: 13.<|im_end|>"
        turns = iter([f"Double it.\n{call}", answer])
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
            [chat_tokenizer(text)["input_ids"] for text in [next(turns)] * len(prompt_ids)],
            None,
        )
        outputs = []
        inner = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: outputs.append(inner(inputs)) or outputs[-1]
        trainer.train()
        output = outputs[0]

        def text_with(row, advantage):
            ids = output["completion_ids"][row][output["advantages"][row] == advantage]
            return chat_tokenizer.decode(ids)

        assert logged(trainer, "sgpo/credit/unlocated") == [0.0]
        # Two steps before the tool, two behind it
        assert text_with(0, 1.0) == f"Double it.\n{call}"
        assert text_with(0, -0.5) == "So it is 13."
        assert text_with(1, 1.0) == ""
        assert text_with(1, -0.5) == "Double it."

    def test_nothing_behind_the_error_has_a_gradient(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(0, 2)], failed_groups="prefix", max_steps=1)
        gradients = []
        inner = trainer._get_per_token_logps_and_entropies

        def with_gradient(*args, **kwargs):
            logps, *rest = inner(*args, **kwargs)
            if logps.requires_grad:
                logps.register_hook(lambda grad: gradients.append(grad.clone()))
            return (logps, *rest)

        trainer._get_per_token_logps_and_entropies = with_gradient
        trainer.train()
        (gradient,) = gradients
        blamed = gradient[:, 0] > 0  # the loss falls as the first step becomes less likely
        assert 0 < blamed.sum() < len(gradient)
        assert not gradient[blamed][:, 1:].any()
        assert (gradient[~blamed][:, :2] < 0).all()
        assert (gradient[~blamed][:, 2] > 0).all()
        assert not gradient[~blamed][:, 3:].any()

    def test_equals_a_hand_written_loss(self, make_trainer):
        trainer = make_trainer([all_failed, fixed(2, 0, 3)], failed_groups="prefix", max_steps=1, loss_type="grpo")
        found = []
        inner = trainer._compute_loss

        def recorded(model, inputs):
            loss = inner(model, inputs)
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = inputs["completion_mask"]
            logits = model(ids, attention_mask=torch.cat([inputs["prompt_mask"], mask], dim=1)).logits
            logps = (
                logits[:, -mask.shape[1] - 1 : -1]
                .log_softmax(-1)
                .gather(2, inputs["completion_ids"][..., None])[..., 0]
            )
            by_hand = 0.0
            for i in range(len(ids)):
                weights = inputs["advantages"][i]
                by_hand = by_hand - (weights * logps[i] * mask[i]).sum() / mask[i].sum() / len(ids)
            names = [name for name, _ in model.named_parameters()]
            a = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
            b = torch.autograd.grad(by_hand, model.parameters())
            found.append((names, a, b))
            return loss

        trainer._compute_loss = recorded
        trainer.train()
        for name, ours, theirs in zip(*found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
            assert ours.abs().max() > 0

    def test_without_a_failed_group_it_is_grpo(self, make_trainer, dataset):
        def mixed(prompts, completions, **kwargs):
            return [float(i % 2) for i in range(len(completions))]

        ours = make_trainer([mixed, fixed(0)], failed_groups="prefix", max_steps=2)
        ours.train()
        theirs = make_trainer([mixed], GRPOTrainer, GRPOConfig, max_steps=2)
        theirs.train()
        assert_same_parameters(ours, theirs)

    def test_mixed_groups_beside_failed_ones_keep_grpos_advantages(self, make_trainer):
        ours = make_trainer([by_kind, fixed(1)], failed_groups="prefix", max_steps=1)
        theirs = make_trainer([by_kind], GRPOTrainer, GRPOConfig, max_steps=1)
        rounds_a, rounds_b = record_advantages(ours), record_advantages(theirs)
        ours.train()
        theirs.train()
        a, b = rounds_a[0], rounds_b[0]
        mixed = b != 0
        assert mixed.any()
        assert not mixed.all()
        assert torch.equal(a[mixed], b[mixed].unsqueeze(1).expand_as(a[mixed]))

    def test_all_incorrect_spares_the_verified_prefix(self, make_trainer):
        def mixed(prompts, completions, **kwargs):
            return [float(i % 2) for i in range(len(completions))]

        trainer = make_trainer([mixed, fixed(2)], failed_groups="prefix", judge_scope="all_incorrect", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        for i, row in enumerate(rounds[0]):
            if i % 2:
                assert (row == row[0]).all()
                assert row[0] > 0
            else:
                assert not row[:2].any()
                assert (row[2:] < 0).all()

    @pytest.mark.parametrize(
        "config",
        [
            *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")),
            {"num_iterations": 2},
            {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
            {"mask_truncated_completions": True},
            {"bf16": True},
            {"failed_group_weight": 0.5},
        ],
        ids=lambda config: "-".join(map(str, config.items())),
    )
    @pytest.mark.filterwarnings("ignore")
    def test_trains(self, make_trainer, config):
        trainer = make_trainer([by_kind, fixed(1, 2)], failed_groups="prefix", generation_kwargs=None, **config)
        trainer.train()
        assert sum(logged(trainer, "sgpo/judge_calls")) > 0
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())

    def test_sequence_ratios_are_warned_of(self, make_trainer):
        with pytest.warns(UserWarning, match="importance_sampling_level='sequence'"):
            make_trainer([by_kind, fixed(0)], failed_groups="prefix", importance_sampling_level="sequence")

    def test_masks_by_the_sign_of_the_advantage_are_warned_of(self, make_trainer):
        with pytest.warns(UserWarning, match="the blame is dropped and the reward kept"):
            make_trainer([by_kind, fixed(0)], failed_groups="prefix", off_policy_mask_threshold=0.5)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"prefix_reward": -1}, "prefix_reward=-1 must be"),
            ({"error_penalty": float("nan")}, "error_penalty=nan must be"),
        ],
    )
    def test_bad_settings(self, config, message):
        with pytest.raises(ValueError, match=message):
            SGPOConfig("out", report_to="none", use_cpu=True, bf16=False, **config)


def test_a_share_of_the_longest_is_warned_of(make_trainer):
    with pytest.warns(UserWarning, match="rts_share_of='longest' has no effect with failed_groups='prefix'"):
        make_trainer([all_failed, fixed(1)], failed_groups="prefix", rts_share_of="longest")
