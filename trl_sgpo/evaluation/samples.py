"""
The folder of an evaluation: `samples.jsonl`, which only grows, and `settings.json`, which says what the samples came
from. A folder holds one way of decoding; models and sets may be added.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sgpo.analysis.jsonable import append_lines, whole_lines, write_json


Line = dict[str, Any]
Key = tuple[str, str, str]  # model, set, kind


class Samples:
    """
    The samples of a folder by model, set and kind, and by the problem's place in the set. `decoding`, `models` and `sets`
    are what they depend on, plain data by name. If the folder has samples of something else, that is a `ValueError`.
    """

    def __init__(
        self,
        folder: Path,
        decoding: Mapping[str, Any],
        models: Mapping[str, Any],
        sets: Mapping[str, Any],
    ) -> None:
        self.path = folder / "samples.jsonl"
        self.lines: dict[Key, dict[int, Line]] = {}
        settings_path = folder / "settings.json"
        given = {"decoding": dict(decoding), "models": dict(models), "sets": dict(sets)}
        given = json.loads(json.dumps(given))  # as a file gives it back
        texts = whole_lines(self.path)
        if texts and settings_path.exists():
            kept = json.loads(settings_path.read_text(encoding="utf-8"))
            different = _differences(kept, given)
            if different:
                raise ValueError(
                    f"output={str(folder)!r} holds samples of other settings, and they must not be mixed. There and here: "
                    f"{'; '.join(different)}. Give another --output, use the old settings, or delete the folder."
                )
            given = {part: {**kept[part], **values} for part, values in given.items()}
        elif texts:
            raise ValueError(
                f"{self.path} has no settings.json beside it, so it may be of any run. Give another --output."
            )
        for number, text in enumerate(texts, start=1):
            try:
                self._keep(json.loads(text))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path}, line {number} is no sample ({error}). Remove that line.") from error
        folder.mkdir(parents=True, exist_ok=True)
        write_json(settings_path, given)

    def of(self, model: str, set: str, kind: str) -> dict[int, Line]:
        """The lines of one model on one benchmark, by the place of the problem in the set."""
        return self.lines.setdefault((model, set, kind), {})

    def add(self, lines: Sequence[Line]) -> None:
        append_lines(self.path, lines)
        for line in lines:
            self._keep(line)

    def _keep(self, line: Line) -> None:
        self.of(line["model"], line["set"], line["kind"])[line["index"]] = line


def _differences(kept: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What differs, in words; models and sets only if both have them."""
    found = []
    for part, values in given.items():
        for name in values if part != "decoding" else sorted({*kept[part], *values}):
            if name not in kept[part] and part != "decoding":
                continue
            there, here = kept[part].get(name), values.get(name)
            if there != here:
                label = name if part == "decoding" else f"{part} {name}"
                found.append(f"{label}={_short(there)} and {_short(here)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
