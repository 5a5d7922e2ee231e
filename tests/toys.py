"""Judges, reward functions, tables, tokenizers and models that tests share."""

import itertools
import json
import math

import torch
from conftest import first_long_word, words_as_steps
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sgpo import StepJudge, StepwiseJudge, Verdict


def stepwise(judge=first_long_word, **kwargs):
    """A StepwiseJudge to which every word is a step."""
    return StepwiseJudge(judge, segmenter=words_as_steps, **kwargs)


def all_failed(prompts, completions, **kwargs):
    return [0.0] * len(completions)


def all_mixed(prompts, completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


class CountingJudge(StepJudge):
    """Counts the items it is asked about, and answers by the length of their text."""

    def __init__(self):
        self.calls = 0
        self.items = []

    def judge(self, items):
        self.calls += len(items)
        self.items += items
        return [Verdict.error(sum(map(len, item.steps)) % len(item.steps)) for item in items]


class FixedJudge(StepJudge):
    """Answers every batch with what a function of the items gives."""

    def __init__(self, answer):
        self.answer = answer

    def judge(self, items):
        return self.answer(items)


def fixed(*first_errors):
    """A StepwiseJudge that names these steps, one completion after the other."""
    return stepwise(
        FixedJudge(
            lambda items: [
                Verdict.error(min(first_errors[i % len(first_errors)], len(item.steps) - 1))
                for i, item in enumerate(items)
            ]
        )
    )


def tensor(rows):
    """A table with None for NaN."""
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float32)


def matrix(values, min_groups=1, max_groups=4, min_size=2, max_size=8):
    """Random (P, G) tables as lists of lists."""
    return st.integers(min_size, max_size).flatmap(
        lambda size: st.lists(st.lists(values, min_size=size, max_size=size), min_size=min_groups, max_size=max_groups)
    )


def save_model(model, tokenizer, folder):
    """A folder that a script can load as a model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    """A file with one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    chat_template=CHATML, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), added=(), words=(), **kwargs
):
    """
    A tokenizer that can write any text: one token per byte, and one per word of `words`. `special` and `added` are control
    tokens, those that the tokenizer calls special and others. `kwargs` are arguments of `PreTrainedTokenizerFast`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    symbols = [*alphabet, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **names)


def tiny_llama(tokenizer, seed=0, **sizes):
    """A random Llama for a tokenizer, the same one for the same seed."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, **sizes}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **sizes,
        )
    )


def writer(tokenizer, answers, **sizes):
    """
    A Llama that writes `\\boxed{ANSWER}` after every line feed, whatever is asked: each answer, one character, with its
    probability. Nothing but the last token decides on the next one, so the characters must all be different.
    """
    model = tiny_llama(tokenizer, tie_word_embeddings=False, **sizes)
    chain = ["\n", *"\\boxed{", tuple(answers), "}", tokenizer.eos_token]
    ids = [
        [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(one)[0]) for one in place]
        for place in map(_as_tuple, chain)
    ]
    scale = model.config.hidden_size**0.5  # of a one-hot vector behind the last norm
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for i, (here, following) in enumerate(itertools.pairwise(ids)):
            model.model.embed_tokens.weight[here, i] = 1
            for id, answer in zip(following, _as_tuple(chain[i + 1]), strict=True):
                model.lm_head.weight[id, i] = (60 + math.log(answers.get(answer, 1))) / scale
    return model


def _as_tuple(place):
    return place if isinstance(place, tuple) else (place,)
