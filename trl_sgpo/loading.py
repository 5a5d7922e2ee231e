"""From what stands on a command line or in a YAML file to the object that it means."""

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_sgpo.judges import StepJudge, StepwiseJudge


# The judges that come with the package, by their short names
JUDGE_NAMES = {
    "arithmetic": "trl_sgpo.judges.ArithmeticJudge",
    "reference": "trl_sgpo.judges.ReferenceJudge",
    "openai": "trl_sgpo.judges.OpenAIJudge",
    "generative": "trl_sgpo.judges.GenerativeJudge",
    "prm": "trl_sgpo.judges.PRMJudge",
    "vllm_pooling": "trl_sgpo.judges.VLLMPoolingJudge",
}

# Arguments of StepwiseJudge that are functions, so that a file names them by their dotted paths
_FUNCTIONS_OF_STEPWISE_JUDGE = {"problem", "segmenter"}

_DATA_FILE_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_object(path: str, argument: str) -> Any:
    """
    Imports an object by its dotted path, for instance `"my_project.judges.check_units"`, with the working directory on
    the import path. `argument` names what holds the path, for the message of the `ValueError` if it cannot be
    imported.
    """
    module_path, _, name = path.rpartition(".")
    if not module_path:
        raise ValueError(
            f"{argument}={path!r} is neither a known name nor a dotted path. Give the import path of an object, for "
            "instance 'my_project.judges.check_units'; the working directory is on the import path."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{argument}={path!r} could not be imported from the working directory {os.getcwd()}: {error}. Check the "
            "spelling, and that the module's own dependencies are installed."
        ) from error


def load_judge(judge: str, judge_args: dict[str, Any] | str | None = None) -> "StepJudge | StepwiseJudge | Any":
    """
    The judge that a command line names: one of `JUDGE_NAMES`, or the dotted path of a judge function, a [`StepJudge`]
    (class or instance), or a ready [`StepwiseJudge`]. `judge_args`, a mapping or JSON, go to the constructor of a
    class. A `ValueError` says what cannot be imported or does not fit.
    """
    example = '{"model": "Qwen/Qwen2.5-7B-Instruct"}'
    arguments = as_mapping(judge_args, "judge_args", example)
    found = load_object(JUDGE_NAMES.get(judge, judge), "judge")
    if not isinstance(found, type):
        if arguments:
            raise ValueError(
                f"judge_args={judge_args!r} was given, but judge={judge!r} is not a class, so there is no constructor "
                "to take them. Leave judge_args out, or name a class."
            )
        return found
    try:
        return found(**arguments)
    except TypeError as error:
        raise ValueError(
            f"judge_args={judge_args!r} do not fit judge={judge!r}: {error}. Give what its constructor takes, written like "
            f"'{example}'."
        ) from error


def load_stepwise_judge(
    judge: str, judge_args: dict[str, Any] | str | None = None, stepwise_judge_args: dict[str, Any] | str | None = None
) -> "StepwiseJudge":
    """
    The [`StepwiseJudge`] that a command line or a YAML file describes. `stepwise_judge_args` are its arguments but the
    judge, as a mapping or JSON. Functions are given by their dotted paths. A `ValueError` says what cannot be imported
    or does not fit.
    """
    from trl_sgpo.judges import StepwiseJudge

    arguments = as_mapping(stepwise_judge_args, "stepwise_judge_args", '{"gamma": 0.3, "unit": "characters"}')
    found = load_judge(judge, judge_args)
    if isinstance(found, StepwiseJudge):
        if arguments:
            raise ValueError(
                f"stepwise_judge_args={arguments!r} was given, but judge={judge!r} is a ready StepwiseJudge, which has its "
                "arguments already. Leave stepwise_judge_args out, or name the judge inside it."
            )
        return found
    known = [name for name in inspect.signature(StepwiseJudge).parameters if name != "judge"]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"stepwise_judge_args has the unknown keys {unknown}. StepwiseJudge takes {known}.")
    for name in _FUNCTIONS_OF_STEPWISE_JUDGE & arguments.keys():
        if isinstance(arguments[name], str):
            arguments[name] = load_object(arguments[name], f"stepwise_judge_args: {name}")
    return StepwiseJudge(found, **arguments)


def as_mapping(given: dict[str, Any] | str | None, argument: str, example: str) -> dict[str, Any]:
    """A mapping of arguments, from a YAML file, or from the command line in JSON."""
    if not given:
        return {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"{argument}={given!r} is not valid JSON ({error}). Write it like '{example}'.") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{argument}={given!r} is no mapping of names to values. Write it like '{example}'.")
    return dict(arguments)


def load_rows(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """
    A dataset by its Hub name, or from a local folder or data file (JSON, JSON lines, Parquet, CSV). A single file becomes
    the split `train`.
    """
    from datasets import load_dataset

    loader = _DATA_FILE_LOADERS.get(Path(name).suffix)
    if loader and Path(name).is_file():
        return load_dataset(loader, data_files=name, streaming=streaming)
    return load_dataset(name, name=config, streaming=streaming)


def read_records(
    name: str, split: str | None, argument: str, config: str | None = None
) -> Iterator[tuple[dict[str, Any], Iterable[tuple[str, Any]]]]:
    """
    The rows of a dataset of the Hub or of a local file, for error messages with their places: for each split (or for the
    one that is named) what is known of it, and its rows. `argument` names what holds the name, for the messages of the
    `ValueError`s.
    """
    path = Path(name)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise ValueError(
                f"{argument}={name!r} does not exist. Give a local file, or the name of a dataset of the Hub."
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield {"name": path.name, "sha256": digest}, _json_records(path)
        return
    splits = load_rows(name, config)
    if split is not None and split not in splits:
        raise ValueError(
            f"split={split!r} is not in {argument}={name!r}, which has {sorted(splits)}. Give one of these."
        )
    shown = path.name if path.exists() else name  # the local folder means nothing to others
    for part in [split] if split else list(splits):
        rows = splits[part]
        source = {"name": shown, "split": part, "fingerprint": getattr(rows, "_fingerprint", None)}
        yield source, ((f"{shown}, split {part}, row {i}", row) for i, row in enumerate(rows))


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{path.name}, row {i}", record) for i, record in enumerate(json.loads(text)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} is not valid JSON: {error}. Write a list of objects.") from error
        return
    # Not splitlines(): it would cut at a line separator inside a JSON string
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.name}, line {i} is not valid JSON: {error}. Write one object per line, or one list of objects."
            ) from error
        yield f"{path.name}, line {i}", record
