"""
What the study compares: the base models (dials) and the methods (arms). Nothing runs here.

A run is one arm on one dial with one judge, learning rate, group size and seed. Its key is made of these. It is the name of its
record.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_sgpo.tasks.rewrite_chain import PretrainConfig


N_OPERATIONS = 5
LENGTH = 4  # letters: 1,296 answers, so a guess is right once in 1,296
COMPLETIONS_PER_UPDATE = 64
TOKENS_PER_COMPLETION = 35  # of a gold solution: 5 blocks of 4 letters, 10 operations left, 4 separators, the end
MAX_COMPLETION_LENGTH = 56

BASE = PretrainConfig(
    layers=2, width=64, clean_updates=1500, noisy_updates=150, max_operations=N_OPERATIONS, length=LENGTH
)

# Base models by the share of their groups of eight that fail: the noise that gives it was found by trial, and the share
# itself is measured again and recorded (table `bases`)
DIALS = {
    "5": replace(BASE, noise=0.135),
    "20": replace(BASE, noise=0.21),
    "75": replace(BASE, noise=0.5),
    "95": replace(BASE, noise=0.75),
    "99": replace(BASE, noise=0.97),
}
# As dial 95, from other seeds of the pretraining: are the results those of one base model?
OTHER_BASES = {f"95-base{seed}": replace(DIALS["95"], seed=seed) for seed in (1, 2)}
AXIS_NOISE = 0.5
EXPOSURES = (0.0, 0.02, 0.1)

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)  # every arm is tuned on the same ones
AXIS_LEARNING_RATE = 2e-4  # the highest at which every arm lives with 95 % failed groups
TUNING_SEEDS = (100,)
TUNING_CHECK_SEEDS = (101, 102)  # nothing is chosen by them
SEEDS = (0, 1, 2, 3, 4)
AXIS_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        name (`str`):
            Its name in keys and tables.
        label (`str`):
            What a reader sees.
        config (`dict`):
            Arguments of `SGPOConfig` beyond those that all arms share.
        judge (`bool`):
            Whether a `StepwiseJudge` is among the reward functions.
        votes (`int`):
            Judgments of each completion. Three quarters of them have to agree, else they abstain.
        retired (`bool`):
            Whether the package has lost the option that it tried. Its recorded runs stay, with the commit that made them.
    """

    name: str
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    judge: bool = False
    votes: int = 1
    retired: bool = False


def _coefficients(prefix_reward: float, error_penalty: float) -> dict[str, Any]:
    return {"failed_groups": "prefix", "prefix_reward": prefix_reward, "error_penalty": error_penalty}


PREFIX = _coefficients(1.0, 0.5)
CENTRED = {"failed_groups": "prefix", "prefix_baseline": "group"}


ARMS = {
    arm.name: arm
    for arm in (
        Arm("grpo", "GRPO"),
        Arm("grpo_exclude", "GRPO, dead groups out of the denominator", {"exclude_dead_groups": True}),
        Arm("sgpo", "SGPO, as in the paper", judge=True),
        Arm("sgpo_exclude", "SGPO, dead groups out of the denominator", {"exclude_dead_groups": True}, judge=True),
        Arm("sgpo_all_incorrect", "SGPO on every wrong completion", {"judge_scope": "all_incorrect"}, judge=True),
        Arm("sgpo_quarter", "SGPO, off after 100k tokens", {"judge_until": 0.25}, judge=True),
        Arm("sgpo_spread", "SGPO, RTS spread of at least 0.3", judge=True, retired=True),
        Arm("sgpo_half", "SGPO, failed groups at half weight", {"failed_group_weight": 0.5}, judge=True),
        Arm("sgpo_handover", "SGPO, weight = share of failed groups", judge=True, retired=True),
        Arm("prefix", "prefix credit", PREFIX, judge=True),
        Arm("sgpo_votes", "SGPO, 3 of 4 judgments agree", judge=True, votes=4),
        Arm("prefix_votes", "prefix credit, 3 of 4 judgments agree", PREFIX, judge=True, votes=4),
        Arm("prefix_exclude", "prefix credit, dead groups out of the denominator", {**PREFIX, "exclude_dead_groups": True}, judge=True),
        Arm("prefix_all_incorrect", "prefix credit, also in mixed groups", {**PREFIX, "judge_scope": "all_incorrect"}, judge=True),
        Arm("prefix_handover", "prefix credit, weight = share of failed groups", judge=True, retired=True),
        Arm("prefix_.3_1", "prefix credit, +0.3 / -1", _coefficients(0.3, 1.0), judge=True),
        Arm("prefix_1_1", "prefix credit, +1 / -1", _coefficients(1.0, 1.0), judge=True),
        Arm("prefix_1_0", "prefix credit, +1 / 0", _coefficients(1.0, 0.0), judge=True),
        Arm("prefix_centred", "prefix credit against the group", CENTRED, judge=True),
        Arm("prefix_centred_half", "prefix credit against the group, and half as it is", judge=True, retired=True),
        Arm("prefix_centred_text", "prefix credit against the group, by characters", judge=True, retired=True),
        Arm("prefix_centred_all_incorrect", "prefix credit against the group, also in mixed groups", {**CENTRED, "judge_scope": "all_incorrect"}, judge=True),
        Arm("sign", "NSR: -1 in failed groups", {"failed_groups": "nsr"}),
        Arm("sign_.1", "NSR: -0.1 in failed groups", {"failed_groups": "nsr", "failed_group_weight": 0.1}),
        Arm("ngrpo", "NGRPO's advantages in failed groups", {"failed_groups": "ngrpo", "epsilon": 0.16, "epsilon_high": 0.24}),
        Arm("zvp", "RL-ZVP in failed groups", {"failed_groups": "zvp"}),
        Arm("lens", "LENS in failed groups", {"failed_groups": "lens"}),
        Arm("grpo_live", "GRPO, dead updates left out", {"skip_dead_updates": True}),
        Arm("sgpo_live", "SGPO, dead updates left out", {"skip_dead_updates": True}, judge=True),
        Arm("prefix_live", "prefix credit, dead updates left out", {**PREFIX, "skip_dead_updates": True}, judge=True),
        Arm("grpo_cut", "GRPO, dead tokens left out", {"skip_dead_tokens": True}),
        Arm("prefix_cut", "prefix credit, dead tokens left out", {**PREFIX, "skip_dead_tokens": True}, judge=True),
        Arm("prefix_centred_cut", "prefix credit against the group, dead tokens left out", {**CENTRED, "skip_dead_tokens": True}, judge=True),
        Arm("sft", "SFT on gold solutions (control)"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """
    One run of the study.

    Args:
        dial (`str`):
            A key of `DIALS` or `OTHER_BASES`, or `"<axis>@<exposure>"`.
        arm (`str`):
            A key of `ARMS`.
        judge (`str`):
            `"exact"`, or `"<kind>:<probability>"` of [`noisy_judges.noisy_judge`].
        learning_rate (`float`):
            Of AdamW, constant.
        seed (`int`):
            Of the training; 100 and above are used for tuning only.
        group_size (`int`):
            Completions per prompt, G.
        completions_per_update (`int`):
            Of all groups of an update together.
        tokens (`int`):
            To be generated.
        stop_at (`float`, *optional*):
            The run ends early when the accuracy has reached this in two evaluations one after the other.
        probe (`bool`):
            Whether base and policy are compared with 64 samples per prompt at an accuracy of one half, and at the end.
        report (`bool`):
            Whether it leaves a folder for `trl_sgpo.scripts.report`, with its completions and a probe by
            `SharpeningCallback` at the end; the report's verdict in words is recorded.
        beside (`str`):
            Name of the comparison that the run was made for, if it must not be compared with others: bases that are made
            anew on another machine differ a little.
    """

    dial: str
    arm: str
    learning_rate: float
    seed: int
    tokens: int
    judge: str = "exact"
    group_size: int = 8
    completions_per_update: int = COMPLETIONS_PER_UPDATE
    stop_at: float | None = None
    probe: bool = False
    report: bool = False
    beside: str = ""

    @property
    def key(self) -> str:
        key = f"{self.dial}/{self.arm}/{self.judge}/G{self.group_size}/lr{self.learning_rate:g}/seed{self.seed}"
        if self.completions_per_update != COMPLETIONS_PER_UPDATE:
            key += f"/update{self.completions_per_update}"
        if self.beside:
            key += f"/{self.beside}"
        return f"{key}/report" if self.report else key


def base_folder(dial: str, folder: Path) -> Path:
    """Where the base model of a dial is kept."""
    return folder / "bases" / dial.replace("@", "-")


def base_config(dial: str) -> PretrainConfig:
    """How the base model of a dial is made."""
    if "@" in dial:
        axis, exposure = dial.split("@")
        return replace(BASE, noise=AXIS_NOISE, axis=axis, exposure=float(exposure))
    return (DIALS | OTHER_BASES)[dial]
