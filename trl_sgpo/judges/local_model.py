"""
The base of the judges that run a model in this process: [`LocalModelJudge`] loads the model or takes a loaded one, and
moves it to its device and back. transformers is imported when a model is loaded, not before.
"""

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from trl_sgpo.judges.base import StepJudge
from trl_sgpo.judges.log_once import LogOnce


T = TypeVar("T")

logger = logging.getLogger(__name__)

# With this variable transformers loads weights on the first rank only, and FSDP sends them to the other ranks
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


class LocalModelJudge(StepJudge):
    """
    Base class of the judges with a model in this process. It keeps the model, its tokenizer, its device and its name.

    A subclass writes `_load_model` and `_take_model`, which set its modules, and `_parts`, which lists them. It runs
    the model inside `_ready`. The arguments are those of [`~trl_sgpo.judges.GenerativeJudge`].
    """

    _files = "config.json, the weights and the tokenizer's files"  # that a model's folder must have

    def __init__(
        self,
        model: str | Path | tuple[Any, Any],
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        offload: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self.offload = offload
        self.revision = revision
        self.tokenizer: Any
        self._version: Any = None  # changes with the weights; unknown for a loaded model
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        if isinstance(model, str | Path):
            self._load(str(model), tokenizer, device, dtype, source)
        elif isinstance(model, tuple | list) and len(model) == 2:
            self._take(*model, tokenizer, device, dtype, source)
        else:
            raise TypeError(
                f"model is a {type(model).__name__}: give a Hub id, a folder, or a loaded model together with its "
                f"tokenizer, `{type(self).__name__}((model, tokenizer))`."
            )
        self._move("cpu" if offload else self.device)
        self._log_once = LogOnce(logger)

    @property
    @abstractmethod
    def _parts(self) -> tuple[Any, ...]:
        """The modules of the model. The first one is a `PreTrainedModel`: its weights have the type `dtype`."""

    @abstractmethod
    def _load_model(self, path: str, **kwargs: Any) -> None:
        """Sets the modules from a Hub id or a folder. `kwargs` are arguments of `from_pretrained`."""

    @abstractmethod
    def _take_model(self, model: Any) -> None:
        """Sets the modules from a loaded model."""

    def _load(self, path: str, tokenizer: Any, device: Any, dtype: Any, source: dict[str, Any]) -> None:
        self.model_name = path
        if device is None:  # this process's GPU if there is one, by the variable that the launchers set
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        # Load directly to the GPU: otherwise several ranks of one machine fill its memory at the same time
        device_map = None if self.offload or self.device.type == "cpu" else {"": self.device}
        with outside_deepspeed():
            self._set_tokenizer(path if tokenizer is None else tokenizer, source)
            self._load_model(path, dtype=dtype, device_map=device_map, **source)
        for part in self._parts:
            part.requires_grad_(False)
        # Of a folder: when its weights were last written, which changes if a model is trained again into it
        files = [file for end in ("safetensors", "bin") for file in Path(path).glob(f"*.{end}")]
        newest = max((file.stat().st_mtime_ns for file in files), default=None)
        self._version = getattr(self._parts[0].config, "_commit_hash", None) or newest

    def _take(self, model: Any, own: Any, tokenizer: Any, device: Any, dtype: Any, source: dict[str, Any]) -> None:
        self.model_name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self._set_tokenizer(own if tokenizer is None else tokenizer, source)
        self._take_model(model)
        if dtype is not None:
            self._parts[0].to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        self.device = torch.device(self._parts[0].device if device is None else device)

    def _set_tokenizer(self, tokenizer: Any, source: dict[str, Any]) -> None:
        if isinstance(tokenizer, str | Path):
            from transformers import AutoTokenizer

            with self._loading():
                tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), **source)
        self.tokenizer = tokenizer

    @contextmanager
    def _loading(self, failure: type[Exception] = Exception) -> Iterator[None]:
        """A failure of transformers becomes an error that names the model and the remedy."""
        try:
            yield
        except failure as error:
            raise ValueError(
                f"model={self.model_name!r} could not be loaded: {error} "
                f"Give a Hub id, or a folder with {self._files}."
            ) from error

    @property
    def name(self) -> str:
        path = Path(self.model_name)
        return f"{type(self).__name__}({path.name if path.exists() else self.model_name})"

    @property
    def _pad_id(self) -> int:
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((id for id in ids if id is not None), 0)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model on its device, in eval mode and without gradients. Afterwards device and mode are as before."""
        modes = [part.training for part in self._parts]
        try:
            for part in self._parts:
                part.eval()
            if self.offload:
                self._move(self.device)
            # The training's autocast is not meant for this model. It would undo the float32 of a PRM's head
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for part, mode in zip(self._parts, modes, strict=True):
                part.train(mode)
            if self.offload:
                self._move("cpu")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _run(
        self, work: Callable[[Sequence[int]], list[T]], keys: Sequence[int], what: Callable[[int], str]
    ) -> list[T | str]:
        """
        The results of `work` on a batch of keys, in order, and a reason for a key whose batch failed. If the batch
        does not fit into the memory, it is halved. `what` describes a key for the reason.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            return list(work(keys))
        except Exception as error:
            out_of_memory = should_reduce_batch_size(error)
            reason = f"{type(error).__name__}: {error}"
            if not out_of_memory:
                self._show_traceback()
        # Not inside the handler: there the exception would keep the tensors of the failed pass alive
        if not out_of_memory:
            return [reason] * len(keys)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(keys) == 1:
            return [f"{what(keys[0])} does not fit into the memory of {self.device}"]
        half = len(keys) // 2
        return [result for part in (keys[:half], keys[half:]) for result in self._run(work, part, what)]

    def _show_traceback(self) -> None:
        self._log_once.failed(f"{self.name} failed on a batch")

    def _move(self, device: Any) -> None:
        for part in self._parts:
            part.to(device)


@contextmanager
def outside_deepspeed() -> Iterator[None]:
    """
    Inside this context transformers loads models whole and on every rank, also if the policy trains under DeepSpeed
    ZeRO-3 or FSDP.

    Under ZeRO-3 transformers partitions the parameters of every new model, and the policy's engine does not gather a
    judge's. With FSDP's memory-saving loading only the first rank reads the weights, and nothing would send a judge's
    to the others. Both settings are restored after the context.
    """
    from transformers.integrations import deepspeed

    # The global is a weak reference to the config. `set_hf_deepspeed_config` needs the config itself, which no public
    # function returns. So the reference is kept and put back.
    name = "_hf_deepspeed_config_weak_ref"
    kept, fsdp_loading = getattr(deepspeed, name, None), os.environ.pop(_FSDP_LOADING, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        setattr(deepspeed, name, kept)
        if fsdp_loading is not None:
            os.environ[_FSDP_LOADING] = fsdp_loading


def context_length(config: Any) -> int | None:
    """Most tokens that a model reads, if its config says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
