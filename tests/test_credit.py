"""From a verdict's step to the tokens: against a naive mapping character by character, with three kinds of tokenizers."""

import json
import random
from importlib import resources
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toys import byte_tokenizer
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import add_response_schema, parse_response

from trl_sgpo import credit
from trl_sgpo.credit import StepTokens, locate_steps
from trl_sgpo.policy import Policy
from trl_sgpo.steps import completion_turns, cut_completion
from trl_sgpo.tasks.rewrite_chain import build_tokenizer


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

    with mock.patch.object(credit, "_CONTEXT", data.draw(st.sampled_from([1, credit._CONTEXT]))):
        place = locate_steps(decoder(tokenizer), ids, cut_at(*steps), first_error)
    start, end = visible(first_error)
    # The first token with a visible character of the wrong step, and the first behind its last one
    error = first_with(start)
    assert place.error == (error, max(first_with(end) if end < len(text) else len(ids), error + 1))
    assert place.verified == (((0, error),) if error else ())


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@given(
    pieces=st.lists(
        st.text("ab 12=é京🙂.\n", min_size=1, max_size=12).filter(lambda piece: piece.strip()), min_size=2, max_size=6
    ),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_steps_that_earn_different_values_are_kept_apart(kind, pieces, data):
    tokenizer = TOKENIZERS[kind]
    steps = [pieces[0].lstrip(), *pieces[1:]]
    ids = tokenizer("".join(steps), add_special_tokens=False)["input_ids"]
    first_error = data.draw(st.integers(1, len(steps) - 1))
    values = data.draw(st.lists(st.sampled_from([0.0, 0.5]), min_size=first_error, max_size=first_error))
    place = locate_steps(decoder(tokenizer), ids, cut_at(*steps), first_error, values=values)
    assert place.steps == tuple(i for i in range(first_error) if i == 0 or values[i] != values[i - 1])
    # A step begins where it would begin if it were the wrong one, and ends where the next one begins
    begins = [locate_steps(decoder(tokenizer), ids, cut_at(*steps), i).error[0] for i in range(first_error + 1)]
    ends = [begins[i] for i in (*place.steps[1:], first_error)]
    assert list(place.verified) == [(begins[i], end) for i, end in zip(place.steps, ends, strict=True)]


def cleaned(tokenizer):
    """As `clean_up_tokenization_spaces` does it."""
    return lambda ids: tokenizer.clean_up_tokenization(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("form", [decoder, cleaned])
@pytest.mark.parametrize("kind", TOKENIZERS)
@given(seed=st.integers(0, 2**32), context=st.sampled_from([1, 2, credit._CONTEXT]))
@settings(max_examples=60, deadline=None)
def test_decoding_from_the_middle_finds_the_same_tokens(kind, form, seed, context):
    """Of any ids, also of those that no text has: broken characters, runs of spaces and quotes, special tokens."""
    rng, tokenizer = random.Random(seed), TOKENIZERS[kind]
    text = "".join(
        "".join(rng.choices(rng.choice(["ab 12=é京🙂.\n", " .'nt s,!?mvre", "京東🙂", " '", "abc ", "b ; c "]), k=20))
        for _ in range(rng.randint(1, 15))
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(rng.randint(0, 6)):
        at = rng.randint(0, len(ids))
        ids[at : at + rng.randint(0, 2)] = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, 3))]
    text = form(tokenizer)(ids)
    ends = sorted({0, len(text), *(rng.randint(0, len(text)) for _ in range(10))})
    cut = cut_completion(text, lambda text: list(pairwise(ends)))
    values = list(range(len(cut.spans)))  # so that every step is located

    def located(context):
        with mock.patch.object(credit, "_CONTEXT", context):
            return locate_steps(form(tokenizer), ids, cut, len(values) - 1, values=values)

    assert located(context) == located(len(ids))  # with so much context, everything is decoded from the first id on


def test_words():
    tokenizer = TOKENIZERS["words"]
    ids = tokenizer("b c [V] ; c b <eos>")["input_ids"]
    cut = cut_at("b c [V] ;", " c b")
    assert locate_steps(decoder(tokenizer), ids, cut, 0) == StepTokens((), (0, 4))
    # The end-of-text token is no part of the last step
    assert locate_steps(decoder(tokenizer), ids, cut, 1) == StepTokens(((0, 4),), (4, 6), (0,))


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
        assert error == other

    @pytest.mark.parametrize("as_text", [False, True], ids=["object", "json_text"])
    @pytest.mark.parametrize(
        "arguments",
        [
            [{"a": 3}, {"a": 3}, {"a": 3}],  # one and the same call
            [{"f": 1}, {"g": {"f": [2, "f"]}}, {}],  # names as keys and values
            [{"a": 'say "name": "f" and }}'}, {"a": "<tool_call> f(1) </tool_call>"}, {"a": "é\n\\"}],
        ],
    )
    @pytest.mark.parametrize("order", ["name_first", "arguments_first"])
    def test_the_kth_call_is_the_kth_occurrence(self, arguments, as_text, order):
        given = [json.dumps(one) if as_text else one for one in arguments]
        calls = [{"function": {"name": name, "arguments": one}} for name, one in zip("fgf", given, strict=True)]
        form = {
            "name_first": '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>',
            "arguments_first": '<tool_call>\n{{"arguments": {1}, "name": "{0}"}}\n</tool_call>',
        }[order]
        written = [form.format(name, json.dumps(one)) for name, one in zip("fgf", arguments, strict=True)]
        messages = [{"role": "assistant", "content": "So f and g.", "tool_calls": calls}]
        turns = ["So f and g.\n" + "\n".join(written) + "<eos>"]
        cut = cut_completion(messages, lambda text: [(0, 11), *self.spans_of_calls(messages)])
        tokenizer = TOKENIZERS["byte_level"]
        ids = tokenizer(turns[0], add_special_tokens=False)["input_ids"]
        for i, call in enumerate(written):
            place = locate_steps(decoder(tokenizer), ids, cut, i + 1)
            assert tokenizer.decode(ids[slice(*place.error)]) == call
            ((start, end),) = place.verified
            assert (start, end) == (0, place.error[0])

    @staticmethod
    def spans_of_calls(messages):
        return [call.span for call in completion_turns(messages)[0].calls]

    def test_a_turn_whose_text_follows_its_call(self):
        """As some models write it. A message does not tell, so its text may come in another order than the ids."""
        messages = [{"role": "assistant", "content": "So f it is.", "tool_calls": self.CALLS}]
        turns = [f"{self.CALL}\nSo f it is.<eos>"]
        assert self.located(turns, messages, 0) == ([], "So f it is.")
        assert self.located(turns, messages, 1)[1] == self.CALL
        assert self.located(turns, messages, 0, decoded=turns[0]) == ([], self.CALL)
        assert self.located(turns, messages, 1, decoded=turns[0]) == ([f"{self.CALL}\n"], "So f it is.")
        # Text before the call that the parser has dropped is no part of it, and is not judged
        turns = [f"I call f.\n{self.CALL}\nSo f it is.<eos>"]
        assert self.located(turns, messages, 0, decoded=turns[0]) == ([], self.CALL)

    def test_a_call_whose_name_is_not_there(self):
        """The first one takes what follows the text, as it has no other place; of another one nothing is known."""
        calls = [{"function": {"name": name, "arguments": {}}} for name in ("other", "another")]
        messages = [{"role": "assistant", "content": "a.", "tool_calls": calls}]
        tokenizer = TOKENIZERS["byte_level"]
        ids = tokenizer(f"a.\n{self.CALL}<eos>", add_special_tokens=False)["input_ids"]
        cut = cut_completion(messages)
        place = locate_steps(decoder(tokenizer), ids, cut, 1)
        assert tokenizer.decode(ids[slice(*place.error)]) == self.CALL
        assert locate_steps(decoder(tokenizer), ids, cut, 2) is None

    def test_a_parser_that_has_taken_something_out_of_the_middle(self):
        messages = [{"role": "assistant", "content": "Add.\n\nStop. 5."}]
        turns = ["Add.\n\n<note>x</note>\n\nStop. 5.<eos>"]
        assert self.located(turns, messages, 1) == (["Add.\n\n<note>x</note>\n\n"], "Stop. 5.")

    def test_a_rollout_that_holds_what_others_wrote(self):
        """Such a completion is one string: its steps are where they are, and the loss masks what the policy did not write."""
        turns = ["I call f.\n\n", ("Tool says 43.\n\n",), "So 44."]
        text = "I call f.\n\nTool says 43.\n\nSo 44."
        assert self.located(turns, text, 2) == (["I call f.\n\nTool says 43.\n\n"], "So 44.")


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
XML = ("<tool_call>", "</tool_call>", "<think>", "</think>")
GEMMA = ("<eos>", "<pad>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", '<|"|>')
HARMONY = ("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
# By TRL's chat templates: special tokens, other added ones, what the template puts before a turn and the model behind it,
# thinking, and the forms of a call with arguments q and n, of several ones
FAMILIES = {
    "qwen3": (
        CHATML,
        XML,
        ("<|im_start|>assistant\n", "<|im_end|>"),
        "<think>\n{}\n</think>\n\n",
        '<tool_call>\n{{"name": "f", "arguments": {{"q": "{0}", "n": {1}}}}}\n</tool_call>',
        "{}\n{}",
    ),
    "qwen3_5_think": (
        CHATML,
        XML,
        ("<|im_start|>assistant\n", "<|im_end|>"),
        "<think>\n{}\n</think>\n\n",
        "<tool_call>\n<function=f>\n<parameter=q>\n{0}\n</parameter>\n<parameter=n>\n{1}\n</parameter>\n</function>"
        "\n</tool_call>",
        "{}\n{}",
    ),
    "glm4moe": (
        ("<|endoftext|>", "<|assistant|>", "<|user|>"),
        XML,
        ("<|assistant|>", "<|user|>"),
        "<think>{}</think>\n",
        "<tool_call>f\n<arg_key>q</arg_key>\n<arg_value>{0}</arg_value>\n<arg_key>n</arg_key>\n<arg_value>{1}</arg_value>"
        "\n</tool_call>",
        "{}\n{}",
    ),
    "lfm2_2_5": (
        (*CHATML, "<|tool_call_start|>", "<|tool_call_end|>"),
        ("<think>", "</think>"),
        ("<|im_start|>assistant\n", "<|im_end|>"),
        "<think>{}</think>",
        "f(q='{0}', n={1})",
        "<|tool_call_start|>[{}, {}]<|tool_call_end|>",
    ),
    "gemma4": (
        GEMMA,
        (),
        ("<|turn>model\n", "<turn|>"),
        "<|channel>thought\n{}<channel|>",
        '<|tool_call>call:f{{n:{1},q:<|"|>{0}<|"|>}}<tool_call|>',
        "{}{}",
    ),
    "gptoss": (
        HARMONY,
        (),
        ("<|start|>assistant", ""),
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant",
        ' to=functions.f<|channel|>commentary json<|message|>{{"q": "{0}", "n": {1}}}<|call|>',
        "{}{}",
    ),
}


class TestFamilies:
    """Calls as TRL parses them from what models of several families write."""

    @pytest.fixture(params=FAMILIES)
    def family(self, request):
        special, added, around, *forms = FAMILIES[request.param]
        template = resources.files("trl").joinpath(f"chat_templates/{request.param}.jinja").read_text()
        names = {"eos_token": around[1] or special[0], "pad_token": special[0]}
        tokenizer = add_response_schema(byte_tokenizer(template, special, added, **names))
        return request.param, tokenizer, around, *forms

    def located(self, tokenizer, around, text):
        """For each step: the verified text and the wrong step's, if it is the first wrong one."""
        ids = tokenizer(text + around[1])["input_ids"]
        message = parse_response(tokenizer, ids, prefix=tokenizer(around[0])["input_ids"])
        decode = Policy(SimpleNamespace(_tokenizer=tokenizer), None).decode
        cut = cut_completion([message], decoded=decode(ids))
        places = [locate_steps(decode, ids, cut, i) for i in range(len(cut.steps))]
        assert None not in places
        return [
            (
                "".join(tokenizer.decode(ids[slice(*span)]) for span in place.verified),
                tokenizer.decode(ids[slice(*place.error)]),
            )
            for place in places
        ]

    @pytest.mark.parametrize("text", ["", "I look at f.\n"])
    @pytest.mark.parametrize("thought", [None, "I call f with 3. Look: I look at f."])
    def test_the_second_call_of_one_function(self, family, text, thought):
        name, tokenizer, around, thinking, call, several = family
        if name == "gptoss":
            text = ""  # its calls have none
        before = thinking.format(thought) if thought else ""
        # What the arguments hold is not where a call begins
        first, second = call.format("use f, then f 3", 3), call.format("f", 3)
        written = several.format(first, second)
        located = self.located(tokenizer, around, before + text + written)
        assert len(located) == bool(text) + 2
        (right, wrong), (both_right, second_wrong) = located[-2:]
        if text:
            assert located[0] == ("", text.strip())
        assert right == text
        start = written.index(second, len(first))
        assert wrong == written[:start].strip()
        assert both_right.strip() == (text + written[:start]).strip()
        assert second_wrong == written[start:].strip()

    def test_a_call_before_the_text(self, family):
        name, tokenizer, around, _, call, several = family
        if name == "gptoss":
            pytest.skip("a turn of gpt-oss ends with its call")
        written = several.format(call.format("f", 3), call.format("then f", 4))
        (_, first), (right, second), (both_right, text) = self.located(tokenizer, around, f"{written}\nSo f gives 4.")
        assert (first + second).replace(" ", "") == written.replace("\n<tool", "<tool").replace(" ", "")
        assert right.strip() == first
        assert both_right == f"{written}\n"
        assert text == "So f gives 4."


@pytest.mark.parametrize("values", [None, list(range(60))], ids=["two_boundaries", "sixty_boundaries"])
def test_long_completions_are_fast(values):
    calls = []
    tokenizer = TOKENIZERS["byte_level"]
    steps = ["".join(f"Line {i}, {k}: we add {i} and {k}.\n" for k in range(10)) + "\n" for i in range(61)]
    ids = tokenizer("".join(steps))["input_ids"]

    def decode(part):
        calls.append(len(part))
        return tokenizer.decode(part, skip_special_tokens=True)

    place = locate_steps(decode, ids, cut_at(*steps), 60, values=values)
    assert len(place.verified) == (60 if values else 1)
    assert len(calls) < (900 if values else 60)  # not one per token
    assert sum(calls) < (9 if values else 4) * len(ids)  # not all of the text for each boundary
