"""
"My loss is 0, is it broken?" What became of the groups, why some teach nothing, and what to change. Pure functions of
numbers.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunFacts:
    """
    The numbers of a run behind its diagnosis. Shares are shares of all logged groups; NaN means unknown.

    Args:
        n_groups, group_size (`int`):
            Logged groups and completions per group.
        teaching, solved, mixed, rescued, other_rewards, tied, abstained, unjudged (`float`):
            Shares of groups. All except `teaching` need an outcome.
        has_judge (`bool`):
            Whether there is a step-wise judge.
        loss (`float`):
            Mean of the absolute logged loss.
        grad_norm (`float`), still (`float`):
            Mean gradient norm, and the share of log entries with a gradient norm of 0.
        clipped (`float`):
            Share of completions that were cut off.
        distinct (`float`):
            Mean number of distinct answers of a group.
        rts (`float`):
            Mean reasoning trajectory score of the judged completions.
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


# True of every run, so the page says it once
LOSS_IS_ZERO = (
    "With one update per batch (num_iterations=1) the printed loss is about 0 by construction: advantages sum to zero inside "
    "a group, and the ratio of new to old policy is 1. The gradient is not 0: look at grad_norm, and at how many groups teach."
)


def answer(facts: RunFacts) -> str:
    """
    One or two sentences: is it broken?

    Example:

    ```python
    >>> answer(RunFacts(n_groups=600, group_size=8, teaching=0.0, grad_norm=0.0, loss=0.0, still=1.0))
    'Nothing is learnt: none of the 600 logged groups teaches. Mean |loss| 0, mean grad_norm 0 (exactly 0 at 100 % of the log entries).'
    ```
    """
    printed = ""
    if not math.isnan(facts.loss) and not math.isnan(facts.grad_norm):
        still = f" (exactly 0 at {_percent(facts.still)} of the log entries)" if facts.still > 0 else ""
        printed = f" Mean |loss| {_small(facts.loss)}, mean grad_norm {_small(facts.grad_norm)}{still}."
    if facts.group_size == 1 or math.isnan(facts.teaching):
        return f"Unknown: there are no groups of completions to look at.{printed}"
    of = f"of the {facts.n_groups} logged groups" if facts.n_groups else "of the groups, by the log,"
    if facts.teaching == 0:
        return f"Nothing is learnt: none {of} teaches.{printed}"
    if facts.teaching < 0.3:
        return f"Not broken, but starved: {_percent(facts.teaching)} {of} teach; in each of the others all rewards are equal.{printed}"
    return f"Not broken: {_percent(facts.teaching)} {of} teach.{printed}"


def advice(facts: RunFacts) -> list[str]:
    """
    What to change, most urgent first; empty if nothing stands out.

    Example:

    ```python
    >>> advice(RunFacts(n_groups=10, group_size=8, teaching=0.5, tied=0.5))[0].split(":")[0]
    '50 % of the groups are tied'
    ```
    """
    said: list[tuple[float, str]] = []

    def when(share: float, least: float, text: str) -> None:
        if share >= least:  # NaN is not
            said.append((share, text))

    if facts.group_size == 1:
        return ["Groups of one completion have no advantage: num_generations must be 2 or more."]
    if facts.has_judge:
        when(
            facts.unjudged,
            0.1,
            f"{_percent(facts.unjudged)} of the groups failed and were not judged, although there is a judge. After judge_until it is "
            "not asked, and with the default judge_scope it sees only failed groups. If it should have been asked, look at "
            "sgpo/judge_calls.",
        )
    else:
        when(
            facts.unjudged,
            0.3,
            f"{_percent(facts.unjudged)} of the groups failed and were not judged: a step-wise judge can make them teach "
            "(SGPOTrainer with a StepwiseJudge). Without one: easier data, or more completions per prompt (num_generations "
            f"above {facts.group_size}).",
        )
    tied = f"{_percent(facts.tied)} of the groups are tied: "
    if facts.rts == 0:
        tied += (
            "no completion of the run has a right step, so no judge can find anything to reward. Use easier data, or show "
            "the model solutions first (supervised fine-tuning)."
        )
    else:
        tied += (
            "all their completions fail at the same place, so none is better than another. Use easier data, a finer segmenter, "
            "unit='characters', or more completions per prompt."
        )
    when(facts.tied, 0.2, tied)
    when(
        facts.abstained,
        0.1,
        f"In {_percent(facts.abstained)} of the groups the judge was silent: is it reachable and able? The completions' column "
        "judge_reason says why. Use a Fallback judge, a more able judge, or no_error='last_step' if the judge sees everything.",
    )
    when(
        facts.solved,
        0.4,
        f"{_percent(facts.solved)} of the groups are solved and teach nothing more: use harder data, or leave out solved prompts.",
    )
    when(
        facts.other_rewards,
        0.1,
        f"{_percent(facts.other_rewards)} of the groups failed and still teach, only through other rewards: the policy learns "
        "format, not answers. Lower these weights when the format is right.",
    )
    when(
        facts.clipped,
        0.25,
        f"{_percent(facts.clipped)} of the completions were cut off before their end and count as wrong: raise max_completion_length.",
    )
    if facts.distinct < 1.5 and facts.teaching < 0.5:
        said.append(
            (
                0.5,
                f"A group has {facts.distinct:.1f} distinct answers on average: the samples hardly differ. Raise the temperature. If "
                "they differed at the start, lower the learning rate.",
            )
        )
    if facts.rts_gap_end - facts.rts_gap_start > 0.1:
        said.append(
            (
                0.5,
                f"RTS by steps grew faster than RTS by characters (gap {facts.rts_gap_start:+.2f} → {facts.rts_gap_end:+.2f}): the policy pads "
                "with small right steps. Use unit='characters'.",
            )
        )
    return [text for _, text in sorted(said, key=lambda pair: -pair[0])]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
