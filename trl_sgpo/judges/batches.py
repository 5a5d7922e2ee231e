"""Batches for a model that judges in this process."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence


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
