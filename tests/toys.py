"""Judges, reward functions and tables that tests share."""

import json
import math

import torch
from conftest import first_long_word, words_as_steps
from hypothesis import strategies as st

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
