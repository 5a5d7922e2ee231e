"""The evaluation of judges as its users run it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from annotated_solutions import calls, made_up_rows, write

from trl_sgpo.scripts.judge_eval import JudgeEvalArguments, main


ROOT = Path(__file__).parents[2]


def test_plain_output_without_rich(workplace, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    rows = [*made_up_rows(), {"problem": "p", "steps": ["a"], "label": 4}]
    write(workplace / "rows.jsonl", rows)
    main(["--judge", "eval_judges.by_mark", "--data", "rows.jsonl", "--output", "out", "--robustness", "--reference"])
    text = capsys.readouterr().out
    for words in ("mean of the subsets", "RTS MAE", "tau-b", "all payloads", "1 rows skipped: label out of range"):
        assert words in text
    assert "The judge saw the reference answer" in text


def test_judge_args(workplace, capsys):
    judge = ["--judge", "eval_judges.Obedient", "--judge_args", '{"offset": 2}']
    main([*judge, "--data", "rows.jsonl", "--output", "out"])
    assert "offset" not in Path("out/results.json").read_text()  # arguments may hold keys


def test_yaml(workplace, capsys):
    Path("eval.yaml").write_text("judge: eval_judges.by_mark\ndata: rows.jsonl\noutput: out\nlimit: 6\n")
    main(["--config", "eval.yaml"])
    assert "Written to out" in capsys.readouterr().out
    assert json.loads(Path("out/results.json").read_text())["n"] == 6


@pytest.mark.parametrize("name", ["limit", "batch_size", "robustness_rows", "injection_rows"])
def test_bad_numbers(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        JudgeEvalArguments("arithmetic", ["x.jsonl"], "out", **{name: 0})


def test_killed(workplace):
    """A real process, killed while it judges: the next one asks about what is missing, at most a batch twice."""
    command = ["--judge", "eval_judges.Slow", "--data", "rows.jsonl", "--output", "out", "--batch_size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_sgpo.scripts.judge_eval", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    began = time.monotonic()
    while len(calls()) < 10 and process.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= len(calls()) < 40
    with open("out/verdicts.jsonl", "a") as file:
        file.write('{"key": "half a li')
    main(command)
    total = json.loads(Path("out/results.json").read_text())["cost"]["distinct_judgements"]
    assert total <= len(calls()) <= total + 2
