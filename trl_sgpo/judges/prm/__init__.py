"""Judges with a process reward model: its layout, the token ids that it reads, and the verdict from its scores."""

from trl_sgpo.judges.prm.encoder import EncodedSteps, PRMEncoder
from trl_sgpo.judges.prm.judge import PRMJudge
from trl_sgpo.judges.prm.scores import (
    KNOWN_WRONG_RULES,
    Calibration,
    StepScorer,
    best_threshold,
    median_step,
    verdict_from_scores,
)
from trl_sgpo.judges.prm.spec import PRMSpec


__all__ = [
    "KNOWN_WRONG_RULES",
    "Calibration",
    "EncodedSteps",
    "PRMEncoder",
    "PRMJudge",
    "PRMSpec",
    "StepScorer",
    "best_threshold",
    "median_step",
    "verdict_from_scores",
]
