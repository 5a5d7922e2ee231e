"""Configuration of [`SGPOTrainer`]: everything of GRPOConfig, and what the trainer itself decides."""

import math
from dataclasses import dataclass, field, fields
from typing import cast

from trl import GRPOConfig

from trl_sgpo.treatments import TREATMENTS


JUDGE_SCOPES = ("failed_groups", "all_incorrect")
PREFIX_BASELINES = ("none", "group")
RTS_SHARES = ("completion", "longest")


@dataclass
class SGPOConfig(GRPOConfig):
    """
    Configuration class for the [`SGPOTrainer`].

    This class holds only the parameters that are specific to SGPO. For the full list of training arguments, see
    [`~trl.GRPOConfig`]; all of them keep their meaning and their default. In particular `beta` is still GRPO's KL
    coefficient: the `beta` and `gamma` of the paper's Eq. 2 are arguments of [`StepwiseJudge`].

    Parameters:
        failed_groups (`str`, *optional*, defaults to `"sgpo"`):
            What is done with a failed group. An own [`~trl_sgpo.treatments.Treatment`] is an argument of the trainer
            instead. All other groups keep GRPO's advantages bit for bit, unless `judge_scope="all_incorrect"` or
            `exclude_dead_groups` says otherwise.

            With a judge, a [`StepwiseJudge`] in `reward_funcs`:

            - `"sgpo"`: each completion gets one reward, that of its correct prefix (Eq. 2, as in the paper). Without a
              judge in the list this is GRPO.
            - `"prefix"`: each token gets its own advantage: `prefix_reward` before the first wrong step,
              `-error_penalty` in that step, and 0 after it and in steps that the judge did not check, because nobody
              judged that. There is no group normalisation (but see `prefix_baseline`), so groups of equal scores
              teach too. A group with verdicts for fewer than half of its completions, or in which no completion has a
              right step, stays as GRPO leaves it. With `judge_scope="all_incorrect"`, the verified prefix of a wrong completion of a mixed group is
              spared GRPO's blame. `reward_weights` of the judge does not matter. Thinking has credit only if
              `StepwiseJudge` is given `include_thinking=True`.

            Without a judge. One in the list is not asked, so that one switch makes the control:

            - `"none"`: nothing, which is GRPO.
            - `"nsr"` (NSR, arXiv 2506.01347): -1 for every wrong completion.
            - `"ngrpo"` (NGRPO, arXiv 2509.18851): mean and standard deviation are taken over the group's outcome
              rewards and one virtual success, so that G equal rewards have the advantage `-1 / sqrt(G + 1)`. The
              paper's asymmetric clipping, `epsilon=0.16` and `epsilon_high=0.24`, is not set here.
            - `"zvp"` (RL-ZVP, arXiv 2509.21880): per token, minus a tenth of what the policy's entropy there lacks to
              the completion's largest one. Costs one more forward pass in rounds with a failed group.
            - `"lens"` (LENS, arXiv 2510.08696): the surer the policy was of a wrong completion, the lower its reward,
              which is then normalised inside the group. Costs one more forward pass in rounds with a failed group,
              unless TRL has the log-probabilities already.

            These add their advantages to those that the rewards of a failed group give. `scale_rewards` and
            `reward_weights` do not reach them, and they work during the whole run.
        outcome_reward (`str` or `list[str]`, *optional*):
            Name of the reward function that says whether a completion is right or wrong, as in the metric
            `rewards/<name>/mean`. It must be given if there are several reward functions beside the judge. A run with
            several tasks gives several names: each function returns None for the rows of the other tasks, and the
            outcome of a row is the one that is not None. The rewards of environments are found together.
        success_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct when its outcome reward reaches this value.
        judge_scope (`str`, *optional*, defaults to `"failed_groups"`):
            Which completions are judged. `"failed_groups"`: those of groups in which no completion is correct, as the
            paper ran it. `"all_incorrect"`: every wrong completion (Eq. 2 read literally; an ablation). A wrong
            completion never ends above a correct one of its group because of the judge.
        judge_until (`float`, *optional*, defaults to `1.0`):
            Judging stops after this fraction of the run's updates, in (0, 1]. The paper judged during 3 of 12 epochs,
            which is 0.25. It needs no dataset length, so it works with streaming data.
        failed_group_weight (`float`, *optional*, defaults to `1.0`):
            Factor on what `failed_groups` gives a failed group: with `"sgpo"` on the judge's part of its advantages,
            with the others on the advantages that they add (with `"zvp"` it is ten times the alpha of RL-ZVP). 1 is
            the paper.
        rts_share_of (`str`, *optional*, defaults to `"completion"`):
            What the RTS in Eq. 2 is a share of, under `failed_groups="sgpo"`. `"completion"`: the completion itself, as
            in the paper. Then stopping early raises the reward: three right steps and a wrong answer have 3/4, three
            right steps of six have 3/6. `"longest"`: the longest completion of the group with a verdict, so that both
            have 3/6. What is logged as RTS stays a share of the completion itself.
        prefix_reward (`float`, *optional*, defaults to `1.0`):
            Advantage of the tokens of the verified prefix, under `failed_groups="prefix"`.
        error_penalty (`float`, *optional*):
            Minus the advantage of the tokens of the first wrong step, under `failed_groups="prefix"`. Defaults to 0.5, and
            to 1 for the centred credit of `prefix_baseline="group"`.
        prefix_baseline (`str`, *optional*, defaults to `"none"`):
            What the credit of `failed_groups="prefix"` is compared with. `"none"`: nothing. `"group"`: the completions
            of the group that are right up to where a step starts, of which a share p gets it right. A right step gets
            `prefix_reward * (1 - p)`, the first wrong one `-error_penalty * p`, so a step that all or none get right
            teaches nothing. A failed group in which all get equally far is tied. With `judge_scope="all_incorrect"` the
            right completions of a mixed group count as right in every step. The wrong ones get this credit in the place
            of GRPO's blame, if at least half of them have a verdict.
        exclude_dead_groups (`bool`, *optional*, defaults to `False`):
            Whether groups without any advantage are left out of what the loss divides by (AGPO, arXiv 2503.15952). TRL
            divides by the tokens or rows of all groups. With many dead groups the others then take smaller steps, and
            a method that revives groups is credited with undoing that: this is the control to put beside every method.
            The advantages of all other groups are multiplied by the whole denominator over theirs, counted over the
            generation round and all processes. KL and entropy terms stay as they are. It is exact for the losses that
            divide by tokens (`"dapo"`, `"cispo"`, `"vespo"`), and with one update per round for those that divide by
            rows (`"grpo"`, `"sapo"`, `"dr_grpo"`, `"luspo"`). With several, an update divides by its share of the
            round's live rows instead of by its own. It is an approximation for `"bnpo"` with several micro-batches or
            processes, because each divides by its own tokens.
        skip_dead_tokens (`bool`, *optional*, defaults to `False`):
            Whether forward and backward passes leave out what has no credit: completions without an advantage, tokens
            after the last one with an advantage, and padding that all rows of a batch share. An update costs less
            where groups are dead. The gradient is the same up to rounding, and up to what dropout draws. The metrics
            `entropy` and `clip_ratio/*` speak of the tokens that are left. It needs a run without KL term, entropy
            bonus, entropy quantile and router loss. With `loss_type="vespo"`, `importance_sampling_level="sequence"`
            or `off_policy_mask_threshold` only whole completions and padding are left out, because there one token's
            loss depends on the others of its completion. Padding stays where the model would tell the difference.
        skip_dead_updates (`bool`, *optional*, defaults to `False`):
            Whether an update in which no token of any process has credit leaves the weights as they are. Without it
            the optimizer's momentum and weight decay still move them. The learning rate's schedule and the count of
            steps go on. It needs a run without KL term, entropy bonus, router loss and DeepSpeed. The optimizer must
            not step inside the backward pass, as LOMO and layer-wise ones do. The metric `sgpo/dead_updates` is the
            share of such updates, with or without this option.

            Both options set the rounding residue in groups of equal rewards to exactly 0.
    """

    failed_groups: str = field(
        default="sgpo",
        metadata={
            "help": "What is done with a failed group: 'sgpo' (one reward per completion, that of its correct prefix) or 'prefix' "
            "(credit per token), both with a judge; 'none' (GRPO), 'nsr', 'ngrpo', 'zvp' (RL-ZVP) or 'lens', all without one.",
            "choices": list(TREATMENTS),
        },
    )
    # The order of the types lets one name stand on a command line; a list stands in YAML or Python
    outcome_reward: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that says whether a completion is right or wrong. With a single "
            "reward function beside the judge it is that one; with several it must be given. A run with several tasks "
            "gives a list of names, in YAML or Python."
        },
    )
    success_threshold: float = field(
        default=0.5, metadata={"help": "A completion is correct when its outcome reward reaches this value."}
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
    failed_group_weight: float = field(
        default=1.0, metadata={"help": "Factor on what failed_groups gives a failed group. 1 is the paper."}
    )
    rts_share_of: str = field(
        default="completion",
        metadata={
            "help": "What the score in a reward is a share of, with failed_groups='sgpo': 'completion' (itself, as in the paper) "
            "or 'longest' (the longest completion of its group with a verdict, so that stopping early does not pay).",
            "choices": list(RTS_SHARES),
        },
    )
    prefix_reward: float = field(
        default=1.0,
        metadata={"help": "Advantage of the tokens before the first wrong step, with failed_groups='prefix'."},
    )
    error_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Minus the advantage of the first wrong step's tokens, with failed_groups='prefix'. Defaults to 0.5, and to 1 "
            "for the centred credit of prefix_baseline='group'."
        },
    )
    prefix_baseline: str = field(
        default="none",
        metadata={
            "help": "What the credit of failed_groups='prefix' is compared with: 'none' (nothing) or 'group' (how many of "
            "its completions get a step right).",
            "choices": list(PREFIX_BASELINES),
        },
    )
    exclude_dead_groups: bool = field(
        default=False,
        metadata={
            "help": "Whether groups without any advantage are left out of the tokens or rows that the loss divides by."
        },
    )
    skip_dead_tokens: bool = field(
        default=False,
        metadata={
            "help": "Whether no compute is spent on completions and tokens without credit. Same gradient, less time."
        },
    )
    skip_dead_updates: bool = field(
        default=False,
        metadata={
            "help": "Whether an update in which no token has credit leaves the weights as they are, in spite of momentum."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


def _check(args: SGPOConfig) -> None:
    """Raises for values out of their range."""
    if math.isnan(args.success_threshold):
        raise ValueError(
            "success_threshold=nan: no outcome reward can reach it, so every group would count as failed. Give "
            "the smallest outcome reward that means 'correct', for instance 0.5 for rewards in {0, 1}."
        )
    if args.judge_scope not in JUDGE_SCOPES:
        raise ValueError(
            f"judge_scope={args.judge_scope!r} is unknown: it must be one of {list(JUDGE_SCOPES)}. Use "
            "'failed_groups' for the paper's setting."
        )
    if not 0 < args.judge_until <= 1:
        raise ValueError(
            f"judge_until={args.judge_until} must lie in (0, 1]: it is the fraction of the run's updates during "
            "which the judge is asked. To train without a judge, leave `StepwiseJudge` out of `reward_funcs`."
        )
    tokens = "a negative one would blame what is right or reward what is wrong. Use 0 to leave those tokens alone."
    for name, why in {
        "failed_group_weight": "it scales what failed groups are given, and a negative one would reward what is "
        "wrong. Use 1 for the paper's setting.",
        "prefix_reward": tokens,
        "error_penalty": tokens,
    }.items():
        value = getattr(args, name)
        if (name, value) != ("error_penalty", None) and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be a finite number of at least 0: {why}")
    if args.prefix_baseline not in PREFIX_BASELINES:
        raise ValueError(
            f"prefix_baseline={args.prefix_baseline!r} is unknown: it must be one of {list(PREFIX_BASELINES)}. Use 'none' for "
            "credit that does not depend on the group."
        )
    if args.rts_share_of not in RTS_SHARES:
        raise ValueError(
            f"rts_share_of={args.rts_share_of!r} is unknown: it must be one of {list(RTS_SHARES)}. Use 'completion' for "
            "the paper's setting."
        )
    if args.failed_groups not in TREATMENTS:
        raise ValueError(
            f"failed_groups={args.failed_groups!r} is unknown: it must be one of {list(TREATMENTS)}. Use 'sgpo' for "
            "the paper's setting, and 'none' for GRPO. An own treatment is passed as `SGPOTrainer(..., treatment=...)`."
        )


def with_own_fields(args: GRPOConfig) -> SGPOConfig:
    """A plain GRPOConfig has none of SGPO's fields: gives it those that it lacks, at their defaults, and returns it."""
    for own in fields(SGPOConfig):
        if own.name not in GRPOConfig.__dataclass_fields__ and not hasattr(args, own.name):
            setattr(args, own.name, own.default)
    settings = cast(SGPOConfig, args)
    _check(settings)  # attributes may have been set after the config was made
    return settings
