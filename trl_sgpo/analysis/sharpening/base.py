"""
The base model of a run, that is, the policy before its training: the way to it without a second copy on the
accelerator ([`find_base`]), and the cache of its samples on disk ([`save_samples`], [`load_samples`]).

Samples of the base cost as much as a probe of the policy and never change. A file of the cache belongs to a key: the
hash of all that the samples depend on. Rewards are not cached, because reward functions change: every run scores the
samples again.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_config_model_id

from trl_sgpo.analysis.sharpening.log import as_columns
from trl_sgpo.analysis.sharpening.probe import Sample


logger = logging.getLogger(__name__)

# Elements of each parameter that go into a fingerprint
_SAMPLED = 4096
# Part of every key of the cache. Raise it if the same key would come to mean something else
_CACHE_VERSION = 1


class BaseModel:
    """The way to the base model. A subclass says how in [`~BaseModel.active`]."""

    can_generate = False  # whether the trainer's generation draws from the base while the base is active

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Gives a model that scores as the base does inside this context. Every rank has to enter it."""
        raise NotImplementedError
        yield


class AdaptersOff(BaseModel):
    """A PEFT model without its adapters, or with TRL's copy of the adapter that training began with, if any."""

    can_generate = True

    @contextmanager
    def active(self) -> Iterator[Any]:
        from trl.trainer.utils import use_adapter

        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.trainer.model


class ReferenceModel(BaseModel):
    """A separate model that TRL has prepared."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        super().__init__(trainer)
        self.model = model

    @property
    def module(self) -> nn.Module:
        """The model without its wrappers."""
        return self.trainer.accelerator.unwrap_model(self.model)

    @contextmanager
    def active(self) -> Iterator[Any]:
        training = self.model.training
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train(training)


class ExchangedWeights(BaseModel):
    """
    The base's weights, kept on the CPU: the parameters that differ from the policy's, by name. While the base is
    active they change places with the policy's, in place. This needs no memory on the accelerator, and the policy's
    weights come back bit for bit.
    """

    can_generate = True

    def __init__(self, trainer: Any, weights: Mapping[str, Tensor]) -> None:
        super().__init__(trainer)
        self.weights = dict(weights)

    @torch.no_grad()
    def _exchange(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = dict(self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters())
        before = {}
        for name, value in weights.items():
            before[name] = parameters[name].detach().to("cpu", copy=True)
            parameters[name].copy_(value)
        if hasattr(self.trainer, "_last_loaded_step"):
            self.trainer._last_loaded_step = -1  # vLLM has to fetch the weights again, now and after the exchange
        return before

    @contextmanager
    def active(self) -> Iterator[Any]:
        policy = self._exchange(self.weights)
        try:
            yield self.trainer.model
        finally:
            self._exchange(policy)


def is_peft(trainer: Any) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


def is_sharded(trainer: Any) -> bool:
    """Whether a rank holds only a part of each parameter: DeepSpeed ZeRO-3 or FSDP."""
    return trainer._dist.is_zero3 or trainer._dist.is_fsdp


def find_base(
    trainer: Any,
    base_model: str | nn.Module | None,
    base_logps: bool,
    fresh: bool,
    recorded_fingerprint: Callable[[], str | None],
) -> tuple[BaseModel | None, str | None]:
    """
    The way to the base model of a run (`None` if there is none), and the base's fingerprint (`None` if the base is not
    known). Every rank has to call it.

    Args:
        base_model (`str` or `nn.Module`, *optional*):
            The base, if it is not the policy before training.
        base_logps (`bool`):
            Whether log-probabilities are needed. Without it no copy of the weights is made.
        fresh (`bool`):
            Whether training begins with this policy. In a resumed run the policy is no longer its base.
        recorded_fingerprint (`Callable`):
            Gives the fingerprint that the begin of a resumed run wrote down.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft(trainer):
        return AdaptersOff(trainer), fingerprint(trainer, model, trainable=False)
    if base_model is not None and is_sharded(trainer):
        loaded = load_sharded(trainer, str(base_model))
        return loaded, fingerprint(trainer, loaded.module)
    if base_model is not None:
        exchanged = load_weights(trainer, base_model)
        with exchanged.active():
            return exchanged, fingerprint(trainer, model)
    known = fingerprint(trainer, model) if fresh else recorded_fingerprint()
    found = _find_untouched(trainer, known, fresh) if base_logps else None
    if known is None and isinstance(found, ReferenceModel):
        known = fingerprint(trainer, found.module)
    return found, known


def _find_untouched(trainer: Any, known: str | None, fresh: bool) -> BaseModel | None:
    """The base of a policy without adapters, for log-probabilities: the cheapest of the ways that are right."""
    if trainer.ref_model is not None and not trainer.args.sync_ref_model:
        reference = ReferenceModel(trainer, trainer.ref_model)
        if known is None or fingerprint(trainer, reference.module) == known:
            return reference
    if not fresh:
        logger.warning(
            "The run was resumed, so the policy is no longer its base, and there is no base_model: log-probabilities "
            "under the base are left out. Give `base_model=`, the model that the run was started from."
        )
        return None
    if not is_sharded(trainer):
        return keep_copy(trainer)
    path = get_config_model_id(trainer.model.config)
    loaded = load_sharded(trainer, path)
    if fingerprint(trainer, loaded.module) != known:
        raise ValueError(
            f"The policy is sharded over the ranks, so its base has to be loaded a second time, but {path!r} holds other "
            "weights than the policy before training. Give `base_model=`, the place of these weights, or base_logps=False."
        )
    return loaded


def keep_copy(trainer: Any) -> ExchangedWeights:
    """Keeps the policy's trainable weights as they are now; the others will not change."""
    parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters if p.requires_grad}
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    logger.info(
        "The base model's weights are kept on the CPU, for log-probabilities under the base: %.2f GiB for each process, and "
        "twice that during a probe. `base_logps=False` avoids it.",
        size / 2**30,
    )
    return ExchangedWeights(trainer, weights)


def load_weights(trainer: Any, base_model: str | nn.Module) -> ExchangedWeights:
    """The weights of another model of the policy's architecture as the base."""
    model: Any = _from_path(trainer, base_model) if isinstance(base_model, str) else base_model
    policy = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wrong = [name for name in policy if name not in weights or weights[name].shape != policy[name].shape]
    if wrong or len(policy) != len(weights):
        given = base_model if isinstance(base_model, str) else type(base_model).__name__
        raise ValueError(
            f"base_model={given!r} does not fit the policy: {len(wrong)} of the policy's {len(policy)} "
            f"parameters are missing or have another shape there{f', for example {wrong[0]}' if wrong else ''}. Give the "
            "model that the run was started from."
        )
    return ExchangedWeights(trainer, {name: weights[name].to("cpu", policy[name].dtype) for name in policy})


def load_sharded(trainer: Any, path: str) -> ReferenceModel:
    """A second model of the base, sharded as TRL shards its reference model."""
    from trl.models import prepare_deepspeed, prepare_fsdp
    from trl.trainer.utils import add_fused_lm_head

    try:
        model = _from_path(trainer, path)
    except OSError as error:
        raise ValueError(
            f"The base model {path!r} could not be loaded ({error}). The policy is sharded over the ranks, so the base is "
            "needed a second time, for its log-probabilities. Give `base_model=`, a name or path, or base_logps=False."
        ) from error
    add_fused_lm_head(model, temperature=trainer.temperature, cast_lm_head_to_fp32=trainer.args.cast_lm_head_to_fp32)
    prepare: Any = prepare_deepspeed if trainer.is_deepspeed_enabled else prepare_fsdp
    logger.info(
        "%s is loaded a second time, sharded over the ranks, for log-probabilities under the base model.", path
    )
    return ReferenceModel(trainer, prepare(model, trainer.accelerator))


def fingerprint(trainer: Any, model: nn.Module, trainable: bool = True) -> str:
    """
    A hash of a model's weights: name, shape and evenly spaced elements of each parameter, so that billions of
    parameters take seconds. `trainable=False` leaves out what is trained: in a PEFT model the rest is the base. Every
    rank has to call it, and gets the same hash. Under FSDP the hash depends on the number of ranks.
    """
    from accelerate.utils import gather_object

    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not trainable and parameter.requires_grad:
            continue
        with trainer._dist.gather_params([parameter]):
            whole = parameter.detach()
            local = whole.to_local() if hasattr(whole, "to_local") else whole
            flat = local.reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(whole.shape)}".encode())
        digest.update(picked)
    if trainer._dist.is_fsdp:  # each rank has hashed its own shards
        return hashlib.blake2b("".join(gather_object([digest.hexdigest()])).encode(), digest_size=16).hexdigest()
    return digest.hexdigest()


def _from_path(trainer: Any, path: str) -> Any:
    from trl.trainer.utils import create_model_from_path

    options = {"trust_remote_code": trainer.args.trust_remote_code, **(trainer.args.model_init_kwargs or {})}
    options.pop("revision", None)  # belongs to the policy, which may be in another repository
    # To the CPU: the caller moves or shards it
    return create_model_from_path(path, **{**options, "device_map": None, "dtype": trainer.model.dtype})


def default_cache_folder() -> Path:
    """`trl_sgpo/base_samples` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_sgpo" / "base_samples"


def hash_of(value: Any) -> str:
    """A hash of anything that JSON can hold. Other values count by their `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def prompts_hash(trainer: Any, prompts: Sequence[Any]) -> str:
    """A hash of the prompts as the model sees them, with the chat template."""
    tokenizer = trainer.processing_class
    template = getattr(trainer, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    return hash_of([list(prompts), template, trainer.chat_template_kwargs])


def cache_key(fingerprint: str, prompts: str, sampling: Mapping[str, Any], n_samples: int, seed: int) -> str:
    """The key of the base's samples in the cache. `fingerprint` and `prompts` are hashes."""
    return hash_of([_CACHE_VERSION, fingerprint, prompts, dict(sampling), n_samples, seed])


def save_samples(folder: Path, key: str, samples: Sequence[Sample]) -> None:
    """Keeps the complete samples under their key. The completions are JSON, so reading the file runs no code."""
    columns = as_columns(samples, ("prompt_id", "sample", "text", "completion", "token_ids", "logp_base"))
    columns["completion"] = [json.dumps(completion) for completion in columns["completion"]]
    write_parquet(folder / f"{key}.parquet", columns)


def load_samples(folder: Path, key: str) -> list[Sample] | None:
    """The samples that were kept under a key; `None` if there are none, or if the file cannot be read."""
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(folder / f"{key}.parquet").to_pylist()
        return [Sample(**{**row, "completion": json.loads(row["completion"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's own errors are ValueErrors
        return None


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes a table so that a reader sees all of it or nothing. A column of None only is left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: list(values) for name, values in columns.items() if any(v is not None for v in values)})
    _write(path, lambda temporary: pq.write_table(table, temporary))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees all of it or nothing."""
    _write(path, lambda temporary: Path(temporary).write_text(json.dumps(value, indent=1, default=str) + "\n"))


def _write(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # mkstemp's files are for the owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
