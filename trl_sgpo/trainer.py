"""
[`SGPOTrainer`]: GRPOTrainer that treats its failed groups. Wiring only: what is done with them is in `treatments/`. It
has three hooks into TRL, and copies nothing of it. `_calculate_rewards` returns the gathered matrix of rewards: here
groups are sorted and the judge is asked, and the matrix is only read. `_generate_and_score_completions` returns TRL's
advantages: here the treatment replaces those of failed groups. A [`~trl_sgpo.rounds.Round`] is all that the first hook
tells the second one. `_prepare_inputs` splits the round into micro-batches: here those are made smaller, on request.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from trl_sgpo import __version__
from trl_sgpo.arguments import check_counts, check_datasets, check_judge_columns, check_names, known_columns
from trl_sgpo.card import describe_run, without_none
from trl_sgpo.config import SGPOConfig, with_own_fields
from trl_sgpo.judges import StepwiseJudge
from trl_sgpo.judges.stepwise import take_judge
from trl_sgpo.live_tokens import RESIDUE
from trl_sgpo.live_updates import LiveUpdates, check_skipping
from trl_sgpo.outcome import find_outcomes, join_outcomes, reward_name
from trl_sgpo.policy import Policy
from trl_sgpo.round_log import JUDGE_COLUMNS, RoundLog
from trl_sgpo.rounds import Round, judge_round
from trl_sgpo.treatments import SequenceReward, Treatment, choose_treatment
from trl_sgpo.treatments.base import checked_advantages
from trl_sgpo.treatments.dead_groups import check_loss_type, rounding_residue, without_dead_groups
from trl_sgpo.versions import check_trl_version


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc


logger = logging.getLogger(__name__)


class SGPOTrainer(GRPOTrainer):
    """
    Trainer for Stepwise Guided Policy Optimization (SGPO), introduced in [Stepwise Guided Policy Optimization: Coloring
    your Incorrect Reasoning in GRPO](https://huggingface.co/papers/2505.11595).

    GRPO learns nothing from a group of completions that are all wrong. Here a step-wise judge finds the first wrong step
    of each completion of such a group, and the correct prefix is rewarded. Groups with a correct completion keep GRPO's
    advantages bit for bit, and without a [`StepwiseJudge`] in `reward_funcs` this *is* [`~trl.GRPOTrainer`]. A subclass
    must not change what `_calculate_rewards` returns: groups are sorted and judged by then. Change a reward function instead.

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
        treatment ([`~trl_sgpo.treatments.Treatment`], *optional*):
            An own method for failed groups, in place of those that `args.failed_groups` names.

    Raises:
        TypeError: If `treatment` is no instance of a [`~trl_sgpo.treatments.Treatment`], or `reward_funcs` holds a judge
            that no [`StepwiseJudge`] wraps.
        ValueError: If the installed TRL is not supported; if `reward_funcs` holds two judges, or none for a treatment that
            asks one; if the treatment cannot know which reward is the outcome, or `args.outcome_reward` is unknown; if the
            judge's reward weight is negative, or there is not one for each of `reward_funcs`; if a dataset has a column
            `prompts` or `completions`, or lacks one that the judge needs; if both `treatment` and `args.failed_groups` name
            a treatment; if the settings do not fit the treatment; if `args.exclude_dead_groups` is combined with a loss
            whose denominator is unknown; if `args.skip_dead_tokens` or `args.skip_dead_updates` is combined with settings
            under which every token has a gradient, or with other settings under which it cannot work.
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
        *,
        treatment: Treatment | None = None,
    ) -> None:
        check_trl_version()
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SGPOConfig(f"{model_id.split('/')[-1]}-SGPO")
        self._settings = with_own_fields(args)

        # A list of our own: TRL writes into the one it is given
        if reward_funcs is None:
            reward_funcs = []
        funcs: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self.stepwise_judge, self.judge_index = take_judge(funcs)
        self.treatment, setting = choose_treatment(treatment, self._settings, self.stepwise_judge)
        self.treatment.setup(self._settings)
        if self._settings.exclude_dead_groups:
            check_loss_type(self._settings.loss_type, "exclude_dead_groups")
        check_skipping(self._settings)
        self._check_judge(setting)
        check_counts(funcs, self.judge_index, self._settings.reward_weights, reward_processing_classes)
        removed = self._settings.remove_unused_columns
        evaluated = None if args.eval_strategy == "no" else eval_dataset
        check_datasets(funcs, removed, train_dataset=train_dataset, eval_dataset=evaluated)
        if self.treatment.asks_judge and rollout_func is None and not removed:  # a rollout function may add columns
            check_judge_columns(self.stepwise_judge, known_columns(train_dataset), "train_dataset")
        acts = self.treatment.needs_outcome and not (self.treatment.asks_judge and self.stepwise_judge is None)
        find = partial(
            find_outcomes,
            judge_index=self.judge_index,
            outcome_reward=self._settings.outcome_reward,
            needed_by=("The StepwiseJudge in reward_funcs" if self.treatment.asks_judge else setting)
            if acts
            else None,
            n_given=len(funcs),
        )
        if environment_factory is None:  # before any weight is loaded, if the names are known
            find([reward_name(func) for func in funcs])

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

        self.outcome_indices = find(self.reward_func_names)  # environments have appended their own by now
        # Each is called with every round and its final output
        self.round_observers: list[Callable[[Round, dict[str, Any]], None]] = []
        self._round: Round | None = None
        self._policy = Policy(self, self.stepwise_judge)
        if self.treatment.asks_judge and self.accelerator.is_main_process:
            self._policy.check_thinking()
        self._live_updates = LiveUpdates(self, self._settings)
        self.add_callback(self._live_updates)
        self._round_log = RoundLog(
            self._metrics,
            self._logs,
            self._log_completion_extra,
            [self.reward_func_names[i] for i in self.outcome_indices],
            self.stepwise_judge if self.treatment.asks_judge else None,
            self.accelerator.is_main_process,
        )

    def _check_judge(self, setting: str) -> None:
        """Raises for a weight with which the judge would do harm; says what has no effect."""
        weights = self._settings.reward_weights or []
        if self.judge_index is None:
            return
        if not self.treatment.asks_judge:
            logger.info(
                "%s: the StepwiseJudge in reward_funcs is not asked, so judge_scope and judge_until have no effect.",
                setting,
            )
        elif isinstance(self.treatment, SequenceReward) and min(weights[self.judge_index :][:1], default=0.0) < 0:
            raise ValueError(
                f"reward_weights={weights} gives the judge a negative weight, which would reward early errors. Give it a "
                "weight of at least 0."
            )

    def _judge_is_due(self, round: Round) -> bool:
        """In training only, and only until the judge's share of the run is over."""
        if self.stepwise_judge is None or not self.treatment.asks_judge or not round.training:
            return False
        # 0.7 * 10 is a little more than 7
        return self.state.global_step < math.ceil(self._settings.judge_until * self.state.max_steps - 1e-9)

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list
    ) -> Tensor:
        check_names(inputs[0], self.reward_funcs, "What rollout_func returns")
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        round = self._round or Round(cast(PreTrainedModel, self.model).training)
        size = cast(int, self.num_generations if round.training else self.num_generations_eval)
        rewards_PGF = rewards.view(-1, size, rewards.shape[1])
        first = self.accelerator.process_index * len(prompts)
        # One matrix on every rank, with the rows of a group next to each other: all ranks decide alike, without asking
        round.fill(
            rewards_PGF,
            self.reward_weights.to(rewards.device),
            join_outcomes(rewards_PGF, self.outcome_indices, self.reward_func_names),
            self._settings.success_threshold,
            self.judge_index,
            slice(first, first + len(prompts)),
            completion_ids_list,
            self._masked(completion_ids_list),
        )
        if self._judge_is_due(round):
            judge = cast(StepwiseJudge, self.stepwise_judge)
            round.to_judge_PG = to_judge_PG = self.treatment.to_judge(round)
            if to_judge_PG.any():
                round.judged = judge_round(
                    round,
                    to_judge_PG,
                    judge,
                    prompts,
                    completions,
                    inputs,
                    gather,
                    self._policy.decoder(completions),
                    of_longest=self._settings.rts_share_of == "longest",
                )
                round.groups = self.treatment.sort(round)
        self._round_log.write(round)
        if self.log_completions:
            self._round_log.write_table(round, taken=self._pending_extra_logs)
            if self.outcome_indices:
                folder = Path(cast(str, self.args.output_dir))
                self._round_log.describe_table(folder, round.success_threshold, self.treatment.name)
        return rewards

    def _masked(self, completion_ids: list) -> list[bool]:
        """Which completions TRL will take for truncated and mask; empty if it masks none."""
        if not self.mask_truncated_completions:
            return []
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return [not len(ids) or int(ids[-1]) not in ends for ids in completion_ids]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        check_names(inputs[0], self.reward_funcs, "The dataset")  # one that could not tell before
        # As TRL takes it, before it generates: some ways of generating leave the model in training mode
        round = self._round = Round(cast(PreTrainedModel, self.model).training)
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._round = None
            for column in JUDGE_COLUMNS:  # what TRL has not flushed belongs to a round that failed
                self._pending_extra_logs.pop(column, None)
        round.output = dict(output)
        if round.training:
            output["advantages"], output[RESIDUE] = self._treat(round)
            if self.rollout_func is not None and "tool_mask" in output and self._judge_is_due(round):
                self._round_log.warn_of_rollouts()
        for observe in self.round_observers:
            observe(round, output)
        return output

    def _treat(self, round: Round) -> tuple[Tensor, Tensor]:
        """The advantages that this rank trains with, and what of GRPO's is no credit. The order of its parts matters."""
        output, args = cast(dict[str, Any], round.output), self._settings
        residue_B = rounding_residue(round, self.multi_objective_aggregation)
        if args.exclude_dead_groups or args.skip_dead_tokens or args.skip_dead_updates:
            output["advantages"] = round.advantages_B - residue_B
        advantages, treats = round.advantages_B, self.treatment.treats(round)
        if treats:
            advantages = self.treatment.advantages(round, self._policy)
            advantages = checked_advantages(advantages, round, self.treatment.name)
        if args.exclude_dead_groups:
            advantages = without_dead_groups(advantages, round, self._policy, self.loss_type)
        if treats or args.exclude_dead_groups:
            self._round_log.show(round, advantages, self._policy.gather if self.log_completions else None)
        return advantages, residue_B

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        training = cast(PreTrainedModel, self.model).training  # before it generates, as in the hook above
        inputs = super()._prepare_inputs(generation_batch)
        if not training:
            return inputs
        batches = self._live_updates.take_round(cast(list[dict[str, Any]], self._buffered_inputs))
        self._buffered_inputs = batches  # type: ignore[assignment]  # TRL declares it as None
        return self._live_updates.take_batch(self._step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        with self._round_log.readable_table():
            super().log(logs, start_time)

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
        described = describe_run(self.treatment, self.stepwise_judge, self._settings)
        versions = "### Framework versions\n\n"
        card.text = card.text.replace(versions, f"{described}\n\n{versions}- TRL-SGPO: {__version__}\n", 1)
        card.text = without_none(card.text, path.parent.name)
        card.save(path)
