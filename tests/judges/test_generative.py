"""A generative judge in this process. Every model is tiny, saved to disk and loaded the way a real one is."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import byte_tokenizer, tiny_llama

from trl_sgpo.judges import JudgeItem, StepwiseJudge, Verdict
from trl_sgpo.judges.generative import GenerativeJudge, QuestionLayout, _longest_heads, choice_shares
from trl_sgpo.judges.prompt import JudgePrompt


SHORT = JudgePrompt(
    version="test", rules="Find it.", known_wrong="Where?", unknown="Any?", text_answer="{choices}. FIRST_ERROR: k"
)
ANSWER = "Hm.\nFIRST_ERROR: 2"
ITEM = JudgeItem("What is 2 + 2?", ("Add them.", "2 + 2 = 5"))
ITEMS = [
    ITEM,
    JudgeItem("What is 3 * 3?", ("Three threes.", "Three and three is six.", "Six and three is ten.")),
    JudgeItem("What is 3 * 3?", ("It is six.",), reference="9"),
    replace(ITEM, known_wrong=False),
]


def judge_tokenizer():
    """Nearly one token per byte, and the control tokens of a chat family, special ones and others."""
    added = ("<tool_call>", "</tool_call>", "<think>", "</think>", "@@END@@", "@@ END@@")
    # The word is one token, so that a tiny model learns to write it in seconds
    return byte_tokenizer(added=added, words=("FIRST_ERROR:",))


def tiny_model(tokenizer):
    return tiny_llama(tokenizer, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def overfit(model, tokenizer, answer, steps=90, learning_rate=5e-3):
    """
    Trains until the model answers everything with `answer`, on the very ids that the judge asks with. The learning rate falls to
    0: at a constant one the last updates shake the weights, and one round in twelve with nonces that were not seen goes wrong.
    """
    layout = QuestionLayout(tokenizer)
    rng = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:  # drawn nonces, but the same ones in every run
        patch.setattr("trl_sgpo.judges.prompt._nonce", lambda texts: f"{rng.getrandbits(32):08x}")
        asked = [layout.encode(SHORT.ask(item)) for item in ITEMS * 5]
    target = [*layout.encode_answer(answer), tokenizer.eos_token_id]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        prompt = asked[step % len(asked)]
        ids = torch.tensor([[*prompt, *target]])
        labels = torch.tensor([[-100] * len(prompt) + target])
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def save(model, tokenizer, path):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return judge_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random model: it says nothing sensible, and the same thing every time."""
    model = tiny_model(tokenizer)
    with torch.no_grad():  # at its initial size every choice would be nearly as likely as any other
        for parameter in model.parameters():
            parameter.mul_(8)
    return save(model, tokenizer, tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer):
    """A model that gives `ANSWER` to everything."""
    model = tiny_model(tokenizer)
    overfit(model, tokenizer, ANSWER)
    return save(model, tokenizer, tmp_path_factory.mktemp("taught") / "model")


def judge_of(path, **arguments):
    return GenerativeJudge(path, **{"prompt": SHORT, "max_new_tokens": 40, **arguments})


def same(a, b):
    """Equal but for the last bits of a confidence, which padding changes."""
    assert [(v.status, v.first_error) for v in a] == [(v.status, v.first_error) for v in b]
    for one, other in zip(a, b, strict=True):
        assert (one.confidence or 0) == pytest.approx(other.confidence or 0, rel=1e-4)


class TestVerdicts:
    def test_what_the_model_has_learnt_is_what_the_judge_says(self, taught):
        judge = judge_of(taught)
        verdicts = judge.judge(ITEMS)
        assert [v.first_error for v in verdicts] == [1, 1, None, 1]
        assert verdicts[0].reason == ANSWER
        assert verdicts[2].reason == "the judge named step 2 of 1"
        assert judge.usage.calls == 4
        assert judge.usage.completion_tokens == 4 * 8
        assert judge.usage.prompt_tokens == sum(len(judge.layout.ask(SHORT, item, judge._limit)[1]) for item in ITEMS)

    def test_in_a_reward_function(self, taught):
        reward = StepwiseJudge(judge_of(taught), transform="identity")
        assert reward(prompts=["What is 2 + 2?"], completions=["First add the numbers.\n\nThat gives 5."]) == [0.5]

    def test_an_answer_without_end_is_cut_off(self, taught):
        verdict = judge_of(taught, max_new_tokens=5).judge([ITEM])[0]
        assert verdict == Verdict.abstain("the judge's answer was cut off at max_new_tokens=5")

    def test_a_loaded_model_and_its_mode(self, taught, tokenizer):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(taught).train()
        judge = judge_of((model, tokenizer))
        assert judge.judge([ITEM])[0].first_error == 1
        assert model.training
        assert judge_of((model, tokenizer), tokenizer=taught).tokenizer is not tokenizer  # loaded from the folder
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_without_a_chat_template(self, tmp_path):
        plain = judge_tokenizer()
        plain.chat_template = None
        model = tiny_model(plain)
        overfit(model, plain, "FIRST_ERROR: 1")
        judge = judge_of(save(model, plain, tmp_path / "plain"))
        assert [v.first_error for v in judge.judge(ITEMS)] == [0] * 4
        asked = plain.decode(judge.layout.encode(SHORT.ask(ITEM)))
        assert asked.startswith("Find it.\n\nProblem:\nWhat is 2 + 2?\n\n<step-")
        assert asked.endswith("FIRST_ERROR: k\n\nAnswer:\n")

    def test_a_template_without_system_messages(self):
        strict = judge_tokenizer()
        strict.chat_template = (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
        )
        asked = strict.decode(QuestionLayout(strict).encode(SHORT.ask(ITEM)))
        assert asked.startswith("<|im_start|>user\nFind it.\n\nProblem:")
        without_rules = QuestionLayout(strict).encode(replace(SHORT, rules="").ask(ITEM))
        assert "Problem:" in strict.decode(without_rules)

    @pytest.mark.parametrize(
        "drop",
        [
            "{% if m.role != 'system' %}",  # every such message
            "{% if not loop.first or m.role == 'user' %}",  # the first one, to put it elsewhere
            "{% if m.role in ('user', 'assistant') and (m.role == 'assistant' or loop.last) %}",  # all but the last turn
        ],
    )
    def test_a_template_that_leaves_the_system_message_out(self, drop):
        silent = judge_tokenizer()
        silent.chat_template = (
            f"{{% for m in messages %}}{drop}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n"
            "{% endif %}{% endfor %}<|im_start|>assistant\n"
        )
        asked = silent.decode(QuestionLayout(silent).encode(SHORT.ask(ITEM)))
        assert asked.startswith("<|im_start|>user\nFind it.\n\nProblem:")
        assert asked.count("Find it.") == 1

    def test_a_template_that_trims_the_system_message(self, tokenizer):
        """It keeps the rules, so nothing is moved."""
        asked = replace(SHORT, rules="\n Find it. \n").ask(ITEM)
        text = tokenizer.decode(QuestionLayout(tokenizer).encode(asked))
        trimming = judge_tokenizer()
        trimming.chat_template = trimming.chat_template.replace("content }}", "content | trim }}")
        assert "| trim" in trimming.chat_template
        trimmed = trimming.decode(QuestionLayout(trimming).encode(asked))
        for one in (text, trimmed):
            assert one.startswith("<|im_start|>system\n")
            assert one.count("Find it.") == 1

    @pytest.mark.parametrize(
        ("answer", "first_error"),
        [
            ('{"analysis": "", "first_error_step": "2"}' + "\n" * 9, 1),
            ("FIRST_ERROR: 2" + "\n" * 9, 1),
            ('{"analysis": "", "first_error_step": "2"', None),
            ("FIRST_ERROR: 2", None),
        ],
    )
    def test_an_answer_that_is_cut_off_in_white_space(self, folder, answer, first_error):
        judge = judge_of(folder)
        ids = judge.layout.encode_answer(answer)
        judge.max_new_tokens = len(ids)
        text, verdict = judge._read(SHORT.ask(ITEM), ids)
        assert text == answer
        assert verdict.first_error == first_error
        assert (first_error is not None) or "cut off at max_new_tokens" in verdict.reason

    def test_a_peft_adapter(self, taught, tokenizer, tmp_path):
        peft = pytest.importorskip("peft")
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(taught)
        model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=64, target_modules="all-linear"))
        overfit(model, tokenizer, "FIRST_ERROR: 1", learning_rate=3e-3)
        model.save_pretrained(tmp_path / "adapter")
        judge = judge_of(tmp_path / "adapter", tokenizer=taught)
        assert judge.judge([ITEM])[0].first_error == 0


class TestScore:
    def test_the_likeliest_choice(self, taught):
        judge = judge_of(taught, answer="score")
        verdicts = judge.judge(ITEMS)
        assert [v.n_steps for v in verdicts] == [2, 3, 1, 2]
        assert verdicts[2].first_error == 0  # the only choice
        assert verdicts[2].confidence == 1
        assert verdicts[0].reason.startswith("P(")
        assert judge.usage.completion_tokens == 0

    def test_after_training_on_verdict_lines(self, tokenizer):
        model = tiny_model(tokenizer)
        overfit(model, tokenizer, "FIRST_ERROR: 2")
        verdicts = judge_of((model, tokenizer), answer="score").judge(ITEMS)
        assert [v.first_error for v in verdicts] == [1, 1, 0, 1]
        assert min(v.confidence for v in verdicts) > 0.9

    def test_it_is_the_probability_of_the_text(self, folder):
        """Against a plain loop over the choices, with more than nine of them and one question per pass."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        item = JudgeItem("Count.", tuple(f"This is number {i}" for i in range(13)), known_wrong=False)
        judge = judge_of(folder, answer="score")
        question = SHORT.ask(item)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        asked = judge.layout.encode(question)
        log_probabilities = []
        for choice in question.choices:
            tail = tokenizer(f"FIRST_ERROR: {choice}", add_special_tokens=False)["input_ids"]
            n = len(tokenizer("FIRST_ERROR:", add_special_tokens=False)["input_ids"])
            ids = torch.tensor([asked + tail])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].log_softmax(dim=-1)
            log_probabilities.append(sum(float(logits[len(asked) + i - 1, tail[i]]) for i in range(n, len(tail))))
        # The nonce is random text in a random model: ask about the very same ids
        found = judge._score({0: (question, asked)}, math.inf)[0]
        shares = choice_shares([judge.layout.choice(c) for c in question.choices], log_probabilities)
        assert found.confidence == pytest.approx(max(shares), rel=1e-3)
        best = question.choices[shares.index(max(shares))]
        assert (found.status, found.first_error) == (
            ("no_error", None) if best == "none" else ("error", int(best) - 1)
        )

    def test_heads(self):
        assert _longest_heads([(1,), (2,)]) == [()]
        assert _longest_heads([(5, 1), (5, 2), (5, 1, 0), (5, 2, 0), (7, 8, 9)]) == [(5, 1), (5, 2), (7, 8)]

    def test_a_longer_number_does_not_count_for_the_shorter(self):
        shares = choice_shares([(1,), (2,), (1, 2)], [math.log(0.5), math.log(0.3), math.log(0.4)])
        assert shares == pytest.approx([0.125, 0.375, 0.5])
        assert choice_shares([(1,), (12,)], [math.log(0.5), math.log(0.5)]) == pytest.approx([0.5, 0.5])
        assert all(map(math.isnan, choice_shares([(1,), (2,)], [math.nan, 0.0])))


@pytest.mark.parametrize("answer", ["generate", "score"])
class TestBatches:
    @pytest.fixture(autouse=True)
    def _one_nonce(self, monkeypatch):
        """A nonce is random text, and a random model's answer depends on it."""
        monkeypatch.setattr("trl_sgpo.judges.prompt._nonce", lambda texts: "0badcafe")

    def test_a_batch_is_what_its_items_are_one_by_one(self, folder, taught, answer):
        for path in (folder, taught):
            judge = judge_of(path, answer=answer)
            together = judge.judge(ITEMS)
            same(together, [judge.judge([item])[0] for item in ITEMS])
            same(judge.judge(ITEMS[::-1]), together[::-1])
            same(judge_of(path, answer=answer, max_tokens_per_batch=900).judge(ITEMS), together)

    def test_memory_that_does_not_suffice_halves_the_batch(self, taught, answer, monkeypatch):
        judge = judge_of(taught, answer=answer)
        expected = judge.judge(ITEMS)
        sizes = []
        name = "generate" if answer == "generate" else "forward"
        inner = getattr(judge._model, name)

        def short_of_memory(*args, **kwargs):
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return inner(*args, **kwargs)

        monkeypatch.setattr(judge._model, name, short_of_memory)
        same(judge.judge(ITEMS), expected)
        assert sizes == [4, 2, 1, 1, 2, 1, 1]

        def never(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr(judge._model, name, never)
        verdicts = judge.judge(ITEMS)
        assert all(v.status == "abstain" and "does not fit into the memory of cpu" in v.reason for v in verdicts)

    def test_a_failure_is_an_abstention(self, taught, answer, monkeypatch, caplog):
        judge = judge_of(taught, answer=answer)

        def broken(*args, **kwargs):
            raise RuntimeError("device-side assert")

        monkeypatch.setattr(judge._model, "generate" if answer == "generate" else "forward", broken)
        for _ in range(2):
            assert {v.reason for v in judge.judge(ITEMS)} == {"RuntimeError: device-side assert"}
        assert caplog.text.count("failed on a batch") == 1

    def test_an_item_that_cannot_be_asked_about(self, taught, answer):
        judge = judge_of(taught, answer=answer, max_tokens_per_batch=500)
        items = [JudgeItem("What?" * 500, ("So.",)), ITEM]
        verdicts = judge.judge(items)
        assert verdicts[0].status == "abstain"
        assert "nothing can be shown" in verdicts[0].reason
        assert verdicts[1].status == "error"

    def test_too_long_a_completion_is_shown_in_part(self, taught, answer):
        judge = judge_of(taught, answer=answer, max_tokens_per_batch=1000)
        long = JudgeItem("What is 2 + 2?", tuple(f"Step {i} is this: {'so ' * 60}" for i in range(9)))
        question, ids = judge.layout.ask(SHORT, long, judge._limit)
        assert 700 < len(ids) <= judge._limit < 1000
        shown = sum(choice.isdigit() for choice in question.choices)
        assert 1 < shown < 9
        assert question.choices[-1] == "later"
        assert "fit" not in judge.judge([long])[0].reason  # what the tiny model makes of it is its own affair

    def test_rng_and_gradients_are_left_alone(self, taught, answer):
        state = torch.get_rng_state()
        judge = judge_of(taught, answer=answer, **({"temperature": 1.0, "votes": 3} if answer == "generate" else {}))
        judge.judge(ITEMS)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(parameter.requires_grad for parameter in judge._model.parameters())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()

    def test_offload(self, taught, answer, monkeypatch):
        judge = judge_of(taught, answer=answer, offload=True)
        moves = []
        inner = judge._model.to
        monkeypatch.setattr(judge._model, "to", lambda device: (moves.append(str(device)), inner(device))[1])
        same(judge.judge(ITEMS), judge_of(taught, answer=answer).judge(ITEMS))
        assert moves == ["cpu", "cpu"]  # to its device, which is the CPU here, and back

    def test_verdicts_stand_if_the_model_cannot_be_moved_back(self, taught, answer, monkeypatch):
        judge = judge_of(taught, answer=answer, offload=True)
        monkeypatch.setattr(judge._model, "to", Mock(side_effect=[judge._model, RuntimeError("no room")]))
        same(judge.judge(ITEMS), judge_of(taught, answer=answer).judge(ITEMS))

    def test_a_model_that_cannot_be_moved_abstains(self, taught, answer, monkeypatch):
        judge = judge_of(taught, answer=answer, offload=True)
        monkeypatch.setattr(judge._model, "to", Mock(side_effect=RuntimeError("no room")))
        assert {verdict.reason for verdict in judge.judge([ITEM])} == {"RuntimeError: no room"}


class TestVotes:
    def test_a_plurality(self, taught):
        judge = judge_of(taught, votes=5, temperature=0.2)
        verdict = judge.judge([ITEM])[0]
        assert verdict.first_error == 1
        assert verdict.confidence >= 0.8
        assert verdict.reason.startswith("first_error=1: ")
        assert judge.usage.calls == 5

    def test_too_little_agreement(self, taught):
        verdict = judge_of(taught, votes=4, temperature=3.0, min_agreement=1.0).judge([ITEM])[0]
        assert verdict.status == "abstain"
        assert "of 4" in verdict.reason

    def test_a_seed_gives_the_same_votes_and_each_call_new_ones(self, folder, monkeypatch):
        def answers(judge):
            return [[text for text, _ in votes] for votes in judge.sample([ITEM])]

        def make(seed):
            return judge_of(folder, votes=2, temperature=1.0, seed=seed, prompt=SHORT)

        first, other = make(0), make(0)
        monkeypatch.setattr("trl_sgpo.judges.prompt._nonce", lambda texts: "0badcafe")
        a = answers(first)
        assert a == answers(other)
        assert a[0][0] != a[0][1]
        assert answers(first) != a

    def test_samples_come_with_their_verdicts(self, taught):
        judge = judge_of(taught, votes=2, temperature=0.1, max_tokens_per_batch=1000)
        samples = judge.sample([ITEM, JudgeItem("What?" * 500, ("So.",))])
        assert [len(answers) for answers in samples] == [2, 0]
        text, verdict = samples[0][0]
        assert text.endswith("FIRST_ERROR: 2")
        assert verdict.first_error == 1


class TestDeadline:
    def test_generation_stops_in_the_middle(self, folder, monkeypatch):
        judge = judge_of(folder, max_new_tokens=3000, batch_deadline=1.0, max_tokens_per_batch=4096)
        monkeypatch.setattr(type(judge), "_eos_ids", property(lambda self: set()))  # it would go on for ever
        now = [0.0]
        monkeypatch.setattr("trl_sgpo.judges.generative.monotonic", lambda: now[0])
        monkeypatch.setattr("transformers.generation.stopping_criteria.time", SimpleNamespace(time=lambda: now[0]))

        def one_eighth_later(*args):
            now[0] += 1 / 8

        judge._model.register_forward_hook(one_eighth_later)
        verdicts = judge.judge(ITEMS * 2)
        assert {v.reason for v in verdicts} == {"not judged within batch_deadline=1 s"}
        # The first question stops at the first token after the deadline. The others do not begin
        assert now[0] == 1 + 1 / 8
        assert (judge.usage.calls, judge.usage.completion_tokens) == (1, 9)

    def test_what_is_done_in_time_counts(self, taught, monkeypatch):
        judge = judge_of(taught, batch_deadline=60.0, max_tokens_per_batch=700)
        clock = iter([0.0, 1.0, 1.0, *[100.0] * 9])  # the first batch is begun in time, the second is not
        monkeypatch.setattr("trl_sgpo.judges.generative.monotonic", lambda: next(clock))
        verdicts = judge.judge(ITEMS)
        assert {v.status for v in verdicts} == {"error", "abstain"}
        assert {v.reason for v in verdicts if v.status == "abstain"} == {"not judged within batch_deadline=60 s"}


WORDS = (
    "<|im_start|> <|im_end|> <|endoftext|> <tool_call> </tool_call> <think> </think> <<|im_end|> @@END@@ @@ END@@ < |"
)
MORE_WORDS = "im_end|> <|im_ > / é FIRST_ERROR: system"
HOSTILE = st.lists(st.sampled_from([*WORDS.split(), *MORE_WORDS.split(), " ", "\n"]), max_size=12).map("".join)


class TestUntrustedText:
    @given(problem=HOSTILE, steps=st.lists(HOSTILE.filter(str.strip), min_size=1, max_size=4), reference=HOSTILE)
    @settings(
        max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
    )
    def test_it_cannot_write_control_tokens(self, random_judge, problem, steps, reference):
        judge = random_judge
        harmless = JudgeItem("p", tuple("s" for _ in steps), reference="r")
        hostile = JudgeItem(problem, tuple(steps), reference=reference)
        control = set(judge.layout._control)

        def count(item):
            return sum(id in control for id in judge.layout.ask(SHORT, item, judge._limit)[1])

        assert count(hostile) == count(harmless)

    @pytest.fixture
    def random_judge(self, folder):
        return judge_of(folder)

    def test_tokens_that_a_family_has_of_its_own(self, folder, tokenizer):
        """Breaking one up makes the other, which is then broken up in its turn."""
        item = replace(ITEM, steps=("@@END@@", "@@ END@@", "@@@@END@@END@@"))
        ids = judge_of(folder).layout.ask(SHORT, item)[1]
        assert not set(tokenizer.convert_tokens_to_ids(["@@END@@", "@@ END@@"])) & set(ids)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"answer": "guess"}, "answer='guess' is unknown"),
            ({"votes": 0}, "votes=0 must be positive"),
            ({"votes": 4, "temperature": 0.0}, "votes=4 does not go with temperature=0.0"),
            ({"votes": 4, "answer": "score"}, "answer='score': all votes would be the same"),
            ({"min_agreement": 4}, "min_agreement=4 must lie in"),
            ({"temperature": -1.0}, "temperature=-1.0"),
            ({"batch_deadline": 0}, "batch_deadline=0 must be positive"),
            ({"max_new_tokens": 5000}, "max_new_tokens=5000 leaves no room for a question"),
        ],
    )
    def test_bad_ones(self, folder, arguments, message):
        with pytest.raises(ValueError, match=message):
            judge_of(folder, **arguments)

    def test_bad_models(self, tmp_path):
        with pytest.raises(TypeError, match="model is a int"):
            GenerativeJudge(3)
        with pytest.raises(ValueError, match="could not be loaded"):
            GenerativeJudge(tmp_path)
        with pytest.raises(TypeError, match="is no `JudgePrompt`"):
            GenerativeJudge(tmp_path, prompt="find it")

    def test_name_and_cache_key(self, folder):
        judge = judge_of(folder)
        assert judge.name == "GenerativeJudge(model)"
        keys = {
            judge.cache_key,
            judge_of(folder, answer="score").cache_key,
            judge_of(folder, max_new_tokens=41).cache_key,
            judge_of(folder, temperature=0.5).cache_key,
            judge_of(folder, prompt=JudgePrompt()).cache_key,
        }
        assert len(keys) == 5
        assert judge_of(folder).cache_key == judge.cache_key
        weights = folder / "model.safetensors"
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
        assert judge_of(folder).cache_key != judge.cache_key  # trained anew


@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed")
def test_beside_a_policy_under_zero3(taught, tmp_path):
    """Two real processes; the judge is loaded after the training arguments, as a script does it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(Path(__file__).parent / "zero3.py"), str(taught), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "true", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["partitioned"] == {"policy": True, "judge": False}
        assert rank["written"] > 0
        assert rank["scored"] > 0
        assert rank["abstain_rate"] == [0.0, 0.0]
        assert max(rank["grad_norm"]) > 0
