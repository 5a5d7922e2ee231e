"""
"My loss is 0, is it broken?" What became of the groups, why dead ones are dead, and what to change. Pure functions of
numbers.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Signs:
    """
    What a diagnosis rests on. Shares are shares of all logged groups; NaN is unknown.

    Args:
        n_groups, group_size (`int`):
            Logged groups and completions per group.
        teaching, solved, mixed, rescued, other_rewards, tied, abstained, unjudged (`float`):
            Shares of groups. All but `teaching` need an outcome.
        has_judge (`bool`):
            Whether there is a step-wise judge.
        loss (`float`):
            Mean of the absolute logged loss.
        grad_norm (`float`), still (`float`):
            Mean gradient norm, and the share of log entries at which it is 0.
        clipped (`float`):
            Share of completions that were cut off.
        distinct (`float`):
            Mean number of distinct answers of a group.
        rts (`float`):
            Mean reasoning trajectory score of what was judged.
        rts_gap_start, rts_gap_end (`float`):
            RTS by steps minus RTS by characters, in the first and last fifth.
    """

    n_groups: int = 0
    group_size: int = 0
    teaching: float = math.nan
    solved: float = math.nan
    mixed: float = math.nan
    rescued: float = math.nan
    other_rewards: float = math.nan
    tied: float = math.nan
    abstained: float = math.nan
    unjudged: float = math.nan
    has_judge: bool = False
    loss: float = math.nan
    grad_norm: float = math.nan
    still: float = math.nan
    clipped: float = math.nan
    distinct: float = math.nan
    rts: float = math.nan
    rts_gap_start: float = math.nan
    rts_gap_end: float = math.nan


# Said once, for it is true of every run
LOSS_IS_ZERO = (
    "With one update per batch (num_iterations=1) the printed loss is about 0 by construction: advantages sum to zero inside "
    "a group, and the ratio of new to old policy is 1. The gradient is another matter: look at grad_norm, and at how many "
    "groups teach."
)


def answer(s: Signs) -> str:
    """
    One or two sentences: is it broken?

    Example:

    ```python
    >>> answer(Signs(n_groups=600, group_size=8, teaching=0.0, grad_norm=0.0, loss=0.0, still=1.0))
    'Nothing is learnt: none of the 600 logged groups teaches. Mean |loss| 0, mean grad_norm 0 (exactly 0 at 100 % of the log entries).'
    ```
    """
    printed = ""
    if not math.isnan(s.loss) and not math.isnan(s.grad_norm):
        still = f" (exactly 0 at {_percent(s.still)} of the log entries)" if s.still > 0 else ""
        printed = f" Mean |loss| {_small(s.loss)}, mean grad_norm {_small(s.grad_norm)}{still}."
    if s.group_size == 1 or math.isnan(s.teaching):
        return f"Cannot be told: there are no groups of completions to look at.{printed}"
    of = f"of the {s.n_groups} logged groups" if s.n_groups else "of the groups, by the log,"
    if s.teaching == 0:
        return f"Nothing is learnt: none {of} teaches.{printed}"
    if s.teaching < 0.3:
        return f"Not broken, but starved: {_percent(s.teaching)} {of} teach, the others have one reward throughout.{printed}"
    return f"Not broken: {_percent(s.teaching)} {of} teach.{printed}"


def advice(s: Signs) -> list[str]:
    """
    What to change, most urgent first; empty if nothing stands out.

    Example:

    ```python
    >>> advice(Signs(n_groups=10, group_size=8, teaching=0.5, tied=0.5))[0].split(":")[0]
    '50 % of the groups are tied'
    ```
    """
    said: list[tuple[float, str]] = []

    def when(share: float, least: float, text: str) -> None:
        if share >= least:  # NaN is not
            said.append((share, text))

    if s.group_size == 1:
        return ["Groups of one completion have no advantage: num_generations must be 2 or more."]
    if s.has_judge:
        when(
            s.unjudged,
            0.1,
            f"{_percent(s.unjudged)} of the groups failed and were not judged, though there is a judge: past judge_until it is "
            "not asked, and with judge_scope unchanged it sees failed groups only. If it should have been asked, look at "
            "sgpo/judge_calls.",
        )
    else:
        when(
            s.unjudged,
            0.3,
            f"{_percent(s.unjudged)} of the groups are all wrong, and nobody judged them: a step-wise judge can make them teach "
            "(SGPOTrainer with a StepwiseJudge). Without one: easier data, or more completions per prompt (num_generations "
            f"above {s.group_size}).",
        )
    tied = f"{_percent(s.tied)} of the groups are tied: "
    if s.rts == 0:
        tied += (
            "no completion of the run has a right step, so there is nothing to reward, however it is judged. Easier data, or "
            "show the model solutions first (supervised fine-tuning)."
        )
    else:
        tied += (
            "all their completions fail at the same place, so there is nothing to prefer. Easier data, a finer segmenter, "
            "unit='characters', or more completions per prompt."
        )
    when(s.tied, 0.2, tied)
    when(
        s.abstained,
        0.1,
        f"In {_percent(s.abstained)} of the groups the judge was silent: is it reachable and able? The completions' column "
        "judge_reason says why. A Fallback judge, no_error='last_step' for judges that see everything, or an abler one.",
    )
    when(
        s.solved,
        0.4,
        f"{_percent(s.solved)} of the groups are solved and teach nothing more: harder data, or leave out prompts that are solved.",
    )
    when(
        s.other_rewards,
        0.1,
        f"{_percent(s.other_rewards)} of the groups are all wrong and yet teach, through other rewards alone: the policy is "
        "learning format, not answers. Lower those weights once format is there.",
    )
    when(
        s.clipped,
        0.25,
        f"{_percent(s.clipped)} of the completions were cut off before their end and count as wrong: raise max_completion_length.",
    )
    if s.distinct < 1.5 and s.teaching < 0.5:
        said.append(
            (
                0.5,
                f"A group has {s.distinct:.1f} distinct answers on average: the samples hardly differ. Raise the temperature, or "
                "lower the learning rate if it was not so at the start.",
            )
        )
    if s.rts_gap_end - s.rts_gap_start > 0.1:
        said.append(
            (
                0.5,
                f"RTS by steps ran away from RTS by characters (gap {s.rts_gap_start:+.2f} → {s.rts_gap_end:+.2f}): the policy pads "
                "with small right steps. unit='characters'.",
            )
        )
    return [text for _, text in sorted(said, key=lambda pair: -pair[0])]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
