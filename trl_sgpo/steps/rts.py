"""
The reasoning trajectory score (RTS): the share of a completion before its first wrong step. Stepwise Guided Policy
Optimization (https://huggingface.co/papers/2505.11595) counts steps. Characters may be counted too.
"""

from collections.abc import Collection, Sequence

from trl_sgpo.steps.segmenter import Span


def rts_by_steps(first_error: int, n_steps: int, checked: Collection[int] | None = None) -> float:
    """
    The RTS of [SGPO](https://huggingface.co/papers/2505.11595), in [0, 1): number of steps before the first wrong one
    / number of all steps. A policy can raise it if it splits its right steps. [`rts_by_characters`] has no such
    weakness.

    Args:
        first_error (`int`):
            0-based index of the first wrong step.
        n_steps (`int`):
            Number of steps. An empty completion, with 0 steps and `first_error=0`, scores 0.
        checked (`Collection[int]`, *optional*):
            0-based indices of the steps that the judge has checked, if not all. A step before the first wrong one that
            was not checked counts neither as right nor as a step. The wrong one and those after it always count.

    Raises:
        `ValueError`: If there is no such step.

    Example:

    ```python
    >>> rts_by_steps(3, 5)  # five steps, the fourth is wrong
    0.6
    >>> rts_by_steps(3, 5, checked=[0, 2])  # nobody has checked the second one
    0.5
    ```
    """
    return _share(first_error, n_steps, [1] * n_steps, checked)


def rts_by_characters(first_error: int, spans: Sequence[Span], checked: Collection[int] | None = None) -> float:
    """
    The RTS in characters, in [0, 1): characters of the steps before the first wrong one / characters of all steps. A
    step that is split in two does not raise it. As [`rts_by_steps`], with the spans of all steps.

    Example:

    ```python
    >>> rts_by_characters(1, [(0, 30), (30, 40)])  # two steps, the second and shorter one is wrong
    0.75
    ```
    """
    return _share(first_error, len(spans), [end - start for start, end in spans], checked)


def right_steps(first_error: int, checked: Collection[int] | None = None) -> list[int]:
    """The 0-based indices of the steps before the first wrong one that were checked."""
    return list(range(first_error)) if checked is None else sorted(i for i in set(checked) if i < first_error)


def _share(first_error: int, n_steps: int, sizes: Sequence[int], checked: Collection[int] | None) -> float:
    """The right steps' share of what counts: they, the first wrong step and all after it."""
    if first_error == n_steps == 0:
        return 0.0
    if not 0 <= first_error < n_steps:
        raise ValueError(
            f"`first_error` is {first_error}, but there are {n_steps} steps: pass the index of the first wrong step, "
            "counted from 0. A completion without a wrong step has no RTS: decide on it before calling this."
        )
    right = sum(sizes[i] for i in right_steps(first_error, checked))
    return right / (right + sum(sizes[first_error:]))
