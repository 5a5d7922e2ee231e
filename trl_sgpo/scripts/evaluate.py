r"""
Evaluates a base model and its checkpoints side by side on maths benchmarks.

    python -m trl_sgpo.scripts.evaluate --models base=Qwen/Qwen2.5-0.5B-Instruct sgpo=outputs/sgpo --sets gsm8k \
        --output outputs/evaluation
    python -m trl_sgpo.scripts.evaluate --models base=Qwen/Qwen2.5-7B sgpo=outputs/sgpo --sets math500 aime24@16 \
        mine=my_problems.jsonl --engine vllm --output outputs/evaluation

A set is a short name (gsm8k, math500, aime24, aime25, amc23, olympiadbench), a dataset of the Hub, or a local file
(JSON, JSON lines, Parquet) with these fields:

    problem   `problem`, `question` or `prompt`: a text, or a list of messages
    answer    `answer`, `final_answer` or `solution`: the final answer, or GSM8K's worked one with `####`

Each set is answered once, greedily, or `@N` times by sampling. math-verify compares the answers, as TRL's
`accuracy_reward` does in training. Samples are kept as soon as a batch is there: the same command continues a run that
was ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class EvaluateArguments:
    """Arguments of the evaluation of models. Each field's `help` says what it is."""

    models: list[str] = field(
        metadata={
            "help": "Names of the Hub, folders or PEFT adapters, the base first. `NAME=MODEL` gives one a name for the tables."
        }
    )
    sets: list[str] = field(
        metadata={
            "help": "Short names (gsm8k, math500, aime24, aime25, amc23, olympiadbench), names of the Hub or local files, "
            "`NAME=FILE` with a name for the tables. `aime24@16` samples 16 answers per problem."
        }
    )
    output: str = field(metadata={"help": "Folder for samples and results. It belongs to one way of decoding."})
    n: int = field(default=0, metadata={"help": "Samples per problem for sets without @N. 0: one greedy answer."})
    temperature: float = field(default=0.6, metadata={"help": "Temperature of the samples."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of the samples. There is no top-k."})
    max_new_tokens: int = field(default=2048, metadata={"help": "Most tokens of an answer."})
    template: str = field(
        default="{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        metadata={"help": "The user's message. {problem} is the problem."},
    )
    reward_func: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of the reward function that says what is right, called as in training, with the columns of the "
            "set. math-verify by default."
        },
    )
    success_threshold: float = field(
        default=0.5, metadata={"help": "An answer is right if its reward by reward_func reaches this."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "The system message. None by default."})
    chat: str = field(
        default="auto",
        metadata={
            "help": "'on': with the tokenizer's chat template, 'off': as plain text, 'auto': with it if there is one.",
            "choices": ["auto", "on", "off"],
        },
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Arguments of the chat template, in JSON: {"enable_thinking": false}.'}
    )
    engine: str = field(
        default="transformers",
        metadata={
            "help": "'transformers', 'vllm' (in this process), or 'server' (OpenAI-compatible).",
            "choices": ["transformers", "vllm", "server"],
        },
    )
    engine_args: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments in JSON: of from_pretrained, of vLLM's LLM, or keys of a request to a server."
        },
    )
    base_url: list[str] | None = field(
        default=None, metadata={"help": "Address of the server, or one for each model. OPENAI_BASE_URL by default."}
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Name of the environment variable that holds the server's key."}
    )
    timeout: float = field(default=1800.0, metadata={"help": "Seconds that a server may take for one answer."})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Answers at a time, and at most lost by an interrupt. 32 by default with transformers, 512 with vLLM, 256 with a server."
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of sets without a short name. 'test' by default, or the only one."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "At most this many problems of each set, drawn at random."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples, the limit and the bootstrap."})
    resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap for the 95 %% intervals."})
    card: str | None = field(
        default=None, metadata={"help": "A model card (README.md) that gets the results in a section Evaluation."}
    )

    def __post_init__(self) -> None:
        for name in ("models", "sets", "base_url"):  # a single name in a YAML file
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for name, least in (("n", 0), ("max_new_tokens", 1), ("batch_size", 1), ("limit", 1), ("resamples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if not 0 < self.temperature < 100:
            raise ValueError(
                f"temperature={self.temperature} must be positive. For greedy answers leave @N and n out."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]. 1 leaves nothing out.")
        if "{problem}" not in self.template:
            raise ValueError(f"template={self.template!r} has no {{problem}}, so the model would not see the problem.")
        if self.base_url is not None and len(self.base_url) not in (1, len(self.models)):
            raise ValueError(
                f"base_url has {len(self.base_url)} addresses for {len(self.models)} models. Give one, or one for each."
            )


def make_parser(prog: str = "python -m trl_sgpo.scripts.evaluate") -> "TrlParser":
    from trl import TrlParser

    configs: list[Any] = [EvaluateArguments]
    return TrlParser(configs, prog=prog)


def main(argv: Sequence[str] | None = None, prog: str = "python -m trl_sgpo.scripts.evaluate") -> None:
    from trl_sgpo.evaluation.card import add_to_card, card_path
    from trl_sgpo.evaluation.evaluation import evaluate
    from trl_sgpo.evaluation.tables import show

    (args,) = make_parser(prog).parse_args_and_config(argv, fail_with_unknown_args=True)
    card = card_path(args.card) if args.card else None
    results = evaluate(args)
    show(results)
    print(f"Written to {args.output}: results.json, samples.jsonl")
    if card:
        card.write_text(add_to_card(card.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"The section Evaluation of {Path(card)} holds these results.")


if __name__ == "__main__":
    main()
