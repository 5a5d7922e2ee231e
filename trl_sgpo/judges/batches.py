"""Batches for a model that judges in this process: how they are made, and what happens if one fails."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_sgpo.judges.log_once import LogOnce


T = TypeVar("T")

logger = logging.getLogger(__name__)


def token_batches(lengths: dict[int, int], max_tokens: int) -> list[list[int]]:
    """
    Keys in batches whose padded size is at most `max_tokens`. A key that is longer than that is a batch of its own.

    The keys are sorted by length, so that there is little padding. The longest ones come first, so that a lack of
    memory shows at once.

    Example:

    ```python
    >>> token_batches({0: 10, 1: 90, 2: 12, 3: 100}, max_tokens=200)
    [[3, 1], [2, 0]]
    ```
    """
    batches: list[list[int]] = []
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(key)
        else:
            batches.append([key])
    return batches


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of shape `(n_rows, longest)`, padded on one side."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, pad_id, side), pad_sequence(masks, True, 0, side)


class BatchRunner:
    """Runs batches of one judge on `device`, so that a failure costs verdicts and not the training."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._log_once = LogOnce(logger)

    def run(
        self,
        work: Callable[[Sequence[int]], list[T]],
        keys: Sequence[int],
        failed: Callable[[str], T],
        what: Callable[[int], str],
        name: str,
    ) -> list[T]:
        """
        The results of `work` on a batch of keys, in order. If the batch does not fit into the memory, it is halved.

        Args:
            failed (`Callable`):
                A reason -> the result of a key whose batch failed.
            what (`Callable`):
                A key -> its description, for the reason.
            name (`str`):
                The judge's name, for the log.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            return work(keys)
        except Exception as error:
            out_of_memory = should_reduce_batch_size(error)
            reason = f"{type(error).__name__}: {error}"
            if not out_of_memory:
                self.show_traceback(name)
        # Not inside the handler: there the exception would keep the tensors of the failed pass alive
        if not out_of_memory:
            return [failed(reason)] * len(keys)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(keys) == 1:
            return [failed(f"{what(keys[0])} does not fit into the memory of {self.device}")]
        half = len(keys) // 2
        return [result for part in (keys[:half], keys[half:]) for result in self.run(work, part, failed, what, name)]

    def show_traceback(self, name: str) -> None:
        """Logs the exception that is being handled; the first one only."""
        self._log_once.traceback(
            "%s failed on a batch. Its completions count as abstentions; further failures are counted in the metric "
            "`sgpo/abstain_rate` and not shown.",
            name,
        )
