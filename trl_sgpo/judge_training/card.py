"""What is published of a trained judge: its model card, its numbers, and the push to the Hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from trl_sgpo.judge_training.arguments import JudgeTrainArguments
    from trl_sgpo.judge_training.data import JudgeData


# Numbers of the card and of the printed summary, and what they mean
NUMBERS = {
    "f1": "F1: harmonic mean of the next two",
    "acc_error": "share of the wrong solutions whose first wrong step is found exactly",
    "acc_correct": "share of the correct solutions that are judged to have no error",
    "acc_error_within_1": "share of the wrong solutions whose first wrong step is found within one step",
    "abstain_rate": "share of the solutions without a verdict",
    "threshold": "threshold, kept in `config.json`",
}


def model_card(
    name: str, arguments: "JudgeTrainArguments", base: str, data: "JudgeData", result: dict[str, Any]
) -> str:
    """The text of the model card: how to load the judge, its numbers, and what it was trained on."""
    from trl_sgpo import __version__

    discriminative = arguments.kind == "discriminative"
    judge = "PRMJudge" if discriminative else "GenerativeJudge"
    module = "prm" if discriminative else "generative"
    extra = f', answer="{arguments.answer}"' if not discriminative and arguments.answer != "generate" else ""
    base_line = "" if Path(base).exists() else f"base_model: {base}\n"
    # A path on this machine is not a name on the Hub, and its folder means nothing to others
    hub_data = [name for name in arguments.data if not Path(name).exists()]
    datasets = "datasets:\n" + "".join(f"- {name}\n" for name in hub_data) if hub_data else ""
    sources = ", ".join(name if name in hub_data else Path(name).name for name in arguments.data)
    numbers = "\n".join(f"| {text} | {result[key]:.3f} |" for key, text in NUMBERS.items() if key in result)
    halves = "\nEach half of them was judged with the threshold of the other half." if discriminative else ""
    method = (
        "The judge is a token classifier. It scores the separator after each step. In training the separator has\n"
        "label 1 before the first wrong step and 0 at that step. Later steps have no label.\n"
        f"Class balance: `{arguments.class_balance}`."
        if discriminative
        else f"The judge was trained on {result.get('examples', 0)} critiques whose verdict equals the annotation.\n"
        f"No verdict occurs more often than the average one. Bootstrap: `{arguments.bootstrap}`."
    )
    return f"""---
{base_line}{datasets}library_name: transformers
pipeline_tag: {"token-classification" if discriminative else "text-generation"}
tags:
- trl-sgpo
- step-wise-judge
---

# {name}

A step-wise judge. It finds the first wrong step of a solution. It was trained with
`python -m trl_sgpo.scripts.judge_train`, version {__version__}, kind `{arguments.kind}`.

```python
from trl_sgpo import StepwiseJudge
from trl_sgpo.judges.{module} import {judge}

judge = StepwiseJudge({judge}("{name}"{extra}))
```

## Evaluation

Measured on {result.get("dev_rows", 0)} solutions whose problems were not trained on.{halves}

| what | value |
|---|---|
{numbers}

These solutions resemble the training data. Before you use the judge on others, measure it there with
`python -m trl_sgpo.scripts.judge_eval`.

## Training

{method}

It saw {len(data.train)} solutions from {sources}.
{data.excluded} more were left out, because their problems belong to evaluation data.
"""


def save_card_and_push(
    arguments: "JudgeTrainArguments",
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    data: "JudgeData",
    result: dict[str, Any],
    push: bool,
) -> None:
    """Writes the card and the numbers into the judge's folder; pushes it if `push` is set. Main process only."""
    folder = Path(str(training_args.output_dir))
    name = training_args.hub_model_id or folder.name
    card = model_card(name, arguments, str(model_args.model_name_or_path), data, result)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "judge_train.json").write_text(json.dumps(result, indent=2) + "\n")
    if push:
        from huggingface_hub import HfApi

        api = HfApi(token=training_args.hub_token)
        repo = api.create_repo(name, private=training_args.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message="Train the judge",
            ignore_patterns=[
                "checkpoint-*",
                "runs/*",
                "training_args.bin",
            ],  # the last holds paths and the host's name,
        )
        print(f"Judge pushed to {repo}.")
