"""
A hook of mkdocs: the READMEs of benchmarks/ and recipes/, the changelog and the notebooks of docs/ become pages of the site, where
they are. Links between pages are those of the repository, which work on GitHub too. A link to a file that is no page keeps its words only.

The plugin mkdocs-jupyter is not used: it leaves links between pages as they are, so on the site they lead nowhere.
"""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[2]
PAGES = ("benchmarks/README.md", "benchmarks/*/README.md", "benchmarks/*/results/tables.md", "recipes/*/README.md", "CHANGELOG.md")
PICTURES = ("benchmarks/**/*.png",)

_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for pattern in (*PAGES, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs").glob("*/*.ipynb")):
        page = path.relative_to(ROOT / "docs").with_suffix(".md")
        markdown, pictures = notebook_page(path)
        files.append(File.generated(config, page.as_posix(), content=markdown))
        for name, png in pictures.items():
            files.append(File.generated(config, (page.parent / name).as_posix(), content=png))
    return files


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, with the pictures that it shows by their file names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        if len(parts) == 1:
            parts.append(f"This page is a notebook: [{path.name}]({path.name}).")
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![What the cell draws]({name})")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri
    source = ROOT / "docs" / here
    in_docs = source.is_file() or source.with_suffix(".ipynb").is_file()
    folder = os.path.dirname(f"docs/{here}" if in_docs else here)

    def rewrite(link: re.Match[str]) -> str:
        picture, words, target, anchor = link.groups(default="")
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        place = os.path.normpath(os.path.join(folder, target)).removeprefix("docs/")
        if place == "README.md":
            place = "index.md"
        if place.endswith(".ipynb") and place != here.removesuffix(".md") + ".ipynb":
            place = place.removesuffix(".ipynb") + ".md"  # its page; only that page itself links to the file
        if files.get_file_from_path(place) is None:
            # A link that leads nowhere in the site: to code, which has no page, or a mistake, which strict mode finds
            return words if (ROOT / place).exists() else link[0]
        return f"{picture}[{words}]({os.path.relpath(place, os.path.dirname(here) or '.')}{anchor})"

    parts, last = [], 0
    for fence in _FENCED.finditer(markdown):
        parts += [_LINK.sub(rewrite, markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, _LINK.sub(rewrite, markdown[last:])])
