"""
[`SGPOTrainer`]: GRPOTrainer whose failed groups are judged step by step. Wiring only: the method is in `groups.py`, the
judging in `judges/`.

It hooks into TRL at one place, `_calculate_rewards`, which returns the gathered matrix of rewards: super fills it with
the judge's column left empty, this class fills that column. Nothing of TRL is copied. `_generate_and_score_completions`
is wrapped for what comes after super has made the advantages: where the judge's part of them has to be scaled
(`failed_group_weight`, abstentions), it is scaled; where credit goes to tokens, it is added per token (`credit.py`); where
failed groups have a remedy without a judge, its advantages are added (`remedies.py`); where dead groups are not to count,
the others' advantages make up for them.
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from accelerate.utils import gather
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_callable_name, get_config_model_id

import trl_sgpo
from trl_sgpo.analysis.metrics import pass_at_k
from trl_sgpo.config import SGPOConfig
from trl_sgpo.credit import StepTokens, locate_steps, prefix_credit
from trl_sgpo.groups import (
    CreditedGroups,
    GroupKinds,
    JudgedGroups,
    blend_advantages,
    credited_groups,
    fill_failed_groups,
    fill_mixed_groups,
    group_advantages,
    group_kinds,
    value_range,
    weighted_sum,
)
from trl_sgpo.judges import StepwiseJudge
from trl_sgpo.judges.stepwise import REWARD_NAME, StepScore
from trl_sgpo.remedies import (
    exclusion_factor,
    lens_advantages,
    ngrpo_advantages,
    sequence_likelihood,
    sign_advantages,
    zvp_advantages,
)
from trl_sgpo.versions import check_trl_version


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc


logger = logging.getLogger(__name__)

_STATUSES = ("error", "no_error", "abstain")

# Columns of the completions table and of its parquet file
_TABLE_COLUMNS = ("first_error", "n_steps", "rts", "verdict", "verdict_reason")

# By what each of TRL's losses divides
_LOSS_DENOMINATORS = {
    **dict.fromkeys(("dapo", "cispo", "vespo", "bnpo"), "tokens"),
    **dict.fromkeys(("grpo", "sapo", "dr_grpo", "luspo"), "rows"),
}

# What a model that reads images takes beside the ids, under the names that TRL gives it in a batch
_MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class _GatheredScores(NamedTuple):
    """The scores of all ranks, each of shape `(P * G,)` and NaN for completions that were not judged."""

    rts: Tensor
    rts_steps: Tensor
    rts_characters: Tensor
    n_steps: Tensor
    status: Tensor  # index in `_STATUSES`
    called: Tensor  # 1 if the judge was asked
    seconds: Tensor  # that the rank of this completion spent judging; never NaN


@dataclass
class _VerdictsOfRound:
    """What `_calculate_rewards` tells the wrapper about this rank's completions, where credit goes to tokens."""

    scores: list[StepScore | None]
    in_failed_group_B: Tensor
    in_rescued_group_B: Tensor
    completion_ids: list[list[int]]
    weight: float


@dataclass
class _AdvantageScaling:
    """What `_calculate_rewards` tells the wrapper of `_generate_and_score_completions` about the round at hand."""

    without_judge_PG: Tensor
    factor_P: Tensor


@dataclass
class _FailedGroups:
    """What `_calculate_rewards` tells the wrapper about the failed groups of all ranks, where they have a remedy."""

    outcome_PG: Tensor  # NaN outside failed groups
    weight: float


def _empty_judge_column(prompts: list, **kwargs: Any) -> list[None]:
    """Stands where the judge stands while super computes the other rewards."""
    return [None] * len(prompts)


_empty_judge_column.__name__ = REWARD_NAME


def _reward_name(reward_func: Any) -> str:
    """The name under which GRPOTrainer will log a reward function that it has not seen yet."""
    if isinstance(reward_func, str):
        return reward_func.split("/")[-1]
    if isinstance(reward_func, nn.Module):
        return get_config_model_id(cast(PreTrainedConfig, reward_func.config)).split("/")[-1]
    return get_callable_name(reward_func)


def _find_outcome(
    names: list[str], judge_index: int | None, outcome_reward: str | None, remedy: str | None = None
) -> int | None:
    """
    The index of the outcome reward; `None` if there is neither a judge nor a remedy and nothing says which one it is.

    Raises:
        ValueError: If it cannot be told which reward says right or wrong.
    """
    candidates = [i for i in range(len(names)) if i != judge_index]
    listed = ", ".join(repr(names[i]) for i in candidates)
    if outcome_reward is not None:
        matches = [i for i in candidates if names[i] == outcome_reward]
        if len(matches) != 1:
            problem = "is not the name of a reward function" if not matches else "is the name of several"
            raise ValueError(
                f"outcome_reward={outcome_reward!r} {problem}. The reward functions are: {listed or 'none'}. Give the "
                "name of the one that says whether a completion is right or wrong."
            )
        return matches[0]
    if len(candidates) == 1:
        return candidates[0]
    if judge_index is None and remedy is None:
        return None
    if judge_index is None and not candidates:
        raise ValueError(
            f"failed_groups={remedy!r} is a remedy for groups whose completions are all wrong, and there is no reward "
            "function that says right or wrong: `reward_funcs=[accuracy_reward]`."
        )
    if judge_index is None:
        raise ValueError(
            f"failed_groups={remedy!r} is a remedy for groups whose completions are all wrong. reward_funcs holds several "
            f"reward functions ({listed}), and outcome_reward is not set. Name the one that says whether a completion is "
            f"right or wrong: `SGPOConfig(outcome_reward={names[candidates[0]]!r})`."
        )
    if not candidates:
        raise ValueError(
            "reward_funcs holds a StepwiseJudge and no outcome reward. A group is judged when its completions are all "
            "wrong, so something has to say right or wrong: `reward_funcs=[accuracy_reward, StepwiseJudge(judge)]`."
        )
    raise ValueError(
        f"reward_funcs holds several reward functions beside the judge ({listed}), and outcome_reward is not set. Name "
        f"the one that says whether a completion is right or wrong: `SGPOConfig(outcome_reward={names[candidates[0]]!r})`."
    )


def _warn_of_what_ties_tokens(args: GRPOConfig, setting: str) -> None:
    """Warns of options of TRL that are made for one advantage per completion, for a setting that gives each token its own."""
    if args.importance_sampling_level != "token":
        warnings.warn(
            f"importance_sampling_level={args.importance_sampling_level!r} ties the tokens of a completion to one ratio, so the "
            f"gradient of one token's advantage reaches all of them, and {setting} no longer tells the tokens apart. Use "
            "importance_sampling_level='token'.",
            UserWarning,
            stacklevel=4,
        )
    if args.off_policy_mask_threshold is not None:
        warnings.warn(
            f"off_policy_mask_threshold={args.off_policy_mask_threshold} drops off-policy completions unless their advantage is "
            f"positive. With {setting} it goes by the advantage of each token, so of such a completion the blame is dropped and "
            "the reward kept. Leave it out.",
            UserWarning,
            stacklevel=4,
        )


class SGPOTrainer(GRPOTrainer):
    """
    Trainer for Stepwise Guided Policy Optimization (SGPO), introduced in [Stepwise Guided Policy Optimization: Coloring
    your Incorrect Reasoning in GRPO](https://huggingface.co/papers/2505.11595).

    GRPO learns nothing from a group of completions that are all wrong. Here a step-wise judge finds the first wrong step
    of each completion of such a group, and the correct prefix is rewarded. Groups with a correct completion keep GRPO's
    advantages bit for bit, and without a [`StepwiseJudge`] in `reward_funcs` this *is* [`~trl.GRPOTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_sgpo import SGPOConfig, SGPOTrainer, StepwiseJudge


    def judge(problem, steps, **row):  # the 0-based index of the first wrong step, or None
        ...


    trainer = SGPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=[accuracy_reward, StepwiseJudge(judge)],
        args=SGPOConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`], in the same order. `reward_funcs` may hold one [`StepwiseJudge`]; the list is
            not changed. `args` may be a [`SGPOConfig`], or a plain [`~trl.GRPOConfig`], which means the defaults.

    Raises:
        ValueError: If the installed TRL is not supported, `reward_funcs` holds two judges, a judge without an outcome
            reward, or several candidates for it with `args.outcome_reward` not set; if `args.outcome_reward` is unknown;
            if the judge's reward weight is negative; if, with `credit_assignment="sequence"`, `args.failed_group_weight`,
            `args.failed_group_schedule` or `judge_scope="all_incorrect"` is combined with
            `multi_objective_aggregation="normalize_then_sum"`; if `args.failed_groups` names a remedy and it cannot be told
            which reward is the outcome; if `args.exclude_dead_groups` is combined with a loss whose denominator is unknown.
    """

    _tag_names = ["trl", "sgpo"]
    _name = "SGPO"
    _paper = {
        "title": "Stepwise Guided Policy Optimization: Coloring your Incorrect Reasoning in GRPO",
        "id": "2505.11595",
        # docstyle-ignore
        "citation": (
            "@article{chen2026stepwise,\n"
            "    title        = {{Stepwise Guided Policy Optimization: Coloring your Incorrect Reasoning in GRPO}},\n"
            "    author       = {Peter Chen and Xiaopeng Li and Ziniu Li and Xi Chen and Tianyi Lin},\n"
            "    journal      = {Transactions on Machine Learning Research},\n"
            "    year         = 2026,\n"
            "    eprint       = {arXiv:2505.11595},\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,
        args: GRPOConfig | None = None,
        train_dataset: "Dataset | IterableDataset | None" = None,
        eval_dataset: "Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: "RolloutFunc | None" = None,
        environment_factory: "EnvironmentFactory | dict[str, EnvironmentFactory] | None" = None,
    ) -> None:
        check_trl_version()
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SGPOConfig(f"{model_id.split('/')[-1]}-SGPO")

        # A list of our own: TRL writes into the one it is given
        if reward_funcs is None:
            reward_funcs = []
        funcs: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        judge_indices = [i for i, func in enumerate(funcs) if isinstance(func, StepwiseJudge)]
        if len(judge_indices) > 1:
            raise ValueError(
                f"reward_funcs holds {len(judge_indices)} StepwiseJudges, at the positions {judge_indices}, and a group "
                "can be judged by one. To combine judges, combine them inside one `StepwiseJudge`."
            )
        self.stepwise_judge: StepwiseJudge | None = None
        self._judge_index: int | None = None
        if judge_indices:
            self._judge_index = judge_indices[0]
            self.stepwise_judge = funcs[self._judge_index]
            funcs[self._judge_index] = _empty_judge_column

        # A plain GRPOConfig has none of these fields: the class attributes of SGPOConfig are the defaults
        self.success_threshold = getattr(args, "success_threshold", SGPOConfig.success_threshold)
        self.judge_scope = getattr(args, "judge_scope", SGPOConfig.judge_scope)
        self.judge_until = getattr(args, "judge_until", SGPOConfig.judge_until)
        self.min_rts_spread = getattr(args, "min_rts_spread", SGPOConfig.min_rts_spread)
        self.failed_group_weight = getattr(args, "failed_group_weight", SGPOConfig.failed_group_weight)
        self.credit_assignment = getattr(args, "credit_assignment", SGPOConfig.credit_assignment)
        self.prefix_reward = getattr(args, "prefix_reward", SGPOConfig.prefix_reward)
        self.error_penalty = getattr(args, "error_penalty", SGPOConfig.error_penalty)
        self.failed_groups = getattr(args, "failed_groups", SGPOConfig.failed_groups)
        self.failed_group_schedule = getattr(args, "failed_group_schedule", SGPOConfig.failed_group_schedule)
        self.exclude_dead_groups = getattr(args, "exclude_dead_groups", SGPOConfig.exclude_dead_groups)
        outcome_reward = getattr(args, "outcome_reward", SGPOConfig.outcome_reward)
        self._remedy = None if self.failed_groups in ("judge", "none") else self.failed_groups
        if environment_factory is None:  # before any weight is loaded, where the names are known
            names = [_reward_name(func) for func in funcs]
            _find_outcome(names, self._judge_index, outcome_reward, self._remedy)
        if self._judge_index is not None and self.failed_groups == "judge":
            self._check_judge_settings(args, self._judge_index)
        elif self._judge_index is not None:
            ignored = ("judge_scope", "judge_until", "min_rts_spread", "credit_assignment")
            logger.info(
                "failed_groups=%r: the StepwiseJudge in reward_funcs is not asked, so %s have no effect.",
                self.failed_groups,
                ", ".join(ignored),
            )
        self._check_remedy_settings(args)

        super().__init__(
            model,
            funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            tools,
            rollout_func,
            environment_factory,
        )

        # Environments have appended reward columns of their own by now
        self._outcome_index = _find_outcome(self.reward_func_names, self._judge_index, outcome_reward, self._remedy)
        self._advantage_scaling: _AdvantageScaling | None = None
        self._verdicts: _VerdictsOfRound | None = None
        self._groups_to_remedy: _FailedGroups | None = None
        self._flat_P: Tensor | None = None
        self._mode_of_round: str | None = None
        self._judge_seconds = 0.0
        self._silent_rounds = 0
        self._truncation_warned = False
        self._rollout_warned = False
        self._table_described = False

    def _check_judge_settings(self, args: GRPOConfig, judge_index: int) -> None:
        """Raises for settings under which the judge cannot work, warns of those under which it works badly."""
        weights = args.reward_weights
        if weights is not None and judge_index < len(weights) and weights[judge_index] < 0:
            raise ValueError(
                f"reward_weights={weights} gives the judge a negative weight, which would reward early errors. Give it "
                "a weight of at least 0."
            )
        if self.credit_assignment == "prefix":
            _warn_of_what_ties_tokens(args, "credit_assignment='prefix'")
            return  # the judge has no part in the rewards, so it does not matter how these are put together
        if args.multi_objective_aggregation == "normalize_then_sum":
            if self.failed_group_schedule != "constant":
                raise ValueError(
                    f"failed_group_schedule={self.failed_group_schedule!r} cannot be combined with "
                    "multi_objective_aggregation='normalize_then_sum': there the judge's part of an advantage cannot be "
                    "told from the rest. Use 'sum_then_normalize', or failed_group_schedule='constant'."
                )
            if self.failed_group_weight != 1:
                raise ValueError(
                    f"failed_group_weight={self.failed_group_weight} cannot be combined with "
                    "multi_objective_aggregation='normalize_then_sum': there the judge's part of an advantage cannot be "
                    "told from the rest. Use 'sum_then_normalize', or scale the judge with `reward_weights`."
                )
            if self.judge_scope == "all_incorrect":
                raise ValueError(
                    "judge_scope='all_incorrect' cannot be combined with multi_objective_aggregation="
                    "'normalize_then_sum': each reward is normalised by itself there, so the judge could lift a wrong "
                    "completion above a correct one. Use 'sum_then_normalize', or judge_scope='failed_groups'."
                )
            warnings.warn(
                "multi_objective_aggregation='normalize_then_sum' normalises over the whole batch, so judged groups "
                "shift the advantages of all others, and mixed groups do not keep GRPO's. Use 'sum_then_normalize'.",
                UserWarning,
                stacklevel=3,
            )
        elif args.scale_rewards == "batch":
            warnings.warn(
                "scale_rewards='batch' divides by the standard deviation of the whole batch, so judged groups shift the "
                "advantages of all others, and mixed groups do not keep GRPO's. Use 'group' or 'none'.",
                UserWarning,
                stacklevel=3,
            )

    def _check_remedy_settings(self, args: GRPOConfig) -> None:
        """Raises for settings under which what is done without a judge cannot work, warns where it works badly."""
        if self._remedy == "zvp":
            _warn_of_what_ties_tokens(args, "failed_groups='zvp'")
        if self.exclude_dead_groups and args.loss_type not in _LOSS_DENOMINATORS:
            raise ValueError(
                f"exclude_dead_groups=True cannot be combined with loss_type={args.loss_type!r}: it is not known what that "
                f"loss divides by. Use one of {sorted(_LOSS_DENOMINATORS)}, or leave exclude_dead_groups out."
            )

    @property
    def _mode(self) -> str:
        """As TRL takes it, before it generates: some ways of generating leave the model in training mode."""
        if self._mode_of_round is not None:
            return self._mode_of_round
        return "train" if self.model is not None and self.model.training else "eval"

    @property
    def _active_judge(self) -> StepwiseJudge | None:
        """The judge, if it is to be asked now: in training only, and only until its share of the run is over."""
        if self.failed_groups != "judge":
            return None
        last_update = math.ceil(self.judge_until * self.state.max_steps - 1e-9)  # 0.7 * 10 is a little more than 7
        return self.stepwise_judge if self._mode == "train" and self.state.global_step < last_update else None

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # One matrix on every rank, with the rows of a group next to each other: all ranks decide alike, without asking
        group_size = cast(int, self.num_generations if self._mode == "train" else self.num_generations_eval)
        if self._outcome_index is not None:
            outcome_PG = rewards_per_func[:, self._outcome_index].view(-1, group_size)
            kinds = group_kinds(outcome_PG, self.success_threshold)
            self._log_groups(outcome_PG, kinds)
            self._judge_round(rewards_per_func, outcome_PG, kinds, inputs, prompts, completions, completion_ids_list)
            if self._remedy is not None and self._mode == "train" and kinds.failed_P.any():
                failed_outcome_PG = outcome_PG.masked_fill(~kinds.failed_P.unsqueeze(1), torch.nan)
                self._groups_to_remedy = _FailedGroups(failed_outcome_PG, self._weight_of_round(kinds))
            if self.log_completions and not self._table_described:
                self._describe_table(self.reward_func_names[self._outcome_index])
        if self.exclude_dead_groups and self._mode == "train":
            self._flat_P = self._groups_of_equal_rewards(rewards_per_func, group_size)
        return rewards_per_func

    def _judge_round(
        self,
        rewards_per_func: Tensor,
        outcome_PG: Tensor,
        kinds: GroupKinds,
        inputs: list[dict],
        prompts: list,
        completions: list,
        completion_ids_list: list,
    ) -> None:
        """Has the judge asked about the completions of all ranks, if it is to be asked, and fills in its column."""
        group_size = outcome_PG.shape[1]
        scores: list[StepScore | None] = [None] * len(prompts)
        judge = self._active_judge
        to_judge_PG = torch.zeros_like(outcome_PG, dtype=torch.bool)
        if judge is not None:
            judged_P = kinds.failed_P | kinds.mixed_P if self.judge_scope == "all_incorrect" else kinds.failed_P
            to_judge_PG = (outcome_PG < self.success_threshold) & judged_P.unsqueeze(1)
        if judge is not None and to_judge_PG.any():
            first = self.accelerator.process_index * len(prompts)
            local = to_judge_PG.flatten()[first : first + len(prompts)].nonzero().flatten().tolist()
            scores = self._judge(judge, local, inputs, prompts, completions)
            self._warn_of_truncated([completion_ids_list[i] for i in local])
            gathered = self._gather_scores(judge, scores)
            rts_PG = gathered.rts.view_as(outcome_PG)
            rewards_PGF = rewards_per_func.view(*outcome_PG.shape, -1)
            # The judge's column is empty so far
            others_PG = weighted_sum(rewards_PGF, self.reward_weights.to(rewards_per_func.device))
            groups: JudgedGroups | CreditedGroups
            if self.credit_assignment == "prefix":
                # The column stays empty: the judge has no part in any group's rewards, and its verdicts pay tokens
                groups = credited_groups(outcome_PG, rts_PG, kinds.failed_P, self.min_rts_spread)
                in_failed_N, in_rescued_N = (
                    flag_P.repeat_interleave(group_size)[first : first + len(prompts)]
                    for flag_P in (kinds.failed_P, groups.rescued_P)
                )
                weight = self._weight_of_round(kinds)
                self._verdicts = _VerdictsOfRound(scores, in_failed_N, in_rescued_N, completion_ids_list, weight)
            else:
                groups = self._fill_judge_column(judge, rewards_PGF, outcome_PG, others_PG, rts_PG, kinds)
            self._log_failed_groups(kinds.failed_P, groups.rescued_P, groups.tied_P, others_PG)
            compared_P = kinds.failed_P & ((~torch.isnan(rts_PG)).sum(dim=1) >= 2)
            self._log_verdicts(judge, gathered, value_range(rts_PG)[compared_P])
        elif self.stepwise_judge is not None and self.failed_groups == "judge" and self._mode == "train":
            # A round in which nobody was asked counts too: what is logged is the mean over rounds
            for name in ("groups/rescued", "groups/tied", "groups/tied_other_rewards", "judge_calls", "judge_seconds"):
                self._log(f"sgpo/{name}", 0.0)
            self._log("sgpo/groups/unjudged", kinds.failed_P.float().mean().item())
        if self.stepwise_judge is not None and self.failed_groups == "judge" and self.log_completions:
            self._log_table_columns(self.stepwise_judge, scores)

    def _weight_of_round(self, kinds: GroupKinds) -> float:
        """The factor on what failed groups are given in this round, by the schedule. The same on every rank."""
        if self.failed_group_schedule == "failed_share":
            return self.failed_group_weight * kinds.failed_P.float().mean().item()
        return self.failed_group_weight

    def _groups_of_equal_rewards(self, rewards_per_func: Tensor, group_size: int) -> Tensor:
        """Which groups, of shape `(P,)`, are given no advantage by their rewards but what rounding leaves."""
        weights_F = self.reward_weights.to(rewards_per_func.device)
        rewards_PGF = rewards_per_func.view(-1, group_size, len(weights_F))
        if self.multi_objective_aggregation == "sum_then_normalize":
            return value_range(weighted_sum(rewards_PGF, weights_F)) == 0
        return torch.stack([value_range(reward_PG) == 0 for reward_PG in rewards_PGF.unbind(dim=2)]).all(dim=0)

    def _judge(
        self, judge: StepwiseJudge, local: list[int], inputs: list[dict], prompts: list, completions: list
    ) -> list[StepScore | None]:
        """Judges this rank's rows `local`. One entry per row of this rank, `None` where there was nothing to judge."""
        start = time.perf_counter()
        judged = judge.score(
            [prompts[i] for i in local], [completions[i] for i in local], [inputs[i] for i in local], known_wrong=True
        )
        self._judge_seconds = time.perf_counter() - start
        scores: list[StepScore | None] = [None] * len(prompts)
        for i, score in zip(local, judged, strict=True):
            scores[i] = score
        return scores

    def _gather_scores(self, judge: StepwiseJudge, scores: list[StepScore | None]) -> _GatheredScores:
        """Every rank joins this, with or without anything judged."""
        rows = [[*_numbers(score, judge), self._judge_seconds] for score in scores]
        columns = gather(torch.tensor(rows, device=self.accelerator.device)).unbind(dim=1)
        return _GatheredScores(*columns)

    def _fill_judge_column(
        self,
        judge: StepwiseJudge,
        rewards_PGF: Tensor,
        outcome_PG: Tensor,
        others_PG: Tensor,
        rts_PG: Tensor,
        kinds: GroupKinds,
    ) -> JudgedGroups:
        """
        Writes the judge's column of the gathered rewards, of shape `(P, G, F)`, in place; `others_PG` is the weighted sum
        of all other columns. The same on every rank.
        """
        weights_F = self.reward_weights.to(rewards_PGF.device)
        reward_PG = judge.rewards(rts_PG)
        # Where a completion without an outcome has another reward, it would be compared with rewards that hold the
        # judge's while its own does not: such a group stays as GRPO leaves it
        uneven_P = (torch.isnan(outcome_PG) & ~torch.isnan(others_PG)).any(dim=1)
        groups = fill_failed_groups(outcome_PG, rts_PG, reward_PG, kinds.failed_P & ~uneven_P, self.min_rts_spread)
        column_PG = groups.column_PG
        if self.judge_scope == "all_incorrect":
            judge_weight = float(weights_F[self._judge_index])
            mixed_PG = fill_mixed_groups(
                outcome_PG, reward_PG, others_PG, kinds.mixed_P & ~uneven_P, self.success_threshold, judge_weight
            )
            column_PG = torch.where(torch.isnan(column_PG), mixed_PG, column_PG)
        sums_first = self.multi_objective_aggregation == "sum_then_normalize"
        if not sums_first:
            # Each column is normalised over its own values there, so an abstention needs no filling in
            column_PG = column_PG.masked_fill(torch.isnan(rts_PG), torch.nan)
        rewards_PGF[:, :, self._judge_index] = column_PG

        factor_P = torch.where(groups.rescued_P, self._weight_of_round(kinds), 1.0).to(reward_PG.dtype)
        if sums_first and self.scale_rewards == "group":
            factor_P = factor_P * groups.spread_factor_P
        if (factor_P != 1).any():
            without_judge_PG = group_advantages(
                others_PG, self.scale_rewards, scale_PG=weighted_sum(rewards_PGF, weights_F)
            )
            self._advantage_scaling = _AdvantageScaling(without_judge_PG, factor_P)
        return groups

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._forget_round()
        self._mode_of_round = self._mode
        output = super()._generate_and_score_completions(inputs)
        self._warn_of_rollouts(output)
        if self._flat_P is not None:
            # A group of equal rewards is dead, and would not be exactly so: taking the mean leaves a rounding residue
            flat_N = self._flat_P.repeat_interleave(cast(int, self.num_generations))
            output["advantages"] = output["advantages"].masked_fill(flat_N[self._local_rows(output)], 0.0)
        if self._advantage_scaling is not None:
            output["advantages"] = self._scale_judged_part(self._advantage_scaling, output)
        if self._verdicts is not None:
            output["advantages"] = self._credit_tokens(self._verdicts, output)
        if self._groups_to_remedy is not None:
            output["advantages"] = self._add_remedy(self._groups_to_remedy, output)
        if self._flat_P is not None:
            output["advantages"] = self._make_up_for_dead_groups(output)
        self._forget_round()
        return output

    def _forget_round(self) -> None:
        """What `_calculate_rewards` has to say holds for the round at hand."""
        self._mode_of_round = None
        self._advantage_scaling = self._verdicts = self._groups_to_remedy = self._flat_P = None

    def _local_rows(self, output: dict[str, Any]) -> slice:
        """Where this rank's completions stand among those of all ranks."""
        n_local = len(output["advantages"])
        first = self.accelerator.process_index * n_local
        return slice(first, first + n_local)

    def _replace_logged_advantages(self, advantage_N: Tensor) -> None:
        """Puts the advantages of all ranks' completions, shape `(P * G,)`, where super has logged its own."""
        logged: Any = self._logs["advantages"]  # what the completions table shows ends with this round's, of all ranks
        n_recent = min(len(logged), len(advantage_N))
        for _ in range(n_recent):
            logged.pop()
        logged.extend(advantage_N.tolist()[len(advantage_N) - n_recent :])

    def _scale_judged_part(self, scaling: _AdvantageScaling, output: dict[str, Any]) -> Tensor:
        """The advantages of this rank's completions, shape `(B,)`, with the judge's part scaled."""
        advantage_PG = gather(output["advantages"]).view_as(scaling.without_judge_PG)
        scaled_N = blend_advantages(advantage_PG, scaling.without_judge_PG, scaling.factor_P).flatten()
        self._replace_logged_advantages(scaled_N)
        return scaled_N[self._local_rows(output)]

    def _add_remedy(self, failed: _FailedGroups, output: dict[str, Any]) -> Tensor:
        """
        The advantages of this rank's completions, with what the remedy gives those of failed groups: of shape `(B, T)` where
        it tells tokens apart and speaks of this rank's completions, else `(B,)`. Every rank joins the forward pass and the
        gather in it, whether or not one of its own groups failed.
        """
        advantage_B = output["advantages"]
        local = self._local_rows(output)
        failed_PG = ~torch.isnan(failed.outcome_PG)
        failed_B = failed_PG.flatten()[local]
        if self._remedy == "zvp":
            _, entropy_BT = self._score_tokens(output)
            own_BT = self._own_tokens(output)
            remedy_BT = failed.weight * zvp_advantages(entropy_BT, own_BT & failed_B.unsqueeze(1)).to(advantage_B)
            mean_B = remedy_BT.sum(dim=1) / own_BT.sum(dim=1).clamp(min=1)
            self._replace_logged_advantages(gather(advantage_B + mean_B))
            return advantage_B.unsqueeze(1) + remedy_BT if failed_B.any() else advantage_B
        if self._remedy == "sign":
            remedy_PG = sign_advantages(failed.outcome_PG)
        elif self._remedy == "ngrpo":
            # A success earns at least the threshold; the usual outcome reward of one is 1
            remedy_PG = ngrpo_advantages(failed.outcome_PG, max(1.0, self.success_threshold))
        else:
            logps_BT = output.get("old_per_token_logps")
            if logps_BT is None:
                logps_BT, _ = self._score_tokens(output)
            likelihood_B = sequence_likelihood(logps_BT.float(), self._own_tokens(output))
            likelihood_PG = gather(likelihood_B).view_as(failed_PG)
            remedy_PG = lens_advantages(likelihood_PG.masked_fill(~failed_PG, torch.nan))
        remedy_N = (failed.weight * remedy_PG).flatten().to(advantage_B)
        self._replace_logged_advantages(gather(advantage_B) + remedy_N)
        return advantage_B + remedy_N[local]

    def _own_tokens(self, output: dict[str, Any]) -> Tensor:
        """Which tokens of this rank's completions the policy wrote and the loss counts, shape `(B, T)`."""
        mask_BT = output["completion_mask"]
        return (mask_BT * output["tool_mask"] if "tool_mask" in output else mask_BT).bool()

    def _score_tokens(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """
        Log-probabilities and entropies of this rank's completions under the policy that wrote them, each of shape `(B, T)`,
        float32 and without gradient. One forward pass, which every rank has to join.
        """
        checkpointing = cast(dict | None, self.args.gradient_checkpointing_kwargs)
        model = cast(PreTrainedModel, self.model)
        with torch.no_grad(), disable_gradient_checkpointing(model, checkpointing):
            logps_BT, entropy_BT, _ = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
                **{key: output[key] for key in _MULTIMODAL_KEYS if key in output},
            )
        return logps_BT.float(), entropy_BT.float()

    def _make_up_for_dead_groups(self, output: dict[str, Any]) -> Tensor:
        """
        The advantages of this rank's completions, multiplied so that the loss is as if the rows of groups without any
        advantage were not in its denominator. Every rank joins the gather in it. The loss's policy term is linear in a
        positive factor on the advantages, whatever its type; the terms of KL and entropy do not see it.
        """
        advantages = output["advantages"]
        own_BT = self._own_tokens(output)
        advantages_BT = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
        alive_B = (advantages_BT * own_BT != 0).any(dim=1)  # a completion whose tokens are masked has no loss
        n_tokens_B = own_BT.sum(dim=1)
        alive_N, n_tokens_N = gather(torch.stack([alive_B.long(), n_tokens_B], dim=1)).unbind(dim=1)
        live_P = alive_N.view(-1, cast(int, self.num_generations)).any(dim=1)
        self._log("sgpo/groups/dead", 1 - live_P.float().mean().item())
        per_token = _LOSS_DENOMINATORS[self.loss_type] == "tokens"
        size_N = n_tokens_N if per_token else torch.ones_like(n_tokens_N)
        factor = exclusion_factor(live_P, size_N.view(len(live_P), -1))
        if live_P.all():
            return advantages
        logged_PG = torch.tensor(list(self._logs["advantages"])[-len(alive_N) :]).view(len(live_P), -1)
        self._replace_logged_advantages((factor * logged_PG.masked_fill(~live_P.cpu().unsqueeze(1), 0.0)).flatten())
        return factor * advantages

    def _credit_tokens(self, verdicts: _VerdictsOfRound, output: dict[str, Any]) -> Tensor:
        """
        The advantages of this rank's completions per token, of shape `(B, T)`; of shape `(B,)` where no verdict changes one.
        Every rank joins the gathers in it, with or without anything judged. What is logged of a completion is the mean over
        its tokens.
        """
        advantages_B, length = output["advantages"], output["completion_ids"].shape[1]
        tool_mask = output.get("tool_mask")
        places: list[StepTokens | None] = []
        n_errors = 0
        own_BT = self._own_tokens(output)
        has_loss = own_BT.any(dim=1).tolist()  # none if it was truncated and masked
        for i, (score, ids) in enumerate(zip(verdicts.scores, verdicts.completion_ids, strict=True)):
            place = None
            if score is not None and has_loss[i] and (score.first_error is not None or score.status == "error"):
                n_errors += 1
                if score.first_error is None or score.cut is None:  # an empty completion: ending at once is its error
                    place = StepTokens((), (0, len(ids)))
                else:
                    by_policy = None if tool_mask is None else tool_mask[i, : len(ids)].bool().tolist()
                    place = locate_steps(self._decode_completion, ids, score.cut, score.first_error, by_policy)
            places.append(place)
        n_found = sum(place is not None for place in places)
        counts = gather(torch.tensor([[float(n_errors), float(n_found)]], device=self.accelerator.device)).sum(dim=0)
        if counts[0] > 0:
            self._log("sgpo/credit/unlocated", 1 - (counts[1] / counts[0]).item())
        credit_BT = prefix_credit(places, length, self.prefix_reward, self.error_penalty).to(advantages_B)
        credit_BT = verdicts.weight * credit_BT * verdicts.in_rescued_group_B.unsqueeze(1)
        # In a mixed group GRPO blames the whole of a wrong completion: what was verified is spared
        verified_BT = prefix_credit(places, length, 1.0, 0.0).to(advantages_B) > 0
        spared_BT = verified_BT & ~verdicts.in_failed_group_B.unsqueeze(1)
        shared_BT = advantages_B.unsqueeze(1).expand(-1, length)
        advantages_BT = shared_BT.masked_fill(spared_BT & (shared_BT < 0), 0.0) + credit_BT
        mean_B = (advantages_BT * own_BT).sum(dim=1) / own_BT.sum(dim=1).clamp(min=1)
        touched_B = (advantages_BT != shared_BT).any(dim=1)
        self._replace_logged_advantages(gather(torch.where(touched_B, mean_B, advantages_B)))
        return advantages_BT if touched_B.any() else advantages_B

    def _decode_completion(self, ids: Any) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _log(self, key: str, value: float) -> None:
        """Logs a value that is the same on every rank. Unlike `log_metric`, nothing is averaged over ranks."""
        self._metrics[self._mode][key].append(value)

    def _log_groups(self, outcome_PG: Tensor, kinds: GroupKinds) -> None:
        """Metrics that need outcomes only; they are there in evaluation and without a judge too."""
        n_P = (~torch.isnan(outcome_PG)).sum(dim=1)
        c_P = (outcome_PG >= self.success_threshold).sum(dim=1)
        if n_P.sum() == 0:
            return
        self._log("sgpo/accuracy", (c_P.sum() / n_P.sum()).item())
        group_size = outcome_PG.shape[1]
        if group_size > 1:
            shares = torch.stack([kinds.solved_P, kinds.mixed_P, kinds.failed_P]).float().mean(dim=1).tolist()
            for kind, share in zip(("solved", "mixed", "failed"), shares, strict=True):
                self._log(f"sgpo/groups/{kind}", share)
        n, c = n_P.cpu().numpy(), c_P.cpu().numpy()
        for k in sorted({2**i for i in range(group_size.bit_length()) if 2**i <= group_size} | {group_size}):
            full = n >= k  # groups with fewer outcomes say nothing about pass@k
            if full.any():
                self._log(f"sgpo/pass@{k}", float(pass_at_k(n[full], c[full], k).mean()))

    def _log_failed_groups(self, failed_P: Tensor, rescued_P: Tensor, tied_P: Tensor, others_PG: Tensor) -> None:
        """What became of the failed groups: shares of all groups."""
        lowest_P = others_PG.nan_to_num(nan=torch.inf).amin(dim=1)
        others_teach_P = others_PG.nan_to_num(nan=-torch.inf).amax(dim=1) > lowest_P
        for name, group_P in (
            ("rescued", rescued_P),
            ("tied", tied_P),
            ("tied_other_rewards", tied_P & others_teach_P),
            ("unjudged", failed_P & ~rescued_P & ~tied_P),
        ):
            self._log(f"sgpo/groups/{name}", group_P.float().mean().item())

    def _log_verdicts(self, judge: StepwiseJudge, scores: _GatheredScores, rts_range: Tensor) -> None:
        """Metrics of the judge, from what all ranks found; says loudly if it judged nothing."""
        scored = ~torch.isnan(scores.rts)
        n_calls = int(scores.called.nansum())
        self._log("sgpo/judge_calls", float(n_calls))
        self._log("sgpo/judge_seconds", scores.seconds.max().item())
        if scored.any():
            self._log("sgpo/rts", scores.rts[scored].mean().item())
            self._log("sgpo/rts_gap", (scores.rts_steps[scored] - scores.rts_characters[scored]).mean().item())
        if len(rts_range):
            self._log("sgpo/rts_spread", rts_range.mean().item())
        if n_calls == 0:
            return
        asked = scores.called == 1
        rates = {name: (scores.status[asked] == i).float().mean().item() for i, name in enumerate(_STATUSES)}
        self._log("sgpo/abstain_rate", rates["abstain"])
        self._log("sgpo/no_error_rate", rates["no_error"])
        self._log("sgpo/steps_per_completion", scores.n_steps[asked].mean().item())
        if torch.isnan(scores.rts[asked]).all():
            self._silent_rounds += 1
            # At the 1st, 2nd, 4th, 8th ... such round: loud, and yet the log stays readable
            if self._silent_rounds & (self._silent_rounds - 1) == 0 and self.accelerator.is_main_process:
                logger.warning(
                    "THE JUDGE GAVE NO USABLE VERDICT in this round: of %d completions known to be wrong it abstained on "
                    "%.0f %% and found no error in %.0f %%. The failed groups train as in GRPO, that is, not at all. "
                    "Rounds like this so far: %d. Is the judge (%s) reachable and able? The column `verdict_reason` of "
                    "the completions table (`log_completions=True`) says why.",
                    n_calls,
                    100 * rates["abstain"],
                    100 * rates["no_error"],
                    self._silent_rounds,
                    judge.judge.name,
                )

    def _log_table_columns(self, judge: StepwiseJudge, scores: list[StepScore | None]) -> None:
        """One value per local row in every call, judged or not: TRL appends columns, and a skipped call shifts them."""
        missing = (math.nan, math.nan, math.nan, "", "")  # one type per column, so that a folder of files can be read
        values = [
            missing
            if score is None
            else (
                _or_nan(score.first_error),
                float(score.n_steps),
                _or_nan(judge.rts(score)),
                score.status,
                score.reason,
            )
            for score in scores
        ]
        for name, column in zip(_TABLE_COLUMNS, zip(*values, strict=True), strict=True):
            self._log_completion_extra(name, list(column))

    def _describe_table(self, outcome_reward: str) -> None:
        """Says beside the completions' files which of their columns is right or wrong, for whoever reads them later."""
        self._table_described = True
        if self.is_world_process_zero():
            folder = Path(cast(str, self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            settings = {
                "outcome_reward": outcome_reward,
                "success_threshold": self.success_threshold,
                "credit_assignment": self.credit_assignment,
            }
            (folder / "sgpo.json").write_text(json.dumps(settings, indent=2) + "\n")

    def _warn_of_truncated(self, completion_ids: list[list[int]]) -> None:
        if not self.mask_truncated_completions or self._truncation_warned:
            return
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        n_truncated = sum(1 for ids in completion_ids if not len(ids) or int(ids[-1]) not in ends)
        if n_truncated:
            self._truncation_warned = True
            logger.warning(
                "mask_truncated_completions=True: %d of the %d completions judged on this rank were truncated. They are "
                "judged and count in their group's mean, but their tokens are masked, so their verdicts teach nothing. "
                "Raise max_completion_length, or set mask_truncated_completions=False to let their correct prefix be "
                "rewarded. This is said once.",
                n_truncated,
                len(completion_ids),
            )

    def _warn_of_rollouts(self, output: dict[str, Any]) -> None:
        if (
            self._rollout_warned
            or self.rollout_func is None
            or "tool_mask" not in output
            or self._active_judge is None
        ):
            return
        self._rollout_warned = True
        logger.warning(
            "rollout_func returns env_mask: the completions hold text that the policy did not write. TRL hands them to reward "
            "functions as one text, so the judge takes that text for the policy's, and it counts in RTS. Give StepwiseJudge a "
            "segmenter that leaves it out, or use tools or environment_factory, whose results are known to be no steps. This is "
            "said once."
        )

    def create_model_card(  # type: ignore[override]  # TRL's signature, which differs from transformers'
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        path = Path(cast(str, self.args.output_dir)) / "README.md"
        card = ModelCard.load(path)
        if self._remedy is not None:
            judged = (
                "No step-wise judge was used: completions of groups in which every answer was wrong were given the "
                f'advantages of `failed_groups="{self._remedy}"`.'
            )
        elif self.stepwise_judge is None or self.failed_groups == "none":
            judged = "No step-wise judge was used: this run is plain GRPO."
        else:
            judged = (
                "Completions of groups in which every answer was wrong "
                + ("(and every other wrong completion) " if self.judge_scope == "all_incorrect" else "")
                + f"were judged step by step by `{self.stepwise_judge!r}`"
                + (f" during the first {self.judge_until:.0%} of the updates." if self.judge_until < 1 else ".")
            )
        versions = "### Framework versions\n\n"
        card.text = card.text.replace(versions, f"{judged}\n\n{versions}- TRL-SGPO: {trl_sgpo.__version__}\n", 1)
        card.save(path)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _numbers(score: StepScore | None, judge: StepwiseJudge) -> list[float]:
    """A score as a row of numbers that can be gathered; NaN for what is not there."""
    if score is None:
        return [math.nan] * 6
    return [
        *map(_or_nan, (judge.rts(score), score.rts_steps, score.rts_characters)),
        float(score.n_steps),
        float(_STATUSES.index(score.status)),
        float(score.called),
    ]
