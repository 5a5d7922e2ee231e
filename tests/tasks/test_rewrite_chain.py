import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo.steps import check_spans
from trl_sgpo.tasks.rewrite_chain import (
    ALPHABET,
    OPERATIONS,
    SECOND_ALPHABET,
    PretrainConfig,
    Problem,
    accuracy_reward,
    build_tokenizer,
    evaluate,
    first_wrong_block,
    load_or_pretrain,
    make_dataset,
    right_prefix,
    sample_problem,
    segment_blocks,
)


problems = st.builds(
    lambda seed, k, length, alphabet: sample_problem(random.Random(seed), k, length, alphabet),
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(2, 6),
    st.sampled_from([ALPHABET, SECOND_ALPHABET]),
)


def completion_of(blocks):
    return " ; ".join(blocks)


def judge(problem, completion):
    spans = segment_blocks(completion)
    return first_wrong_block(problem.prompt, [completion[start:end] for start, end in spans])


@pytest.mark.parametrize(
    ("operation", "result"), [("R", "bcda"), ("L", "bcfa"), ("V", "fcba"), ("S", "bacf")], ids=OPERATIONS
)
def test_operations(operation, result):
    letters = tuple("abcf")  # f is the last letter: R takes it round to a
    assert Problem(letters, (operation,)).apply(operation, letters) == tuple(result)


@given(problems)
@settings(max_examples=100, deadline=None)
def test_the_gold_solution_is_right(problem):
    completion = completion_of(problem.gold_blocks())
    assert accuracy_reward([problem.prompt], [completion]) == [1.0]
    assert judge(problem, completion) is None
    assert right_prefix(problem.prompt, completion) == 1.0
    assert Problem.from_prompt(problem.prompt) == problem


@given(problems, st.data())
@settings(max_examples=200, deadline=None)
def test_the_step_checker_finds_the_first_corrupted_block(problem, data):
    blocks = problem.gold_blocks()
    i = data.draw(st.integers(0, len(blocks) - 1))
    tokens = blocks[i].split()
    position = data.draw(st.integers(0, len(problem.letters) - 1))
    tokens[position] = problem.alphabet[(problem.alphabet.index(tokens[position]) + 1) % len(problem.alphabet)]
    blocks[i] = " ".join(tokens)
    completion = completion_of(blocks)
    assert judge(problem, completion) == i
    assert right_prefix(problem.prompt, completion) == i / len(blocks)
    assert accuracy_reward([problem.prompt], [completion]) == [float(i < len(blocks) - 1)]  # the verifier sees the end


def test_too_few_and_too_many_blocks():
    problem = Problem(tuple("abcd"), ("R", "V", "S"))
    gold = problem.gold_blocks()
    assert judge(problem, completion_of(gold[:2])) == 0  # no reward for stopping early
    assert judge(problem, completion_of([*gold, "a b c d"])) == 0
    assert judge(problem, completion_of(gold) + " ;") == 0  # the verifier counts a block more there
    assert accuracy_reward([problem.prompt] * 2, [completion_of(gold[:2]), completion_of([*gold, gold[-1]])]) == [0, 0]


def test_noise_goes_on_from_the_corrupted_letters():
    problem = Problem(tuple("abcd"), ("R", "V"))
    blocks = problem.blocks(noise=1.0, rng=random.Random(0))
    first, second = ([token for token in block.split() if len(token) == 1] for block in blocks)
    assert sum(a != b for a, b in zip(first, "bcde", strict=True)) == 1
    assert sum(a != b for a, b in zip(second, first[::-1], strict=True)) == 1


@given(st.text("ab [R];=", max_size=60))
@settings(max_examples=200, deadline=None)
def test_segmenter_and_checkers_take_any_text(text):
    spans = segment_blocks(text)
    check_spans(text, spans)
    problem = Problem(tuple("abcd"), ("R", "V"))
    if spans:
        first = first_wrong_block(problem.prompt, [text[start:end] for start, end in spans])
        assert first is None or 0 <= first < len(spans)
        assert first is not None or accuracy_reward([problem.prompt], [text]) == [1.0]
    assert accuracy_reward([problem.prompt], [text])[0] in (0.0, 1.0)
    assert 0 <= right_prefix(problem.prompt, text) <= 1


def test_bad_input():
    with pytest.raises(ValueError, match="prompt='a b c' is not a RewriteChain prompt"):
        Problem.from_prompt("a b c")
    with pytest.raises(ValueError, match="operation='X' is unknown"):
        Problem(tuple("ab"), ("X",)).gold_blocks()


def test_tokenizer_keeps_every_token():
    tokenizer = build_tokenizer()
    for alphabet in (ALPHABET, SECOND_ALPHABET):
        row = make_dataset(1, 6, seed=0, alphabet=alphabet)[0]
        text = f"{row['prompt']} {row['solution']}"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_pretraining_learns_and_is_cached(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = PretrainConfig(
        clean_updates=150, noisy_updates=0, max_operations=1, length=2, layers=2, width=48, heads=2, learning_rate=5e-3
    )
    path = load_or_pretrain(tmp_path / "base", config, progress=False)
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert load_or_pretrain(path, config, progress=False) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = make_dataset(32, 1, seed=7, length=2)["prompt"]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    result = evaluate(model, tokenizer, prompts, n_samples=4, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.greedy_accuracy > 0.8
    assert result.right_prefix >= result.accuracy > 0.5
    assert 0 <= result.failed_groups < 0.5
