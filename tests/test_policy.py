"""What a treatment may ask of the trainer: here the text of ids, with the marks of thinking that TRL's texts have lost."""

import logging
from types import SimpleNamespace

import pytest
from conftest import first_long_word, logged
from datasets import Dataset
from toys import CHATML, CountingJudge, all_failed, byte_tokenizer, tiny_llama

from trl_sgpo import StepwiseJudge, Verdict
from trl_sgpo.policy import Policy


CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARMONY = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>")


def decode(tokenizer, text):
    return Policy(SimpleNamespace(_tokenizer=tokenizer), None).decode(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("special", "text", "decoded"),
    [
        ((), "<think>Hm.</think>4<|im_end|>", "<think>Hm.</think>4"),
        (("<think>", "</think>"), "<think>Hm.</think>4<|im_end|>", "<think>Hm.</think>4"),
        (("[THINK]", "[/THINK]", "[INST]"), "[THINK]Hm.[/THINK]4[INST]", "[THINK]Hm.[/THINK]4"),
        (
            HARMONY,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4<|im_end|>",
            "<|channel|>analysis<|message|>Hm.assistant<|channel|>final<|message|>4",
        ),
        (
            ("<|channel>", "<channel|>"),
            "<|channel>thought\nHm.<channel|>4<|im_end|>",
            "<|channel>thought\nHm.<channel|>4",
        ),
        (("<|reserved_7|>", "/nothink"), "4<|reserved_7|>/nothink<|im_end|>", "4"),
    ],
)
def test_decoding_keeps_the_marks_of_thinking_and_no_other_special_token(special, text, decoded):
    tokenizer = byte_tokenizer(special=(*CONTROL, *special))
    assert decode(tokenizer, text) == decoded


class SecondStepIsWrong(CountingJudge):
    def judge(self, items):
        return [Verdict.error(1) for _ in super().judge(items)]


FORMS = {
    "think": (("<think>", "</think>"), "<think>{}</think>{}<|im_end|>"),
    "the_opening_mark_is_in_the_prompt": (("<think>", "</think>"), "{}</think>{}<|im_end|>"),
    "brackets": (("[THINK]", "[/THINK]"), "[THINK]{}[/THINK]{}<|im_end|>"),
    "channels": (
        HARMONY,
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|im_end|>",
    ),
    "gemma": (("<|channel>", "<channel|>"), "<|channel>thought\n{}<channel|>{}<|im_end|>"),
}


@pytest.mark.parametrize("conversational", [False, True], ids=["string", "messages"])
@pytest.mark.parametrize("form", FORMS)
def test_thinking_between_special_tokens_is_neither_judged_nor_paid(make_trainer, form, conversational):
    special, written = FORMS[form]
    tokenizer = byte_tokenizer(special=(*CONTROL, *special), padding_side="left")
    judge = SecondStepIsWrong()
    prompt = [{"role": "user", "content": "What is 2 + 2?"}] if conversational else "What is 2 + 2?"
    trainer = make_trainer(
        [all_failed, StepwiseJudge(judge)],
        trainer_args={
            "model": tiny_llama(tokenizer),
            "processing_class": tokenizer,
            "train_dataset": Dataset.from_dict({"prompt": [prompt] * 4}),
        },
        failed_groups="prefix",
        max_completion_length=200,
        max_steps=1,
    )
    # The model is random: what it writes is given to it, all that follows is real
    text = written.format("Add them. So it is 5.\n\nSo it is 5.", "Add them.\n\nSo it is 5.")
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
        [tokenizer(text)["input_ids"] for _ in prompt_ids],
        None,
    )
    outputs = []
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(inner(inputs)) or outputs[-1]
    trainer.train()
    assert {item.steps for item in judge.items} == {("Add them.\n\n", "So it is 5.")}
    ids, advantages = outputs[0]["completion_ids"][0], outputs[0]["advantages"][0]
    assert tokenizer.decode(ids[advantages == 1.0]) == "Add them.\n\n"
    assert tokenizer.decode(ids[advantages == -0.5]) == "So it is 5."
    start = text.rindex("Add them.")
    assert (advantages != 0).nonzero()[0].item() == len(tokenizer(text[:start])["input_ids"])
    assert logged(trainer, "sgpo/credit/unlocated") == [0.0]


class TestUnknownMarks:
    def trainer(self, make_trainer, judge, special, **attributes):
        tokenizer = byte_tokenizer(CHATML, special=(*CONTROL, *special), padding_side="left")
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        rows = Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 4})
        given = {"model": tiny_llama(tokenizer), "processing_class": tokenizer, "train_dataset": rows}
        return make_trainer([all_failed, *judge], trainer_args=given)

    def warnings(self, caplog):
        return [record.message for record in caplog.records if "marks of thinking" in record.message]

    def test_one_warning_when_the_trainer_is_made(self, make_trainer, caplog):
        with caplog.at_level(logging.WARNING):
            self.trainer(
                make_trainer, [StepwiseJudge(first_long_word)], ("<|reasoning|>", "<|/reasoning|>", "<|pause|>")
            )
        (message,) = self.warnings(caplog)
        assert "['<|/reasoning|>', '<|reasoning|>']" in message
        assert "response_template" in message
        assert "include_thinking=True" in message

    @pytest.mark.parametrize(
        ("judge", "special", "attributes"),
        [
            ([StepwiseJudge(first_long_word)], (), {}),
            (
                [StepwiseJudge(first_long_word)],
                ("<think>", "</think>", "<|channel|>", "/nothink", "<|reserved_1|>"),
                {},
            ),
            ([StepwiseJudge(first_long_word, include_thinking=True)], ("<|reasoning|>",), {}),
            ([StepwiseJudge(first_long_word)], ("<|reasoning|>",), {"response_template": {"fields": {}}}),
            ([], ("<|reasoning|>",), {}),
        ],
        ids=["none", "known", "judged_anyway", "parsed_by_trl", "no_judge"],
    )
    def test_none_if_nothing_is_unknown(self, make_trainer, judge, special, attributes, caplog):
        with caplog.at_level(logging.WARNING):
            self.trainer(make_trainer, judge, special, **attributes)
        assert self.warnings(caplog) == []
