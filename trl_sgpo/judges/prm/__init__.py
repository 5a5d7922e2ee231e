"""
Judges with a process reward model: the layout of the model ([`PRMSpec`]), the token ids that it reads
([`PRMEncoder`]), the verdict from its scores ([`verdict_from_scores`]), and the judge that runs it in this process
([`PRMJudge`]).
"""

from trl_sgpo.judges.prm.encoder import EncodedSteps, PRMEncoder
from trl_sgpo.judges.prm.judge import PRMJudge
from trl_sgpo.judges.prm.scores import (
    KNOWN_WRONG_RULES,
    Calibration,
    StepScorer,
    best_threshold,
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
    "verdict_from_scores",
]
