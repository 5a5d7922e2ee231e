"""
The documentation is whole: links lead somewhere, the navigation names every page, and the help texts are the parsers' own. mkdocs
itself is not needed: `make docs` builds the site with it. `python tests/test_docs.py` writes the help texts anew.
"""

import io
import json
import os
import re
import shlex
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from itertools import takewhile
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PATTERNS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "docs/*/*.ipynb",
    "benchmarks/README.md",
    "benchmarks/*/README.md",
    "recipes/*/README.md",
)
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
COMMAND_LINE = ROOT / "docs" / "reference" / "command_line.md"

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
HELP = re.compile(r"(<!-- help: ?([\w-]*) -->\n```text\n)(.*?)(```\n)", re.DOTALL)

WIDTH = 88


def text_of(page: Path) -> str:
    """The words of a page; of a notebook, those of its Markdown cells."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(page: Path) -> set[str]:
    """The anchors that both GitHub and mkdocs give the headings of a page; a heading for which they differ has none."""
    found = set()
    for heading in HEADING.findall(FENCED.sub("", text_of(page))):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().replace("`", "")
        github = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        mkdocs = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip())
        found |= {github} & {mkdocs}
    return found


def broken_links(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(FENCED.sub("", text_of(page))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page: one\n\n[a](#a-page-one) [b](#two) [c](gone.md) [d](page.md#a-page-one)\n\n```\n[e](gone.md)\n```\n"
    )
    assert broken_links(page) == ["#two", "gone.md"]


def leaves(nav):
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from leaves(value) if isinstance(value, list) else [value]


def test_the_navigation_names_every_page():
    named = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    docs = ROOT / "docs"
    assert len(named) == len(set(named))
    notebooks = {page.relative_to(docs).with_suffix(".md").as_posix() for page in docs.glob("*/*.ipynb")}
    assert {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} | notebooks <= set(named)
    assert all((docs / name).is_file() or (ROOT / name).is_file() or name in notebooks for name in named)
    records = {page.relative_to(ROOT).as_posix() for page in PAGES if page.is_relative_to(ROOT / "benchmarks")}
    assert records <= set(named)


def test_the_addresses_of_the_repository_agree():
    """Of the package's page, of the site and of the citation; none has one as long as the repository has none."""
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"].get("Repository")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text()).get("repo_url")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text()).get("repository-code")
    assert package == site == citation


def whole_help(command: str) -> str:
    """What `trl-sgpo COMMAND --help` prints."""
    from trl_sgpo import cli

    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        cli.main([command, "--help"] if command else ["--help"])
    return printed.getvalue()


def own_help(command: str) -> str:
    """Of the help of a command that takes TRL's arguments too, the part on those of this package."""
    from trl import GRPOConfig
    from trl.scripts.grpo import GRPOScriptArguments

    from trl_sgpo import SGPOConfig
    from trl_sgpo.judge_training.arguments import JudgeTrainArguments
    from trl_sgpo.scripts import judge_train, sgpo

    make_parser, classes, inherited = {
        "train": (sgpo.make_parser, (sgpo.SGPOScriptArguments, SGPOConfig), (GRPOScriptArguments, GRPOConfig)),
        "judge-train": (judge_train.make_parser, (JudgeTrainArguments,), ()),
    }[command]
    own = {field.name for one in classes for field in fields(one)} - {f.name for one in inherited for f in fields(one)}
    parser = make_parser(prog=f"trl-sgpo {command}")
    formatter = parser.formatter_class(prog=parser.prog, width=WIDTH - 2)
    formatter.start_section(f"options of trl-sgpo {command} beside TRL's")
    formatter.add_arguments([action for action in parser._actions if action.dest in own])
    formatter.end_section()
    return formatter.format_help()


def with_help(page: str) -> str:
    """The page with the help texts as they are now."""
    return HELP.sub(
        lambda block: (
            block[1] + (own_help if block[2] in ("train", "judge-train") else whole_help)(block[2]) + block[4]
        ),
        page,
    )


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse breaks lines in another way in every version")
def test_the_help_texts_are_the_parsers_own(monkeypatch):
    from trl_sgpo import cli

    monkeypatch.setenv("COLUMNS", str(WIDTH))
    page = COMMAND_LINE.read_text()
    assert {name for _, name, _, _ in HELP.findall(page)} == {"", *cli.COMMANDS}
    assert page == with_help(page), "run `python tests/test_docs.py`"


def commands() -> list[tuple[str, str, list[str]]]:
    """Every call of `trl-sgpo` in a block of shell commands: the page, the command, its options."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE):
            words = ["", *shlex.split(block.replace("\\\n", " ").replace("\n", " ; "))]
            for start in [
                i for i, word in enumerate(words) if word == "trl-sgpo" and words[i - 1] not in ("install", "cd")
            ]:
                call = list(takewhile(lambda word: word != ";", words[start + 1 :]))
                found.append((page.name, call[0], [word for word in call if word.startswith("--")]))
    return found


def test_the_commands_of_the_pages_exist():
    from trl_sgpo.scripts import evaluate, judge, judge_eval, judge_train, report, sgpo

    makers = {"judge": judge, "judge-eval": judge_eval, "judge-train": judge_train, "evaluate": evaluate}
    makers |= {"report": report, "train": sgpo}
    known = {name: {*maker.make_parser()._option_string_actions, "--config"} for name, maker in makers.items()}
    known["env"] = set()
    wrong = [
        (page, name, option) for page, name, options in commands() for option in options if option not in known[name]
    ]
    assert wrong == []
    assert {"train", "judge", "judge-eval", "judge-train", "evaluate", "report", "env"} == {
        name for _, name, _ in commands()
    }


if __name__ == "__main__":
    os.environ["COLUMNS"] = str(WIDTH)
    sys.path.insert(0, str(ROOT))
    COMMAND_LINE.write_text(with_help(COMMAND_LINE.read_text()))
