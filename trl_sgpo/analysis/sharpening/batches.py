"""
Metrics of the training batches: [`TrainingBatches`]. Callbacks never see groups, because TRL shuffles the rows right
after `_generate_and_score_completions`. An SGPOTrainer lets observers see its rounds. For any other GRPOTrainer this
file makes the rounds itself: it wraps two methods, of that instance only, and changes nothing that passes through.
"""

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor

from trl_sgpo.analysis.metrics import answer_entropy, likelihood_displacement, rank_of_correct, uplift_by_rank
from trl_sgpo.analysis.sharpening.probe import token_logps, undisturbed
from trl_sgpo.groups import group_kinds, group_pass_at_k
from trl_sgpo.outcome import join_outcomes
from trl_sgpo.rounds import Round


PREFIX = "sharpening/batch/"
_WRAPPED = ("_calculate_rewards", "_generate_and_score_completions")


@dataclass
class _Captured:
    """A generation batch of this rank before its update."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    correct: Tensor  # of all ranks
    logps: Tensor  # of all ranks, before the update


class TrainingBatches:
    """
    Logs metrics of the training batches. TRL averages them over a logging interval, like its own metrics.

    Args:
        metrics (`bool`):
            Group split, pass@k and effective tokens, without further computation.
        rank (`bool`):
            Rank of the correct samples by log-probability under the policy that drew them: one forward pass per batch,
            unless TRL has computed `old_per_token_logps`.
        update (`bool`):
            Uplift by rank and likelihood displacement: one more forward pass after the last update with a batch.
    """

    def __init__(
        self,
        trainer: Any,
        outcome_indices: list[int],
        success_threshold: float,
        metrics: bool,
        rank: bool,
        update: bool,
        extract_answer: Callable[[str], Hashable] | None = None,
    ) -> None:
        self.trainer, self.outcome_indices, self.success_threshold = trainer, outcome_indices, success_threshold
        self.metrics, self.rank, self.update, self.extract_answer = metrics, rank, update, extract_answer
        self.seconds = 0.0  # spent here since the start, with forward passes
        self._round: Round | None = None  # only for a trainer that makes no rounds
        self._captured: list[_Captured] = []
        self._inner: dict[str, Any] = {}

    def install(self) -> None:
        """Starts to observe, if it does not yet."""
        self._captured = []
        observers = getattr(self.trainer, "round_observers", None)
        if observers is not None:
            if self.observe not in observers:
                observers.append(self.observe)
            return
        if self.trainer.__dict__.get(_WRAPPED[0]) == self._rewards:
            return
        for name, wrapper in zip(_WRAPPED, (self._rewards, self._generated), strict=True):
            self._inner[name] = getattr(self.trainer, name)
            setattr(self.trainer, name, wrapper)

    def remove(self) -> None:
        """Stops observing. A method that somebody else has wrapped since then stays as it is."""
        observers = getattr(self.trainer, "round_observers", None)
        if observers is not None:
            if self.observe in observers:
                observers.remove(self.observe)
            return
        for name, wrapper in zip(_WRAPPED, (self._rewards, self._generated), strict=True):
            if self.trainer.__dict__.get(name) == wrapper:
                setattr(self.trainer, name, self._inner[name])
                if getattr(type(self.trainer), name, None) is getattr(self._inner[name], "__func__", None):
                    delattr(self.trainer, name)

    def _log(self, key: str, value: float) -> None:
        if not math.isnan(value):
            self.trainer._metrics["train"][PREFIX + key].append(float(value))

    def _rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        rewards = self._inner["_calculate_rewards"](inputs, prompts, completions, completion_ids_list)
        if self._round is not None and self._round.training:
            rewards_PGF = rewards.view(-1, self.trainer.num_generations, rewards.shape[1])
            weights_F = self.trainer.reward_weights.to(rewards.device)
            self._round.fill(rewards_PGF, weights_F, self._outcome(rewards_PGF), completion_ids=completion_ids_list)
        return rewards

    def _generated(self, inputs: list) -> dict[str, Any]:
        round = self._round = Round(training=self.trainer.model.training)
        output = self._inner["_generate_and_score_completions"](inputs)
        self._round = None
        self.observe(round, output)
        return output

    def _outcome(self, rewards_PGF: Tensor) -> Tensor:
        return join_outcomes(rewards_PGF, self.outcome_indices, self.trainer.reward_func_names)

    def observe(self, round: Round, output: dict[str, Any]) -> None:
        """Takes each round, and the batch that the trainer makes of it."""
        if not round.training:
            return
        start = time.perf_counter()
        outcome_PG = self._outcome(round.rewards_PGF)
        if self.metrics:
            self._log_batch(outcome_PG, round, output)
        if self.rank or self.update:
            self._capture(outcome_PG.flatten(), output)
        self.seconds += time.perf_counter() - start

    def _log_batch(self, outcome_PG: Tensor, round: Round, output: dict[str, Any]) -> None:
        for kind, groups_P in group_kinds(outcome_PG, self.success_threshold)._asdict().items():
            self._log(kind.removesuffix("_P"), groups_P.double().mean().item())
        for k, estimate in group_pass_at_k(outcome_PG, self.success_threshold).items():
            self._log(f"pass@{k}", estimate)
        mask, advantages = output["completion_mask"], output["advantages"]
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        effective, total = gather(torch.stack([(mask * (advantages != 0)).sum(), mask.sum()])).view(-1, 2).sum(dim=0)
        self._log("effective_tokens", (effective / total).item() if total > 0 else math.nan)
        size = self.trainer.num_generations
        if self.extract_answer is None or len(round.completion_ids) % size != 0:
            return  # a group is spread over ranks, so its answers are not all here
        texts = self.trainer.processing_class.batch_decode(round.completion_ids, skip_special_tokens=True)
        answers = [self.extract_answer(text) for text in texts]
        groups = [answers[i : i + size] for i in range(0, len(answers), size)]
        self._log("answer_entropy", float(np.mean([answer_entropy(group) for group in groups])))

    def _capture(self, outcome: Tensor, output: dict[str, Any]) -> None:
        prompt_ids, completion_ids = (
            [row[m.bool()].tolist() for row, m in zip(output[f"{part}_ids"], output[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")
        )
        completion_mask, old = output["completion_mask"].bool(), output.get("old_per_token_logps")
        if old is not None:
            logps = gather((old * completion_mask).double().sum(dim=1).float())
        else:
            logps = self._logps(prompt_ids, completion_ids)
        # A truncated completion may be masked completely: then it is not trained on
        correct = (outcome >= self.success_threshold) & gather(completion_mask.any(dim=1))
        if self.rank:
            groups = np.arange(len(correct)) // self.trainer.num_generations
            self._log("rank_by_policy", rank_of_correct(logps.cpu(), correct.cpu(), groups).value)
        if self.update:
            self._captured.append(_Captured(prompt_ids, completion_ids, correct, logps))

    def _logps(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
        """Summed log-probabilities under the current policy, of all ranks."""
        with undisturbed(self.trainer):
            rows, _ = token_logps(self.trainer, self.trainer.model, prompt_ids, completion_ids)
        return gather(torch.stack([row.sum().float() for row in rows]).to(self.trainer.accelerator.device))

    def after_update(self) -> None:
        """To be called after every update. Measures the batches after their last update."""
        every = self.trainer.args.steps_per_generation * self.trainer.num_iterations
        if not self._captured or self.trainer._step % every != 0:
            return
        start = time.perf_counter()
        captured, self._captured = self._captured, []
        for batch in captured:
            after = self._logps(batch.prompt_ids, batch.completion_ids).cpu()
            before, correct = batch.logps.cpu(), batch.correct.cpu()
            groups = np.arange(len(correct)) // self.trainer.num_generations
            self._log("displacement", likelihood_displacement(before, after, correct))
            for i, share in enumerate(uplift_by_rank(before, after, correct, groups), start=1):
                self._log(f"uplift_q{i}", share)
        self.seconds += time.perf_counter() - start
