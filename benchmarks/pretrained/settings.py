"""What is compared: the methods, the runs, and the tables that they belong to. Nothing runs here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any


SEEDS = (0, 1, 2)
TUNING_SEED = 100
LEARNING_RATES = (1e-5, 2e-5)
BUDGET = {"chains": 150_000, "gsm8k": 400_000}  # generated tokens
TUNING_BUDGET = 60_000
GSM8K_RATE = 1e-5
TUNED = 0.0  # stands for the learning rate that tuning chose
GROUP_SIZE, GROUPS_PER_UPDATE = 8, 8


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        label (`str`):
            What a reader sees.
        config (`dict`):
            Arguments of `SGPOConfig` beyond those that all share.
        judge (`str`, *optional*):
            `"task"`, `"all_steps"` (the same, but steps that it has not checked count as right), `"arithmetic"`,
            `"random"`, or `"trained"`, which is a process reward model in a folder.
        imitate (`bool`):
            Whether the right completions are imitated, with an advantage of 1 each, and nothing else is done
            (rejection-sampling SFT).
    """

    label: str
    config: dict[str, Any] = field(default_factory=dict)
    judge: str | None = None
    imitate: bool = False


PREFIX = {"failed_groups": "prefix"}
ARMS = {
    "grpo": Arm("GRPO"),
    "sgpo": Arm("SGPO, as in the paper", judge="task"),
    "sgpo_longest": Arm("SGPO, share of the longest completion", {"rts_share_of": "longest"}, judge="task"),
    "prefix": Arm("prefix credit", PREFIX, judge="task"),
    "prefix_centred": Arm("prefix credit against the group", {**PREFIX, "prefix_baseline": "group"}, judge="task"),
    "grpo_16": Arm("GRPO, 16 completions per group", {"num_generations": 16}),
    "prefix_arithmetic": Arm("prefix credit, ArithmeticJudge alone", PREFIX, judge="arithmetic"),
    "prefix_random": Arm("prefix credit, random verdicts", PREFIX, judge="random"),
    "sgpo_all_steps": Arm("SGPO, unchecked steps count as right", judge="all_steps"),
    "prefix_all_steps": Arm("prefix credit, unchecked steps count as right", PREFIX, judge="all_steps"),
    "prefix_judge": Arm("prefix credit, trained judge", PREFIX, judge="trained"),
    "imitation": Arm("rejection-sampling SFT", imitate=True),
}
MAIN = ("grpo", "sgpo", "prefix")
ALL_STEPS = ("sgpo_all_steps", "prefix_all_steps")
COMPARED = (*MAIN, "sgpo_longest")  # over all seeds
OTHERS = ("prefix_centred", "grpo_16", "prefix_arithmetic", "prefix_random", "imitation")


@dataclass(frozen=True)
class Run:
    """One run: a task, a method, a learning rate (0: the one that tuning chose), a seed, and generated tokens."""

    task: str
    arm: str
    learning_rate: float
    seed: int
    tokens: int

    @property
    def key(self) -> str:
        return f"{self.task}/{self.arm}/lr{self.learning_rate:g}/seed{self.seed}"


def _tune() -> list[Run]:
    return [Run("chains", arm, rate, TUNING_SEED, TUNING_BUDGET) for arm in MAIN for rate in LEARNING_RATES]


def _main() -> list[Run]:
    return [Run("chains", arm, TUNED, seed, BUDGET["chains"]) for seed in SEEDS for arm in COMPARED]


def _others() -> list[Run]:
    return [Run("chains", arm, TUNED, SEEDS[0], BUDGET["chains"]) for arm in OTHERS]


def _gsm8k(*arms: str) -> list[Run]:
    return [Run("gsm8k", arm, GSM8K_RATE, SEEDS[0], BUDGET["gsm8k"]) for arm in arms]


@dataclass(frozen=True)
class Table:
    """A question and the runs that answer it."""

    question: str
    runs: Callable[[], list[Run]]


TABLES = {
    "tune": Table("Which learning rate suits each method?", _tune),
    "main": Table("Chains of 4 and 5 operations: how many tokens does each method need?", _main),
    "others": Table("And other settings, judges and controls?", _others),
    "gsm8k": Table("And word problems?", partial(_gsm8k, *MAIN, "prefix_centred")),
    "gsm8k_all_steps": Table(
        "And word problems if steps that nobody checked count as right?", partial(_gsm8k, *ALL_STEPS)
    ),
    "gsm8k_judge": Table("And word problems with a trained judge?", partial(_gsm8k, "prefix_judge")),
}
