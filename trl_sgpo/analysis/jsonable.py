"""Results as JSON, and records of single answers as JSON lines that only grow."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)


def jsonable(value: Any) -> Any:
    """The value as plain data for JSON: dataclasses as dictionaries, NaN and infinities as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON (see [`jsonable`]) in one piece, so that a reader never finds half of a file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _whole(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that only grows. A last one that a killed run left incomplete is left out, with a warning."""
    whole = _whole(path)
    if path.exists() and path.stat().st_size > len(whole):
        logger.warning("The last line of %s is incomplete and is left out; what it said is asked for again.", path)
    return whole.decode("utf-8").split("\n")[:-1]


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines to such a file, in one piece, so that an interrupt leaves whole lines. An incomplete last one goes first."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("a+b") as file:
        if size := file.tell():
            file.seek(size - 1)
            if file.read() != b"\n":
                file.truncate(len(_whole(path)))
        file.write(text.encode("utf-8"))
