"""The arguments of a judge's training, and their checks."""

import math
from dataclasses import dataclass, field


CHOICES = {
    "kind": ("discriminative", "generative"),
    "class_balance": ("weights", "none"),
    "bootstrap": ("none", "missing", "all"),
    "answer": ("generate", "score"),
}

# Judges are compared on these sets. A judge that was trained on one of them has no valid score there
EVALUATION_SETS = ("processbench", "prmbench", "mr-ben", "mr_ben")


@dataclass
class JudgeTrainArguments:
    """
    Arguments of the training of a judge. Each field's `help` says what it is. Beyond that:

    - `separator`: if it is not in the vocabulary and not blank, it is added as a special token, which no completion
      can contain.
    - `lm_weight`: one label per step teaches little, and a model that can predict the right step sees the wrong one
      more easily. It needs tied embeddings, because a token classifier has no output embeddings.
    - `rounds`: each round samples from the latest judge and trains `model_name_or_path` anew.
    - `bootstrap`: `"none"` leaves out the solutions without a right critique. With `"all"` nothing is sampled, and
      `GenerativeJudge(answer="score")` needs it.
    """

    data: list[str] = field(metadata={"help": "Annotated solutions: names of datasets on the Hub, or local files."})
    kind: str = field(
        default="discriminative",
        metadata={"help": "'discriminative' (a token classifier) or 'generative' (a model that writes critiques)."},
    )
    split: str | None = field(default=None, metadata={"help": "Split of a dataset on the Hub. All splits by default."})
    exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Names on the Hub or local files. Their problems are taken out of the training data."},
    )
    dev_data: list[str] | None = field(
        default=None, metadata={"help": "Data to calibrate and report on. By default a share of the problems of data."}
    )
    dev_share: float = field(
        default=0.1, metadata={"help": "Share of the problems of data that becomes dev data if dev_data is not given."}
    )
    separator: str = field(
        default="<extra_0>",
        metadata={"help": "Discriminative: text after every step. The judge scores the step there."},
    )
    class_balance: str = field(
        default="weights",
        metadata={
            "help": "Discriminative: 'weights' gives right and wrong steps the same total weight in the loss, 'none' "
            "counts every labelled step once."
        },
    )
    lm_weight: float = field(
        default=0.0,
        metadata={"help": "Discriminative: weight of a language-modelling loss on the tokens of the right steps."},
    )
    samples: int = field(
        default=4, metadata={"help": "Generative: critiques that are sampled per solution and round."}
    )
    rounds: int = field(default=1, metadata={"help": "Generative: rounds of sampling and training."})
    bootstrap: str = field(
        default="none",
        metadata={
            "help": "Generative: which solutions are trained with a bare verdict line instead of a critique: 'none', "
            "'missing' (those without a right critique) or 'all'."
        },
    )
    sampling_temperature: float = field(
        default=0.8, metadata={"help": "Generative: temperature at which critiques are sampled."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Generative: maximum number of tokens of a critique."})
    max_tokens_per_batch: int = field(
        default=16384, metadata={"help": "Maximum number of tokens of one batch when the judge is asked."}
    )
    answer: str = field(
        default="generate",
        metadata={"help": "Generative: how the trained judge answers on the dev data, 'generate' or 'score'."},
    )

    def __post_init__(self) -> None:
        for name in ("data", "exclude", "dev_data"):
            if isinstance(getattr(self, name), str):  # a single name in a YAML file
                setattr(self, name, [getattr(self, name)])
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: it must be one of {list(choices)}.")
        for name in ("samples", "rounds", "max_new_tokens", "max_tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.dev_share < 1:
            raise ValueError(f"dev_share={self.dev_share} must lie strictly between 0 and 1: a share of the problems.")
        if not (self.lm_weight >= 0 and math.isfinite(self.lm_weight)):
            raise ValueError(
                f"lm_weight={self.lm_weight} must be a finite number of at least 0. 0 leaves that loss out."
            )
        if not self.sampling_temperature > 0:
            raise ValueError(
                f"sampling_temperature={self.sampling_temperature} must be positive, because several critiques of one "
                "solution have to differ."
            )
        for name in self.data:
            if any(known in name.lower() for known in EVALUATION_SETS):
                raise ValueError(
                    f"data={name!r} is a set that judges are evaluated on. A judge that was trained on it has no "
                    "valid score there. Train on other data, and name this set in `exclude` to keep its problems out of training."
                )
