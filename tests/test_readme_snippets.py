"""
The Python code of README.md and docs/ runs. Each page is one program: its blocks are executed in order, in one namespace, and of
a `diff` block the new side. `stubs` holds what a reader brings along. A model and a dataset of the Hub are replaced by tiny ones, and
the trainer runs two short updates on a CPU.
"""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from trl import GRPOConfig
from trl.rewards import accuracy_reward

from trl_sgpo import SGPOConfig


ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^print\(.+\)(?:  |\n)# (.+)$", re.MULTILINE)

# What cannot be had offline or in seconds, and what stands for it
REPLACED = {
    r'"Qwen/[\w.-]+"': '"model"',
    r"\b(SGPO|GRPO)Config\(": r"small_\1Config(",
    r'load_dataset\("[\w/-]+", split="train"\)': "small_dataset()",
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

# Page, words of a block, why it cannot run here
CANNOT_RUN: list[tuple[str, str, str]] = [
    ("docs/howto/prm.md", "PRMJudge(", "loads a process reward model from the Hub"),
    (
        "docs/howto/vllm_pooling.md",
        "VLLMPoolingJudge(",
        "loads a process reward model's tokenizer and config from the Hub",
    ),
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    """The code of a page, block by block."""
    found = []
    for language, text in FENCED.findall(page.read_text()):
        if language == "diff":
            lines = [line for line in text.splitlines() if not line.startswith("-")]
            text = "\n".join(line[1:] for line in lines)
        if not any(name_of(page) == name and words in text for name, words, _ in CANNOT_RUN):
            found.append(text)
    return found


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if blocks(page)]


def small(config_class):
    """The configuration that the page asks for, and a run of seconds."""
    limits = {"max_steps": 2, "max_completion_length": 12, "use_cpu": True, "bf16": False, "report_to": "none"}
    return lambda **given: config_class(**{**given, **limits, "disable_tqdm": True, "save_strategy": "no"})


def small_dataset() -> Dataset:
    problems = [[{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(8)]
    return Dataset.from_list(
        [{"prompt": prompt, "solution": f"\\boxed{{{2 * i}}}"} for i, prompt in enumerate(problems)]
    )


@pytest.fixture
def stubs(make_trainer):
    """What a reader has: a trainer, and problems to probe it with. Only what the page uses is made."""
    return {
        "trainer": lambda: make_trainer([accuracy_reward], trainer_args={"train_dataset": small_dataset()}),
        "probe_dataset": lambda: small_dataset(),
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs(page, stubs, tmp_path, monkeypatch, capsys, make_model, tokenizer):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.config.max_position_embeddings = 4096  # room for the question to a judge
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("model/chat_template.jinja").write_text(CHAT_TEMPLATE)
    code = blocks(page)
    for found, new in REPLACED.items():
        code = [re.sub(found, new, block) for block in code]
    whole = "\n".join(code)
    namespace = {"__name__": page.stem, "small_dataset": small_dataset}
    namespace |= {"small_SGPOConfig": small(SGPOConfig), "small_GRPOConfig": small(GRPOConfig)}
    namespace |= {
        name: make()
        for name, make in stubs.items()
        if name in whole and not re.search(rf"^{name} =", whole, re.MULTILINE)
    }
    for i, block in enumerate(code):
        exec(compile(block, f"{name_of(page)}, block {i + 1}", "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        assert [said for said in PRINTED.findall(block) if said not in printed] == []


def test_the_pages_with_code_are_found():
    assert {"README.md", "docs/start/first_run.md", "docs/howto/write_a_treatment.md"} <= {name_of(p) for p in PAGES}


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, words, _ in CANNOT_RUN])
def test_what_cannot_run_is_there_and_compiles(name, words):
    text = (ROOT / name).read_text()
    found = [block for _, block in FENCED.findall(text) if words in block]
    assert found
    for block in found:
        compile(block, name, "exec")
