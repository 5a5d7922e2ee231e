"""What is recorded beside a result: the settings that it depends on, and commit, versions and hardware."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.common import provenance


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a file that is there was written to its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def settings_of(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """What a result depends on, of the arguments."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "function", *left_out)}


def check_settings(path: Path, settings: dict[str, Any], what: str, key: str | None = None) -> None:
    """Raises `ValueError` if something was made before with other settings: two experiments do not share a folder."""
    if not path.exists():
        return
    kept = json.loads(path.read_text())
    kept = kept[key] if key else kept
    different = [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]
    if different:
        listed = ", ".join(f"{name}: {kept.get(name)!r} there, {settings.get(name)!r} now" for name in different)
        raise ValueError(
            f"{path.parent} holds {what} with other settings ({listed}). Give another --output, or remove it."
        )


def surroundings() -> dict[str, Any]:
    """Commit, versions and hardware, as every record has them."""
    return provenance(("trl", "transformers", "torch", "accelerate"))
