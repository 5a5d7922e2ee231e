"""What the model card says of a run with [`SGPOTrainer`]."""

from typing import TYPE_CHECKING

from trl_sgpo.judges import StepwiseJudge
from trl_sgpo.treatments import NoTreatment, Treatment


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig


def describe_run(treatment: Treatment, judge: StepwiseJudge | None, args: "SGPOConfig") -> str:
    """What was done with failed groups, in one sentence."""
    if isinstance(treatment, NoTreatment) or (treatment.asks_judge and judge is None):
        return "No step-wise judge was used: this run is plain GRPO."
    if not treatment.asks_judge:
        return (
            "No step-wise judge was used: completions of groups in which every answer was wrong were given the "
            f"advantages of the treatment `{treatment.name}`."
        )
    return (
        "Completions of groups in which every answer was wrong "
        + ("(and every other wrong completion) " if args.judge_scope == "all_incorrect" else "")
        + f"were judged step by step by `{judge!r}` (treatment `{treatment.name}`"
        + (", shares of the longest completion" if treatment.name == "sgpo" and args.rts_share_of == "longest" else "")
        + ")"
        + (f" during the first {args.judge_until:.0%} of the updates." if args.judge_until < 1 else ".")
    )


def without_none(text: str, name: str) -> str:
    """The text of a card in which TRL's template names "None" what has no name on the Hub: the base model, the model itself."""
    text = text.replace("[None](https://huggingface.co/None)", "a local model", 1)
    return text.replace('model="None"', f'model="{name}"', 1)
