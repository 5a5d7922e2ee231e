"""
A process reward model behind a vLLM server: `POST /pooling` with the task `token_classify`.

The completions are tokenised here, as for [`PRMJudge`], and sent as token ids: so the server cannot take for a separator
what the policy wrote, and the positions of the scores are known. Needs no package beyond the standard library.

Left out: several servers and a circuit breaker.
"""

import json
import math
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from time import monotonic, sleep
from typing import Any

from trl_sgpo.judges.base import JudgeItem
from trl_sgpo.judges.prm import KNOWN_WRONG_RULES, EncodedSteps, PRMEncoder, PRMSpec, StepScorer


_RETRIES = 2
_PASSING_STATUS = {429, 502, 503, 504}  # what may be better a moment later
_LARGEST_ANSWER = 1 << 28  # bytes


class VLLMPoolingJudge(StepScorer):
    """
    Judge that has every step scored by a process reward model on a vLLM server; the first step whose score is under the
    threshold is the error. See [`PRMJudge`] for what a verdict says.

    Start the server with `vllm serve Qwen/Qwen2.5-Math-PRM-7B --runner pooling`. It may answer with one row per token, or
    with one row per step tag (pooling type `STEP`).

    Args:
        model (`str`):
            Name of the model, as the server knows it.
        base_url (`str`, *optional*, defaults to `"http://localhost:8000"`):
            Address of the server, with or without `/v1`.
        spec ([`PRMSpec`], *optional*):
            The model's layout. By default what its config says; see [`PRMJudge`].
        tokenizer (`str` or `PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer, or the Hub id or folder that has it and the config. Defaults to `model`.
        threshold (`float`, *optional*):
            A step is wrong when its score is below this. Defaults to the spec's.
        known_wrong_rule (`str`, *optional*, defaults to `"threshold"`):
            See [`PRMJudge`].
        positive_index (`int`, *optional*):
            Which number of the server's rows belongs to a right step. Defaults to the spec's `positive_label` for token
            classification, and to 0 otherwise: give the server of a causal LM the two ids as `returned_token_ids`, the
            positive one first.
        use_activation (`bool`, *optional*, defaults to `True`):
            Whether the server turns logits into probabilities. With `False` it is asked not to, and the spec's activation
            is applied here.
        api_key_env (`str`, *optional*, defaults to `"VLLM_API_KEY"`):
            Name of the environment variable that holds the key, if the server wants one. The key itself is never an
            argument, so that it appears in no config, log or model card.
        max_concurrency (`int`, *optional*, defaults to `32`):
            Requests under way at the same time, per process.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that one request may take.
        batch_deadline (`float`, *optional*, defaults to `300.0`):
            Seconds that one batch may take; the rest is abstained on. Keep it below the process group's timeout.
        revision (`str`, *optional*):
            Branch, tag or commit of the tokenizer and the config on the Hub.

    Raises:
        ValueError: If the tokenizer or the config cannot be loaded or do not go with the spec, or another argument is
            out of its range.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "http://localhost:8000",
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
    ) -> None:
        limits = {"max_concurrency": max_concurrency, "timeout": timeout, "batch_deadline": batch_deadline}
        for name, value in limits.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive: it limits what the judge may take.")
        if known_wrong_rule not in KNOWN_WRONG_RULES:
            raise ValueError(
                f"known_wrong_rule={known_wrong_rule!r} is unknown: it must be one of {list(KNOWN_WRONG_RULES)}."
            )
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r} is no address. Give one like 'http://localhost:8000'.")
        self.model = model
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.known_wrong_rule = known_wrong_rule
        self.use_activation = use_activation
        self.api_key_env = api_key_env
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.batch_deadline = batch_deadline
        self.revision = revision
        self._key()  # so that one that cannot be sent is found before any training
        config = None
        source = model if tokenizer is None else tokenizer
        if isinstance(source, str | os.PathLike):
            tokenizer, config = _load_tokenizer(str(source), revision)
        if spec is None:
            if config is None:
                raise ValueError(
                    "spec=None, and a loaded tokenizer has no config that could tell it. Give `spec`, or the tokenizer "
                    "by its Hub id or folder."
                )
            spec = PRMSpec.from_config(config)
        self.spec = spec
        if threshold is not None:
            self.threshold = threshold
        limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
        self.encoder = PRMEncoder(tokenizer, spec, limit)
        if positive_index is None:
            positive_index = spec.positive_label if spec.head == "token_classification" else 0
        self.positive_index = positive_index

    @property
    def name(self) -> str:
        return f"VLLMPoolingJudge({self.model})"

    @property
    def cache_key(self) -> str:
        """What a cache knows this judge by: all that its verdicts depend on."""
        spec = json.dumps({**self.spec.to_config(), "max_length": self.encoder.max_length}, sort_keys=True)
        options = f"known_wrong_rule={self.known_wrong_rule}, positive_index={self.positive_index}"
        return f"VLLMPoolingJudge({self.model}, {self.revision}, {options}) {spec}"

    def score_steps(self, items: Sequence[JudgeItem]) -> list[list[float] | str]:
        end = monotonic() + self.batch_deadline
        late = f"not judged within batch_deadline={self.batch_deadline:g} s"
        results: list[list[float] | str] = [late] * len(items)
        encoded: list[tuple[int, EncodedSteps]] = []
        for i, one in enumerate(self.encoder.encode(items)):
            if isinstance(one, Exception):
                results[i] = f"the completion could not be encoded: {type(one).__name__}: {one}"
            elif not one.positions:
                results[i] = []
            else:
                encoded.append((i, one))
        queue: Iterator[tuple[int, EncodedSteps]] = iter(encoded)
        lock = threading.Lock()
        open_requests = threading.Semaphore(0)

        def work() -> None:
            while monotonic() < end:
                with lock:
                    i, one = next(queue, (-1, None))
                if one is None:
                    return
                results[i] = self._score_one(one, end)
                open_requests.release()

        # Daemon threads: a server that drips its answer for ever must not keep the program from ending
        for _ in range(min(self.max_concurrency, len(encoded))):
            threading.Thread(target=work, name="VLLMPoolingJudge", daemon=True).start()
        for _ in encoded:
            if not open_requests.acquire(timeout=max(0.0, end - monotonic())):
                break
        return list(results)

    def _score_one(self, encoded: EncodedSteps, end: float) -> list[float] | str:
        body = {
            "model": self.model,
            "task": "token_classify",
            "input": [encoded.ids],
            "encoding_format": "float",
            "use_activation": self.use_activation,
        }
        try:
            answer = self._post("/pooling", body, end)
            return self._scores(answer["data"][0]["data"], encoded)
        except (KeyError, IndexError, TypeError) as error:
            return f"the server's answer has another form ({type(error).__name__}: {error})"
        except Exception as error:
            # Whatever a server or the network does, it costs one verdict
            return self._without_key(f"{type(error).__name__}: {error}")[:300]

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
            return (
                f"the server gave {len(rows)} rows for {len(encoded.ids)} tokens with {len(tagged)} step tags and "
                f"{len(encoded.positions)} steps"
            )
        return [self._score(row if isinstance(row, list) else [row]) for row in chosen]

    def _score(self, row: list[float]) -> float:
        if self.spec.head == "causal_lm" and len(row) != 2:
            raise ValueError(
                f"the server gave {len(row)} numbers per row where the two verdict tokens' are wanted: start it with "
                "returned_token_ids"
            )
        value = float(row[self.positive_index])
        if not self.use_activation:
            if self.spec.activation == "sigmoid":
                return 1 / (1 + math.exp(-max(-700.0, value)))
            largest = max(row)
            return math.exp(value - largest) / sum(math.exp(other - largest) for other in row)
        if not math.isnan(value) and not 0 <= value <= 1:
            raise ValueError(
                f"the server gave {value:.3g}, which is no probability: its model applies no activation; use "
                "use_activation=False"
            )
        return value

    def _post(self, path: str, body: dict[str, Any], end: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode()
        # A redirect would take the key along to another server
        opener = urllib.request.build_opener(_NoRedirect)
        for attempt in range(_RETRIES + 1):
            request = urllib.request.Request(self.base_url + path, data=data, headers=headers, method="POST")
            stop = min(end, monotonic() + self.timeout)
            try:
                with opener.open(request, timeout=max(0.001, stop - monotonic())) as response:
                    return json.loads(_read(response, stop))
            except urllib.error.HTTPError as error:
                passing = error.code in _PASSING_STATUS
                text = error.read(200).decode("utf-8", "replace")
                failure: Exception = ConnectionError(f"the server answered {error.code}: {text}")
            except TimeoutError as error:
                raise TimeoutError(f"no answer within timeout={self.timeout:g} s") from error
            except (OSError, HTTPException) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    raise TimeoutError(f"no answer within timeout={self.timeout:g} s") from error
                passing, failure = True, error
            pause = 0.5 * 2**attempt
            if not passing or attempt == _RETRIES or monotonic() + pause >= end:
                break
            sleep(pause)
        raise failure

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and (key.isprintable())):
            # Else the HTTP library would say so, and show the key
            raise ValueError(
                f"the environment variable {self.api_key_env} (api_key_env) holds characters that no HTTP header may "
                "have. Set it anew."
            )
        return key

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        return text.replace(key, "***") if key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: Any, stop: float) -> bytes:
    """The body of an answer; the time limit of a socket is for one read, and there may be many."""
    parts: list[bytes] = []
    size = 0
    while chunk := response.read1(1 << 16):
        parts.append(chunk)
        size += len(chunk)
        if monotonic() > stop:
            raise TimeoutError
        if size > _LARGEST_ANSWER:
            raise ConnectionError(f"the server's answer is longer than {_LARGEST_ANSWER} bytes")
    return b"".join(parts)


def _load_tokenizer(path: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision), AutoConfig.from_pretrained(
            path, revision=revision
        )
    except Exception as error:
        raise ValueError(
            f"the tokenizer and config of {path!r} could not be loaded: {error} They are needed here, since the server "
            "is sent token ids. Give `tokenizer`: the Hub id or folder that has them."
        ) from error
