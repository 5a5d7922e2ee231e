"""From a verdict's step to the tokens: against a naive mapping character by character, with three kinds of tokenizers."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import (
    assert_same_parameters,
    by_kind,
    logged,
    record_advantages,
    words_as_steps,
)
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SGPOConfig, StepJudge, StepwiseJudge, Verdict
from trl_sgpo.credit import StepTokens, locate_steps, prefix_credit
from trl_sgpo.steps import cut_completion
from trl_sgpo.tasks.rewrite_chain import build_tokenizer


def all_failed(prompts, completions, **kwargs):
    return [0.0] * len(completions)


CORPUS = ["First we add 2 and 3.\n\nThe sum is 5, so x = 5.\n\nStep 2: naïve café 東京 🙂🙃 done. ¿Qué?"] * 4


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def sentencepiece():
    """As in Llama 2 and Gemma: a mark for spaces, and bytes for what the vocabulary lacks."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<eos>"], show_progress=False)
    core.train_from_iterator([text.replace("🙂", "").replace("東", "") for text in CORPUS], trainer)
    vocabulary = core.get_vocab()
    for i in range(256):
        vocabulary.setdefault(f"<0x{i:02X}>", len(vocabulary))
    merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    core.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {"byte_level": byte_level(), "sentencepiece": sentencepiece(), "words": build_tokenizer()}


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def characters_of_tokens(tokenizer, ids):
    """For each token the characters of the text that it takes part in, found by decoding every beginning."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends, broken = [], []
    for i in range(len(ids) + 1):
        beginning = tokenizer.decode(ids[:i], skip_special_tokens=True)
        same = 0
        while same < min(len(beginning), len(text)) and beginning[same] == text[same]:
            same += 1
        ends.append(max([same, *ends[-1:]]))  # a character that is cut in two may garble what stands in front of it
        broken.append(len(beginning) > same)
    owned = []
    for i in range(len(ids)):
        mine = set(range(ends[i], ends[i + 1]))
        # Without text of its own, or with the first bytes of a character behind it, it takes part in what a later one completes
        if (not mine or broken[i + 1]) and (end := next((end for end in ends[i + 1 :] if end > ends[i + 1]), None)):
            mine |= set(range(ends[i + 1], end))
        owned.append(mine)
    return text, owned


def cut_at(*texts):
    """A completion of these texts, each a step."""
    ends = [sum(map(len, texts[: i + 1])) for i in range(len(texts))]
    return cut_completion("".join(texts), lambda text: list(pairwise([0, *ends])))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@given(
    pieces=st.lists(
        st.text("ab 12=é京🙂.\n", min_size=1, max_size=12).filter(lambda piece: piece.strip()), min_size=1, max_size=5
    ),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_tokens_equal_those_of_the_naive_mapping(kind, pieces, data):
    tokenizer = TOKENIZERS[kind]
    steps = [pieces[0].lstrip(), *pieces[1:]]
    ids = tokenizer("".join(steps), add_special_tokens=False)["input_ids"]
    first_error = data.draw(st.integers(0, len(steps) - 1))
    text, owned = characters_of_tokens(tokenizer, ids)
    assert text == "".join(steps)

    def first_with(position):
        return next((i for i, mine in enumerate(owned) if mine and max(mine) >= position), len(ids))

    def visible(i):
        begin = len("".join(steps[:i]))
        step = steps[i]
        return begin + len(step) - len(step.lstrip()), begin + len(step.rstrip())

    place = locate_steps(decoder(tokenizer), ids, cut_at(*steps), first_error)
    start, end = visible(first_error)
    # The first token with a visible character of the wrong step, and the first behind its last one
    error = first_with(start)
    assert place.error == (error, max(first_with(end) if end < len(text) else len(ids), error + 1))
    assert place.verified == (((0, error),) if error else ())


def test_words():
    tokenizer = TOKENIZERS["words"]
    ids = tokenizer("b c [V] ; c b <eos>")["input_ids"]
    cut = cut_at("b c [V] ;", " c b")
    assert locate_steps(decoder(tokenizer), ids, cut, 0) == StepTokens((), (0, 4))
    # The end-of-text token is no part of the last step
    assert locate_steps(decoder(tokenizer), ids, cut, 1) == StepTokens(((0, 4),), (4, 6))


def test_bytes_in_front_of_a_character_in_bytes_belong_to_what_they_are():
    """A character that is not complete yet turns the bytes in front of it into something else."""
    tokenizer = TOKENIZERS["sentencepiece"]
    steps = ["ab.\n\n", "🙂 5.\n", "京 6."]
    ids = tokenizer("".join(steps), add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    place = locate_steps(decoder(tokenizer), ids, cut_at(*steps), 0)
    assert tokenizer.decode(ids[slice(*place.error)]) in ("ab", "ab.")
    place = locate_steps(decoder(tokenizer), ids, cut_at(*steps), 1)
    assert pieces[place.error[0]] == "<0xF0>"


def test_a_completion_that_is_cut_off_inside_a_character():
    tokenizer = TOKENIZERS["byte_level"]
    whole = tokenizer("One. Two 京", add_special_tokens=False)["input_ids"]
    ids = whole[:-1]
    text = tokenizer.decode(ids)
    assert text.endswith("\ufffd")
    assert locate_steps(decoder(tokenizer), ids, cut_at("One. ", text[5:]), 1).error[1] == len(ids)


def test_what_cannot_be_found():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer("One. Two. Three.")["input_ids"]
    assert locate_steps(decoder(tokenizer), ids, cut_at("One. ", "Four."), 1) is None
    assert locate_steps(decoder(tokenizer), [], cut_at("One."), 0) is None
    place = locate_steps(decoder(tokenizer), ids, cut_at("Zero.\n", "Two."), 1)
    assert tokenizer.decode(ids[slice(*place.error)]).strip() == "Two."
    assert place.verified == ()


def test_what_lies_between_the_steps_is_not_judged():
    tokenizer = TOKENIZERS["byte_level"]
    text = "x = 1 (as x = 1 was given) so x = 2 done"
    places = [(0, 5), (27, 35)]
    ids = tokenizer(text)["input_ids"]
    place = locate_steps(decoder(tokenizer), ids, cut_completion(text, lambda text: places), 1)
    assert [tokenizer.decode(ids[slice(*span)]).strip() for span in place.verified] == ["x = 1"]
    assert tokenizer.decode(ids[slice(*place.error)]).strip() == "so x = 2"


class TestMessages:
    """What a chat parser makes of a completion is not what stands in its ids."""

    CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'
    CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"a": 3}}}]

    def located(self, turns, messages, first_error, **options):
        """The verified text, piece by piece, and the wrong step's; `turns` are texts, those of tools as tuples of one."""
        tokenizer = TOKENIZERS["byte_level"]
        ids, by_policy = [], []
        for turn in turns:
            tokens = tokenizer(turn[0] if isinstance(turn, tuple) else turn, add_special_tokens=False)["input_ids"]
            ids += tokens
            by_policy += [isinstance(turn, str)] * len(tokens)
        cut = cut_completion(messages, **options)
        place = locate_steps(decoder(tokenizer), ids, cut, first_error, by_policy if len(turns) > 1 else None)
        return [tokenizer.decode(ids[slice(*span)]) for span in place.verified], tokenizer.decode(
            ids[slice(*place.error)]
        )

    def test_tool_results_are_part_of_no_step(self):
        messages = [
            {"role": "assistant", "content": "I multiply."},
            {"role": "tool", "content": "So it is 43."},
            {"role": "assistant", "content": "So it is 43."},
        ]
        turns = ["I multiply.<eos>", ("Tool: So it is 43. ",), "So it is 43.<eos>"]
        assert self.located(turns, messages, 0) == ([], "I multiply.")
        assert self.located(turns, messages, 1) == (["I multiply.<eos>"], "So it is 43.")

    def test_thinking_that_quotes_a_step_is_not_the_step(self):
        messages = [
            {"role": "assistant", "content": "3 * 4 = 12.", "tool_calls": self.CALLS},
            {"role": "tool", "content": "12"},
            {
                "role": "assistant",
                "content": "12 + 1 = 14.",
                "reasoning_content": "I wrote 3 * 4 = 12. And 12 + 1 = 14.",
            },
        ]
        turns = [
            f"3 * 4 = 12.\n{self.CALL}<eos>",
            ("12",),
            "<think>\nI wrote 3 * 4 = 12. And 12 + 1 = 14.\n</think>\n\n12 + 1 = 14.<eos>",
        ]
        assert self.located(turns, messages, 0) == ([], "3 * 4 = 12.")
        assert self.located(turns, messages, 1) == (["3 * 4 = 12.\n"], self.CALL)
        assert self.located(turns, messages, 2) == ([turns[0]], "12 + 1 = 14.")

    def test_thinking_that_the_parser_left_out(self):
        for messages in ("<think>We add. So x = 5.</think>We add. So x = 5.", [{"content": "We add. So x = 5."}]):
            place = self.located(["<think>We add. So x = 5.</think>We add. So x = 5."], messages, 1)
            assert place == (["We add. "], "So x = 5.")

    def test_thinking_is_paid_if_it_is_judged(self):
        messages = [{"role": "assistant", "reasoning_content": "We add 2.\n\nThen 5.", "content": "10 it is."}]
        # The chat template has put the first mark into the prompt
        turns = ["We add 2.\n\nThen 5.\n</think>\n\n10 it is.<eos>"]
        assert self.located(turns, messages, 0, include_thinking=True) == ([], "We add 2.")
        assert self.located(turns, messages, 1, include_thinking=True)[0] == ["We add 2.\n\n"]
        verified, error = self.located(turns, messages, 2, include_thinking=True)
        assert error == "10 it is."
        assert "".join(verified).startswith("We add 2.\n\nThen 5.")

    def test_a_tool_call_is_part_of_its_step(self):
        messages = [{"role": "assistant", "content": "a:", "tool_calls": self.CALLS}]
        assert self.located([f"a:\n{self.CALL}<eos>"], messages, 0) == ([], f"a:\n{self.CALL}")
        messages = [{"role": "assistant", "content": "", "tool_calls": self.CALLS}]
        assert self.located([f"{self.CALL}<eos>"], messages, 0) == ([], self.CALL)

    def test_several_calls(self):
        calls = [*self.CALLS, {"type": "function", "function": {"name": "g", "arguments": {}}}]
        other = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
        messages = [{"role": "assistant", "content": "Look.", "tool_calls": calls}]
        verified, error = self.located([f"Look.\n{self.CALL}\n{other}<eos>"], messages, 2)
        assert verified[0].startswith(f"Look.\n{self.CALL}")
        assert error == 'g", "arguments": {}}\n</tool_call>'

    def test_a_parser_that_has_taken_something_out_of_the_middle(self):
        messages = [{"role": "assistant", "content": "Add.\n\nStop. 5."}]
        turns = ["Add.\n\n<note>x</note>\n\nStop. 5.<eos>"]
        assert self.located(turns, messages, 1) == (["Add.\n\n<note>x</note>\n\n"], "Stop. 5.")

    def test_a_rollout_that_holds_what_others_wrote(self):
        """Such a completion is one string: its steps are where they are, and the loss masks what the policy did not write."""
        turns = ["I call f.\n\n", ("Tool says 43.\n\n",), "So 44."]
        text = "I call f.\n\nTool says 43.\n\nSo 44."
        assert self.located(turns, text, 2) == (["I call f.\n\nTool says 43.\n\n"], "So 44.")


def test_long_completions_are_fast():
    calls = []
    tokenizer = TOKENIZERS["byte_level"]
    steps = [f"Step {i}: we add {i} and {i}.\n\n" for i in range(700)]
    ids = tokenizer("".join(steps))["input_ids"]

    def decode(part):
        calls.append(len(part))
        return tokenizer.decode(part, skip_special_tokens=True)

    assert locate_steps(decode, ids, cut_at(*steps), 650).error[0] > 0
    assert len(calls) < 100  # not one per token


def test_credit_equals_loop():
    places = [StepTokens(((0, 1), (2, 3)), (3, 4)), None, StepTokens((), (0, 2))]
    credit = prefix_credit(places, 5, 0.3, 1.0)
    for row, place in zip(credit.tolist(), places, strict=True):
        for t, value in enumerate(row):
            expected = 0.0
            if place and any(start <= t < end for start, end in place.verified):
                expected = 0.3
            elif place and place.error[0] <= t < place.error[1]:
                expected = -1.0
            assert value == pytest.approx(expected)


class FixedJudge(StepJudge):
    def __init__(self, *first_errors):
        self.first_errors = first_errors

    def judge(self, items):
        return [
            Verdict.error(min(self.first_errors[i % len(self.first_errors)], len(item.steps) - 1))
            for i, item in enumerate(items)
        ]


def stepwise(*first_errors):
    return StepwiseJudge(FixedJudge(*first_errors), segmenter=words_as_steps)


@pytest.fixture
def make_trainer(make_trainer, tokenizer):
    """As everywhere, but no completion ends before its length, since what is checked of each row needs several steps."""
    full_length = {"suppress_tokens": [tokenizer.pad_token_id, tokenizer.eos_token_id]}
    return lambda *args, **config: make_trainer(*args, **{"generation_kwargs": full_length, **config})


class TestTrainer:
    def test_equal_verdicts_teach_where_the_error_is(self, make_trainer):
        trainer = make_trainer([all_failed, stepwise(1)], credit_assignment="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert (rounds[0][:, 0] == 1).all()
        assert (rounds[0][:, 1] == -0.5).all()
        assert not rounds[0][:, 2:].any()

    def test_a_group_without_a_right_step_stays_as_grpo_leaves_it(self, make_trainer):
        trainer = make_trainer([all_failed, stepwise(0)], credit_assignment="prefix", max_steps=1)
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
            [all_failed, stepwise(1)], credit_assignment="prefix", max_steps=1, generation_kwargs=ends_often
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

        judge = StepwiseJudge(FixedJudge(1), segmenter=finds_steps_at_times)
        trainer = make_trainer([all_failed, judge], credit_assignment="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        n_judged = logged(trainer, "sgpo/judge_calls")[0]
        assert 0 < n_judged < len(rounds[0])
        assert rounds[0].any(dim=1).sum() <= n_judged

    def test_the_judge_has_no_part_in_the_rewards(self, make_trainer):
        """So it moves no other group, however the rewards are put together."""
        for config in ({"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}):
            ours = make_trainer([by_kind, stepwise(1, 2)], credit_assignment="prefix", max_steps=1, **config)
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
        trainer = make_trainer([all_failed, stepwise(1)], credit_assignment="prefix", max_steps=1)
        trainer.train()
        assert logged(trainer, "sgpo/groups/rescued") == [1.0]
        assert logged(trainer, "sgpo/groups/tied") == [0.0]

    def test_min_rts_spread(self, make_trainer):
        trainer = make_trainer([all_failed, stepwise(1)], credit_assignment="prefix", max_steps=1, min_rts_spread=0.99)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/groups/tied") == [1.0]
        assert not rounds[0].any()

    def test_no_error_that_stands_for_the_last_step_is_an_error(self, make_trainer):
        class Blind(StepJudge):
            def judge(self, items):
                return [Verdict.no_error() for _ in items]

        judge = StepwiseJudge(Blind(), segmenter=words_as_steps, no_error="last_step")
        trainer = make_trainer([all_failed, judge], credit_assignment="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert (rounds[0][:, 0] == 1).all()
        assert (rounds[0] == -0.5).any(dim=1).all()
        assert (torch.tensor(list(trainer._logs["advantages"])) != 0).all()

    def test_a_group_with_few_verdicts_stays_as_grpo_leaves_it(self, make_trainer):
        class Silent(FixedJudge):
            def judge(self, items):
                return [v if i % 4 == 0 else Verdict.abstain("no vote") for i, v in enumerate(super().judge(items))]

        trainer = make_trainer(
            [all_failed, StepwiseJudge(Silent(1), segmenter=words_as_steps)], credit_assignment="prefix", max_steps=1
        )
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/groups/unjudged") == [1.0]
        assert not rounds[0].any()

    def test_the_verified_prefix_is_rewarded(self, make_trainer):
        trainer = make_trainer([all_failed, stepwise(2)], credit_assignment="prefix", max_steps=1)
        rounds = record_advantages(trainer)
        trainer.train()
        assert logged(trainer, "sgpo/credit/unlocated") == [0.0]
        for row in rounds[0].tolist():
            assert row[:4] == pytest.approx([1.0, 1.0, -0.5, 0.0])
            assert not any(row[3:])

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
            [all_failed, StepwiseJudge(FixedJudge(2, 0))],
            trainer_args={
                "model": make_chat_model(),
                "processing_class": chat_tokenizer,
                "train_dataset": rows,
                "tools": [double],
            },
            credit_assignment="prefix",
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
        trainer = make_trainer([all_failed, stepwise(0, 2)], credit_assignment="prefix", max_steps=1)
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
        trainer = make_trainer(
            [all_failed, stepwise(2, 0, 3)], credit_assignment="prefix", max_steps=1, loss_type="grpo"
        )
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

        ours = make_trainer([mixed, stepwise(0)], credit_assignment="prefix", max_steps=2)
        ours.train()
        theirs = make_trainer([mixed], GRPOTrainer, GRPOConfig, max_steps=2)
        theirs.train()
        assert_same_parameters(ours, theirs)

    def test_mixed_groups_beside_failed_ones_keep_grpos_advantages(self, make_trainer):
        ours = make_trainer([by_kind, stepwise(1)], credit_assignment="prefix", max_steps=1)
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

        trainer = make_trainer(
            [mixed, stepwise(2)], credit_assignment="prefix", judge_scope="all_incorrect", max_steps=1
        )
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
        trainer = make_trainer([by_kind, stepwise(1, 2)], credit_assignment="prefix", generation_kwargs=None, **config)
        trainer.train()
        assert sum(logged(trainer, "sgpo/judge_calls")) > 0
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())

    def test_sequence_ratios_are_warned_of(self, make_trainer):
        with pytest.warns(UserWarning, match="importance_sampling_level='sequence'"):
            make_trainer([by_kind, stepwise(0)], credit_assignment="prefix", importance_sampling_level="sequence")

    def test_masks_by_the_sign_of_the_advantage_are_warned_of(self, make_trainer):
        with pytest.warns(UserWarning, match="the blame is dropped and the reward kept"):
            make_trainer([by_kind, stepwise(0)], credit_assignment="prefix", off_policy_mask_threshold=0.5)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"credit_assignment": "tokens"}, "credit_assignment='tokens' is unknown"),
            ({"prefix_reward": -1}, "prefix_reward=-1 must be"),
            ({"error_penalty": float("nan")}, "error_penalty=nan must be"),
        ],
    )
    def test_bad_settings(self, config, message):
        with pytest.raises(ValueError, match=message):
            SGPOConfig("out", report_to="none", use_cpu=True, bf16=False, **config)
