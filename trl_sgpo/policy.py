"""[`Policy`]: what a treatment may ask of the trainer."""

import inspect
from collections.abc import Sequence
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather
from torch import Tensor

from trl_sgpo.judges.stepwise import StepwiseJudge
from trl_sgpo.rounds import Round


if TYPE_CHECKING:
    from trl import GRPOTrainer


class Policy:
    """
    The policy that is trained, as a treatment sees it, and the judge in `reward_funcs`. Every rank has to join `score`
    and `gather`.
    """

    def __init__(self, trainer: "GRPOTrainer", judge: StepwiseJudge | None) -> None:
        self._trainer: Any = trainer
        self.judge = judge

    def score(self, round: Round) -> tuple[Tensor, Tensor]:
        """
        Log-probabilities and entropies of this rank's completions under the policy that wrote them, each of shape `(B, T)`,
        float32 and without gradient. One forward pass.
        """
        from trl import GRPOTrainer
        from trl.models.utils import disable_gradient_checkpointing

        trainer, output = self._trainer, cast(dict[str, Any], round.output)
        arguments = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        # What a model that reads images takes beside the ids stands at the end
        of_images = dropwhile(lambda name: name != "compute_aux_loss", arguments)
        images = {name: output[name] for name in of_images if name in output}
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        ):
            logps_BT, entropy_BT, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=trainer.args.per_device_train_batch_size,
                compute_entropy=True,
                **images,
            )
        return logps_BT.float(), entropy_BT.float()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a list of token ids, without special tokens."""
        return self._trainer._tokenizer.decode(ids, skip_special_tokens=True)

    def gather(self, values_B: Tensor) -> Tensor:
        """From this rank's values, shape `(B, ...)`, to those of all ranks, shape `(P, G, ...)`."""
        return gather(values_B).view(-1, self._trainer.num_generations, *values_B.shape[1:])
