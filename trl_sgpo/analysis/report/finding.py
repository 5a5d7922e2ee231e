"""
The finding: did training sharpen what the base could do already, or expand it? Decision rules as a pure function of
numbers with intervals ([`decide`]), and the words for the result.

More solved prompts are not yet an expansion. If pass@1 rises, the policy finds in `n` samples what the base finds in a
few times `n`; an exponential tilt of the base does that. So newly solved prompts are checked in two ways, if the
numbers are there: how many samples the *base* would need, by its own log-probabilities, for what the policy wrote; and
whether hard prompts gained more than a tilt gives (`tilt_line`).
"""

import math
from dataclasses import dataclass

from trl_sgpo.analysis.metrics import Estimate, SupportTable, chance_pass_at_k
from trl_sgpo.analysis.metrics.rates import UNDEFINED


KINDS = ("sharpened", "expanded", "shrank", "mixed", "no change", "unknown")

# Level of the intervals and tests that decide. Four of them can raise a false alarm, so each is stricter than 95 %: base
# against base gives "no change" in about 19 of 20 probes
LEVEL = 0.99
# With fewer prompts or samples, intervals say nothing
LEAST_PROMPTS = 8
LEAST_SAMPLES = 8
# A wider interval of the gain can hide a real gain, so "no change" is not said
WIDEST_NO_CHANGE = 0.1
# A prompt is within the base's reach if the base would solve it in this many times the samples that it had. The number is
# large because `base_rates` is a lower bound: it misses what the base knows and the policy does not write
REACH = 100


@dataclass(frozen=True)
class Evidence:
    """The numbers behind a finding: means over the same prompts, with intervals over prompts."""

    n_prompts: int
    n_samples: int  # of the base, per prompt
    k: int  # the largest k for which base and policy have samples
    base_pass_1: Estimate
    policy_pass_1: Estimate
    base_pass_k: Estimate
    policy_pass_k: Estimate
    gain_1: Estimate  # policy minus base, prompt by prompt, at `LEVEL`
    gain_k: Estimate
    support: SupportTable
    slope: Estimate = UNDEFINED  # of the tilt line: 1 for a pure tilt, less if hard prompts gained more
    base_rates: tuple[float, ...] = ()  # the base's pass@1 on each expanded prompt, from log-probabilities
    process_gain_k: Estimate = UNDEFINED  # gain in process-verified pass@k, at `LEVEL`
    guess: float | None = None  # probability that one guess is correct


@dataclass(frozen=True)
class Finding:
    """A finding in words."""

    kind: str  # one of `KINDS`
    headline: str
    evidence: tuple[str, ...] = ()  # the numbers behind it
    caveats: tuple[str, ...] = ()  # what it cannot say

    def __str__(self) -> str:
        return f"{self.headline}: {'; '.join(self.evidence)}" if self.evidence else f"{self.headline}."


def unknown(reason: str, evidence: tuple[str, ...] = ()) -> Finding:
    """The finding if there is no basis for one."""
    return Finding("unknown", f"Sharpened or expanded? Unknown, because {reason}", evidence)


def decide(e: Evidence) -> Finding:
    """
    The finding about a run. The rules, in order:

    1. *unknown*: too few prompts or samples, or neither base nor policy solved anything.
    2. *mixed*: prompts were both won and lost, each beyond chance.
    3. *shrank*: prompts were lost beyond chance, with or without a rise of pass@1.
    4. Prompts were won beyond chance and pass@k rose. *unknown* if guessing reaches the policy's pass@k. *mixed* if the
       answers are right but the steps are not. *sharpened* if these prompts are within the base's reach by its own
       log-probabilities. *mixed* if they are not, but the tilt line explains them. *sharpened* if there are no
       log-probabilities and the tilt line explains them. *expanded* otherwise.
    5. pass@1 rose: *sharpened*, or *mixed* if pass@k fell.
    6. pass@1 or pass@k moved in another way: *mixed*.
    7. Nothing moved: *no change*, or *unknown* if the interval is too wide to say so.

    "Rose" and "fell" mean that the interval does not contain 0. "Beyond chance" is [`SupportTable.changes`].
    """
    numbers = _numbers(e)
    reason = _too_little(e)
    if reason:
        return unknown(reason, numbers)
    changes = e.support.changes(LEVEL)
    up_1, down_1 = e.gain_1.low > 0, e.gain_1.high < 0
    up_k, down_k = e.gain_k.low > 0, e.gain_k.high < 0
    caveats = _caveats(e)

    def found(kind: str, headline: str) -> Finding:
        return Finding(kind, headline, numbers, caveats)

    if "expanded" in changes and "shrunk" in changes:
        return found("mixed", "A mixed picture: prompts were both won and lost, more than by chance")
    if "shrunk" in changes and up_1:
        return found("shrank", "Sharpened at the cost of support: it shrank")
    if "shrunk" in changes:
        return found("shrank", "Shrank: the support is smaller than the base's")
    if "expanded" in changes and up_k:
        return _won(e, numbers, caveats)
    if up_1 and down_k:
        return found("mixed", f"A mixed picture: pass@1 rose and pass@{e.k} fell")
    if up_1:
        return found("sharpened", "Sharpened inside the base's support")
    moved = [(k, up) for k, up, down in ((1, up_1, down_1), (e.k, up_k, down_k)) if up or down]
    if moved:
        said = " and ".join(f"pass@{k} {'rose' if up else 'fell'}" for k, up in moved)
        return found("mixed", f"A mixed picture: {said}, and not in the way of sharpening or expansion")
    if e.gain_1.high - e.gain_1.low > 2 * WIDEST_NO_CHANGE:
        change = f"{_signed(e.gain_1.low)} to {_signed(e.gain_1.high)}"
        return unknown(f"the change of pass@1 is known only as {change}: more prompts or samples are needed", numbers)
    return found("no change", "No change that this probe can see")


def _too_little(e: Evidence) -> str:
    """Why there is no basis for a finding; empty if there is one."""
    if e.n_prompts < LEAST_PROMPTS:
        return f"the probe has only {e.n_prompts} prompts (at least {LEAST_PROMPTS} are needed)"
    n = min(e.n_samples, e.k)
    if n < LEAST_SAMPLES:
        return f"{n} samples per prompt say nothing about support (at least {LEAST_SAMPLES} are needed)"
    if math.isnan(e.gain_1.low) or math.isnan(e.gain_k.low):
        return "the gains have no interval"
    if e.support.preserved + e.support.expanded + e.support.shrunk == 0:
        return (
            f"neither base nor policy solved a single prompt in {e.n_samples} samples: rarer solutions cannot be seen"
        )
    return ""


def _won(e: Evidence, numbers: tuple[str, ...], caveats: tuple[str, ...]) -> Finding:
    """Prompts were won beyond chance, and pass@k rose: is that beyond the base's reach?"""
    rate = _share(e.support.unseen_rate)
    unseen = f'"not solved by the base in {e.n_samples} samples" may still mean a pass rate of up to {rate}.'
    if e.guess and chance_pass_at_k(e.guess, e.k) >= e.policy_pass_k.low:
        return unknown(
            f"guessing alone reaches a pass@{e.k} of {_share(chance_pass_at_k(e.guess, e.k))}, so newly solved prompts "
            "prove nothing",
            numbers,
        )
    if not math.isnan(e.process_gain_k.low) and e.process_gain_k.low <= 0:
        return Finding(
            "mixed",
            "A mixed picture: more prompts have a right answer, but no more have a right solution",
            (*numbers, f"process-verified pass@{e.k} changed by {_interval(e.process_gain_k)}"),
            caveats,
        )
    tilted = e.slope.high >= 1  # NaN is not
    if e.base_rates:
        reach = REACH * e.n_samples
        within = sum(rate >= 1 / reach for rate in e.base_rates)
        typical = sorted(e.base_rates)[len(e.base_rates) // 2]
        needs = f"about {1 / typical:,.0f}" if typical > 1e-9 else "more than 1,000,000,000"
        rates = (
            f"by its own log-probabilities the base would need {needs} samples for what the policy writes there (median; "
            f"{within} of {len(e.base_rates)} such prompts are within {reach:,})"
        )
        if 2 * within >= len(e.base_rates):
            return Finding("sharpened", "Sharpened inside the base's support", (*numbers, rates), caveats)
        if tilted:
            return Finding(
                "mixed",
                "A mixed picture: prompts were won far beyond the base's reach, and yet no more than a tilt gives",
                (*numbers, rates),
                (unseen, *caveats),
            )
        return Finding("expanded", "Expanded beyond the base's reach", (*numbers, rates), (unseen, *caveats))
    if tilted:
        explained = "the newly solved prompts are no more than a tilt of the base gives"
        headline = "Sharpened inside the base's support"
        return Finding("sharpened", headline, (*numbers, explained), (unseen, *caveats))
    if math.isnan(e.slope.high):
        unchecked = (
            "Neither log-probabilities nor a tilt line were there to check how far these prompts are from the base."
        )
        caveats = (unchecked, *caveats)
    return Finding("expanded", "Expanded beyond what the base solved", numbers, (unseen, *caveats))


def _caveats(e: Evidence) -> tuple[str, ...]:
    found = []
    if e.gain_k.low <= 0 <= e.gain_k.high and e.gain_k.high - e.gain_k.low > 2 * WIDEST_NO_CHANGE:
        found.append(
            f"The change of pass@{e.k} is known only as {_signed(e.gain_k.low)} to {_signed(e.gain_k.high)}: with more prompts a "
            "change of the support might show."
        )
    if e.base_pass_k.value > 0.99:
        found.append(f"The base solves all these prompts within {e.k} samples: an expansion could not show on them.")
    if e.guess and chance_pass_at_k(e.guess, e.k) > 0.5 * e.base_pass_k.value:
        found.append(
            f"Guessing alone reaches a pass@{e.k} of {_share(chance_pass_at_k(e.guess, e.k))}: read Cover@tau and small k."
        )
    return tuple(found)


def _numbers(e: Evidence) -> tuple[str, ...]:
    s = e.support
    said = [
        f"pass@{k} {_share(base.value)} → {_share(policy.value)} (change {_interval(gain)})"
        for k, base, policy, gain in (
            (1, e.base_pass_1, e.policy_pass_1, e.gain_1),
            (e.k, e.base_pass_k, e.policy_pass_k, e.gain_k),
        )
    ]
    won, lost = f"{s.expanded} of {e.n_prompts} prompts won", f"{s.shrunk} lost"
    said.append(f"{won} (by chance {s.expanded_null:.1f}), {lost} (by chance {s.shrunk_null:.1f})")
    if not math.isnan(e.slope.value):
        said.append(f"tilt slope {e.slope.value:.2f} [{e.slope.low:.2f}, {e.slope.high:.2f}]")
    return tuple(said)


def _interval(x: Estimate) -> str:
    return _signed(x.value) + ("" if math.isnan(x.low) else f" [{_signed(x.low)}, {_signed(x.high)}]")


def _share(value: float) -> str:
    """`0.52`, `0.016`, `0.00021`: at least two digits, and as many as it takes not to say 0."""
    if math.isnan(value):
        return "?"
    size = abs(value)
    digits = 2 if value == 0 or size >= 0.0995 else 3 if size >= 0.0005 else min(9, 1 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return "?" if math.isnan(value) else ("-" if value < 0 else "+") + _share(abs(value))
