"""
How a process reward model wants its text, and where its scores are read: [`PRMSpec`] and the presets of the known
families.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args


Head = Literal["token_classification", "causal_lm", "value_head"]
Template = Literal["plain", "chat", "turns"]
ReadAt = Literal["separator", "step", "verdict"]
Activation = Literal["softmax", "sigmoid"]

# The key of a model's config.json that may hold its spec
CONFIG_KEY = "prm_spec"


@dataclass(frozen=True)
class PRMSpec:
    """
    The layout of a process reward model: the text that it was trained on, and where and how its scores are read.

    The usual families have presets ([`~PRMSpec.preset`]). A model's `config.json` may also hold a spec as a plain
    dictionary under the key `"prm_spec"` ([`~PRMSpec.to_config`] writes it).

    Args:
        head (`str`, *optional*, defaults to `"token_classification"`):
            How a hidden state becomes a score. `"token_classification"`: a classifier with one output per label, also
            the two-layer one of Qwen2.5-Math-PRM. `"causal_lm"`: the logits of the tokens `positive` and `negative`.
            `"value_head"`: a head with a single output.
        template (`str`, *optional*, defaults to `"plain"`):
            `"plain"`: the problem, then the steps, as running text. `"chat"`: the tokenizer's chat template, with the
            problem as the user's message and all steps as the assistant's. `"turns"`: one user's message per step,
            each answered by a verdict token. The problem stands before the first step.
        separator (`str`, *optional*, defaults to `"\\n"`):
            Text put after every step. Special tokens are special in it, and plain text in a problem or a step. Empty
            for the template `"turns"`.
        read_at (`str`, *optional*, defaults to `"separator"`):
            Where the score of a step is read. `"separator"`, `"step"`: at the last token of the separator or the step.
            `"verdict"`: at the position before the verdict token, which predicts it. Then the token `positive` stands
            in the text after every step, also after a step with a low score.
        positive, negative (`str`, *optional*, default to `"+"` and `"-"`):
            The verdict tokens for a right and a wrong step, a single token each. For the head `"causal_lm"` only.
        positive_label (`int`, *optional*, defaults to `1`):
            The label that means a right step. For the head `"token_classification"` only.
        activation (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"` over the labels or over the two verdict tokens, or `"sigmoid"` of the one output.
        system (`str`, *optional*):
            The system message. By default the chat template decides. Not for the template `"plain"`.
        before_first_step, before_next_steps, step_label (`str`, *optional*, default to `""`):
            Text put between the problem and the first step, before every further step, and before every step, such as
            `"Step {number}: "`. A step that begins with such a label itself gets none.
        add_bos (`bool`, *optional*, defaults to `True`):
            Whether the text begins with the tokenizer's BOS token, if it has one. For the template `"plain"` only.
        keep_prefix_space (`bool`, *optional*, defaults to `False`):
            SentencePiece tokenizers put a space before every text. By default only the beginning of the text has it.
            `True`: every problem, step and separator has its own, as in TRL's former `PRMTrainer`.
        threshold, max_length (`float` and `int`, *optional*):
            A step is wrong if its score is below the threshold, in [0, 1], 0.5 by default. Most tokens that the model
            reads, by default what its config says.

    Raises:
        ValueError: If a field has an unknown value, is out of its range, or does not go with another field.

    Example:

    ```python
    >>> PRMSpec.preset("qwen2.5-math-prm").separator
    '<extra_0>'
    >>> PRMSpec(separator="\\n\\n", threshold=0.3).to_config()["threshold"]
    0.3
    ```
    """

    head: Head = "token_classification"
    template: Template = "plain"
    separator: str = "\n"
    read_at: ReadAt = "separator"
    positive: str = "+"
    negative: str = "-"
    positive_label: int = 1
    activation: Activation = "softmax"
    system: str | None = None
    before_first_step: str = ""
    before_next_steps: str = ""
    step_label: str = ""
    add_bos: bool = True
    keep_prefix_space: bool = False
    threshold: float = 0.5
    max_length: int | None = None

    def __post_init__(self) -> None:
        literals = {"head": Head, "template": Template, "read_at": ReadAt, "activation": Activation}
        for name, choices in ((name, get_args(literal)) for name, literal in literals.items()):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown: it must be one of {list(choices)}.")
        is_number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not (is_number and 0 <= self.threshold <= 1):
            raise ValueError(
                f"threshold={self.threshold!r} must be a number in [0, 1]. A score is a probability, and a step is "
                "wrong if its score is below the threshold. Find a threshold with `PRMJudge.calibrate`, or use 0.5."
            )
        if self.max_length is not None and not self.max_length > 0:
            raise ValueError(f"max_length={self.max_length} must be a positive number of tokens, or None.")
        if self.head == "value_head" and self.activation != "sigmoid":
            raise ValueError(
                f"activation={self.activation!r} does not go with head='value_head': it has one output, and the "
                "softmax of one output is always 1. Use activation='sigmoid'."
            )
        if self.head == "causal_lm" and self.activation != "softmax":
            raise ValueError(
                f"activation={self.activation!r} does not go with head='causal_lm'. The score of this head is the "
                f"softmax over the tokens {self.positive!r} and {self.negative!r}. Use activation='softmax'."
            )
        if self.head == "causal_lm" and self.positive == self.negative:
            raise ValueError(
                f"positive={self.positive!r} and negative={self.negative!r} are the same token, so every score would "
                "be one half. Give the token for a right step and the token for a wrong step."
            )
        if self.template == "turns" and (self.read_at != "verdict" or self.separator):
            raise ValueError(
                f"read_at={self.read_at!r} and separator={self.separator!r} do not go with template='turns'. There "
                "the verdict tokens stand between the steps. Use read_at='verdict' and separator=''."
            )
        if self.template != "turns" and not self.separator and self.read_at != "step":
            raise ValueError(
                f"separator={self.separator!r} is empty, so read_at={self.read_at!r} has no token to read a score at. "
                "Give the text that stood after every step in the model's training, or use read_at='step'."
            )
        try:
            self.step_label.format(number=1)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"step_label={self.step_label!r} cannot be filled in ({type(error).__name__}: {error}): write `{{number}}` "
                "where the number of the step belongs, for instance 'Step {number}: '."
            ) from error
        if self.template == "plain" and self.system is not None:
            raise ValueError(
                f"system={self.system!r} does not go with template='plain', which has no messages: use template='chat'"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "PRMSpec":
        """
        The spec of a known family of models.

        Args:
            name (`str`):
                `"qwen2.5-math-prm"` (Qwen2.5-Math-PRM and -PRM800K), `"trl"` (token classification as trained by TRL's
                former `PRMTrainer`, and PURE-PRM), `"math-shepherd"`, `"rlhflow"` or `"skywork"`
                (Skywork-o1-Open-PRM).
            changes:
                Fields of the spec that differ, for instance `threshold=0.3`.
        """
        if name not in PRESETS:
            raise ValueError(f"name={name!r} is no preset. The presets are {list(PRESETS)}. Or give a `PRMSpec(...)`.")
        return replace(PRESETS[name], **changes)

    @classmethod
    def from_config(cls, config: Any) -> "PRMSpec":
        """
        The spec of a model, from its config (a `PretrainedConfig`, or the contents of `config.json`): the one under
        `"prm_spec"`, else the preset of its architecture or name. A `ValueError` if it gives none, or an invalid one.
        """
        values = config if isinstance(config, Mapping) else config.__dict__
        given = values.get(CONFIG_KEY)
        if given is not None:
            known = {field.name for field in fields(cls)}
            if not isinstance(given, Mapping) or not set(given) <= known:
                wrong = sorted(set(given) - known) if isinstance(given, Mapping) else given
                raise ValueError(
                    f"the config's {CONFIG_KEY!r} cannot be read: {wrong!r} are no fields of a `PRMSpec`, whose "
                    f"fields are {sorted(known)}. Give `spec=PRMSpec(...)` instead."
                )
            return cls(**given)
        architectures = [str(name) for name in values.get("architectures") or []]
        path = str(values.get("_name_or_path") or "")
        # The architecture says more than a name. Of a path only the end is the model's name
        for mark, preset in _ARCHITECTURES.items():
            if any(name.endswith(mark) for name in architectures):
                return cls.preset(preset)
        name = "/".join(path.lower().rstrip("/").split("/")[-2:])
        for words, preset in _NAMES.items():
            if all(word in name for word in words):
                return cls.preset(preset)
        raise ValueError(
            f"spec=None, and the config of {path or 'this model'!r} (architectures {architectures}) does not say how "
            "its steps are separated and how its scores are read. Give `spec`: one of the presets, "
            f"`PRMSpec.preset(name)` with name one of {list(PRESETS)}, or a `PRMSpec(...)` of your own."
        )

    @property
    def positive_index(self) -> int:
        """Index of the head's output that means a right step."""
        return {"token_classification": self.positive_label, "causal_lm": 1, "value_head": 0}[self.head]

    def to_config(self) -> dict[str, Any]:
        """The spec as a plain dictionary for a model's config: `model.config.prm_spec = spec.to_config()`."""
        return asdict(self)


PRESETS: dict[str, PRMSpec] = {
    "qwen2.5-math-prm": PRMSpec(
        template="chat",
        separator="<extra_0>",
        system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    "trl": PRMSpec(separator="\n", keep_prefix_space=True),
    "math-shepherd": PRMSpec(
        head="causal_lm", separator=" ки", before_first_step=" ", before_next_steps="\n", step_label="Step {number}: "
    ),
    "rlhflow": PRMSpec(head="causal_lm", template="turns", separator="", read_at="verdict", before_first_step=" "),
    "skywork": PRMSpec(head="value_head", separator="\n", activation="sigmoid", before_first_step="\n"),
}

# How a family is recognised: by the end of an architecture's name, and by words that all occur in a model's name
_ARCHITECTURES = {
    "ForProcessRewardModel": "qwen2.5-math-prm",
    "ForPrmModel": "skywork",
    "ForTokenClassification": "trl",
}
_NAMES = {
    ("skywork", "prm"): "skywork",
    ("math-shepherd", "prm"): "math-shepherd",
    ("rlhflow", "prm"): "rlhflow",
    ("llama3.1-8b-prm",): "rlhflow",
}
