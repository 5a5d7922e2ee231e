"""Outcome rewards and the judge for the samples of a probe: [`Scorer`]."""

import asyncio
import inspect
import math
import traceback
from typing import Any

from accelerate.utils import gather_object
from trl.trainer.utils import get_callable_name

from trl_sgpo.analysis.sharpening.probe import Sample, Stopwatch
from trl_sgpo.judges import StepwiseJudge
from trl_sgpo.policy import Policy


# What GRPOTrainer too leaves out of the columns, or replaces
NO_COLUMNS = ("prompt", "completion", "completion_ids", "trainer_state", "log_extra", "log_metric")


class ScoringError(RuntimeError):
    """A reward function or a judge has raised on some rank; all ranks know."""


class Scorer:
    """
    Says of each sample whether it is correct, and whether its steps are. There is one outcome reward for each task. A
    reward function sees no more than `batch_size` completions at once, as in training.
    """

    def __init__(
        self,
        trainer: Any,
        rows: list[dict[str, Any]],
        outcomes: list[Any],
        success_threshold: float,
        judge: StepwiseJudge | None,
        batch_size: int,
    ) -> None:
        self.trainer, self.rows, self.outcomes = trainer, rows, outcomes
        self.success_threshold, self.judge, self.batch_size = success_threshold, judge, batch_size

    def score(self, local: list[Sample], watch: Stopwatch) -> list[Sample]:
        """Scores this rank's samples, gathers those of all ranks. Raises `ScoringError` on every rank or on none."""
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
        return in_order([sample for samples, _ in gathered for sample in samples])

    def _score_outcomes(self, samples: list[Sample]) -> None:
        for start in range(0, len(samples), self.batch_size):
            piece = samples[start : start + self.batch_size]
            rows = [self.rows[sample.prompt_id] for sample in piece]
            columns = {name: [row[name] for row in rows] for name in rows[0] if name not in NO_COLUMNS}
            for sample in piece:
                sample.scored = sample.correct = False
            for outcome in self.outcomes:
                self._score_outcome(outcome, piece, rows, columns)

    def _score_outcome(
        self, outcome: Any, piece: list[Sample], rows: list[dict[str, Any]], columns: dict[str, list[Any]]
    ) -> None:
        """Scores by one outcome reward. A sample without a value belongs to another task."""
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
                    "rewards, each must return None for the rows of the other tasks."
                )
            sample.scored, sample.correct = True, bool(reward >= self.success_threshold)

    def _judge_steps(self, samples: list[Sample], judge: StepwiseJudge) -> None:
        solved = [sample for sample in samples if sample.correct]
        rows = [self.rows[sample.prompt_id] for sample in solved]
        for sample in samples:
            sample.process_correct = False
        decode = Policy(self.trainer, judge).decode
        scores = judge.score(
            [row["prompt"] for row in rows],
            [sample.completion for sample in solved],
            rows,
            known_wrong=False,
            decoded=[decode(sample.token_ids) for sample in solved],
        )
        for sample, score in zip(solved, scores, strict=True):
            sample.judged = score.status != "abstain"
            sample.process_correct = score.status == "no_error"


def in_order(samples: list[Sample]) -> list[Sample]:
    """By prompt, then by number."""
    return sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample))


def _nowhere(*args: Any, **kwargs: Any) -> None:
    """Takes what a reward function logs, because a probe's samples are no training metrics."""


async def _awaited(rewards: Any) -> Any:
    return await rewards
