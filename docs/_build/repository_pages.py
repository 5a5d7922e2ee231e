"""
A hook of mkdocs: the READMEs of benchmarks/ and recipes/ and the changelog become pages of the site, where they are. Links
between pages are those of the repository, which work on GitHub too. A link to a file that is no page keeps its words only.
"""

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
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri
    in_docs = (ROOT / "docs" / here).is_file()
    folder = os.path.dirname(f"docs/{here}" if in_docs else here)

    def rewrite(link: re.Match[str]) -> str:
        picture, words, target, anchor = link.groups(default="")
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        place = os.path.normpath(os.path.join(folder, target)).removeprefix("docs/")
        if place == "README.md":
            place = "index.md"
        if files.get_file_from_path(place) is None:
            # A link that leads nowhere in the site: to code, which has no page, or a mistake, which strict mode finds
            return words if (ROOT / place).exists() else link[0]
        return f"{picture}[{words}]({os.path.relpath(place, os.path.dirname(here) or '.')}{anchor})"

    parts, last = [], 0
    for fence in _FENCED.finditer(markdown):
        parts += [_LINK.sub(rewrite, markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, _LINK.sub(rewrite, markdown[last:])])
