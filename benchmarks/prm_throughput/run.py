"""
The time of `PRMJudge.judge`, compared with that of its forward passes alone, and with one forward pass per step.

    python -m benchmarks.prm_throughput.run

Three ways to score the same 16 completions with the same model: the judge (tokenising, batching, one pass per completion,
verdicts); the bare forward passes over the judge's own padded batches; and one pass per prefix, batched under the same
token budget. Measured in CPU seconds, in alternating rounds, in an order that alternates too.
"""

import json
import os
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from benchmarks.common import commit, write_results
from trl_sgpo import JudgeItem
from trl_sgpo.judges.batches import pad, token_batches
from trl_sgpo.judges.prm import PRMJudge
from trl_sgpo.judges.prm.models import Qwen2ForProcessRewardModel


PROBLEMS, COMPLETIONS, ROUNDS, PREFIX_ROUNDS, THREADS, BUDGET = 4, 4, 15, 3, 1, 4096
HERE = Path(__file__).parent
WORDS = [
    "the",
    "a",
    "of",
    "so",
    "we",
    "have",
    "then",
    "add",
    "both",
    "sides",
    "equation",
    "number",
    "total",
    "times",
    "divided",
    "by",
    "gives",
    "therefore",
    "apples",
    "each",
    "remaining",
    "first",
    "second",
    "triangle",
    "area",
    "length",
    "is",
    "equal",
    "to",
    "half",
    "value",
    "x",
    "y",
    "z",
    "substituting",
    "back",
    "into",
]


def sentence(rng, n_words):
    return (
        " ".join(rng.choice(WORDS) if rng.random() < 0.75 else str(rng.randint(2, 999)) for _ in range(n_words)) + "."
    )


def make_items(rng):
    """Lengths as in GSM8K: problems of 30 to 80 words, 4 to 12 steps of 8 to 40 words, all of them made up."""
    problems = [sentence(rng, rng.randint(30, 80)) for _ in range(PROBLEMS)]
    return [
        JudgeItem(problem, tuple(sentence(rng, rng.randint(8, 40)) for _ in range(rng.randint(4, 12))))
        for problem in problems
        for _ in range(COMPLETIONS)
    ]


def save_model(folder, rng):
    """A random Qwen2.5-Math-PRM of 4 layers and width 256, with a BPE tokenizer of 2,000 entries."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>"]
    core.train_from_iterator(
        [sentence(rng, 60) for _ in range(500)],
        trainers.BpeTrainer(
            vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    )
    torch.manual_seed(0)
    model = Qwen2ForProcessRewardModel(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bare_pass(judge, batches):
    """Forward passes over ready batches of `(input_ids, attention_mask, rows, columns)`, as the judge makes them."""
    with torch.inference_mode():
        for input_ids, attention_mask, rows, columns in batches:
            hidden = judge._body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            judge._head(hidden[rows, columns].float()).softmax(-1)[:, 1].tolist()


def batches_of(sequences):
    """Sequences of `(ids, positions)`, sorted and padded as the judge does it."""
    made = []
    for batch in token_batches({i: len(ids) for i, (ids, _) in enumerate(sequences)}, BUDGET):
        chosen = [sequences[i] for i in batch]
        input_ids, mask = pad([ids for ids, _ in chosen], 0, "right")
        rows = torch.tensor([row for row, (_, positions) in enumerate(chosen) for _ in positions])
        columns = torch.tensor([position for _, positions in chosen for position in positions])
        made.append((input_ids, None if mask.all() else mask, rows, columns))
    return made


def timed(function):
    """CPU seconds of this process, all threads together: what else the machine does is not in them."""
    start = time.process_time()
    function()
    return time.process_time() - start


def summary(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main():
    torch.set_num_threads(THREADS)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, rng)
        judge = PRMJudge(folder, max_tokens_per_batch=BUDGET, device="cpu")
        items = make_items(rng)
        encoded = judge.encoder.encode(items)
        one_pass = batches_of([(one.ids, one.positions) for one in encoded])
        prefixes = batches_of([(one.ids[: position + 1], [position]) for one in encoded for position in one.positions])
        ways = {
            "judge": lambda: judge.judge(items),
            "bare": lambda: bare_pass(judge, one_pass),
            "prefixes": lambda: bare_pass(judge, prefixes),
        }
        for name in ("judge", "bare"):  # to warm up
            ways[name]()
        seconds = {name: [] for name in ways}
        for i in range(ROUNDS):
            for name in ("judge", "bare", "prefixes")[:: 1 if i % 2 == 0 else -1]:
                if name != "prefixes" or i < PREFIX_ROUNDS:  # it takes several times as long
                    seconds[name].append(timed(ways[name]))
        encoding = [timed(lambda: judge.encoder.encode(items)) for _ in range(ROUNDS)]
        length = [len(one.ids) for one in encoded]
        steps = [one.n_steps for one in encoded]
    to_bare = [bare / judged for judged, bare in zip(seconds["judge"], seconds["bare"], strict=True)]
    to_prefixes = [prefix / judged for judged, prefix in zip(seconds["judge"], seconds["prefixes"], strict=False)]
    result = {
        "commit": commit(),
        "versions": {name: version(name) for name in ("trl", "transformers", "tokenizers", "torch")},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {THREADS} thread, CPU",
        "seed": 0,
        "rounds": ROUNDS,
        "rounds_of_prefixes": PREFIX_ROUNDS,
        "completions": len(items),
        "tokens_per_completion": summary(length),
        "steps_per_completion": summary(steps),
        "padding_share": 1 - sum(length) / sum(ids.numel() for ids, *_ in one_pass),
        "judge_throughput_over_bare_forward": summary(to_bare),
        "judge_throughput_over_one_pass_per_prefix": summary(to_prefixes),
        "cpu_seconds": {name: summary(values) for name, values in {**seconds, "encoding": encoding}.items()},
        "tokens_per_cpu_second": sum(length) / statistics.median(seconds["judge"]),
    }
    write_results(HERE / "results.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
