"""
A process reward model behind vLLM servers: `POST /pooling` with the task `token_classify`. Needs
`pip install trl-sgpo[api]`. Servers, retries and the breaker are in `servers.py` and `endpoint.py`.

The completions are tokenised here, as for [`PRMJudge`], and sent as token ids. So the server cannot take the policy's
text for a separator, and the positions of the scores are known.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

from trl_sgpo.judges.addresses import checked_urls
from trl_sgpo.judges.base import JudgeItem
from trl_sgpo.judges.endpoint import RequestFailed
from trl_sgpo.judges.local_model import context_length
from trl_sgpo.judges.prm import EncodedSteps, PRMEncoder, PRMSpec, StepScorer
from trl_sgpo.judges.prm.scores import checked_rule
from trl_sgpo.judges.server_settings import RequestFormat, ServerSettings
from trl_sgpo.judges.servers import Request, Servers


_ROUNDING = 0.01  # by which a sum of probabilities may differ from 1: a server may compute in bfloat16


class VLLMPoolingJudge(StepScorer):
    """
    Judge that scores every step with a process reward model on one or several vLLM servers. The first step whose score
    is below the threshold is the error.

    See [`PRMJudge`] for what a verdict says, and [`OpenAIJudge`] for what happens if a server fails. Start a server
    with `vllm serve Qwen/Qwen2.5-Math-PRM-7B --runner pooling`. It may answer with one row per token, or with one row
    per step tag (pooling type `STEP`).

    Args:
        model (`str`):
            Name of the model, as the server knows it.
        base_url (`str` or `Sequence[str]`, *optional*, defaults to `"http://localhost:8000"`):
            Address of the server, with or without `/v1` and `/pooling`. Several servers with the same model share the
            work and stand in for each other.
        spec ([`PRMSpec`], *optional*):
            The model's layout. By default what its config says; see [`PRMJudge`].
        tokenizer (`str` or `PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer, or the Hub id or folder that has it and the config. Defaults to `model`.
        threshold, known_wrong_rule (`float` and `str`, *optional*):
            See [`PRMJudge`].
        positive_index (`int`, *optional*):
            Which number of the server's rows belongs to a right step. Defaults to the spec's `positive_label` for token
            classification, and to 0 otherwise: give the server of a causal LM the two ids as `returned_token_ids`, the
            positive one first.
        use_activation (`bool`, *optional*, defaults to `True`):
            Whether the server turns logits into probabilities. With `False` it is asked not to, and the spec's
            activation is applied here.
        revision (`str`, *optional*):
            Branch, tag or commit of the tokenizer and the config on the Hub.
        api_key_env (`str`, *optional*, defaults to `"VLLM_API_KEY"`):
            Name of the environment variable that holds the key, if the server wants one. See [`OpenAIJudge`].
        max_concurrency, timeout, batch_deadline, max_retries, breaker_failures, breaker_seconds (*optional*):
            See [`OpenAIJudge`].

    Raises:
        ImportError: If the package `aiohttp` is not installed.
        TypeError, ValueError: If the tokenizer or the config cannot be loaded or do not go with the spec, or another
            argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] = "http://localhost:8000",
        spec: PRMSpec | None = None,
        tokenizer: Any = None,
        threshold: float | None = None,
        known_wrong_rule: str = "threshold",
        positive_index: int | None = None,
        use_activation: bool = True,
        api_key_env: str = "VLLM_API_KEY",
        max_concurrency: int = 32,
        timeout: float = 120.0,
        batch_deadline: float = 300.0,
        revision: str | None = None,
        max_retries: int = 2,
        breaker_failures: int = 8,
        breaker_seconds: float = 30.0,
    ) -> None:
        self.model = model
        self.known_wrong_rule = checked_rule(known_wrong_rule)
        self.use_activation = use_activation
        self.revision = revision
        self.servers = Servers(
            self.name,
            [url.removesuffix("/v1") for url in checked_urls(base_url)],
            ServerSettings(
                path="/pooling",
                field="data",
                longest_answer=1 << 28,
                if_too_long="The completion is too long for the server: start it with a larger --max-model-len.",
                if_not_found=f"Check base_url, model={model!r}, and that the server runs with --runner pooling.",
                # Nothing that a server could refuse and that could be left out
                request_format=RequestFormat(output="text", temperature=False, length_key="", system=False),
                api_key_env=api_key_env,
                max_concurrency=max_concurrency,
                timeout=timeout,
                batch_deadline=batch_deadline,
                max_retries=max_retries,
                breaker_failures=breaker_failures,
                breaker_seconds=breaker_seconds,
            ),
        )
        config = None
        source = model if tokenizer is None else tokenizer
        if isinstance(source, str | os.PathLike):
            from transformers import AutoConfig, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
                config = AutoConfig.from_pretrained(str(source), revision=revision)
            except Exception as error:
                raise ValueError(
                    f"the tokenizer and config of {str(source)!r} could not be loaded: {error} They are needed here, "
                    "because token ids are sent. Give `tokenizer`: the Hub id or folder that has them."
                ) from error
        if spec is None:
            if config is None:
                raise ValueError(
                    "spec=None, and a loaded tokenizer has no config. Give `spec`, or the tokenizer by its Hub id."
                )
            spec = PRMSpec.from_config(config)
        self.spec = spec
        if threshold is not None:
            self.threshold = threshold
        self.encoder = PRMEncoder(tokenizer, spec, None if config is None else context_length(config))
        if positive_index is None:
            positive_index = spec.positive_label if spec.head == "token_classification" else 0
        self.positive_index = positive_index

    @property
    def name(self) -> str:
        return f"VLLMPoolingJudge({self.model})"

    @property
    def cache_key(self) -> str:
        options = f"known_wrong_rule={self.known_wrong_rule}, positive_index={self.positive_index}"
        return f"VLLMPoolingJudge({self.model}, {self.revision}, {options}) {self._layout_text()}"

    def _score_encoded(
        self, items: Sequence[JudgeItem], encoded: dict[int, EncodedSteps]
    ) -> dict[int, list[float] | str]:
        answers = self.servers.ask([self._request(items[i], one) for i, one in encoded.items()])
        scores = [answer.text if isinstance(answer, RequestFailed) else answer for answer in answers]
        return dict(zip(encoded, scores, strict=True))

    def _request(self, item: JudgeItem, encoded: EncodedSteps) -> Request[list[float] | str]:
        body = {
            "model": self.model,
            "task": "token_classify",
            "input": [encoded.ids],
            "encoding_format": "float",
            "use_activation": self.use_activation,
        }

        def read(_: None, answer: dict[str, Any]) -> list[float] | str:
            try:
                return self._scores(answer["data"][0]["data"], encoded)
            except (KeyError, IndexError, TypeError) as error:
                return f"the server's answer has another form ({type(error).__name__}: {error})"

        return Request(item.problem, lambda request_format: (None, body), read)

    def _scores(self, rows: Any, encoded: EncodedSteps) -> list[float] | str:
        """The score of each step out of rows for every token, or for every step tag."""
        if not isinstance(rows, list):
            raise TypeError(f"data is a {type(rows).__name__}")
        tag = encoded.ids[encoded.positions[0]]
        tagged = [i for i, id in enumerate(encoded.ids) if id == tag]
        if len(rows) == len(encoded.ids):
            chosen = [rows[position] for position in encoded.positions]
        elif len(rows) == len(tagged) and set(encoded.positions) <= set(tagged):
            # A step tag such as a newline may stand inside a step too
            chosen = [rows[tagged.index(position)] for position in encoded.positions]
        else:
            reason = (
                f"the server gave {len(rows)} rows for {len(encoded.ids)} tokens with {len(tagged)} step tags and "
                f"{len(encoded.positions)} steps"
            )
            if not rows and self.spec.read_at == "separator":
                option = f"""--pooler-config '{{"step_tag_id": {tag}}}'"""
                reason += f". Its step tag may be another token: start it with {option}"
            return reason
        if not self.use_activation and all(map(_are_probabilities, rows)):
            return "the server gave probabilities although use_activation=False: use use_activation=True"
        return [self._score(row if isinstance(row, list) else [row]) for row in chosen]

    def _score(self, row: list[float]) -> float:
        if self.spec.head == "causal_lm" and len(row) != 2:
            raise ValueError(f"the server gave {len(row)} numbers per row, not 2: start it with returned_token_ids")
        value = float(row[self.positive_index])
        if not self.use_activation:
            if self.spec.activation == "sigmoid":
                return 1 / (1 + math.exp(-max(-700.0, value)))
            largest = max(row)
            return math.exp(value - largest) / sum(math.exp(other - largest) for other in row)
        if not math.isnan(value) and not 0 <= value <= 1:
            raise ValueError(f"the server gave {value:.3g}, which is no probability: use use_activation=False")
        if self.spec.activation == "softmax" and len(row) > 1 and abs(sum(row) - 1) > _ROUNDING:
            raise ValueError(
                f"the server gave {row}, which are no probabilities, because their sum is not 1: use use_activation=False"
            )
        return value


def _are_probabilities(row: Any) -> bool:
    """Whether numbers are the probabilities of several labels. Of logits this is nearly impossible for many rows."""
    return isinstance(row, list) and len(row) > 1 and min(row) >= 0 and abs(sum(row) - 1) <= _ROUNDING
