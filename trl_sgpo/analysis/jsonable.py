"""Results as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np


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
