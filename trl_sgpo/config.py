"""Configuration of [`SGPOTrainer`]: everything of GRPOConfig, and what the trainer itself decides."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig


JUDGE_SCOPES = ("failed_groups", "all_incorrect")
CREDIT_ASSIGNMENTS = ("sequence", "prefix")
FAILED_GROUPS = ("judge", "none", "sign", "ngrpo", "zvp", "lens")
FAILED_GROUP_SCHEDULES = ("constant", "failed_share")


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
            Factor on the judge's part of the advantages of rescued groups. 1 is the paper, 0 is GRPO. With another remedy
            in `failed_groups` it is the factor on that remedy's advantages (with `"zvp"`, ten times the alpha of
            RL-ZVP).
        credit_assignment (`str`, *optional*, defaults to `"sequence"`):
            Whom a verdict pays. `"sequence"`: every token of the completion alike, by Eq. 2, as in the paper. `"prefix"`:
            each token by what the verdict says of it. In a failed group the tokens before the first wrong step have the
            advantage `prefix_reward`, those of that step `-error_penalty`, and those behind it, which nobody judged, 0; no
            group normalisation is involved, so groups of equal scores teach too. A group with verdicts for fewer than half of its
            completions, or in which no completion has a right step, stays as GRPO leaves it. With
            `judge_scope="all_incorrect"`, the verified prefix of a wrong completion of a mixed group is spared GRPO's blame. The
            judge has no part in the rewards then: its column and `reward_weights` do not matter, and `reward` compares with a
            GRPO run's. Credit begins at the first judged step, so thinking has some only if `StepwiseJudge` is given
            `include_thinking=True`.
        prefix_reward (`float`, *optional*, defaults to `1.0`):
            Advantage of a token of the verified prefix, under `credit_assignment="prefix"`.
        error_penalty (`float`, *optional*, defaults to `0.5`):
            The tokens of the first wrong step have minus this as their advantage, under `credit_assignment="prefix"`.
        failed_groups (`str`, *optional*, defaults to `"judge"`):
            What is done with a failed group. `"judge"`: its completions are judged (without a [`StepwiseJudge`] in
            `reward_funcs` this is GRPO). `"none"`: nothing, which is GRPO; a judge in the list is not asked, so that one
            switch makes the control. The others are remedies that ask no judge either. Each adds its advantages to those
            that the rewards of a failed group give; all other groups keep GRPO's bit for bit, and `scale_rewards` and
            `reward_weights` do not reach it. It needs to know the outcome reward, and works during the whole run.

            - `"sign"` (NSR, arXiv 2506.01347): -1 for every wrong completion.
            - `"ngrpo"` (NGRPO, arXiv 2509.18851): the mean and the standard deviation are taken over the group's outcome
              rewards and one virtual success, so that G equal rewards have the advantage `-1 / sqrt(G + 1)`. The paper
              also clips asymmetrically: `epsilon=0.16` and `epsilon_high=0.24`, which are not set here.
            - `"zvp"` (RL-ZVP, arXiv 2509.21880): per token, minus a tenth of what the policy's entropy there lacks to the
              completion's largest one. Costs one more forward pass in rounds with a failed group.
            - `"lens"` (LENS, arXiv 2510.08696): the surer the policy was of a wrong completion, the lower its reward, which
              is then normalised inside the group. Costs one more forward pass in rounds with a failed group, unless TRL
              has the log-probabilities already.
        failed_group_schedule (`str`, *optional*, defaults to `"constant"`):
            Course of `failed_group_weight`. `"constant"`: as given. `"failed_share"`: multiplied by the share of failed
            groups among those of the generation round, which hands over to the outcome as groups stop failing. It has no
            memory, so a resumed run goes on exactly.
        exclude_dead_groups (`bool`, *optional*, defaults to `False`):
            Whether groups without any advantage are left out of what the loss divides by (AGPO, arXiv 2503.15952). TRL
            divides by the tokens or the rows of all groups, so with many dead ones the others take smaller steps, and a
            method that revives groups is credited with undoing that: this is the control to put beside every arm. The
            advantages of all other groups are multiplied by the whole denominator over theirs, counted over the generation
            round and all processes; KL and entropy terms stay as they are. Exact for the losses that divide by tokens
            (`"dapo"`, `"cispo"`, `"vespo"`), and for those that divide by rows (`"grpo"`, `"sapo"`, `"dr_grpo"`,
            `"luspo"`) with one update per round; with several, an update divides by its share of the round's live rows
            rather than by its own. An approximation for `"bnpo"` with several micro-batches or processes, of which each
            divides by its own tokens.
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
            "help": "Factor on the judge's part of the advantages of rescued groups, or on the advantages of the remedy "
            "that failed_groups names. 1 is the paper, 0 is GRPO."
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
    failed_groups: str = field(
        default="judge",
        metadata={
            "help": "What is done with a failed group: 'judge' (its completions are judged), 'none' (GRPO, no judge is "
            "asked), or a remedy without a judge: 'sign' (NSR), 'ngrpo', 'zvp' (RL-ZVP) or 'lens'.",
            "choices": list(FAILED_GROUPS),
        },
    )
    failed_group_schedule: str = field(
        default="constant",
        metadata={
            "help": "Course of failed_group_weight: 'constant', or 'failed_share' (multiplied by the share of failed "
            "groups in the generation round).",
            "choices": list(FAILED_GROUP_SCHEDULES),
        },
    )
    exclude_dead_groups: bool = field(
        default=False,
        metadata={
            "help": "Whether groups without any advantage are left out of the tokens or rows that the loss divides by."
        },
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
                "judge's part of the advantages, or a remedy's, and a negative one would reward what is wrong. Use 1 for "
                "the paper's setting."
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
        if self.failed_groups not in FAILED_GROUPS:
            raise ValueError(
                f"failed_groups={self.failed_groups!r} is unknown: it must be one of {list(FAILED_GROUPS)}. Use 'judge' for "
                "the paper's setting, and 'none' for GRPO."
            )
        if self.failed_group_schedule not in FAILED_GROUP_SCHEDULES:
            raise ValueError(
                f"failed_group_schedule={self.failed_group_schedule!r} is unknown: it must be one of "
                f"{list(FAILED_GROUP_SCHEDULES)}. Use 'constant' for the paper's setting."
            )
