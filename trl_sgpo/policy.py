"""[`Policy`]: what a treatment may ask of the trainer."""

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather
from torch import Tensor

from trl_sgpo.judges.stepwise import StepwiseJudge
from trl_sgpo.rounds import Round
from trl_sgpo.steps.thinking import is_mark, may_be_thinking_token


if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)


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
        """
        The text of a list of token ids, without special tokens, but with those that mark thinking and tool calls, which
        TRL's texts have lost.
        """
        tokenizer, left_out = self._trainer._tokenizer, self._left_out
        if len(left_out) == len(self._special_tokens):
            return tokenizer.decode(ids, skip_special_tokens=True)
        return tokenizer.decode([i for i in ids if i not in left_out], skip_special_tokens=False)

    def decoder(self, completions: Sequence[Any]) -> Callable[[Sequence[int]], str] | None:
        """[`~Policy.decode`], if it may say more than the completions: of plain texts without marks it cannot."""
        same = len(self._left_out) == len(self._special_tokens) and all(isinstance(text, str) for text in completions)
        return None if same else self.decode

    @cached_property
    def _left_out(self) -> set[int]:
        """The ids of the special tokens that are no marks."""
        return {i for i, token in self._special_tokens.items() if not is_mark(token)}

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        """The tokens that TRL's texts leave out, by their ids."""
        tokenizer = self._trainer._tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        return {**named, **{i: str(token) for i, token in added.items() if token.special}}

    def check_thinking(self) -> None:
        """Warns if thinking that is not to be judged could not be told from the rest."""
        tokenizer = self._trainer._tokenizer
        parsed = any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
        if self.judge is None or self.judge.include_thinking or parsed:
            return
        unknown = sorted(token for token in self._special_tokens.values() if may_be_thinking_token(token))
        if unknown:
            logger.warning(
                f"The special tokens {unknown} of the tokenizer may be marks of thinking, but they are not known here, and "
                "TRL leaves special tokens out of its texts: thinking between them would be judged as a part of the "
                "solution, although include_thinking=False. Set the tokenizer's `response_template`, so that TRL puts "
                "thinking into a field of its own (it does for prompts of messages), or say that it is to be judged: "
                "`StepwiseJudge(..., include_thinking=True)`."
            )

    def gather(self, values_B: Tensor) -> Tensor:
        """From this rank's values, shape `(B, ...)`, to those of all ranks, shape `(P, G, ...)`."""
        return gather(values_B).view(-1, self._trainer.num_generations, *values_B.shape[1:])
