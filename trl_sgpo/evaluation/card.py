"""The numbers of an evaluation in a model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_sgpo.evaluation.tables import markdown


_BEGIN, _END = "<!-- trl-sgpo evaluate -->", "<!-- /trl-sgpo evaluate -->"
_SECTION = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
_AFTER = "\n## Citations\n"  # in the cards that TRL makes


def card_path(card: str) -> Path:
    """The file of a card, from its path or its folder's. A `ValueError` if it is not there."""
    path = Path(card)
    path = path / "README.md" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"card={card!r} does not exist. Give the README.md of a checkpoint, or its folder.")
    return path


def add_to_card(text: str, results: Mapping[str, Any]) -> str:
    """
    The text of a card with a section "Evaluation". An earlier one that this function wrote is replaced; else it stands
    before TRL's citations, or at the end.
    """
    section = f"{_BEGIN}\n## Evaluation\n\n{markdown(results)}{_END}\n"
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1)
    before, found, after = text.partition(_AFTER)
    return f"{before.rstrip()}\n\n{section}{found}{after}"
