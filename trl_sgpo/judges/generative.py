"""
A generative judge in this process: a causal language model that is asked, in words, for the first wrong step.

The question and how its answer is read are those of a judge on a server ([`JudgePrompt`]). Control tokens of the
tokenizer are broken up in the policy's text, and a question that still holds one is not asked.

Left out: prefix caching, continuous batching, and models on several devices. A server has these. This judge is for
small models beside the training, and for models that were trained to judge.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from trl_sgpo.judges.base import JudgeItem, Verdict
from trl_sgpo.judges.batches import pad, token_batches
from trl_sgpo.judges.combinators import plurality
from trl_sgpo.judges.local_model import LocalModelJudge, context_length
from trl_sgpo.judges.prompt import JudgePrompt, Question, is_final


logger = logging.getLogger(__name__)

ANSWERS = ("generate", "score")
ANSWER_PREFIX = "FIRST_ERROR:"

_TRIES = 8  # how often a question that is too long is made again with fewer steps

# By index of the item: its question, and the token ids of the question
Asked = dict[int, tuple[Question, list[int]]]


@dataclass
class Usage:
    """The work of a judge so far."""

    calls: int = 0  # questions that the model has read; every vote counts
    prompt_tokens: int = 0  # of those questions
    completion_tokens: int = 0  # that the model has written; 0 if it only scores the choices


class GenerativeJudge(LocalModelJudge):
    """
    Judge that asks a causal language model for the first wrong step. transformers runs the model in this process.

    The model gets the tokenizer's chat template if there is one. If the template refuses or drops the system message,
    the rules stand in the user's message. Without a template it gets the rules, the question and
    `Answer:`, with empty lines between them. If a completion is too long, the verdict is on the steps that fit.

    The judge restores torch's random state, so a judge that samples changes nothing in the training around it. The
    model may be loaded while the policy trains under DeepSpeed ZeRO-3.

    Args:
        model (`str`, `Path` or `tuple`):
            Hub id or folder of the model, or a loaded model and its tokenizer, `(model, tokenizer)`. It may be a PEFT
            adapter if `peft` is installed.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`, *optional*):
            Tokenizer to use instead of the model's own.
        prompt ([`JudgePrompt`], *optional*):
            The texts of the question.
        answer (`str`, *optional*, defaults to `"generate"`):
            `"generate"`: the model writes a brief check and the verdict. `"score"`: it writes nothing. The verdict is
            the most likely continuation of `FIRST_ERROR:` among the allowed choices. The confidence is its share of
            their probability. This takes one forward pass, and suits a small model that was trained to judge.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Tokens that the model may write per answer. An answer that does not end within them is an abstention.
        max_tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Most tokens of one batch, with answers and padding, and of a single question with its answer. If a batch
            does not fit into the memory, it is halved.
        votes, min_agreement (`int` and `float`, *optional*, default to `1` and `0.5`):
            Answers per completion, and the share of them that the winner needs. See
            [`~trl_sgpo.judges.combinators.plurality`].
        temperature, seed (`float` and `int`, *optional*):
            Sampling temperature, by default 0 (greedy decoding) for one vote and 0.7 for several, and seed of the
            sampling. Every call draws new samples.
        batch_deadline (`float`, *optional*, defaults to `600.0`):
            Seconds that one call of the judge may take. A completion that is not judged by then is an abstention. Keep
            it below the process group's timeout. `None`: no limit.
        device, dtype (`str`, `torch.device` or `torch.dtype`, *optional*):
            Where the model runs, and the type of its weights. By default this process's GPU and bfloat16 if there is
            one, else the CPU and float32. A loaded model keeps its own.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the model waits in the CPU's memory and is moved to the device for every call. This leaves the
            GPU's memory to the training.
        chat_template_kwargs (`dict`, *optional*):
            Arguments for the chat template, for instance `{"enable_thinking": False}`.
        trust_remote_code, revision (`bool` and `str`, *optional*):
            Whether code from the model's repository may be run, and the branch, tag or commit of the model on the Hub.

    Raises:
        TypeError: If `model` is neither a string nor a pair, or if `prompt` is no [`JudgePrompt`].
        ValueError: If the model cannot be loaded, or another argument is out of its range.

    Example:

    ```python
    >>> judge = GenerativeJudge("Qwen/Qwen2.5-7B-Instruct", votes=4, offload=True)
    >>> trainer = SGPOTrainer(..., reward_funcs=[accuracy_reward, StepwiseJudge(judge)])
    ```
    """

    _files = "config.json, the weights and the tokenizer's files (`tokenizer=...` if these are elsewhere)"

    def __init__(
        self,
        model: str | Path | tuple[Any, Any],
        tokenizer: Any = None,
        prompt: JudgePrompt | None = None,
        answer: str = "generate",
        max_new_tokens: int = 1024,
        max_tokens_per_batch: int = 16384,
        votes: int = 1,
        min_agreement: float = 0.5,
        temperature: float | None = None,
        seed: int = 0,
        batch_deadline: float | None = 600.0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        offload: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        if prompt is not None and not isinstance(prompt, JudgePrompt):
            raise TypeError(f"prompt={prompt!r} is no `JudgePrompt`. Give `JudgePrompt(rules=...)`.")
        if answer not in ANSWERS:
            raise ValueError(f"answer={answer!r} is unknown: it must be one of {list(ANSWERS)}.")
        if not 0 <= min_agreement <= 1:
            raise ValueError(f"min_agreement={min_agreement} must lie in [0, 1]: it is the share of the votes.")
        if temperature is None:
            temperature = 0.0 if votes == 1 else 0.7
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature={temperature} must be a number of at least 0. 0 is greedy decoding.")
        if votes > 1 and (temperature == 0 or answer == "score"):
            raise ValueError(
                f"votes={votes} does not go with temperature={temperature} and answer={answer!r}: all votes would be "
                "the same. Use answer='generate' and a temperature such as 0.7, or votes=1."
            )
        self.prompt = prompt or JudgePrompt()
        self.answer = answer
        self.max_new_tokens = max_new_tokens
        self.max_tokens_per_batch = max_tokens_per_batch
        self.votes = votes
        self.min_agreement = min_agreement
        self.temperature = temperature
        self.seed = seed
        self.batch_deadline = batch_deadline
        for name in ("max_new_tokens", "max_tokens_per_batch", "votes", "batch_deadline"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, because it is a limit of the judge.")
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.usage = Usage()
        self._model: Any
        super().__init__(model, tokenizer, device, dtype, offload, trust_remote_code, revision)
        self.layout = QuestionLayout(self.tokenizer, self.chat_template_kwargs)
        own = context_length(self._model.config)
        longest = min(max_tokens_per_batch, own or max_tokens_per_batch)
        if answer == "score":
            self.layout.choice("1")  # raises if this tokenizer cannot
        # A number has hardly more tokens than digits. "none" and "later" have at most one per letter and the space
        prefix = len(self.layout.answer_prefix)
        self._answer_tokens = max_new_tokens if answer == "generate" else prefix + 8
        self._limit = longest - self._answer_tokens  # of the tokens of a question
        if self._limit <= 0:
            raise ValueError(
                f"max_new_tokens={self._answer_tokens} leaves no room for a question: {self.model_name!r} reads {own} "
                f"tokens, and max_tokens_per_batch={max_tokens_per_batch}. Make the first smaller, or the last larger."
            )
        self._calls = 0  # of `judge`: each draws new samples

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self._model,)

    def _load_model(self, path: str, **kwargs: Any) -> None:
        from transformers import AutoModelForCausalLM

        with self._loading():
            self._model = AutoModelForCausalLM.from_pretrained(path, **kwargs)

    def _take_model(self, model: Any) -> None:
        self._model = model

    @property
    def cache_key(self) -> str:
        settings = {
            "revision": self.revision,
            "version": self._version,
            "prompt": self.prompt.fingerprint,
            "answer": self.answer,
            "max_new_tokens": self.max_new_tokens,
            "longest": self._limit,
            "votes": self.votes,
            "min_agreement": self.min_agreement,
            "temperature": self.temperature,
            "seed": self.seed,
            "dtype": str(self._model.dtype),
            "chat": self.chat_template_kwargs,
        }
        return f"GenerativeJudge({self.model_name}) {json.dumps(settings, sort_keys=True, default=str)}"

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        end = math.inf if self.batch_deadline is None else monotonic() + self.batch_deadline
        asked, verdicts = self._asked(items)
        try:
            with self._ready():
                verdicts |= (self._score if self.answer == "score" else self._generate)(asked, end)
        except Exception as error:  # the model could not be moved
            self._show_traceback()
            verdicts = dict.fromkeys(asked, Verdict.abstain(f"{type(error).__name__}: {error}")) | verdicts
        return [verdicts[i] for i in range(len(items))]

    def sample(self, items: Sequence[JudgeItem]) -> list[list[tuple[str, Verdict]]]:
        """
        Critiques to train on: `votes` answers of the model per item, each with the verdict that is read from it. An
        item whose question cannot be asked has none.
        """
        asked, failed = self._asked(items)
        for i, verdict in failed.items():
            logger.info("Item %d is left out: %s", i, verdict.reason)
        with self._ready():
            answers = self._answers(asked, math.inf)
        return [answers.get(i, []) for i in range(len(items))]

    def _asked(self, items: Sequence[JudgeItem]) -> tuple[Asked, dict[int, Verdict]]:
        """The questions of a call, and abstentions on the items that cannot be asked about."""
        asked: Asked = {}
        failed: dict[int, Verdict] = {}
        for i, item in enumerate(items):
            try:
                asked[i] = self.layout.ask(self.prompt, item, self._limit)
            except Exception as error:
                failed[i] = Verdict.abstain(str(error) or type(error).__name__)
        self._calls += 1
        return asked, failed

    def _generate(self, asked: Asked, end: float) -> dict[int, Verdict]:
        answers = self._answers(asked, end)
        votes = {i: [verdict for _, verdict in own] for i, own in answers.items()}
        return {i: own[0] if self.votes == 1 else plurality(own, self.min_agreement) for i, own in votes.items()}

    def _answers(self, asked: Asked, end: float) -> dict[int, list[tuple[str, Verdict]]]:
        """Per item, `votes` answers and the verdicts read from them."""
        rows = [i for i in asked for _ in range(self.votes)]
        answers: dict[int, list[tuple[str, Verdict]]] = {i: [] for i in asked}
        lengths = {row: len(asked[i][1]) + self._answer_tokens for row, i in enumerate(rows)}
        with self._own_randomness():
            for batch in token_batches(lengths, self.max_tokens_per_batch):
                prompts = [asked[rows[row]][1] for row in batch]
                for row, ids in zip(batch, self._in_memory(self._write, prompts, end), strict=True):
                    question = asked[rows[row]][0]
                    answers[rows[row]].append(("", ids) if isinstance(ids, Verdict) else self._read(question, ids))
        return answers

    def _read(self, question: Question, ids: list[int]) -> tuple[str, Verdict]:
        ended = bool(ids) and ids[-1] in self._eos_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        if ended or (len(ids) >= self.max_new_tokens and is_final(text, cut_off=True)):
            return text, question.verdict(text)
        if len(ids) >= self.max_new_tokens:
            return text, Verdict.abstain(f"the judge's answer was cut off at max_new_tokens={self.max_new_tokens}")
        return text, self._late()

    @property
    def _eos_ids(self) -> set[int]:
        given = getattr(self._model.generation_config, "eos_token_id", None)
        ids = given if isinstance(given, list | tuple) else [given]
        return {id for id in [*ids, self.tokenizer.eos_token_id] if id is not None}

    def _write(self, prompts: list[list[int]], end: float) -> list[list[int]]:
        """The ids that the model writes after each prompt, up to the first EOS."""
        from transformers import GenerationConfig

        input_ids, mask = self._padded(prompts)
        sampling = self.temperature > 0
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=sampling,
            **({"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if sampling else {"num_beams": 1}),
            # generate() checks the time after every token
            max_time=None if end == math.inf else max(end - monotonic(), 0.0),
            eos_token_id=sorted(self._eos_ids) or None,
            pad_token_id=self._pad_id,
        )
        written = self._model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=settings,
            synced_gpus=False,  # True lets the ranks wait for each other under ZeRO-3. This model is not partitioned
        )[:, input_ids.shape[1] :].tolist()
        stops = [next((n + 1 for n, id in enumerate(row) if id in self._eos_ids), None) for row in written]
        answers = [row[:stop] for row, stop in zip(written, stops, strict=True)]
        self.usage.calls += len(prompts)
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.completion_tokens += sum(map(len, answers))
        return answers

    def _score(self, asked: Asked, end: float) -> dict[int, Verdict]:
        rows: list[tuple[int, tuple[int, ...]]] = []  # an item, and a head: tokens after which choices are looked up
        for i, (question, _) in asked.items():
            rows += [(i, head) for head in _longest_heads([self.layout.choice(c) for c in question.choices])]
        ids = [asked[i][1] + self.layout.answer_prefix + list(head) for i, head in rows]
        found: dict[int, dict[tuple[int, ...], float]] = {i: {} for i in asked}
        verdicts: dict[int, Verdict] = {}
        for batch in token_batches({row: len(own) for row, own in enumerate(ids)}, self.max_tokens_per_batch):
            prompts, heads = [ids[row] for row in batch], [rows[row][1] for row in batch]
            results = self._in_memory(self._log_probabilities, prompts, end, [len(head) for head in heads])
            for row, head, result in zip(batch, heads, results, strict=True):
                i = rows[row][0]
                if isinstance(result, Verdict):
                    verdicts[i] = result
                    continue
                choices = {self.layout.choice(choice) for choice in asked[i][0].choices}
                for choice in choices:
                    if choice[:-1] == head[: len(choice) - 1]:
                        found[i][choice] = sum(float(result[n, id]) for n, id in enumerate(choice))
        for i, (question, _) in asked.items():
            if i not in verdicts:
                verdicts[i] = self._most_likely(question, found[i])
        return verdicts

    def _most_likely(self, question: Question, log_probabilities: dict[tuple[int, ...], float]) -> Verdict:
        choices = [self.layout.choice(choice) for choice in question.choices]
        values = choice_shares(choices, [log_probabilities[choice] for choice in choices])
        if any(map(math.isnan, values)):
            return Verdict.abstain("the model gave scores that are no numbers (NaN)")
        shares = sorted(zip(question.choices, values, strict=True), key=lambda pair: -pair[1])
        best, confidence = shares[0]
        reason = "P(" + ", ".join(f"{choice}: {share:.2g}" for choice, share in shares[:5]) + ")"
        verdict = question.verdict(f"{ANSWER_PREFIX} {best}")
        return verdict if verdict.status == "abstain" else replace(verdict, confidence=confidence, reason=reason)

    def _log_probabilities(self, prompts: list[list[int]], end: float, head_lengths: list[int]) -> list[torch.Tensor]:
        """Per prompt, the log-probabilities of the next token: before its head, and after each token of its head."""
        input_ids, mask = self._padded(prompts)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=max(head_lengths) + 1,
        ).logits
        self.usage.calls += len(prompts)
        self.usage.prompt_tokens += sum(map(len, prompts))
        return [logits[row, -1 - n :].float().log_softmax(dim=-1).cpu() for row, n in enumerate(head_lengths)]

    def _in_memory(self, run: Any, prompts: list[list[int]], end: float, *columns: list[Any]) -> list[Any]:
        """The results of `run` on a batch, in parts if the memory is too small. A `Verdict` for each that failed."""

        def part(rows: Sequence[int]) -> list[Any]:
            if monotonic() >= end:
                return [self._late()] * len(rows)
            return run([prompts[i] for i in rows], end, *([column[i] for i in rows] for column in columns))

        results = self._run(part, range(len(prompts)), lambda i: f"a question of {len(prompts[i])} tokens")
        return [Verdict.abstain(result) if isinstance(result, str) else result for result in results]

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad(rows, self._pad_id, "left")  # the model writes on after the last token
        return ids.to(self.device), mask.to(self.device)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Sampling with this judge's seed. Afterwards torch's random state is as before, for the training."""
        if self.temperature == 0:
            yield
            return
        seed = self.seed * 1_000_003 + self._calls
        cuda = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # Not torch.manual_seed: it seeds every device, and only one of them is restored
            torch.default_generator.manual_seed(seed)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            yield

    def _late(self) -> Verdict:
        return Verdict.abstain(f"not judged within batch_deadline={self.batch_deadline:g} s")


class QuestionLayout:
    """
    The token ids of a question: with the tokenizer's chat template, or in a plain layout if it has none.

    Train a judge on the same ids: those of [`~QuestionLayout.ask`], then those of [`~QuestionLayout.encode_answer`]
    and an EOS token.
    """

    def __init__(self, tokenizer: Any, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        # Text that the vocabulary lacks becomes the unknown token, which is no control token unless it also begins or
        # ends a text
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._control = {
            id: text
            for id, text in {**added, **special}.items()
            # Single letters and white space are always text, also if a vocabulary lists them as added tokens
            if len(text) > 1 and not text.isspace() and (id != tokenizer.unk_token_id or id in ends)
        }
        self.answer_prefix = self.encode_answer(ANSWER_PREFIX)
        self.choice = lru_cache(maxsize=4096)(self._choice)

    def ask(self, prompt: JudgePrompt, item: JudgeItem, max_tokens: int | None = None) -> tuple[Question, list[int]]:
        """
        The question about a completion and its token ids, up to where the answer begins. It has as many steps as fit
        into `max_tokens`, and no control token in the policy's text. A `ValueError` if that is not possible.
        """
        room: int | None = None
        broken_up: tuple[str, ...] = ()
        for _ in range(_TRIES):
            question = prompt.ask(item, max_characters=room, control_tokens=broken_up)
            found = self.control_tokens_in(question)
            if found:
                # Only those that occur: some vocabularies have thousands, and a search for each takes time
                broken_up += tuple(sorted(found, key=len, reverse=True))
                continue
            ids = self.encode(question)
            excess = 0 if max_tokens is None else len(ids) - max_tokens
            if excess <= 0:
                return question, ids
            texts = [item.problem, item.reference or "", *item.steps, *item.context.values()]
            room = sum(map(len, texts)) if room is None else room
            # By this text's own characters per token. Whole steps are left out, so the number need not be exact
            characters = sum(len(message["content"]) for message in question.messages)
            room -= math.ceil(excess * characters / len(ids)) + 1
        if found:
            raise ValueError(f"the text holds control tokens that cannot be broken up: {sorted(found)}")
        raise ValueError(f"the completion does not fit into {max_tokens} tokens, even if steps are left out")

    def control_tokens_in(self, question: Question) -> set[str]:
        """The control tokens that the tokenizer finds in the texts of a question. Without any it may be asked."""
        contents = [message["content"] for message in question.messages]
        found = {id for ids in self.tokenizer(contents, add_special_tokens=False)["input_ids"] for id in ids}
        return {self._control[id] for id in found if id in self._control}

    def encode(self, question: Question) -> list[int]:
        """Token ids of a question, up to where the answer begins."""
        alone = question.without_system
        if self.tokenizer.chat_template is None:
            ids = self.encode_answer(f"{alone[0]['content']}\n\nAnswer:\n")
            bos = self.tokenizer.bos_token_id
            return ids if bos is None else [bos, *ids]
        settings = {"tokenize": False, "add_generation_prompt": True, **self.chat_template_kwargs}
        try:
            text = self.tokenizer.apply_chat_template(question.messages, **settings)
        except Exception:  # some families have no system message
            text = None
        if (
            text is None or question.messages[0]["content"].strip() not in text
        ):  # and some templates leave it out without a word
            text = self.tokenizer.apply_chat_template(alone, **settings)
        return self.encode_answer(text)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer, or of its beginning, as it follows a question."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _choice(self, choice: str) -> tuple[int, ...]:
        """The tokens of a choice after `ANSWER_PREFIX`."""
        ids = self.encode_answer(f"{ANSWER_PREFIX} {choice}")
        n = len(self.answer_prefix)
        if ids[:n] != self.answer_prefix or len(ids) == n:
            raise ValueError(
                f"answer='score' does not go with this tokenizer: its tokens of {ANSWER_PREFIX + ' ' + choice!r} do "
                f"not begin with those of {ANSWER_PREFIX!r}. Use answer='generate'."
            )
        return tuple(ids[n:])


def choice_shares(choices: Sequence[tuple[int, ...]], log_probabilities: Sequence[float]) -> list[float]:
    """
    The share of each choice in the probability of all choices, from their tokens and log-probabilities. All are
    NaN if one of these is not finite. If a tokenizer cuts numbers into digits, the probability that a text begins with
    `1` includes `10` and `12`. These are subtracted.
    """
    if not all(map(math.isfinite, log_probabilities)):
        return [math.nan] * len(choices)
    highest = max(log_probabilities)
    own = [math.exp(value - highest) for value in log_probabilities]
    masses = list(own)
    for i, choice in enumerate(choices):
        prefixes = [k for k, other in enumerate(choices) if len(other) < len(choice) and choice[: len(other)] == other]
        if prefixes:
            masses[max(prefixes, key=lambda k: len(choices[k]))] -= own[i]
    masses = [max(mass, 0.0) for mass in masses]  # a difference of nearly equal floats may be slightly negative
    return [mass / sum(masses) for mass in masses]


def _longest_heads(choices: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The fewest token rows after which every choice can be looked up: the model reads all but its last token."""
    heads = sorted({choice[:-1] for choice in choices})
    return [h for h in heads if not any(other != h and other[: len(h)] == h for other in heads)]
