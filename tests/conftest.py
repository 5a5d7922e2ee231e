"""Tiny models, made on the spot: nothing here needs a network or a GPU."""

import json
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from annotated_solutions import JUDGES, made_up_rows, write

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.tasks.rewrite_chain import PretrainConfig, build_model, build_tokenizer, make_dataset


# On a GPU machine too the small tests run on the CPU, where equal means equal bit for bit. One thread for each worker
torch.set_num_threads(1)

# Fixtures that train a model or start processes
SLOW_FIXTURES = {"make_trainer", "two_ranks"}
SLOW_FOLDERS = {"benchmarks"}


def pytest_collection_modifyitems(items):
    """
    Sorts the tests into two tiers by what they use. `make test` runs what is not slow, `make test-all` the rest. A test marked
    `essential` is in the first one whatever it uses. Whole commands, other processes and simulations mark themselves `slow`.
    """
    for item in items:
        slow = SLOW_FIXTURES.intersection(item.fixturenames) or SLOW_FOLDERS.intersection(item.path.parts)
        if slow and not item.get_closest_marker("essential"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model(tokenizer):
    """A new copy of one and the same random Llama on every call."""
    return lambda seed=0: build_model(PretrainConfig(layers=1, width=32, heads=2, seed=seed), tokenizer)


@pytest.fixture
def dataset():
    """Eight RewriteChain problems; `kind` says what the reward functions of the tests make of their groups."""
    rows = make_dataset(8, n_operations=2, seed=0)
    return rows.add_column("kind", ["failed", "mixed"] * 4)


@pytest.fixture
def make_trainer(make_model, tokenizer, dataset, tmp_path):
    """
    `make_trainer(reward_funcs, trainer_class, config_class, **config)`: two groups of four completions per update, four
    updates, and everything that is logged kept in `trainer.state.log_history`.
    """

    def make(reward_funcs, trainer_class=SGPOTrainer, config_class=SGPOConfig, trainer_args=None, **config):
        config = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **config,
        }
        given = {
            "model": make_model(),
            "processing_class": tokenizer,
            "train_dataset": dataset,
            **(trainer_args or {}),
        }
        return trainer_class(reward_funcs=reward_funcs, args=config_class(**config), **given)

    return make


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same_parameters(a, b) -> None:
    """Equal bit for bit."""
    a, b = (x if isinstance(x, dict) else parameters(x) for x in (a, b))
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"these parameters differ: {different}"


def assert_every_parameter_moved(before, after) -> None:
    before, after = (x if isinstance(x, dict) else parameters(x) for x in (before, after))
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still, f"these parameters did not move: {still}"


def logged(trainer, key: str) -> list[float]:
    """What was logged under a key, in order, where it was logged."""
    return [entry[key] for entry in trainer.state.log_history if entry.get(key) is not None]


def record_advantages(trainer) -> list[torch.Tensor]:
    """The advantages of each generation round as they leave the trainer, before TRL shuffles them."""
    rounds = []
    inner = trainer._generate_and_score_completions

    def wrapped(inputs):
        output = inner(inputs)
        rounds.append(output["advantages"].clone())
        return output

    trainer._generate_and_score_completions = wrapped
    return rounds


def record_rounds(trainer):
    """
    The output of each generation round as it leaves the trainer, with the log-probabilities and entropies of its tokens
    computed from the logits, and the advantages that are logged.
    """
    rounds = []
    inner = trainer._generate_and_score_completions

    def wrapped(inputs):
        output = inner(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        length = output["completion_ids"].shape[1]
        with torch.no_grad():
            logps = (
                trainer.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].float().log_softmax(-1)
            )
        rounds.append(
            {
                **output,
                "logps": logps.gather(2, output["completion_ids"].unsqueeze(2)).squeeze(2),
                "entropy": -(logps.exp() * logps).sum(dim=2),
                "logged": torch.tensor(list(trainer._logs["advantages"])),
            }
        )
        return output

    trainer._generate_and_score_completions = wrapped
    return rounds


# Reward functions. `kind` is a column of the dataset; completions of a group follow each other.


def by_kind(prompts, completions, kind, **kwargs):
    """Failed groups: all wrong. Mixed groups: every other completion is right. Solved groups: all right."""
    return [{"failed": 0.0, "mixed": float(i % 2), "solved": 1.0}[k] for i, k in enumerate(kind)]


def length_reward(prompts, completions, **kwargs):
    """Something that is not right or wrong: a little reward for length."""
    return [len(completion) / 100 for completion in completions]


def letters_reward(prompts, completions, **kwargs):
    return [sum(x in "abc" for x in completion) / 50 for completion in completions]


def first_long_word(problem, steps, **row):
    """A judge that any random completion can be given to: the steps differ, so do its verdicts."""
    return sum(map(len, steps)) % len(steps)


def words_as_steps(text):
    """A segmenter for random completions: one step per token."""
    spans, start = [], 0
    for word in text.split(" "):
        if word:
            spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans


@pytest.fixture
def chat_tokenizer():
    """A byte-level tokenizer that can write any text, with Qwen3's chat template, which TRL can read tool calls from."""
    from toys import byte_tokenizer  # toys imports this file

    template = resources.files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    added = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    return byte_tokenizer(template, added=added, padding_side="left")


@pytest.fixture
def make_chat_model(chat_tokenizer):
    from toys import tiny_llama

    return lambda seed=0: tiny_llama(chat_tokenizer, seed, tie_word_embeddings=True)


@pytest.fixture
def gsm8k_path(tmp_path) -> Path:
    """A file with GSM8K's columns and marks, made up here."""
    problems = [
        (f"Tom has {a} bags with {b} apples each and eats {c}. How many are left?", a, b, c)
        for a, b, c in [(3, 4, 2), (5, 6, 7), (2, 9, 3), (8, 2, 1), (4, 4, 4), (7, 3, 2), (6, 5, 1), (9, 2, 8)]
    ]
    rows = [
        {
            "question": question,
            "answer": f"He has {a}*{b}=<<{a}*{b}={a * b}>>{a * b} apples.\nSo {a * b}-{c}="
            f"<<{a * b}-{c}={a * b - c}>>{a * b - c} are left.\n#### {a * b - c}",
        }
        for question, a, b, c in problems
    ]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with judges and annotated solutions. It is the working directory."""
    (tmp_path / "eval_judges.py").write_text(JUDGES)
    write(tmp_path / "rows.jsonl", made_up_rows())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("eval_judges", None)
    return tmp_path
