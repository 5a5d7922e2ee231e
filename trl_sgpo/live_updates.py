"""
[`LiveUpdates`]: follows which micro-batches and optimizer steps of a run have credit. It makes a round's batches smaller
(`skip_dead_tokens`) and leaves out the optimizer steps in which nothing teaches (`skip_dead_updates`).
"""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import GRPOTrainer

from trl_sgpo.live_tokens import RESIDUE, count_live_rows, padding_can_go, smaller_batches, tokens_stand_alone
from trl_sgpo.treatments.dead_groups import check_loss_type


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig


def check_skipping(args: "SGPOConfig") -> None:
    """Raises a `ValueError` for settings under which nothing may be left out, before any weights are loaded."""
    asked = [name for name in ("skip_dead_tokens", "skip_dead_updates") if getattr(args, name)]
    if not asked:
        return
    everywhere = "has a gradient at every token, so none is dead"
    for name, value, harmless, why in (
        ("beta", args.beta, 0.0, f"The KL term {everywhere}"),
        ("entropy_coef", args.entropy_coef, 0.0, f"The entropy bonus {everywhere}"),
        ("use_adaptive_entropy", args.use_adaptive_entropy, False, f"The entropy bonus {everywhere}"),
    ):
        if value != harmless:
            raise ValueError(
                f"{asked[0]}=True cannot be combined with {name}={value!r}. {why}. Set {name}={harmless!r}, or leave "
                f"{asked[0]} out."
            )
    if args.skip_dead_tokens:
        if args.top_entropy_quantile < 1:
            raise ValueError(
                f"skip_dead_tokens=True cannot be combined with top_entropy_quantile={args.top_entropy_quantile!r}. The "
                "quantile is taken over all tokens of the batch, dead ones included. Set top_entropy_quantile=1.0, or leave "
                "skip_dead_tokens out."
            )
        check_loss_type(args.loss_type, "skip_dead_tokens")
    if args.skip_dead_updates:
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "skip_dead_updates=True cannot be combined with DeepSpeed. Its engine takes the optimizer step inside the "
                "backward pass, before anyone can leave it out. Leave skip_dead_updates out, or train without DeepSpeed."
            )
        optim = OptimizerNames(args.optim).value
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(
                f"skip_dead_updates=True cannot be combined with optim={optim!r}, which takes its steps inside the backward "
                "pass, before anyone can leave one out. Use an optimizer like 'adamw_torch', or leave skip_dead_updates out."
            )
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                f"skip_dead_updates=True with fp16=True cannot be combined with max_grad_norm={args.max_grad_norm!r}. The scaler "
                "of the gradients looks at them in clipping only, and it refuses a step without gradients otherwise. Set "
                "max_grad_norm, for instance to 1.0, or use bf16=True."
            )


def _size(batches: list[dict[str, Any]]) -> int:
    """Places for tokens, padding included."""
    return sum(batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in batches)


class LiveUpdates(TrainerCallback):
    """
    Knows of every micro-batch whether a token in it has credit, on any rank. It logs the share of optimizer steps
    without any, `sgpo/dead_updates`, and what `skip_dead_tokens` leaves of a round, `sgpo/trained_tokens`.
    """

    def __init__(self, trainer: GRPOTrainer, args: "SGPOConfig") -> None:
        self._trainer: Any = trainer
        if trainer.aux_loss_enabled and (args.skip_dead_tokens or args.skip_dead_updates):
            option = "skip_dead_tokens" if args.skip_dead_tokens else "skip_dead_updates"
            raise ValueError(
                f"{option}=True cannot be combined with the router loss of this mixture of experts, which has a gradient at "
                f"every token, so none is dead. Set router_aux_loss_coef=0.0, or leave {option} out."
            )
        self._skip_tokens, self._skip_updates = args.skip_dead_tokens, args.skip_dead_updates
        if self._skip_tokens:
            self._cut_tokens = tokens_stand_alone(args)
            self._cut_right, self._cut_left = padding_can_go(cast(PreTrainedModel, trainer.model))
        self._batches: list[dict[str, Any]] = []
        self._live: list[bool] = []  # for each of them, whether it has credit on any rank
        self._update: list[bool] = []  # the same for the micro-batches of the update under way

    def take_round(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches to train on in place of a round's. Every rank joins the gather in it."""
        if batches is self._batches:
            return batches
        # Rows may change places between the micro-batches of one optimizer step. Rounds and optimizer steps both begin at
        # multiples of this many micro-batches
        size = math.gcd(len(batches), self._trainer.args.gradient_accumulation_steps)
        if self._trainer.loss_type == "bnpo":
            size = 1
        # On each of R ranks, for K blocks of S micro-batches
        n_live_RKS = self._trainer.accelerator.gather(count_live_rows(batches)).view(-1, len(batches) // size, size)
        for batch in batches:
            batch.pop(RESIDUE, None)
        self._live = (n_live_RKS > 0).any(dim=0).flatten().tolist()
        self._batches = batches
        if self._skip_tokens:
            self._batches = []
            for block, n_live in enumerate(n_live_RKS.sum(dim=2).amax(dim=0).tolist()):
                self._batches += smaller_batches(
                    batches[block * size : (block + 1) * size],
                    n_live,
                    self._trainer.loss_type,
                    cut_tokens=self._cut_tokens,
                    cut_right=self._cut_right,
                    cut_left=self._cut_left,
                    multiple=self._trainer.pad_to_multiple_of,
                )
            self._log_share(self._batches, batches)
        return self._batches

    def _log_share(self, smaller: list[dict[str, Any]], batches: list[dict[str, Any]]) -> None:
        sizes_2 = torch.tensor([_size(smaller), _size(batches)], device=self._trainer.accelerator.device)
        now, before = self._trainer.accelerator.gather(sizes_2).view(-1, 2).sum(dim=0).tolist()
        self._trainer._metrics["train"]["sgpo/trained_tokens"].append(now / before)

    def take_batch(self, step: int) -> dict[str, Any]:
        """The micro-batch that is trained on in TRL's `step`."""
        index = step % len(self._batches)
        self._update.append(self._live[index])
        return self._batches[index]

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._update = []

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._update:  # a subclass takes its batches from elsewhere, and nothing is known of them
            return
        dead = not any(self._update)
        self._trainer._metrics["train"]["sgpo/dead_updates"].append(float(dead))
        if self._skip_updates and dead:
            # Gradients that are None, not 0, leave momentum and weight decay alone too
            self._trainer.optimizer.zero_grad(set_to_none=True)
