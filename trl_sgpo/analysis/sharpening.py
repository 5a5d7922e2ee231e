"""
[`SharpeningCallback`]: is the policy learning something new, or sharpening what its base could already do?

It samples a fixed set of prompts from the base model once and from the policy now and then, and compares the two: see
`metrics.py` for the formulas. Wiring only: sampling is in `probe.py`, the base in `base_model.py` and `base_samples.py`,
the numbers in `sharpening_metrics.py`, the hook into training batches in `training_batches.py`.

Training with it is training without it, bit for bit: nothing that it draws, counts or logs reaches the trainer's state
(vLLM's own scheduling excepted, which no seed controls).
"""

import asyncio
import inspect
import json
import logging
import math
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name, get_config_model_id

from trl_sgpo.analysis import base_samples as store
from trl_sgpo.analysis.base_model import (
    AdaptersOff,
    BaseModel,
    ReferenceModel,
    fingerprint,
    is_peft,
    is_sharded,
    keep_copy,
    load_sharded,
    load_weights,
)
from trl_sgpo.analysis.probe import Batch, Probe, Sample, Stopwatch, sampling_settings, undisturbed
from trl_sgpo.analysis.sharpening_metrics import default_ks, summarise
from trl_sgpo.analysis.training_batches import TrainingBatches
from trl_sgpo.judges import StepwiseJudge
from trl_sgpo.outcome import find_outcomes


logger = logging.getLogger(__name__)

PREFIX = "sharpening/"

# Arguments of a reward function that are no columns of the dataset
_REWARD_ARGUMENTS = {
    "self",
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
}


class ScoringError(RuntimeError):
    """A reward function or a judge has raised on some rank; all ranks know."""


class SharpeningCallback(TrainerCallback):
    """
    Compares the policy with its base model on a fixed set of prompts, at the begin of training, every so many updates and
    at the end, and logs under `sharpening/` what distinguishes sharpening from expansion.

    Works with [`SGPOTrainer`] and with plain [`~trl.GRPOTrainer`]. Completions come from the trainer's own generation, with
    its sampling settings, for base and policy alike. Log-probabilities are those that TRL trains on: logits divided by the
    sampling temperature, over the whole vocabulary, the end token included. So `kl_k1` is unbiased only if `top_p`, `top_k`
    and `min_p` truncate nothing.

    The base is the policy before training (PEFT: without its adapters; or `base_model`). Its samples are kept on disk, so
    another run from the same base draws none. Everything is written to `<output_dir>/sharpening/` too: `probe.json`,
    `prompts.parquet`, `base.parquet` and a `policy_<step>.parquet` for each probe.

    Training goes on as if the probe was not there, bit for bit, and a reward function or judge that raises inside a probe
    costs that probe only.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer to be watched.
        prompts (`Dataset` or `Sequence[Mapping]`):
            The probe set: rows with `prompt` and the columns that the outcome reward needs. An optional column `domain`
            splits the gain.
        n_samples (`int`, *optional*, defaults to `64`):
            Samples per prompt, of base and policy.
        every (`int`, *optional*, defaults to `50`):
            Updates between two probes.
        ks (`Sequence[int]`, *optional*):
            For pass@k. Defaults to the powers of two up to `n_samples`, and `n_samples`.
        taus (`Sequence[float]`, *optional*, defaults to `(0.25, 0.5, 0.75, 1.0)`):
            For Cover@tau.
        outcome_reward (`str`, `list[str]` or `Callable`, *optional*):
            What says right or wrong: the name of one of the trainer's reward functions, a list of names, one for each task, or
            a reward function. Defaults to [`SGPOTrainer`]'s, else to the trainer's only one.
        success_threshold (`float`, *optional*):
            A completion is correct when its outcome reaches this. Defaults to [`SGPOTrainer`]'s, else to 0.5.
        judge ([`StepwiseJudge`], [`StepJudge`] or `Callable`, *optional*):
            Checks the steps of correct completions, for process-verified pass@k (every step right and the outcome correct;
            an abstention verifies nothing). Defaults to the trainer's [`StepwiseJudge`], if it has one; `False` for none.
        extract_answer (`Callable[[str], Hashable]`, *optional*):
            From a completion's text to its answer, `None` for none: gives maj@k and the answers' entropy.
        sample_base (`bool`, *optional*, defaults to `True`):
            Whether to sample the base at all. Without it only what the policy's samples say is left.
        base_logps (`bool`, *optional*, defaults to `True`):
            Log-probabilities of the policy's samples under the base: KL, perplexity, tilt. Where neither adapters nor a
            reference model give them, the base's weights are kept on the CPU.
        base_model (`str` or `nn.Module`, *optional*):
            The base, if it is not the policy before training; for a resumed run, the model that it was started from.
        at_begin, at_end (`bool`, *optional*, defaults to `True`):
            Whether to probe before the first update and after the last one.
        batch_metrics (`bool`, *optional*, defaults to `True`):
            Group split, pass@k and effective tokens of the training batches, under `sharpening/batch/`. Costs nothing.
        batch_rank (`bool`, *optional*, defaults to `False`):
            Rank of the correct completions of a training batch by log-probability: a forward pass per batch.
        batch_update (`bool`, *optional*, defaults to `False`):
            Uplift by rank and likelihood displacement: forward passes before and after the update.
        batch_size (`int`, *optional*):
            Completions that a rank generates at once. Defaults to what it generates at once in training.
        cache_dir (`str` or `Path`, *optional*):
            Where the base's samples are kept for other runs. Defaults to `~/.cache/trl_sgpo/base_samples`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples. Independent of the training's.

    Raises:
        TypeError: If `trainer`, `prompts`, `outcome_reward` or `extract_answer` is of a wrong type.
        ValueError: If the probe set is empty, lacks a column or holds a prompt twice; if another argument is out of its
            range; if it cannot be told which reward says right or wrong; if the trainer uses tools, environments, images or
            a rollout function.

    Example:

    ```python
    from trl_sgpo.analysis import SharpeningCallback

    trainer.add_callback(SharpeningCallback(trainer=trainer, prompts=probe_dataset, n_samples=64, every=50))
    trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        prompts: Iterable[Mapping[str, Any]],
        n_samples: int = 64,
        every: int = 50,
        ks: Sequence[int] | None = None,
        taus: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        outcome_reward: str | Sequence[str] | Callable | None = None,
        success_threshold: float | None = None,
        judge: Any = None,
        extract_answer: Callable[[str], Hashable] | None = None,
        sample_base: bool = True,
        base_logps: bool = True,
        base_model: str | nn.Module | None = None,
        at_begin: bool = True,
        at_end: bool = True,
        batch_metrics: bool = True,
        batch_rank: bool = False,
        batch_update: bool = False,
        batch_size: int | None = None,
        cache_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(trainer, GRPOTrainer):
            raise TypeError(
                f"trainer={type(trainer).__name__} is not a GRPOTrainer or SGPOTrainer. Make the trainer first, then "
                "`trainer.add_callback(SharpeningCallback(trainer=trainer, prompts=...))`."
            )
        _check_trainer(trainer)
        self.trainer: Any = trainer
        for name, value in (("n_samples", n_samples), ("every", every), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        self.n_samples, self.every = n_samples, every
        self.ks = default_ks(n_samples) if ks is None else sorted(set(ks))
        if not self.ks or self.ks[0] < 1 or self.ks[-1] > n_samples:
            raise ValueError(
                f"ks={list(ks or ())} must lie between 1 and n_samples={n_samples}: pass@k of a prompt needs at least k "
                f"samples of it. Raise n_samples to {max(ks or (1,))}, or leave out the larger ones."
            )
        self.taus = list(taus)
        if any(not 0 < tau <= 1 for tau in self.taus):
            raise ValueError(f"taus={self.taus} must lie in (0, 1]: they are shares of a prompt's samples.")
        if extract_answer is not None and not callable(extract_answer):
            raise TypeError(
                f"extract_answer={extract_answer!r} is not callable. Give a function from a completion's text to its "
                "answer, for instance `lambda text: text.split()[-1]`."
            )
        self.extract_answer = extract_answer
        self.outcomes, outcome_indices = _find_outcomes(trainer, outcome_reward)
        threshold = getattr(trainer.args, "success_threshold", 0.5) if success_threshold is None else success_threshold
        if math.isnan(threshold):
            raise ValueError(
                "success_threshold=nan: no outcome reaches it. Give the smallest one that means 'correct'."
            )
        self.success_threshold = float(threshold)
        self.rows = _rows(prompts)
        for outcome in self.outcomes:
            _check_columns(self.rows, outcome)
        self.domains = [str(row["domain"]) for row in self.rows] if "domain" in self.rows[0] else None
        self.judge = _find_judge(trainer, judge)
        self.sample_base, self.base_logps = sample_base, base_logps
        if base_model is not None and is_peft(trainer):
            raise ValueError(
                "base_model was given, but the policy is a PEFT model: its base is the model without the adapters. "
                "Leave base_model out."
            )
        if base_model is not None and is_sharded(trainer) and not isinstance(base_model, str):
            raise ValueError(
                f"base_model={type(base_model).__name__} is a module, but the policy is sharded over the ranks, and the "
                "base has to be loaded likewise. Give its name or path."
            )
        self.base_model = base_model
        self.at_begin, self.at_end = at_begin, at_end
        self.cache_dir = store.default_folder() if cache_dir is None else Path(cache_dir)
        self.seed = seed
        self.folder = Path(str(trainer.args.output_dir)) / "sharpening"
        self._probe = Probe(trainer, [row["prompt"] for row in self.rows], n_samples, batch_size, seed)
        self._batches: TrainingBatches | None = None
        if batch_metrics or batch_rank or batch_update:
            if outcome_indices:
                self._batches = TrainingBatches(
                    trainer,
                    outcome_indices,
                    self.success_threshold,
                    batch_metrics,
                    batch_rank,
                    batch_update,
                    extract_answer,
                )
            elif batch_rank or batch_update:
                raise ValueError(
                    "batch_rank and batch_update need the outcome among the trainer's rewards, but outcome_reward is "
                    f"{get_callable_name(self.outcomes[0])!r}, which the trainer does not use. Name one of "
                    f"{trainer.reward_func_names}, or leave them out."
                )
        self._base: BaseModel | None = None
        self._base_samples: list[Sample] | None = None
        self._base_scored = self._base_written = False
        self._watch = Stopwatch()
        self._last_probe: int | None = None
        self._traceback_shown = False

    # Events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_probe = None
        self._base, self._base_samples = None, None
        self._base_scored = self._base_written = False
        if self._batches is not None:
            self._batches.install()
        step = state.global_step
        with undisturbed(self.trainer):
            key = self._find_base(step)  # what is wrong with the arguments ends the run, before anything is generated
        if self.trainer.accelerator.is_main_process:
            self._guarded(lambda: self._write_settings(step), collective=False)
        self._watch = Stopwatch()  # what the base costs is logged with the first probe
        self._guarded(lambda: self._get_base_samples(key, step, self._watch))
        if self.at_begin:
            self._run_probe(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._batches is not None:
            self._batches.after_update()
        # At the end of training the trackers may be closed before this callback's turn, so the last update counts as it
        last = control.should_training_stop and self.at_end
        if state.global_step % self.every == 0 or last:
            self._run_probe(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None  # another step's weights by now
        if self.at_end and self._last_probe != state.global_step and not best:
            self._run_probe(state.global_step)
        if self._batches is not None:
            self._batches.remove()

    def _guarded(self, part: Callable[[], Any], collective: bool = True) -> Any:
        """
        Runs a part of a probe. If it raises, the probe is skipped, and the traceback is shown once. What goes wrong on one
        rank of several while the others wait for it cannot be skipped: that ends the run, as it would in training.
        """
        try:
            return part()
        except Exception as error:
            alone = self.trainer.accelerator.num_processes == 1
            if collective and not alone and not isinstance(error, ScoringError):
                raise
            if not self._traceback_shown and self.trainer.accelerator.is_main_process:
                self._traceback_shown = True
                logger.warning(
                    "A probe of SharpeningCallback failed and is skipped; training goes on. Further failures are not "
                    "shown.",
                    exc_info=True,
                )
            return None

    # The base

    def _find_base(self, step: int) -> str | None:
        """Sets how to get at the base's log-probabilities. Returns the key of its samples, `None` if it is unknown."""
        trainer = self.trainer
        fresh = step == 0
        model = trainer.accelerator.unwrap_model(trainer.model)
        prompts = store.prompts_hash(trainer, self._probe.prompts)
        self._settings = {
            "model": str(get_config_model_id(trainer.model.config)),
            **sampling_settings(trainer),
            "prompts_hash": prompts,
            "n": self.n_samples,
            "ks": self.ks,
            "taus": self.taus,
            "seed": self.seed,
            "outcome_reward": " | ".join(map(get_callable_name, self.outcomes)),
            "success_threshold": self.success_threshold,
            "logps": "natural, summed over the completion's tokens with the end token, at the sampling temperature",
            "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        }
        if trainer.top_p < 1 or trainer.top_k > 0 or trainer.min_p:
            logger.info(
                "top_p=%s, top_k=%s, min_p=%s: probes sample from a truncated distribution, while log-probabilities are those "
                "of the whole one, so `sharpening/kl_k1` is no unbiased estimate.",
                trainer.top_p,
                trainer.top_k,
                trainer.min_p,
            )
        known: str | None
        if is_peft(trainer):
            self._base = AdaptersOff(trainer)
            known = fingerprint(trainer, model, trainable=False)
        elif self.base_model is not None and is_sharded(trainer):
            loaded = load_sharded(trainer, str(self.base_model))
            self._base, known = loaded, fingerprint(trainer, loaded.module)
        elif self.base_model is not None:
            self._base = load_weights(trainer, self.base_model)
            with self._base.active():
                known = fingerprint(trainer, model)
        else:
            known = fingerprint(trainer, model) if fresh else self._recorded_fingerprint()
            if self.base_logps:
                self._base = self._find_untouched(known, fresh)
            if known is None and isinstance(self._base, ReferenceModel):
                known = fingerprint(trainer, self._base.module)
        if known is None:
            return None
        self._settings["base_fingerprint"] = known
        return store.cache_key(known, prompts, sampling_settings(trainer), self.n_samples, self.seed)

    def _find_untouched(self, known: str | None, fresh: bool) -> BaseModel | None:
        """The base of a policy without adapters, for log-probabilities: whichever costs least of those that are right."""
        trainer = self.trainer
        if trainer.ref_model is not None and not trainer.args.sync_ref_model:
            reference = ReferenceModel(trainer, trainer.ref_model)
            if known is None or fingerprint(trainer, reference.module) == known:
                return reference
        if not fresh:
            logger.warning(
                "The run was resumed, so the policy is no longer its base, and there is no base_model: log-probabilities "
                "under the base are left out. Give `base_model=`, the model that the run was started from."
            )
            return None
        if not is_sharded(trainer):
            return keep_copy(trainer)
        path = get_config_model_id(trainer.model.config)
        loaded = load_sharded(trainer, path)
        if fingerprint(trainer, loaded.module) != known:
            raise ValueError(
                f"The policy is sharded over the ranks, so its base has to be loaded a second time, but {path!r} holds other "
                "weights than the policy before training. Give `base_model=`, where these weights are, or base_logps=False."
            )
        return loaded

    def _recorded_fingerprint(self) -> str | None:
        """The base's fingerprint as the begin of this run wrote it down."""
        found = None
        if self.trainer.accelerator.is_main_process:
            try:
                found = json.loads((self.folder / "probe.json").read_text()).get("base_fingerprint")
            except (OSError, ValueError):
                found = None
        return broadcast_object_list([found])[0]

    def _get_base_samples(self, key: str | None, step: int, watch: Stopwatch) -> None:
        """The base's samples, from the cache or drawn now."""
        trainer = self.trainer
        cached = None
        if not self.sample_base:
            return
        if key is not None and trainer.accelerator.is_main_process:
            cached = store.load(self.cache_dir, key)
        self._base_samples = broadcast_object_list([cached])[0]
        if self._base_samples is None:
            drawable = self._base is not None and self._base.can_generate
            if is_peft(trainer) and trainer.use_vllm:
                drawable = False  # vLLM is sent merged adapters, switched off or not
            unmoved = step == 0 and self.base_model is None and not (is_peft(trainer) and drawable)
            if key is None or not (drawable or unmoved):
                logger.warning(
                    "The base model's samples are not in %s, and the base is out of reach (the run was resumed, or the base "
                    "cannot generate here): the comparison with it is left out. Start from update 0 with the callback, "
                    "or give `base_model=`, the model that the run was started from.",
                    self.cache_dir,
                )
            else:
                drawn = self._draw_base(unmoved, watch)
                self._base_samples = drawn
                if drawn is not None and trainer.accelerator.is_main_process:
                    self._guarded(lambda: store.save(self.cache_dir, key, drawn), collective=False)

    def _write_settings(self, step: int) -> None:
        for path in self.folder.glob("policy_*.parquet"):
            # Of an earlier run in this folder, at updates that this one has still before it
            if path.stem[7:].isdigit() and int(path.stem[7:]) >= step:
                path.unlink()
        store.write_json(self.folder / "probe.json", self._settings)
        store.write_parquet(
            self.folder / "prompts.parquet",
            {
                "prompt_id": list(range(len(self.rows))),
                "prompt": [_prompt_text(row["prompt"]) for row in self.rows],
                "domain": self.domains or [None] * len(self.rows),
            },
        )

    def _draw_base(self, unmoved: bool, watch: Stopwatch) -> list[Sample] | None:
        """Draws the base's samples: from the policy, if that is the base still."""
        with undisturbed(self.trainer):
            if unmoved or self._base is None:
                batches = self._draw_as_it_is(watch)
                if is_peft(self.trainer) and self._base is not None:
                    with watch("base_logps"), self._base.active() as model:
                        self._probe.add_base_logps(batches, model)
            else:
                with self._base.active():
                    batches = self._draw_as_it_is(watch)
        local = self._probe.samples(batches)
        moved = any(s.logp_base is not None and abs(s.logp_base - (s.logp_policy or 0)) > 0.1 for s in local)
        for sample in local:
            sample.logp_base, sample.logp_policy, sample.entropy, sample.k3 = sample.logp_policy, None, None, None
        gathered = gather_object([(local, moved)])
        if any(moved for _, moved in gathered):
            logger.warning(
                "The adapters that training begins with change the model already, and vLLM samples with them: the "
                "comparison with the base model is left out. Train without vLLM, or merge the adapters first."
            )
            return None
        return _in_order([sample for samples, _ in gathered for sample in samples])

    def _draw_as_it_is(self, watch: Stopwatch) -> list[Batch]:
        batches = self._probe.draw("base", watch, description="sampling the base model")
        with watch("base_logps"):
            self._probe.add_logps(batches)
        return batches

    # A probe

    def _run_probe(self, step: int) -> None:
        if self._last_probe == step:
            return
        self._last_probe = step
        watch, self._watch = self._watch, Stopwatch()
        start = time.perf_counter() - sum(watch.seconds.values())
        policy = self._guarded(lambda: self._collect(step, watch))
        if policy is None:
            return
        logs = self._guarded(lambda: self._report(step, policy, watch), collective=False)
        if logs is not None:
            for part, seconds in watch.seconds.items():
                logs[f"{PREFIX}seconds/{part}"] = seconds
            logs[f"{PREFIX}seconds/total"] = time.perf_counter() - start
            self._log(logs)

    def _collect(self, step: int, watch: Stopwatch) -> list[Sample]:
        """Draws and scores: every rank takes part, and gets the samples of all."""
        probe = self._probe
        with undisturbed(self.trainer):
            batches = probe.draw(f"policy/{step}", watch)
            with watch("logps"):
                probe.add_logps(batches)
            if self._base is not None and self.base_logps:
                with watch("base_logps"), self._base.active() as model:
                    probe.add_base_logps(batches, model)
            if self._base_samples is not None and not self._base_scored:
                rank, n_ranks = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
                self._base_samples = self._score(self._base_samples[rank::n_ranks], watch)
                self._base_scored = True
            return self._score(probe.samples(batches), watch)

    def _score(self, local: list[Sample], watch: Stopwatch) -> list[Sample]:
        """
        Scores this rank's samples and gathers those of all.

        Raises:
            ScoringError: On every rank, if a reward function or a judge has raised on one.
        """
        failure = None
        try:
            with watch("score"):
                self._score_outcomes(local)
            if self.judge is not None:
                with watch("judge"):
                    self._judge_steps(local, self.judge)
        except Exception:
            failure = traceback.format_exc()
        with watch("gather"):
            gathered = gather_object([(local, failure)])
        failures = [failure for _, failure in gathered if failure]
        if failures:
            raise ScoringError(failures[0])
        return _in_order([sample for samples, _ in gathered for sample in samples])

    def _score_outcomes(self, samples: list[Sample]) -> None:
        """In pieces of a training batch, so that a reward function sees nothing larger than it does there."""
        size = self._probe.batch_size
        for start in range(0, len(samples), size):
            piece = samples[start : start + size]
            rows = [self.rows[sample.prompt_id] for sample in piece]
            columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
            for sample in piece:
                sample.scored = sample.correct = False
            for outcome in self.outcomes:
                self._score_outcome(outcome, piece, rows, columns)

    def _score_outcome(
        self, outcome: Any, piece: list[Sample], rows: list[dict[str, Any]], columns: dict[str, list[Any]]
    ) -> None:
        """By one outcome reward; a sample that it has no value for belongs to another task."""
        rewards = outcome(
            prompts=[row["prompt"] for row in rows],
            completions=[sample.completion for sample in piece],
            completion_ids=[sample.token_ids for sample in piece],
            **columns,
            trainer_state=self.trainer.state,
            log_extra=_nowhere,
            log_metric=_nowhere,
        )
        if inspect.isawaitable(rewards):
            rewards = asyncio.run_coroutine_threadsafe(_awaited(rewards), self.trainer.async_loop).result()
        if len(rewards) != len(piece):
            raise ValueError(
                f"The reward function {get_callable_name(outcome)!r} returned {len(rewards)} rewards for "
                f"{len(piece)} completions: there must be one for each."
            )
        for sample, reward in zip(piece, rewards, strict=True):
            if reward is None or math.isnan(reward):
                continue
            if sample.scored:
                raise ValueError(
                    f"A completion has two outcomes, one of them from {get_callable_name(outcome)!r}. With several outcome "
                    "rewards each must return None for the rows of the other tasks."
                )
            sample.scored, sample.correct = True, bool(reward >= self.success_threshold)

    def _judge_steps(self, samples: list[Sample], judge: StepwiseJudge) -> None:
        solved = [sample for sample in samples if sample.correct]
        rows = [self.rows[sample.prompt_id] for sample in solved]
        for sample in samples:
            sample.process_correct = False
        scores = judge.score([row["prompt"] for row in rows], [s.completion for s in solved], rows, known_wrong=False)
        for sample, score in zip(solved, scores, strict=True):
            sample.judged = score.status != "abstain"
            sample.process_correct = score.status == "no_error"

    def _report(self, step: int, policy: list[Sample], watch: Stopwatch) -> dict[str, float]:
        """Writes the samples down and returns what is to be logged; alike on every rank, without asking the others."""
        if self.trainer.accelerator.is_main_process:
            with watch("write"):
                self._write(f"policy_{step:06d}", policy)
                if self._base_samples is not None and not self._base_written:
                    self._write("base", self._base_samples)
                    self._base_written = True
        with watch("metrics"):
            base = self._base_samples if self._base_scored else None
            found = summarise(
                policy, base, len(self.rows), self.ks, self.taus, self.domains, extract_answer=self.extract_answer
            )
        return {PREFIX + key: value for key, value in found.items()}

    def _write(self, name: str, samples: list[Sample]) -> None:
        columns = {
            column: [getattr(sample, attribute) for sample in samples]
            for column, attribute in (
                ("prompt_id", "prompt_id"),
                ("sample", "sample"),
                ("text", "text"),
                ("correct", "correct"),
                ("process_correct", "process_correct"),
                ("logp_policy", "logp_policy"),
                ("logp_base", "logp_base"),
                ("n_tokens", "n_tokens"),
            )
        }
        store.write_parquet(self.folder / f"{name}.parquet", columns)

    def _log(self, logs: dict[str, float]) -> None:
        """
        Logs at this update. GRPOTrainer's own `log` would take the training metrics collected so far with it, so this is
        the one above it; and a log event takes back that training's own is due.
        """
        due = self.trainer.control.should_log
        Trainer.log(self.trainer, logs)
        self.trainer.control.should_log = due


def _check_trainer(trainer: GRPOTrainer) -> None:
    """Raises for trainers whose completions are more than one call of the generation."""
    settings: Any = trainer
    uses = [
        name
        for name, used in (
            ("tools", settings.tools),
            ("environment_factory", settings.environment_factories),
            ("rollout_func", settings.rollout_func),
            ("a multimodal processor", settings._is_vlm),
        )
        if used
    ]
    if uses:
        raise ValueError(
            f"The trainer uses {' and '.join(uses)}, which SharpeningCallback cannot probe: it draws single-turn completions "
            "of text. Leave the callback out for such a run."
        )
    if (settings.args.generation_kwargs or {}).get("do_sample") is False or settings.temperature == 0:
        raise ValueError(
            f"temperature={settings.temperature} and generation_kwargs={settings.args.generation_kwargs} make generation "
            "greedy: all samples of a prompt would be equal, and pass@k would say nothing. Sample, as training does."
        )


def _rows(prompts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The probe set as a list of rows, checked."""
    if isinstance(prompts, str | Mapping) or not hasattr(prompts, "__len__"):
        raise TypeError(
            f"prompts={type(prompts).__name__} is not a set of rows. Give a `Dataset` or a list of dicts with the column "
            "'prompt' and those that the outcome reward needs; take a part of a stream first, `list(stream.take(64))`."
        )
    rows = []
    for i, row in enumerate(prompts):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"prompts[{i}] is {type(row).__name__}, not a row: it must be a dict with the column 'prompt' and those "
                "that the outcome reward needs."
            )
        if row.get("prompt") in (None, "", []):
            raise ValueError(
                f"prompts[{i}] has no column 'prompt', or an empty one; its columns are {sorted(row)}. Name the column "
                "with the problem 'prompt', as in the training set."
            )
        rows.append(dict(row))
    if not rows:
        raise ValueError("prompts is empty: without a prompt there is nothing to probe. Some 50 to 200 are usual.")
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        text = _prompt_text(row["prompt"])
        if text in first:
            raise ValueError(
                f"prompts[{i}] is the same as prompts[{first[text]}] ({text[:60]!r}): its samples would count twice, and "
                "the intervals would come out too narrow. Leave duplicates out, and raise n_samples for more samples."
            )
        first[text] = i
    return rows


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables tell nothing of themselves
        return {}


def _check_columns(rows: list[dict[str, Any]], outcome: Any) -> None:
    needed = [
        name
        for name, parameter in _parameters(outcome).items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in _REWARD_ARGUMENTS
    ]
    for column in [*needed, *(["domain"] if any("domain" in row for row in rows) else [])]:
        lacking = [i for i, row in enumerate(rows) if column not in row]
        if lacking:
            who = (
                "the domain of each"
                if column == "domain"
                else f"the outcome reward {get_callable_name(outcome)!r} needs"
            )
            raise ValueError(
                f"prompts lacks the column {column!r} in {len(lacking)} of {len(rows)} rows, prompts[{lacking[0]}] for "
                f"one: {who}. Take the rows from a data set with the training set's columns."
            )


def _find_outcomes(trainer: Any, given: Any) -> tuple[list[Any], list[int]]:
    """The outcome rewards, one for each task, and their columns among the trainer's rewards; none for a foreign function."""
    names, funcs = trainer.reward_func_names, trainer.reward_funcs
    if callable(given) and not isinstance(given, nn.Module):
        return [given], [i for i, func in enumerate(funcs) if func is given][:1]
    if given is not None and not isinstance(given, str | list | tuple):
        raise TypeError(
            f"outcome_reward={type(given).__name__} is neither a name nor a reward function. Give one of {names}, or a "
            "function `f(prompts, completions, **columns) -> list[float]`."
        )
    judge_index = getattr(trainer, "judge_index", None)
    if judge_index is None:
        judge_index = next((i for i, func in enumerate(funcs) if isinstance(func, StepwiseJudge)), None)
    indices = getattr(trainer, "outcome_indices", []) if given is None else []
    indices = indices or find_outcomes(names, judge_index, given, needed_by="SharpeningCallback")
    models = [names[i] for i in indices if isinstance(funcs[i], nn.Module)]
    if models:
        raise ValueError(
            f"outcome_reward={models[0]!r} is a reward model, whose scores do not say right or wrong. Give a function "
            "that does, `outcome_reward=accuracy_reward`."
        )
    return [funcs[i] for i in indices], indices


def _find_judge(trainer: Any, given: Any) -> StepwiseJudge | None:
    if given is False:
        return None
    if given is not None:
        return given if isinstance(given, StepwiseJudge) else StepwiseJudge(given)
    found = getattr(trainer, "stepwise_judge", None)
    return found or next((func for func in trainer.reward_funcs if isinstance(func, StepwiseJudge)), None)


def _in_order(samples: list[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample))


def _nowhere(*args: Any, **kwargs: Any) -> None:
    """Takes what a reward function logs: a probe's samples are no training metrics."""


async def _awaited(rewards: Any) -> Any:
    return await rewards
