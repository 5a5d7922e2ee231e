"""Configuration of [`SGPOTrainer`]: everything of GRPOConfig, and what the trainer itself decides."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig


JUDGE_SCOPES = ("failed_groups", "all_incorrect")
CREDIT_ASSIGNMENTS = ("sequence", "prefix")


@dataclass
class SGPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`SGPOTrainer`].

    This class holds only the parameters that are specific to SGPO. For the full list of training arguments, see
    [`~trl.GRPOConfig`]; all of them keep their meaning and their default. In particular `beta` is still GRPO's KL
    coefficient: the `beta` and `gamma` of the paper's Eq. 2 are arguments of [`StepwiseJudge`].

    Parameters:
        outcome_reward (`str`, *optional*):
            Name of the reward function that says whether a completion is right or wrong, as it appears in the metric
            `rewards/<name>/mean`. With a single reward function beside the judge it is that one; with several it must
            be given.
        success_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct when its outcome reward reaches this value.
        judge_scope (`str`, *optional*, defaults to `"failed_groups"`):
            Which completions are judged. `"failed_groups"`: those of groups in which no completion is correct, as the
            paper ran it. `"all_incorrect"`: every wrong completion (Eq. 2 read literally; an ablation). Judged or not,
            a wrong completion never ends above a correct one of its group because of the judge.
        judge_until (`float`, *optional*, defaults to `1.0`):
            Judging stops after this fraction of the run's updates, in (0, 1]. The paper judged during 3 of 12 epochs,
            which is 0.25. It needs no dataset length, so it works with streaming data.
        min_rts_spread (`float`, *optional*, defaults to `0.0`):
            A failed group whose reasoning trajectory scores span less than this stays as GRPO leaves it, in [0, 1].
        failed_group_weight (`float`, *optional*, defaults to `1.0`):
            Factor on the judge's part of the advantages of rescued groups. 1 is the paper, 0 is GRPO.
        credit_assignment (`str`, *optional*, defaults to `"sequence"`):
            Whom a verdict pays. `"sequence"`: every token of the completion alike, by Eq. 2, as in the paper. `"prefix"`:
            each token by what the verdict says of it. In a failed group the tokens before the first wrong step have the
            advantage `prefix_reward`, those of that step `-error_penalty`, and those behind it, which nobody judged, 0; no
            group normalisation is involved, so tied groups teach too. With `judge_scope="all_incorrect"`, the verified
            prefix of a wrong completion of a mixed group is spared GRPO's blame.
        prefix_reward (`float`, *optional*, defaults to `1.0`):
            Advantage of a token of the verified prefix, under `credit_assignment="prefix"`.
        error_penalty (`float`, *optional*, defaults to `0.5`):
            The tokens of the first wrong step have minus this as their advantage, under `credit_assignment="prefix"`.
    """

    outcome_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that says whether a completion is right or wrong. With a single "
            "reward function beside the judge it is that one; with several it must be given."
        },
    )
    success_threshold: float = field(
        default=0.5,
        metadata={"help": "A completion is correct when its outcome reward reaches this value."},
    )
    judge_scope: str = field(
        default="failed_groups",
        metadata={
            "help": "Which completions are judged: 'failed_groups' (those of groups without any correct completion) "
            "or 'all_incorrect' (every wrong completion).",
            "choices": list(JUDGE_SCOPES),
        },
    )
    judge_until: float = field(
        default=1.0,
        metadata={
            "help": "Judging stops after this fraction of the run's updates, in (0, 1]. The paper's setting is 0.25."
        },
    )
    min_rts_spread: float = field(
        default=0.0,
        metadata={
            "help": "A failed group whose reasoning trajectory scores span less than this stays as GRPO leaves it, "
            "in [0, 1]."
        },
    )
    failed_group_weight: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the judge's part of the advantages of rescued groups. 1 is the paper, 0 is GRPO."
        },
    )
    credit_assignment: str = field(
        default="sequence",
        metadata={
            "help": "Whom a verdict pays: 'sequence' (every token of the completion alike, as in the paper) or 'prefix' "
            "(the tokens before the first wrong step are rewarded, those of that step blamed, the rest left alone).",
            "choices": list(CREDIT_ASSIGNMENTS),
        },
    )
    prefix_reward: float = field(
        default=1.0,
        metadata={"help": "Advantage of the tokens before the first wrong step, with credit_assignment='prefix'."},
    )
    error_penalty: float = field(
        default=0.5,
        metadata={"help": "Minus the advantage of the first wrong step's tokens, with credit_assignment='prefix'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.success_threshold):
            raise ValueError(
                "success_threshold=nan: no outcome reward can reach it, so every group would count as failed. Give "
                "the smallest outcome reward that means 'correct', for instance 0.5 for rewards in {0, 1}."
            )
        if self.judge_scope not in JUDGE_SCOPES:
            raise ValueError(
                f"judge_scope={self.judge_scope!r} is unknown: it must be one of {list(JUDGE_SCOPES)}. Use "
                "'failed_groups' for the paper's setting."
            )
        if not 0 < self.judge_until <= 1:
            raise ValueError(
                f"judge_until={self.judge_until} must lie in (0, 1]: it is the fraction of the run's updates during "
                "which the judge is asked. To train without a judge, leave `StepwiseJudge` out of `reward_funcs`."
            )
        if not 0 <= self.min_rts_spread <= 1:
            raise ValueError(
                f"min_rts_spread={self.min_rts_spread} must lie in [0, 1]: it is a difference of two reasoning "
                "trajectory scores, which are shares. Use 0 to rescue every failed group that is not tied."
            )
        if not (self.failed_group_weight >= 0 and math.isfinite(self.failed_group_weight)):
            raise ValueError(
                f"failed_group_weight={self.failed_group_weight} must be a finite number of at least 0: it scales the "
                "judge's part of the advantages, and a negative one would reward early errors. Use 1 for the paper's "
                "setting."
            )
        if self.credit_assignment not in CREDIT_ASSIGNMENTS:
            raise ValueError(
                f"credit_assignment={self.credit_assignment!r} is unknown: it must be one of {list(CREDIT_ASSIGNMENTS)}. "
                "Use 'sequence' for the paper's setting."
            )
        for name in ("prefix_reward", "error_penalty"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(
                    f"{name}={value} must be a finite number of at least 0: a negative one would blame what is right or "
                    "reward what is wrong. Use 0 to leave those tokens alone."
                )
