"""
The notebook of the first run does what it says. It is executed as a reader runs it: by a Jupyter kernel, in a process of its own.
Running its cells by `exec` would need fewer packages, but in a kernel Trainer, tqdm and matplotlib show other things.

`python tests/test_notebook.py` writes its outputs anew.
"""

import json
import statistics
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "start" / "first_run_offline.ipynb"
LARGEST = 300_000  # bytes


def execute(folder: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs; what it writes lands in `folder`. Raises if a cell raises."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", coalesce_streams=True, resources=resources)
    return client.execute()


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def is_clean(notebook: nbformat.NotebookNode) -> bool:
    """Whether it shows printed words and pictures only: no warning, no error, no progress bar."""
    kinds = {(output.output_type, output.get("name")) for output in outputs(notebook)}
    return kinds == {("stream", "stdout"), ("display_data", None)}


def test_the_committed_outputs_can_be_read():
    """All cells ran, once and in order, and what they show has no path of a machine and no warning."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert is_clean(notebook)
    assert not [path for path in ("/tmp/", "/home/", "/root/", "site-packages") if path in NOTEBOOK.read_text()]
    assert NOTEBOOK.stat().st_size < LARGEST


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_and_its_claims_hold(tmp_path):
    notebook = execute(tmp_path)
    assert is_clean(notebook)
    assert "the first wrong one has index 2" in printed(notebook)

    folder = tmp_path / "outputs" / "first_run"
    logs = {}
    for name in ("grpo", "prefix"):
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        logs[name] = [entry for entry in history if "sgpo/accuracy" in entry]
    grpo, prefix = logs["grpo"], logs["prefix"]
    assert len(grpo) == len(prefix)

    def mean(log, key):
        return statistics.mean(entry.get(key, 0.0) for entry in log)

    # Most groups fail at the start, and the judge is asked by one run only
    assert mean(grpo[:5], "sgpo/groups/failed") > 0.8
    assert mean(grpo, "sgpo/judge_calls") == 0 < mean(prefix, "sgpo/judge_calls")
    # Prefix credit is ahead: over the whole run, and in when it reaches an accuracy of 0.25
    assert mean(prefix, "sgpo/accuracy") > mean(grpo, "sgpo/accuracy") + 0.05
    assert mean(prefix, "sgpo/groups/failed") < mean(grpo, "sgpo/groups/failed") - 0.05
    first = {
        name: next((i for i in range(len(log) - 9) if mean(log[i : i + 10], "sgpo/accuracy") >= 0.25), len(log))
        for name, log in logs.items()
    }
    assert first["prefix"] < first["grpo"]
    # The report has a finding about each run
    found = {
        run["name"]: run["finding"] for run in json.loads((folder / "report" / "summary.json").read_text())["runs"]
    }
    assert {name: found[name]["kind"] != "unknown" for name in found} == {"grpo": True, "prefix": True}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        executed = execute(Path(folder))
    executed.metadata.language_info = {"name": "python"}  # without the version of this one
    for cell in executed.cells:
        cell.metadata.clear()  # the times of the run
        if cell.cell_type == "code":
            for output in cell.outputs:
                output.get("data", {}).pop("text/plain", None)  # the size of a picture, in words
    nbformat.write(executed, NOTEBOOK)
