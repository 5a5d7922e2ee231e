"""
From right and wrong answers to numbers. Every average is over problems, each with the mean of its samples, and has a
95 % bootstrap interval over problems. Shapes: `_P` problems, `_N` samples of a problem.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_sgpo.analysis.metrics import Estimate, mean_estimate, pass_at_k, sign_flip_p, usual_ks


@dataclass(frozen=True)
class Answers:
    """The answers of one model to a benchmark, all of shape (P, N). `tokens_PN` is NaN where nobody counted, `found_PN` where nobody knows."""

    correct_PN: np.ndarray
    found_PN: np.ndarray
    tokens_PN: np.ndarray
    cut_PN: np.ndarray

    @property
    def rate_P(self) -> np.ndarray:
        return self.correct_PN.mean(axis=1)


def answers_of(lines: Sequence[dict[str, Any]]) -> Answers:
    """The answers in lines of `samples.jsonl`, in their order."""

    def column(name: str, kind: Any) -> np.ndarray:
        return np.array([line[name] for line in lines], dtype=kind)

    return Answers(column("correct", bool), column("found", float), column("tokens", float), column("cut", bool))


def summary(answers: Answers, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """
    The numbers of one model on one benchmark: accuracy (avg@n, or pass@1 of greedy answers), pass@k for the powers of two up
    to n, the shares of answers that were not found and that were cut off, and the mean length in tokens.
    """
    n_problems, n = answers.correct_PN.shape
    right_P = answers.correct_PN.sum(axis=1)
    how = {"n_resamples": resamples, "seed": seed}
    tokens = answers.tokens_PN[~np.isnan(answers.tokens_PN)]
    return {
        "accuracy": mean_estimate(answers.rate_P, **how),
        "pass_at_k": {str(k): mean_estimate(pass_at_k(n, right_P, k), **how) for k in usual_ks(n)},
        "no_answer": float(1 - answers.found_PN.mean()),
        "cut": float(answers.cut_PN.mean()),
        "tokens": float(tokens.mean()) if tokens.size else float("nan"),
        "problems": n_problems,
        "samples": n,
    }


def comparison(base: Answers, other: Answers, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """
    A model against the base on the same problems, in the same order: the difference of the accuracies with its interval, and
    the p-value of the sign-flip test. The difference is taken problem by problem, so that what is hard for both cancels.
    """
    difference_P = other.rate_P - base.rate_P
    estimate: Estimate = mean_estimate(difference_P, n_resamples=resamples, seed=seed)
    return {
        "difference": estimate,
        "p": sign_flip_p(difference_P, seed=seed),
        "better": int((difference_P > 0).sum()),
        "worse": int((difference_P < 0).sum()),
    }
