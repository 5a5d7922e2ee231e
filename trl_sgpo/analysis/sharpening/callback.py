"""
[`SharpeningCallback`]: is the policy learning something new, or sharpening what its base could do already? This file
is wiring only; `analysis/sharpening/__init__.py` says what the other files do.
"""

import json
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name, get_config_model_id

from trl_sgpo.analysis.sharpening import arguments, base
from trl_sgpo.analysis.sharpening.batches import TrainingBatches
from trl_sgpo.analysis.sharpening.log import FILE_COLUMNS, as_columns, log_numbers
from trl_sgpo.analysis.sharpening.probe import Batch, Probe, Sample, Stopwatch, sampling_settings, undisturbed
from trl_sgpo.analysis.sharpening.scoring import Scorer, ScoringError, in_order
from trl_sgpo.judges.log_once import LogOnce


logger = logging.getLogger(__name__)

PREFIX = "sharpening/"


class SharpeningCallback(TrainerCallback):
    """
    Compares the policy with its base model on a fixed set of prompts, and logs under `sharpening/` what distinguishes
    sharpening from expansion.

    It works with [`SGPOTrainer`] and with plain [`~trl.GRPOTrainer`], and uses the trainer's own generation and
    sampling settings. Log-probabilities are those that TRL trains on: logits divided by the sampling temperature, over
    the whole vocabulary, with the end token. So `kl_k1` is unbiased only if `top_p`, `top_k` and `min_p` truncate
    nothing.

    The base is the policy before training (PEFT: the policy without its adapters; or `base_model`). Its samples are
    kept on disk, so another run from the same base draws none. `<output_dir>/sharpening/` holds `probe.json`,
    `prompts.parquet`, `base.parquet` and a `policy_<step>.parquet` for each probe.

    Training goes on as if there was no probe, bit for bit, except for vLLM's own scheduling, which no seed controls.
    If a reward function or the judge raises inside a probe, only that probe is lost.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        prompts (`Dataset` or `Sequence[Mapping]`):
            The probe set: rows with `prompt` and the columns that the outcome reward needs. An optional column
            `domain` splits the gain.
        n_samples (`int`, *optional*, defaults to `64`):
            Samples per prompt, of base and policy.
        every (`int`, *optional*, defaults to `50`):
            Updates between two probes.
        ks, taus (`Sequence`, *optional*):
            For pass@k and Cover@tau. `ks` defaults to the powers of two up to `n_samples`, and `n_samples`.
        outcome_reward (`str`, `list[str]` or `Callable`, *optional*):
            The reward that says right or wrong: the name of one of the trainer's reward functions, a list of names
            (one for each task), or a reward function. Defaults to [`SGPOTrainer`]'s, else to the trainer's only one.
        success_threshold (`float`, *optional*):
            A completion is correct if its outcome reaches this. Defaults to [`SGPOTrainer`]'s, else to 0.5.
        judge ([`StepwiseJudge`], [`StepJudge`] or `Callable`, *optional*):
            Checks the steps of correct completions, for process-verified pass@k (every step right and the outcome
            correct; an abstention verifies nothing). Defaults to the trainer's [`StepwiseJudge`], if it has one;
            `False` for none.
        extract_answer (`Callable[[str], Hashable]`, *optional*):
            From a completion's text to its answer, `None` for no answer: gives maj@k and the entropy of the answers.
        sample_base (`bool`, *optional*, defaults to `True`):
            Whether to sample the base. Without it there are only the numbers of the policy's samples.
        base_logps (`bool`, *optional*, defaults to `True`):
            Log-probabilities of the policy's samples under the base, for KL, perplexity and tilt. The base's weights
            are kept on the CPU, unless adapters or a reference model give them.
        base_model (`str` or `nn.Module`, *optional*):
            The base, if it is not the policy before training. For a resumed run: the model that it was started from.
        at_begin, at_end (`bool`, *optional*, defaults to `True`):
            Whether to probe before the first update and after the last one.
        batch_metrics, batch_rank, batch_update (`bool`, *optional*, defaults to `True`, `False`, `False`):
            Numbers of the training batches, under `sharpening/batch/`. `batch_metrics`: group split, pass@k and
            effective tokens, at no cost. `batch_rank`: rank of the correct completions by log-probability, with a
            forward pass per batch. `batch_update`: uplift by rank and likelihood displacement, with forward passes
            before and after the update.
        batch_size (`int`, *optional*):
            Completions that a rank generates at once. Defaults to the number in training.
        cache_dir (`str` or `Path`, *optional*):
            Where the base's samples are kept for other runs. Defaults to `~/.cache/trl_sgpo/base_samples`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples, independent of the training's seed.

    Raises:
        TypeError: If `trainer`, `prompts`, `outcome_reward` or `extract_answer` has a wrong type.
        ValueError: If the probe set is empty, lacks a column or holds a prompt twice; if another argument is out of
            its range; if no reward says right or wrong; if the trainer uses tools, environments, images or rollouts.

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
        arguments.check_trainer(trainer)
        arguments.check_numbers(n_samples=n_samples, every=every, batch_size=batch_size)
        self.trainer: Any = trainer
        self.n_samples, self.every, self.seed = n_samples, every, seed
        self.ks, self.taus = arguments.check_ks(ks, n_samples), arguments.check_taus(taus)
        self.extract_answer = arguments.check_extract_answer(extract_answer)
        self.outcomes, outcome_indices = arguments.outcomes_of(trainer, outcome_reward)
        self.success_threshold = arguments.check_threshold(success_threshold, trainer)
        self.rows = arguments.probe_rows(prompts)
        for outcome in self.outcomes:
            arguments.check_columns(self.rows, outcome)
        self.domains = [str(row["domain"]) for row in self.rows] if "domain" in self.rows[0] else None
        self.judge = arguments.judge_of(trainer, judge, self.rows)
        self.sample_base, self.base_logps = sample_base, base_logps
        self.base_model = arguments.check_base_model(base_model, trainer)
        self.at_begin, self.at_end = at_begin, at_end
        self.cache_dir = base.default_cache_folder() if cache_dir is None else Path(cache_dir)
        self.folder = Path(str(trainer.args.output_dir)) / "sharpening"
        arguments.check_batch_options(self.outcomes, outcome_indices, trainer, needed=batch_rank or batch_update)
        self._probe = Probe(trainer, [row["prompt"] for row in self.rows], n_samples, batch_size, seed)
        self._scorer = Scorer(
            trainer, self.rows, self.outcomes, self.success_threshold, self.judge, self._probe.batch_size
        )
        self._batches: TrainingBatches | None = None
        if outcome_indices and (batch_metrics or batch_rank or batch_update):
            self._batches = TrainingBatches(
                trainer,
                outcome_indices,
                self.success_threshold,
                batch_metrics,
                batch_rank,
                batch_update,
                extract_answer,
            )
        self._log_once = LogOnce(logger)
        self._forget()

    # Events

    def _forget(self) -> None:
        self._last_probe: int | None = None
        self._base: base.BaseModel | None = None
        self._base_samples: list[Sample] | None = None
        self._base_scored = self._base_written = False
        self._watch = Stopwatch()  # the base's seconds are logged with the first probe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget()
        if self._batches is not None:
            self._batches.install()
        step = state.global_step
        with undisturbed(self.trainer):
            key = self._find_base(step)  # wrong arguments end the run before anything is generated
        if self.trainer.accelerator.is_main_process:
            self._guarded(lambda: self._write_settings(step), collective=False)
        if self.sample_base:
            self._guarded(lambda: self._get_base_samples(key, step, self._watch))
        if self.at_begin:
            self._run_probe(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._batches is not None:
            self._batches.after_update()
        # At the end of training the trackers may be closed before this callback's turn, so the last update is probed here
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
        Runs a part of a probe. If it raises, the probe is skipped, and the traceback is shown once. An error on one
        rank while the other ranks wait for it cannot be skipped: it ends the run, as it would in training.
        """
        try:
            return part()
        except Exception as error:
            alone = self.trainer.accelerator.num_processes == 1
            if collective and not alone and not isinstance(error, ScoringError):
                raise
            if self.trainer.accelerator.is_main_process:
                self._log_once.traceback(
                    "A probe of SharpeningCallback failed and is skipped; training goes on. Further failures are not "
                    "shown."
                )
            return None

    # The base

    def _find_base(self, step: int) -> str | None:
        """Finds the way to the base. Returns the key of its samples in the cache, `None` if the base is not known."""
        trainer = self.trainer
        prompts = base.prompts_hash(trainer, self._probe.prompts)
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
                "top_p=%s, top_k=%s, min_p=%s: probes sample from a truncated distribution, but log-probabilities are those "
                "of the whole distribution, so `sharpening/kl_k1` is not unbiased.",
                trainer.top_p,
                trainer.top_k,
                trainer.min_p,
            )
        self._base, known = base.find_base(
            trainer, self.base_model, self.base_logps, step == 0, self._recorded_fingerprint
        )
        if known is None:
            return None
        self._settings["base_fingerprint"] = known
        return base.cache_key(known, prompts, sampling_settings(trainer), self.n_samples, self.seed)

    def _recorded_fingerprint(self) -> str | None:
        """The base's fingerprint that the begin of this run wrote down."""
        found = None
        if self.trainer.accelerator.is_main_process:
            with suppress(OSError, ValueError):
                found = json.loads((self.folder / "probe.json").read_text()).get("base_fingerprint")
        return broadcast_object_list([found])[0]

    def _get_base_samples(self, key: str | None, step: int, watch: Stopwatch) -> None:
        """The base's samples, from the cache or drawn now."""
        trainer, cached = self.trainer, None
        if key is not None and trainer.accelerator.is_main_process:
            cached = base.load_samples(self.cache_dir, key)
        self._base_samples = broadcast_object_list([cached])[0]
        if self._base_samples is not None:
            return
        peft = base.is_peft(trainer)
        # vLLM gets merged adapters, even if they are switched off
        drawable = self._base is not None and self._base.can_generate and not (peft and trainer.use_vllm)
        unmoved = step == 0 and self.base_model is None and not (peft and drawable)
        if key is None or not (drawable or unmoved):
            logger.warning(
                "The base model's samples are not in %s, and the base is out of reach (the run was resumed, or the "
                "base cannot generate here): the comparison with it is left out. Start from update 0 with the "
                "callback, or give `base_model=`, the model that the run was started from.",
                self.cache_dir,
            )
            return
        drawn = self._base_samples = self._draw_base(unmoved, watch)
        if drawn is not None and trainer.accelerator.is_main_process:
            self._guarded(lambda: base.save_samples(self.cache_dir, key, drawn), collective=False)

    def _write_settings(self, step: int) -> None:
        for path in self.folder.glob("policy_*.parquet"):
            # From an earlier run in this folder, at updates that this run has not reached yet
            if path.stem[7:].isdigit() and int(path.stem[7:]) >= step:
                path.unlink()
        base.write_json(self.folder / "probe.json", self._settings)
        base.write_parquet(
            self.folder / "prompts.parquet",
            {
                "prompt_id": list(range(len(self.rows))),
                "prompt": [arguments.prompt_text(row["prompt"]) for row in self.rows],
                "domain": self.domains or [None] * len(self.rows),
            },
        )

    def _draw_base(self, unmoved: bool, watch: Stopwatch) -> list[Sample] | None:
        """Draws the base's samples: from the policy, if it is still the base."""
        with undisturbed(self.trainer):
            if unmoved or self._base is None:
                batches = self._draw_as_it_is(watch)
                if base.is_peft(self.trainer) and self._base is not None:
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
        return in_order([sample for samples, _ in gathered for sample in samples])

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
        """Draws and scores. Every rank takes part, and gets the samples of all ranks."""
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
                self._base_samples = self._scorer.score(self._base_samples[rank::n_ranks], watch)
                self._base_scored = True
            return self._scorer.score(probe.samples(batches), watch)

    def _report(self, step: int, policy: list[Sample], watch: Stopwatch) -> dict[str, float]:
        """Writes the samples and returns the numbers for the log: the same on every rank, without communication."""
        if self.trainer.accelerator.is_main_process:
            with watch("write"):
                self._write(f"policy_{step:06d}", policy)
                if self._base_samples is not None and not self._base_written:
                    self._write("base", self._base_samples)
                    self._base_written = True
        with watch("metrics"):
            found = log_numbers(
                policy,
                self._base_samples if self._base_scored else None,
                len(self.rows),
                self.ks,
                self.taus,
                self.domains,
                self.extract_answer,
            )
        return {PREFIX + key: value for key, value in found.items()}

    def _write(self, name: str, samples: list[Sample]) -> None:
        base.write_parquet(self.folder / f"{name}.parquet", as_columns(samples, FILE_COLUMNS))

    def _log(self, logs: dict[str, float]) -> None:
        """
        Logs at this update. GRPOTrainer's `log` would also log the training metrics collected so far, so its parent's
        `log` is called. A log event clears `should_log`; it is set back, because training's own log may be due.
        """
        due = self.trainer.control.should_log
        Trainer.log(self.trainer, logs)
        self.trainer.control.should_log = due
