"""Is a run with a loss of 0 broken? What became of its groups, why some teach nothing, and what to change."""

import math
from dataclasses import dataclass

from trl_sgpo.length_alarm import COMPLETIONS, ROUNDS, changed_for_nothing


@dataclass(frozen=True)
class RunFacts:
    """
    The numbers of a run behind its diagnosis. `teaching` to `unjudged` are shares of all logged groups, and all of
    them except `teaching` need an outcome. NaN means unknown.
    """

    n_groups: int = 0  # logged groups
    n_updates: int = 0
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
    loss: float = math.nan  # mean of the absolute logged loss
    grad_norm: float = math.nan  # mean
    still: float = math.nan  # share of log entries with a gradient norm of 0
    clipped: float = math.nan  # share of completions that were cut off
    distinct: float = math.nan  # mean number of distinct answers of a group
    rts: float = math.nan  # mean of the judged completions
    rts_gap_start: float = math.nan  # RTS by steps minus RTS by characters, in the first fifth
    rts_gap_end: float = math.nan  # and in the last fifth
    length_start: float = math.nan  # mean length of a completion, in tokens
    length_end: float = math.nan
    accuracy_start: float = math.nan
    accuracy_end: float = math.nan


# True of every run, so the page says it once
LOSS_IS_ZERO = (
    "With one update per batch (num_iterations=1) the printed loss says nothing: advantages sum to zero inside a group, and "
    "the ratio of new to old policy is 1, so it is 0 or, if the loss is averaged over tokens and lengths differ, wobbles "
    "around 0. The gradient is not 0: look at grad_norm, and at how many groups teach."
)


def answer(facts: RunFacts) -> str:
    """One or two sentences: is it broken?"""
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
    """What to change, most urgent first; empty if nothing stands out."""
    if facts.group_size == 1:
        return ["Groups of one completion have no advantage: num_generations must be 2 or more."]
    unjudged = (
        ", although there is a judge. After judge_until it is not asked, and with the default judge_scope it sees "
        "only failed groups. If it should have been asked, look at sgpo/judge_calls."
    )
    if not facts.has_judge:
        unjudged = (
            ": a step-wise judge can make them teach (SGPOTrainer with a StepwiseJudge). Without one: easier data, or "
            f"more completions per prompt (num_generations above {facts.group_size})."
        )
    tied = (
        "all their completions fail at the same place, so none is better than another. Use easier data, a finer "
        "segmenter, unit='characters', or more completions per prompt."
    )
    if facts.rts == 0:
        tied = (
            "the judge finds no right step in any completion, so nothing is rewarded. Read a few. If their first steps are "
            "right, the judge is not able enough, or checks too few steps (`sgpo/unchecked_steps`): measure it with "
            "`trl-sgpo judge-eval`. If they are wrong, use easier data, or "
            "show the model solutions first (supervised fine-tuning)."
        )
    alike = facts.distinct < 1.5 and facts.teaching < 0.5
    pads = facts.rts_gap_end - facts.rts_gap_start > 0.1
    lengths = f"{facts.length_start:.0f} → {facts.length_end:.0f} tokens"
    accuracies = f"({_percent(facts.accuracy_start, 1)} → {_percent(facts.accuracy_end, 1)})"
    is_long_enough = facts.n_updates >= 5 * ROUNDS and facts.n_groups * facts.group_size >= 5 * COMPLETIONS
    changed = (
        changed_for_nothing(facts.length_start, facts.length_end, facts.accuracy_start, facts.accuracy_end)
        if facts.has_judge and is_long_enough
        else None
    )
    # How urgent it is, from which value on to say it, and what to say. NaN is below every value
    said = [
        (
            facts.unjudged,
            0.1 if facts.has_judge else 0.3,
            f"{_percent(facts.unjudged)} of the groups failed and were not judged{unjudged}",
        ),
        (facts.tied, 0.2, f"{_percent(facts.tied)} of the groups are tied: {tied}"),
        (
            facts.abstained,
            0.1,
            f"In {_percent(facts.abstained)} of the groups the judge was silent: is it reachable and able? The "
            "completions' column judge_reason says why. Use a Fallback judge, a more able judge, or "
            "no_error='last_step' if the judge sees everything.",
        ),
        (
            facts.solved,
            0.4,
            f"{_percent(facts.solved)} of the groups are solved and teach nothing more: use harder data, or leave out "
            "solved prompts.",
        ),
        (
            facts.other_rewards,
            0.1,
            f"{_percent(facts.other_rewards)} of the groups failed and still teach, only through other rewards: the "
            "policy learns format, not answers. Lower these weights when the format is right.",
        ),
        (
            facts.clipped,
            0.25,
            f"{_percent(facts.clipped)} of the completions were cut off before their end and count as wrong: raise "
            "max_completion_length.",
        ),
        (
            0.5 * alike,
            0.5,
            f"A group has {facts.distinct:.1f} distinct answers on average: the samples hardly differ. Raise the "
            "temperature. If they differed at the start, lower the learning rate.",
        ),
        (
            0.5 * pads,
            0.5,
            "RTS by steps grew faster than RTS by characters (gap "
            f"{facts.rts_gap_start:+.2f} → {facts.rts_gap_end:+.2f}): the policy pads with small right steps. Use "
            "unit='characters'.",
        ),
        (
            0.5 * (changed == "longer"),
            0.5,
            f"Completions grew ({lengths}), and accuracy did not rise {accuracies}: a judge that blames late steps pays for "
            "more steps. Read some, measure the judge (`trl-sgpo judge-eval`), and lower failed_group_weight or set judge_until.",
        ),
        (
            0.5 * (changed == "shorter"),
            0.5,
            f"Completions became shorter ({lengths}), and accuracy fell {accuracies}: the policy may learn to stop early. With "
            "failed_groups='sgpo' the reward is a share of a completion's steps; failed_groups='prefix' or "
            "rts_share_of='longest' takes that away.",
        ),
    ]
    urgent = [(urgency, text) for urgency, least, text in said if urgency >= least]
    return [text for _, text in sorted(urgent, key=lambda pair: -pair[0])]


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
