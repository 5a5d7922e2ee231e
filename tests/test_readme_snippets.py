"""
The Python code of README.md and docs/ runs. Each page is one program: its blocks are executed in order, in one namespace, and of
a `diff` block the new side. `stubs` holds what a reader brings along. A model of the Hub is replaced by a tiny one, and the trainer runs on a CPU.
"""

import re
from pathlib import Path

import pytest

from trl_sgpo.tasks.rewrite_chain import accuracy_reward, make_dataset


ROOT = Path(__file__).parents[1]
REPLACED = {r'"Qwen/[\w.-]+"': '"model"', r"\bSGPOConfig\(": 'SGPOConfig(use_cpu=True, bf16=False, report_to="none", '}
FENCED = re.compile(r"^```(python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Page, words of a block, why it cannot run here
CANNOT_RUN: list[tuple[str, str, str]] = []


def blocks(page: Path) -> list[str]:
    """The code of a page, block by block."""
    found = []
    for language, text in FENCED.findall(page.read_text()):
        if language == "diff":
            lines = [line for line in text.splitlines() if not line.startswith("-")]
            text = "\n".join(line[1:] for line in lines)
        if not any(page.name == name and words in text for name, words, _ in CANNOT_RUN):
            found.append(text)
    return found


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(page)]


def first_step(problem, steps, **row):
    return 0


@pytest.fixture
def stubs(make_trainer):
    """What a reader has: a reward, a judge, data, and a trainer. Only what the page uses is made."""
    return {
        "accuracy_reward": lambda: accuracy_reward,
        "judge": lambda: first_step,
        "dataset": lambda: make_dataset(8, 2, seed=0),
        "probe_dataset": lambda: make_dataset(4, 2, seed=1),
        "trainer": lambda: make_trainer([accuracy_reward]),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, stubs, tmp_path, monkeypatch, make_model, tokenizer):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    code = blocks(page)
    for found, new in REPLACED.items():
        code = [re.sub(found, new, block) for block in code]
    names = {name: make() for name, make in stubs.items() if any(re.search(rf"\b{name}\b", block) for block in code)}
    namespace = {"__name__": page.stem, **names}
    for i, block in enumerate(code):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), namespace)


def test_the_pages_with_code_are_found():
    assert {"README.md", "write_a_treatment.md"} <= {page.name for page in PAGES}
