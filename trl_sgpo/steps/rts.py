"""
The reasoning trajectory score (RTS): the share of a completion before its first wrong step. Stepwise Guided Policy
Optimization (https://huggingface.co/papers/2505.11595) counts steps. Characters may be counted too.
"""

from collections.abc import Sequence

from trl_sgpo.steps.segmenter import Span


def rts_by_steps(first_error: int, n_steps: int) -> float:
    """
    The RTS of [SGPO](https://huggingface.co/papers/2505.11595), in [0, 1): number of steps before the first wrong one
    / number of all steps. A policy can raise it if it splits its right steps. [`rts_by_characters`] has no such
    weakness.

    Args:
        first_error (`int`):
            0-based index of the first wrong step.
        n_steps (`int`):
            Number of steps. An empty completion, with 0 steps and `first_error=0`, scores 0.

    Raises:
        `ValueError`: If there is no such step.

    Example:

    ```python
    >>> rts_by_steps(3, 5)  # five steps, the fourth is wrong
    0.6
    ```
    """
    if first_error == n_steps == 0:
        return 0.0
    _check_first_error(first_error, n_steps)
    return first_error / n_steps


def rts_by_characters(first_error: int, spans: Sequence[Span]) -> float:
    """
    The RTS in characters, in [0, 1): characters of the steps before the first wrong one / characters of all steps. A
    step that is split in two does not raise it. As [`rts_by_steps`], with the spans of all steps.

    Example:

    ```python
    >>> rts_by_characters(1, [(0, 30), (30, 40)])  # two steps, the second and shorter one is wrong
    0.75
    ```
    """
    if first_error == len(spans) == 0:
        return 0.0
    _check_first_error(first_error, len(spans))
    lengths = [end - start for start, end in spans]
    return sum(lengths[:first_error]) / sum(lengths)


def _check_first_error(first_error: int, n_steps: int) -> None:
    if not 0 <= first_error < n_steps:
        raise ValueError(
            f"`first_error` is {first_error}, but there are {n_steps} steps: pass the index of the first wrong step, "
            "counted from 0. A completion without a wrong step has no RTS: decide on it before calling this."
        )
