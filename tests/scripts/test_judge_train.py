"""Training a judge from the command line."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from solutions_to_learn import write_solutions
from toys import save_model

from trl_sgpo.judge_training.arguments import JudgeTrainArguments
from trl_sgpo.scripts import judge_train


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_command(make_model, tokenizer, tmp_path):
    config = {
        "data": [str(write_solutions(tmp_path / "train.jsonl"))],
        "model_name_or_path": str(save_model(make_model(), tokenizer, tmp_path / "base")),
        "output_dir": str(tmp_path / "judge"),
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(config))
    result = subprocess.run(
        [sys.executable, "-m", "trl_sgpo.scripts.judge_train", "--config", str(tmp_path / "judge.yaml")],
        cwd=ROOT,
        env={**os.environ, "CI": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Judge saved to" in result.stdout
    assert (tmp_path / "judge" / "judge_train.json").exists()


def test_the_help_says_all_of_every_argument(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken inside a help text
    monkeypatch.setattr(sys, "argv", ["judge_train", "--help"])
    with pytest.raises(SystemExit) as ended:
        judge_train.main()
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for argument in fields(JudgeTrainArguments):
        assert f"--{argument.name} " in shown
        assert argument.metadata["help"] in shown


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "judge").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipe_files_are_understood(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config", str(path), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    arguments, training_args, model_args = judge_train.make_parser().parse_args_and_config(
        words, fail_with_unknown_args=True
    )
    assert arguments.data
    assert arguments.exclude
    assert model_args.model_name_or_path
    assert training_args.output_dir
