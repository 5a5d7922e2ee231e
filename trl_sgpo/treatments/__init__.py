"""
What is done with failed groups. Each method is a [`Treatment`]. `TREATMENTS` names the built-in ones for
`failed_groups` in YAML, and an own one is passed as `SGPOTrainer(..., treatment=...)`.
"""

import inspect
from copy import copy
from typing import TYPE_CHECKING

from trl_sgpo.policy import Policy
from trl_sgpo.rounds import Round
from trl_sgpo.treatments.base import NoTreatment, Treatment
from trl_sgpo.treatments.prefix import PrefixCredit
from trl_sgpo.treatments.sequence import SequenceReward
from trl_sgpo.treatments.without_judge import LENS, NGRPO, NSR, ZVP


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig
    from trl_sgpo.judges import StepwiseJudge


TREATMENTS: dict[str, type[Treatment]] = {
    treatment.name: treatment for treatment in (SequenceReward, PrefixCredit, NoTreatment, NSR, NGRPO, ZVP, LENS)
}
DEFAULT = SequenceReward.name

__all__ = [
    "LENS",
    "NGRPO",
    "NSR",
    "TREATMENTS",
    "ZVP",
    "NoTreatment",
    "Policy",
    "PrefixCredit",
    "Round",
    "SequenceReward",
    "Treatment",
]


def choose_treatment(
    treatment: Treatment | None, args: "SGPOConfig", judge: "StepwiseJudge | None"
) -> tuple[Treatment, str]:
    """
    The treatment of a run, the user's own or the one that the settings name, and the setting that chose it, as a
    message names it. `TypeError` if `treatment` is no instance of a [`Treatment`], `ValueError` if both name one, or
    it asks a judge that is not there.
    """
    if treatment is None:
        treatment, setting = TREATMENTS[args.failed_groups](), f"failed_groups={args.failed_groups!r}"
    else:
        setting = f"treatment={treatment!r}"
        if not isinstance(treatment, Treatment):
            instance = f", not the class: `treatment={treatment.__name__}()`" if inspect.isclass(treatment) else ""
            raise TypeError(
                f"{setting} is no treatment. Give an instance of a subclass of `trl_sgpo.treatments.Treatment`{instance}."
            )
        if args.failed_groups != DEFAULT:
            raise ValueError(
                f"{setting} and failed_groups={args.failed_groups!r} both say what is done with failed groups. Leave "
                f"failed_groups at its default, {DEFAULT!r}."
            )
    if treatment.asks_judge and judge is None and type(treatment) is not TREATMENTS[DEFAULT]:
        raise ValueError(
            f"{setting} asks a judge, and reward_funcs holds no StepwiseJudge. Put one into the list: "
            "`reward_funcs=[accuracy_reward, StepwiseJudge(judge)]`."
        )
    return copy(treatment), setting  # what it keeps of the settings is this trainer's
