"""The tables of the study: which runs each is made of. `report.py` reads them back from what was recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.controlled_study.records import tuning_runs
from benchmarks.controlled_study.settings import (
    AXIS_LEARNING_RATE,
    AXIS_NOISE,
    AXIS_SEEDS,
    EXPOSURES,
    LEARNING_RATES,
    OTHER_BASES,
    SEEDS,
    TUNING_CHECK_SEEDS,
    TUNING_SEEDS,
    Run,
)
from trl_sgpo.tasks.rewrite_chain import AXES


TUNED = 0.0  # stands for the learning rate that tuning chose
RECOMMENDED = "prefix"
THREE = ("grpo", "sgpo", RECOMMENDED)

BUDGET = {"5": 150_000, "20": 200_000, "75": 300_000, "95": 900_000, "99": 900_000}  # generated tokens
AREA = {"5": 150_000, "20": 200_000, "75": 300_000, "95": 250_000, "99": 250_000}  # tokens that areas are taken over
AREA |= dict.fromkeys(OTHER_BASES, AREA["95"])
JUDGE_BUDGET = 300_000  # half as many again as GRPO needs to 50 %
TUNING_BUDGET = {"5": 100_000, "20": 150_000, "75": 250_000, "95": 350_000, "99": 450_000}
STOP_AT = 0.75
COMMON_RATE = 2e-4  # GRPO's best
LARGE_UPDATE = 256  # completions
BLAMES_LAST = "last:1"
LENGTH_BUDGET = 300_000

# The learning rates that tuning chose
BEST_RATES = {(dial, arm): 4e-4 for dial in ("75", "95", "99") for arm in THREE} | {
    ("95", "grpo"): 2e-4,
    ("99", "grpo"): 1e-4,
}
ANEW_BUDGET = {"75": 200_000, "95": 300_000, "99": 450_000}
FORMS = ("", "_centred", "_centred_half", "_centred_text")  # of prefix credit
CUT_SEEDS = (10, 11, 12)
ERRING = ("random:0.2", "random:0.4", "early:1", "late:1")  # judges
ANEW = "anew"  # bases made on another machine, and every run that is compared made beside the others

CREDIT_ARMS = ("prefix_.3_1", "prefix_1_1", "prefix_1_0")
WITHOUT_JUDGE = ("sign", "sign_.1", "ngrpo", "zvp", "lens")
MAIN_ARMS = (
    *THREE,
    *CREDIT_ARMS,
    *WITHOUT_JUDGE,
    "grpo_exclude",
    "sgpo_exclude",
    "prefix_exclude",
    "sgpo_all_incorrect",
    "sgpo_quarter",
    "prefix_all_incorrect",
)
# At first most errors are in the first step, and "early" cannot move those: "early:1" is wrong about as often as "late:0.4"
NOISY_JUDGES = (
    "random:0.2",
    "random:0.4",
    "stubborn:0.4",
    "early:0.2",
    "early:0.4",
    "early:1",
    "late:0.2",
    "late:0.4",
    "random:1",
)
JUDGED_ARMS = ("sgpo", "sgpo_votes", RECOMMENDED, "prefix_votes")
JUDGE_RATES = (1e-4, 2e-4, 4e-4)  # up to the best with an exact judge
GUARDS = ("sgpo_spread", "sgpo_half", "prefix_1_1", "prefix_1_0")  # tried under one judge only


@dataclass(frozen=True)
class Table:
    """A question and the runs that answer it."""

    question: str
    runs: Callable[[], list[Run]]


def _tune() -> list[Run]:
    runs = []
    for arm in MAIN_ARMS:
        runs += tuning_runs("95", arm, TUNING_BUDGET["95"])
    for dial in ("99", "75", "20", "5"):
        for arm in (*THREE, "prefix_all_incorrect"):
            # The others' budget shows no difference between the learning rates of GRPO at 99 %
            late = (dial, arm) == ("99", "grpo")
            runs += tuning_runs(dial, arm, (BUDGET if late else TUNING_BUDGET)[dial])
    # What the grid leaves out, shown and not chosen from: between the best rates of GRPO and of the judged arms, and below
    # those of the arms that are best at its end
    runs += [Run("95", arm, 3e-4, TUNING_SEEDS[0], TUNING_BUDGET["95"], stop_at=STOP_AT) for arm in THREE]
    runs += [
        Run("95", arm, 2e-5, TUNING_SEEDS[0], TUNING_BUDGET["95"], stop_at=STOP_AT)
        for arm in ("sign", "ngrpo", "lens")
    ]
    return runs


def _tune_check() -> list[Run]:
    runs = [run for arm in (*THREE, "zvp") for run in tuning_runs("95", arm, TUNING_BUDGET["95"])]
    return [replace(run, seed=seed) for run in runs for seed in TUNING_CHECK_SEEDS]


def _main() -> list[Run]:
    budget = dict.fromkeys(MAIN_ARMS, BUDGET["95"])
    budget |= dict.fromkeys(WITHOUT_JUDGE, 400_000)  # twice what GRPO needs
    budget["sgpo_quarter"] = 400_000  # off before SGPO is done
    return [
        Run("95", arm, TUNED, seed, budget[arm], stop_at=STOP_AT, probe=arm in THREE)
        for seed in SEEDS
        for arm in MAIN_ARMS
    ]


def _dials() -> list[Run]:
    runs = [
        Run("99", arm, TUNED, seed, BUDGET["99"], stop_at=STOP_AT)
        for seed in SEEDS
        for arm in (*THREE, "prefix_all_incorrect")
    ]
    for dial in ("75", "20", "5"):
        arms = (*THREE, "prefix_all_incorrect", *(("prefix_handover", "sgpo_handover") if dial == "75" else ()))
        runs += [
            Run(dial, arm, TUNED, seed, BUDGET[dial], probe=dial == "75" and arm in THREE)
            for seed in SEEDS
            for arm in arms
        ]
    return runs


def _tune_other_bases() -> list[Run]:
    # More fail there than on dial 95, and the others' budget shows no difference between the learning rates of GRPO
    budget = dict.fromkeys(THREE, TUNING_BUDGET["95"]) | {"grpo": BUDGET["95"]}
    return [run for base in OTHER_BASES for arm in THREE for run in tuning_runs(base, arm, budget[arm])]


def _other_bases() -> list[Run]:
    return [
        Run(base, arm, TUNED, seed, BUDGET["95"], stop_at=STOP_AT)
        for base in OTHER_BASES
        for seed in SEEDS
        for arm in THREE
    ]


def _tune_judges() -> list[Run]:
    runs = []
    for judge in NOISY_JUDGES:
        for arm in JUDGED_ARMS:
            rates = JUDGE_RATES if arm.startswith("sgpo") else JUDGE_RATES[1:]  # prefix credit never chose the lowest
            runs += tuning_runs("95", arm, 250_000, judge, rates)
    for arm in ("prefix_1_1", "prefix_1_0"):
        runs += tuning_runs("95", arm, 250_000, "random:0.4", rates=JUDGE_RATES[1:])
    return runs


def _judges() -> list[Run]:
    conditions = [(judge, arm) for judge in NOISY_JUDGES for arm in JUDGED_ARMS]
    conditions += [("random:0.4", arm) for arm in GUARDS]
    return [
        Run("95", arm, TUNED, seed, JUDGE_BUDGET, judge=judge, stop_at=0.6)
        for seed in SEEDS
        for judge, arm in conditions
    ]


def _group_sizes() -> list[Run]:
    return [
        Run("95", arm, TUNED, seed, 300_000, group_size=group_size, stop_at=0.6)
        for seed in SEEDS
        for group_size in (4, 16)
        for arm in THREE
    ]


def _common_rate() -> list[Run]:
    return [Run("95", arm, COMMON_RATE, seed, 400_000, stop_at=STOP_AT) for seed in SEEDS for arm in THREE]


def _tune_large_updates() -> list[Run]:
    runs = [run for arm in THREE for run in tuning_runs("95", arm, 800_000, rates=LEARNING_RATES[2:])]
    return [replace(run, completions_per_update=LARGE_UPDATE) for run in runs]


def _large_updates() -> list[Run]:
    return [
        Run("95", arm, TUNED, seed, 1_200_000, completions_per_update=LARGE_UPDATE, stop_at=STOP_AT)
        for seed in SEEDS
        for arm in THREE
    ]


def _axis_budget(exposure: float) -> int:
    return 300_000 if exposure else 100_000  # where nothing moves, nothing more is to be seen


def _axes(exposures: Sequence[float]) -> list[Run]:
    runs = []
    for seed in AXIS_SEEDS:
        for exposure in exposures:
            for axis in AXES:
                dial = f"{axis}@{exposure:g}"
                tokens = _axis_budget(exposure)
                runs += [Run(dial, arm, AXIS_LEARNING_RATE, seed, tokens) for arm in THREE]
                if exposure:  # GRPO dies at this rate where nearly all groups fail
                    runs.append(Run(dial, "grpo", AXIS_LEARNING_RATE / 2, seed, tokens))
                if not exposure:  # what the architecture can, from the base that knows least
                    runs.append(Run(dial, "sft", 1e-3, seed, 1_000_000, stop_at=0.9))
    return runs


def _length() -> list[Run]:
    arms = ("sgpo", RECOMMENDED)
    return [Run("95", arm, COMMON_RATE, s, LENGTH_BUDGET, judge=BLAMES_LAST) for s in SEEDS[:3] for arm in arms]


def _anew(dial: str, arm: str, seed: int, factor: float = 1, **others: Any) -> Run:
    """A run on a base that was made anew, at a multiple of its method's best learning rate."""
    method = arm.split("_")[0]
    of_prefix = {"stop_at": 0.8, "probe": True} if method == RECOMMENDED else {"stop_at": STOP_AT}
    rate = factor * BEST_RATES[dial, method]
    return Run(dial, arm, rate, seed, ANEW_BUDGET[dial], beside=ANEW, **(of_prefix | others))


def _dead_updates() -> list[Run]:
    # A run in which no update is dead is the same with the option: there one seed is run both ways. SGPO has a few at 99 %
    return [
        _anew(dial, arm + skip, seed, factor)
        for seed in SEEDS
        for dial in ANEW_BUDGET
        for arm in THREE
        for factor in (1, 2)
        for skip in ("", "_live")
        if not skip or arm == "grpo" or (dial, arm) == ("99", "sgpo") or seed == SEEDS[0]
    ]


def _dead_tokens() -> list[Run]:
    # Both of a pair, one after the other, so that the machine is the same for both
    return [
        _anew(dial, arm + cut, seed)
        for seed in SEEDS
        for dial in ("95", "99")
        for arm in ("grpo", RECOMMENDED)
        for cut in ("", "_cut")
    ]


def _baseline_tokens() -> list[Run]:
    # Seeds of its own: the runs of `dead_tokens` did not record how many tokens were left
    return [
        _anew(dial, f"{RECOMMENDED}{form}_cut", seed)
        for seed in CUT_SEEDS
        for dial in ANEW_BUDGET
        for form in FORMS[:2]
    ]


def _baseline() -> list[Run]:
    runs = [
        _anew(dial, RECOMMENDED + form, seed, factor)
        for factor in (1, 2, 4)
        for seed in SEEDS
        for dial in ANEW_BUDGET
        for form in (FORMS if factor == 1 else FORMS[:3])  # the second clock at one rate
    ]
    # At four times the rate all runs of the first seed were dead by 25k tokens, the later ones by 50k
    return [
        replace(run, tokens=50_000) if run.learning_rate > 2 * BEST_RATES[run.dial, "sgpo"] else run for run in runs
    ]


def _baseline_judges() -> list[Run]:
    return [
        _anew("95", RECOMMENDED + form, seed, judge=judge) for seed in SEEDS for judge in ERRING for form in FORMS[:3]
    ]


def _baseline_mixed() -> list[Run]:
    return [
        _anew(dial, f"{RECOMMENDED}{form}_all_incorrect", seed)
        for seed in SEEDS
        for dial in ANEW_BUDGET
        for form in FORMS[:2]
    ]


def _baseline_axes() -> list[Run]:
    axes = [axis for axis in AXES if axis != "representation"]
    return [
        Run(f"{axis}@{exposure:g}", RECOMMENDED + form, AXIS_LEARNING_RATE, seed, 200_000, beside=ANEW)
        for seed in AXIS_SEEDS
        for exposure in EXPOSURES[1:]
        for axis in axes
        for form in FORMS[:3]
    ]


def _reports() -> list[Run]:
    budgets = BUDGET | {f"{axis}@{exposure:g}": _axis_budget(exposure) for axis in AXES for exposure in (0.0, 0.1)}
    return [
        Run(dial, arm, AXIS_LEARNING_RATE if "@" in dial else TUNED, 0, tokens, report=True, stop_at=STOP_AT)
        for dial, tokens in budgets.items()
        for arm in THREE
    ]


TABLES = {
    "tune": Table("Which learning rate suits each method?", _tune),
    "tune_check": Table("Would two more seeds have chosen the same?", _tune_check),
    "main": Table("At about 95 % failed groups, how many tokens does each method need to 50 % accuracy?", _main),
    "dials": Table("And at 5, 20, 75 and 99 %?", _dials),
    "common_rate": Table("How much of the gain is the learning rate? All methods at GRPO's:", _common_rate),
    "tune_other_bases": Table("Which learning rate suits each method on other base models?", _tune_other_bases),
    "other_bases": Table("And from base models of other pretraining seeds?", _other_bases),
    "tune_judges": Table("Which learning rate suits each method under a judge with errors?", _tune_judges),
    "judges": Table("What does a judge with errors leave of the gain?", _judges),
    "group_sizes": Table("And with 4 or 16 completions per group?", _group_sizes),
    "tune_large_updates": Table(
        "Which learning rate suits updates of four times as many prompts?", _tune_large_updates
    ),
    "large_updates": Table("And with four times as many prompts per update?", _large_updates),
    "axes": Table(
        f"And outside of what pretraining showed? (pretraining noise {AXIS_NOISE})", lambda: _axes((0.0, 0.1))
    ),
    "axes_rare": Table("And if pretraining showed it rarely?", lambda: _axes((0.02,))),
    "length": Table("Does a judge that always blames the last step teach length, and is it noticed?", _length),
    "dead_updates": Table("What does an optimizer step in which nothing teaches do?", _dead_updates),
    "baseline": Table("Is credit against the group's baseline as fast, and more stable?", _baseline),
    "baseline_judges": Table("And under a judge with errors?", _baseline_judges),
    "baseline_mixed": Table("And if wrong completions of mixed groups are judged too?", _baseline_mixed),
    "baseline_axes": Table("And outside of what pretraining showed?", _baseline_axes),
    "baseline_tokens": Table("And how much less is there to compute?", _baseline_tokens),
    "dead_tokens": Table(
        "Is learning the same if no compute is spent on what has no credit, and how long does it take?", _dead_tokens
    ),
    "reports": Table("What does the sharpening report say of each?", _reports),
}
