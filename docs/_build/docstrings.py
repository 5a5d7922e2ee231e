"""
An extension of griffe: TRL's docstrings as mkdocstrings can show them. Types and defaults are read from the signatures, so
those in the docstring are left out, and [`Name`] becomes a link if the site has a reference entry of that name.
"""

import re
from pathlib import Path
from typing import Any

import griffe


REFERENCE = Path(__file__).parents[1] / "reference"

_PARAMETER = re.compile(r"^(    [\w*]+(?:, [\w*]+)*) \(.+?\):(?= |$)", re.MULTILINE)
_EXCEPTION = re.compile(r"^    `\w+`(?:, `\w+`)*:", re.MULTILINE)
_MENTION = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")


def _entries() -> dict[str, str]:
    """The objects that have an entry in the reference, by their last name and by their path."""
    found: dict[str, str] = {}
    for page in REFERENCE.glob("*.md"):
        for path in re.findall(r"^::: ([\w.]+)", page.read_text(), re.MULTILINE):
            found[path] = found[path.rpartition(".")[2]] = path
    return found


ENTRIES = _entries()


def _linked(mention: re.Match[str]) -> str:
    name = mention[2]
    owner, _, last = name.rpartition(".")
    shown = last if mention[1] else name
    path = ENTRIES.get(name) or ENTRIES.get(last)
    owner = ENTRIES.get(owner) or ENTRIES.get(owner.rpartition(".")[2])
    if path is None and owner is not None and mention[1] and not last.startswith("_"):
        path, shown = f"{owner}.{last}", f"{owner.rpartition('.')[2]}.{last}"
    return f"[`{shown}`][{path}]" if path else f"`{shown}`"


def _parameter(line: re.Match[str]) -> str:
    names = [*line[1].split(", "), *re.findall(r"\), (\w+) \(", line[0])]
    return "    " + ",\u00a0".join(name.strip() for name in names) + ":"  # a plain space would end the name


def readable(text: str) -> str:
    text = _EXCEPTION.sub(lambda line: line[0].replace("`", ""), _PARAMETER.sub(_parameter, text))
    return _MENTION.sub(_linked, text)


class Readable(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
