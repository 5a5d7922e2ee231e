"""
RewriteChain: letters rewritten by a chain of operations. The controlled task of this package.

A solution has one block per operation, separated by `;`: the letters after that operation, then the remaining
operations. The last block has no operations left. It is the answer.

    prompt      a b c d [R] [V] =
    completion  b c d e [V] ; e d c b

Every step can be checked, so the task has an exact outcome reward ([`accuracy_reward`]) and an exact step judge
([`first_wrong_block`]). The difficulty is a dial. A small Llama is pretrained from scratch. Clean traces teach the
skill first. Then traces whose steps are corrupted with probability `noise` bury it under failed groups: greedy
decoding still solves the task, sampling fails. With three letters of six there are 216 answers, so a wrong solution
sometimes has the right answer by luck, as in multiple choice.

After DataAlchemy (arXiv 2508.01191), but each block carries the remaining operations. Text is split at spaces, so a
token is a letter, an operation, `;` or `=`.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ALPHABET = "abcdef"
SECOND_ALPHABET = "ghijkl"  # in the vocabulary, never in pretraining: the token-representation axis
OPERATIONS = ("R", "L", "V", "S")  # rotate letters by one, left shift, reverse, swap the first two
SEPARATOR = ";"

# Ways in which a problem can lie outside of what pretraining shows (after arXiv 2510.15990); see [`sample_unseen`]
AXES = ("depth", "length", "representation", "composition")
LONE_OPERATION = "S"  # the operation that pretraining shows only by itself, on the composition axis


@dataclass(frozen=True)
class Problem:
    """
    One RewriteChain problem. The operations are applied from left to right. `R` rotates in the alphabet.

    Example:

    ```python
    >>> problem = Problem(letters=("a", "b", "c", "d"), operations=("R", "V"))
    >>> problem.prompt
    'a b c d [R] [V] ='
    >>> problem.gold_blocks()
    ['b c d e [V]', 'e d c b']
    ```
    """

    letters: tuple[str, ...]
    operations: tuple[str, ...]
    alphabet: str = ALPHABET

    @property
    def prompt(self) -> str:
        return " ".join([*self.letters, *(f"[{operation}]" for operation in self.operations), "="])

    @classmethod
    def from_prompt(cls, prompt: str) -> "Problem":
        """Reads a problem back from its prompt. Raises `ValueError` for a text that is no RewriteChain prompt."""
        tokens = prompt.split()
        letters = tuple(token for token in tokens if len(token) == 1 and token.isalpha())
        operations = tuple(token[1:-1] for token in tokens if token.startswith("[") and token.endswith("]"))
        problem = cls(letters, operations, SECOND_ALPHABET if set(letters) <= set(SECOND_ALPHABET) else ALPHABET)
        if problem.prompt.split() != tokens or not letters or not set(operations) <= set(OPERATIONS):
            raise ValueError(f"prompt={prompt!r} is not a RewriteChain prompt such as 'a b c d [R] [V] ='.")
        return problem

    def apply(self, operation: str, letters: tuple[str, ...]) -> tuple[str, ...]:
        """The letters after one operation."""
        if operation == "R":
            return tuple(self.alphabet[(self.alphabet.index(x) + 1) % len(self.alphabet)] for x in letters)
        if operation == "L":
            return letters[1:] + letters[:1]
        if operation == "V":
            return letters[::-1]
        if operation == "S":
            return letters[1::-1] + letters[2:]
        raise ValueError(f"operation={operation!r} is unknown: it must be one of {OPERATIONS}.")

    def blocks(self, noise: float = 0.0, rng: random.Random | None = None) -> list[str]:
        """
        The solution, one block per operation. With probability `noise` one letter of a block is replaced by another of
        the alphabet. The chain goes on from there, so later blocks follow from it.
        """
        letters, blocks = self.letters, []
        for i, operation in enumerate(self.operations):
            letters = self.apply(operation, letters)
            if rng is not None and rng.random() < noise:
                position = rng.randrange(len(letters))
                wrong = rng.choice([x for x in self.alphabet if x != letters[position]])
                letters = (*letters[:position], wrong, *letters[position + 1 :])
            blocks.append(" ".join([*letters, *(f"[{left}]" for left in self.operations[i + 1 :])]))
        return blocks

    def gold_blocks(self) -> list[str]:
        """The right solution, one block per operation."""
        return self.blocks()


def sample_problem(
    rng: random.Random, n_operations: int, length: int = 3, alphabet: str = ALPHABET, operations: str = "RLVS"
) -> Problem:
    """A random problem with `n_operations` operations over `length` letters."""
    return Problem(
        letters=tuple(rng.choice(alphabet) for _ in range(length)),
        operations=tuple(rng.choice(operations) for _ in range(n_operations)),
        alphabet=alphabet,
    )


def sample_unseen(rng: random.Random, axis: str, n_operations: int, length: int) -> Problem:
    """
    A problem outside of a pretraining on chains of up to `n_operations` operations over `length` letters. `"depth"`:
    two operations more. `"length"`: one letter more. `"representation"`: the letters of the second alphabet.
    `"composition"`: a chain of `n_operations` with `LONE_OPERATION`, which a pretraining with this axis shows only by
    itself.
    """
    if axis == "depth":
        return sample_problem(rng, n_operations + 2, length)
    if axis == "length":
        return sample_problem(rng, n_operations, length + 1)
    if axis == "representation":
        return sample_problem(rng, n_operations, length, SECOND_ALPHABET)
    if axis == "composition":
        problem = sample_problem(rng, n_operations, length)
        operations = list(problem.operations)
        operations[rng.randrange(n_operations)] = LONE_OPERATION
        return Problem(problem.letters, tuple(operations))
    raise ValueError(f"axis={axis!r} is unknown: it must be one of {AXES}.")


def make_dataset(
    n: int, n_operations: int, seed: int, length: int = 3, alphabet: str = ALPHABET, operations: str = "RLVS"
) -> "Dataset":
    """`n` random problems with the columns `prompt` and `solution` (the gold blocks, joined by `;`)."""
    rng = random.Random(seed)
    return _as_dataset([sample_problem(rng, n_operations, length, alphabet, operations) for _ in range(n)])


def make_unseen_dataset(n: int, axis: str, n_operations: int, seed: int, length: int = 3) -> "Dataset":
    """`n` problems of [`sample_unseen`], with the columns of [`make_dataset`]."""
    rng = random.Random(seed)
    return _as_dataset([sample_unseen(rng, axis, n_operations, length) for _ in range(n)])


def _as_dataset(problems: Sequence[Problem]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": problem.prompt, "solution": f" {SEPARATOR} ".join(problem.gold_blocks())} for problem in problems]
    )


def segment_blocks(text: str) -> list[tuple[int, int]]:
    """Segmenter for [`StepwiseJudge`]: one step per block, the separator with the block it ends."""
    spans, start = [], 0
    while start < len(text):
        separator = text.find(SEPARATOR, start)
        end = len(text) if separator < 0 else separator + 1
        if text[start:end].strip():
            spans.append((start, end))
        start = end
    return spans


@lru_cache(maxsize=4096)  # the completions of a group share their prompt
def _gold_blocks(prompt: str) -> tuple[tuple[str, ...], ...]:
    """The right solution of a prompt, one tuple of tokens per block."""
    return tuple(tuple(block.split()) for block in Problem.from_prompt(prompt).gold_blocks())


def first_wrong_block(problem: str, steps: Sequence[str], **row: Any) -> int | None:
    """
    The step checker, an exact judge for [`StepwiseJudge`]: the 0-based index of the first wrong block, `None` if the
    solution is right.

    A step is right if its whole block equals the gold block. A solution with too few or too many blocks has no answer.
    It counts as wrong from its first block on. Otherwise a policy is rewarded for stopping early, because one right
    block of two is an RTS of 1/2 and one of five is 1/5. In training the solutions then shrank to three quarters of
    their length, and the accuracy stayed the same.
    """
    gold = _gold_blocks(problem)
    if len(steps) != len(gold) or steps[-1].rstrip().endswith(SEPARATOR):
        return 0
    for i, (step, block) in enumerate(zip(steps, gold, strict=True)):
        if tuple(step.strip().removesuffix(SEPARATOR).split()) != block:
            return i
    return None


def accuracy_reward(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """
    The verifier, as a reward function: 1.0 if a completion has exactly one block per operation and its last block is
    right, else 0.0. It does not look at the other steps.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        gold = _gold_blocks(prompt)
        blocks = completion.split(SEPARATOR)
        rewards.append(float(len(blocks) == len(gold) and tuple(blocks[-1].split()) == gold[-1]))
    return rewards


def right_prefix(prompt: str, completion: str) -> float:
    """Leading right blocks over the number of gold blocks, in [0, 1]."""
    gold = _gold_blocks(prompt)
    blocks = [tuple(block.split()) for block in completion.split(SEPARATOR)]
    right = 0
    while right < min(len(gold), len(blocks)) and blocks[right] == gold[right]:
        right += 1
    return right / len(gold)


def build_tokenizer() -> "PreTrainedTokenizerBase":
    """The word-level tokenizer of the task: both alphabets, the operations, `;`, `=` and two special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "=", SEPARATOR, *(f"[{x}]" for x in OPERATIONS), *ALPHABET, *SECOND_ALPHABET]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=256
    )


@dataclass(frozen=True)
class PretrainConfig:
    """
    How the tiny base model is made. Every trace has 1 to `max_operations` operations over `length` letters. The
    learning rate is the peak of AdamW's: linear warm-up over 50 updates, then cosine to a tenth.

    Args:
        noise (`float`, *optional*, defaults to `0.85`):
            Probability that a block of a noisy trace is corrupted: the difficulty dial.
        clean_updates, noisy_updates (`int`, *optional*, default to `500` and `120`):
            Updates on clean traces, which teach the skill, and then on noisy ones, which bury it.
        axis (`str`, *optional*):
            One of `AXES`: what lies outside of the pretraining, see [`sample_unseen`]. It is needed for `exposure`.
            With `"composition"` no chain of several operations has `LONE_OPERATION`.
        exposure (`float`, *optional*, defaults to `0.0`):
            Share of the traces that are nevertheless drawn from outside.
    """

    noise: float = 0.85
    clean_updates: int = 500
    noisy_updates: int = 120
    max_operations: int = 5
    length: int = 3
    layers: int = 4
    width: int = 128
    heads: int = 4
    batch_size: int = 64
    learning_rate: float = 3e-3
    axis: str | None = None
    exposure: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.axis is not None and self.axis not in AXES:
            raise ValueError(f"axis={self.axis!r} is unknown: it must be one of {AXES}, or None.")
        if not 0 <= self.exposure <= 1 or (self.exposure > 0 and self.axis is None):
            raise ValueError(
                f"exposure={self.exposure} with axis={self.axis!r}: it is the share of traces from outside along an axis, in "
                "[0, 1]. Name the axis, or leave exposure at 0."
            )


def build_model(config: PretrainConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """A Llama with random weights, seeded by `config.seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=3 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def pretraining_traces(config: PretrainConfig) -> Iterator[list[tuple[str, str]]]:
    """The batches of pretraining, each a list of (prompt, completion): the clean ones first, then the noisy ones."""
    rng = random.Random(config.seed)
    for update in range(config.clean_updates + config.noisy_updates):
        noise = 0.0 if update < config.clean_updates else config.noise
        n_operations = [rng.randint(1, config.max_operations) for _ in range(config.batch_size)]
        problems = [_pretraining_problem(rng, k, config) for k in n_operations]
        yield [(p.prompt, f" {SEPARATOR} ".join(p.blocks(noise, rng))) for p in problems]


def _pretraining_problem(rng: random.Random, n_operations: int, config: PretrainConfig) -> Problem:
    if config.exposure > 0 and rng.random() < config.exposure:
        return sample_unseen(rng, cast(str, config.axis), config.max_operations, config.length)
    operations = chain_operations(config) if n_operations > 1 else "".join(OPERATIONS)
    return sample_problem(rng, n_operations, config.length, operations=operations)


def chain_operations(config: PretrainConfig) -> str:
    """The operations that a pretraining shows in chains of several."""
    return "".join(x for x in OPERATIONS if config.axis != "composition" or x != LONE_OPERATION)


def pretrain(config: PretrainConfig, progress: bool = True) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """
    Trains the base model from scratch on the completions of [`pretraining_traces`]. Returns it in eval mode, and its
    tokenizer.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    tokenizer = build_tokenizer()
    model = build_model(config, tokenizer).train()
    updates = config.clean_updates + config.noisy_updates
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, min(50, updates // 4), updates, min_lr_rate=0.1)
    bar = tqdm(pretraining_traces(config), total=updates, desc="pretraining the base", disable=not progress)
    for batch in bar:
        ids = [tokenizer(prompt)["input_ids"] for prompt, _ in batch]
        completion_ids = [tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id] for _, completion in batch]
        width = max(len(p) + len(c) for p, c in zip(ids, completion_ids, strict=True))
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels = torch.full((len(batch), width), -100)
        for row, (p, c) in enumerate(zip(ids, completion_ids, strict=True)):
            input_ids[row, : len(p) + len(c)] = torch.tensor(p + c)
            labels[row, len(p) : len(p) + len(c)] = torch.tensor(c)
        # Right padding under causal attention needs no mask: no real token sees a padding token
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval(), tokenizer


def load_or_pretrain(path: str | Path, config: PretrainConfig, progress: bool = True) -> Path:
    """
    Makes the base model once, and returns its folder. If that has a model with the same `config`, it is used as it is.
    Any other is replaced.
    """
    path = Path(path)
    recipe_file = path / "pretrain_config.json"
    if recipe_file.exists() and json.loads(recipe_file.read_text()) == asdict(config):
        return path
    model, tokenizer = pretrain(config, progress)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    recipe_file.write_text(json.dumps(asdict(config), indent=2) + "\n")  # last: a broken-off run is made again
    return path


@dataclass(frozen=True)
class Evaluation:
    """
    How good the completions of a policy are: the share of correct samples (pass@1 at the sampling temperature), the
    share of problems that greedy decoding solves, the mean share of leading right blocks of a sample, and the share of
    problems without a correct sample.
    """

    accuracy: float
    greedy_accuracy: float
    right_prefix: float
    failed_groups: float


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    n_samples: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 512,
) -> Evaluation:
    """
    Samples `n_samples` completions for every prompt, and decodes each prompt once greedily. The random state of torch
    is restored, so an evaluation does not change a training.
    """
    import torch
    from transformers import GenerationConfig

    def decode(prompts: Sequence[str], **kwargs: Any) -> list[str]:
        texts = []
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
            settings = GenerationConfig(
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **kwargs,
            )
            ids = cast(Any, model).generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                generation_config=settings,
            )
            texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            repeated = [prompt for prompt in prompts for _ in range(n_samples)]
            sampled = decode(repeated, do_sample=True, temperature=temperature, top_k=0)
            greedy = decode(prompts, do_sample=False)
    finally:
        model.train(was_training)
    correct = accuracy_reward(repeated, sampled)
    groups = [correct[i : i + n_samples] for i in range(0, len(correct), n_samples)]
    return Evaluation(
        accuracy=sum(correct) / len(correct),
        greedy_accuracy=sum(accuracy_reward(prompts, greedy)) / len(prompts),
        right_prefix=sum(map(right_prefix, repeated, sampled)) / len(repeated),
        failed_groups=sum(not any(group) for group in groups) / len(groups),
    )
