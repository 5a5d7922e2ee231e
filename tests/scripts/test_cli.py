"""The command `trl-sgpo`."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from toys import save_model, write_rows

from trl_sgpo import cli
from trl_sgpo.command_line import LAUNCHED


ROOT = Path(__file__).parents[2]


def run(*argv, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, "-m", "trl_sgpo.cli", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_help_names_every_command_and_loads_no_torch():
    code = "import sys; from trl_sgpo import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in result.stdout for name in cli.COMMANDS)


def test_every_command_has_a_script_with_a_main():
    for script, _ in cli.COMMANDS.values():
        assert callable(import_module(f"trl_sgpo.scripts.{script}").main)


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "train"])
def test_help_of_a_command_has_its_name(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: trl-sgpo {command} " in capsys.readouterr().out


def test_no_command_gets_the_help(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian"])
    assert ended.value.code == 2
    assert "'trian'" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_not_a_traceback(capsys, monkeypatch):
    assert cli.main(["judge", "--problem", "p", "--completion", "c"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("trl-sgpo judge: judge is not given.")
    monkeypatch.setenv("TRL_SGPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="judge is not given"):
        cli.main(["judge", "--problem", "p", "--completion", "c"])


def test_what_a_bug_report_needs(capsys):
    assert cli.main(["env"]) == 0
    said = capsys.readouterr().out
    for name in ("TRL-SGPO", "TRL", "PyTorch", "Python", "vLLM", "DeepSpeed", "aiohttp"):
        assert f"- {name} version: " in said


class TestTrain:
    def launched(self, monkeypatch, *argv):
        found = []
        monkeypatch.setenv(LAUNCHED, "")  # put back afterwards
        monkeypatch.setattr("accelerate.commands.launch.launch_command", found.append)
        assert cli.main(["train", *map(str, argv)]) == 0
        return found[0]

    def test_arguments_of_the_launcher_and_of_the_script(self, monkeypatch):
        args = self.launched(
            monkeypatch, "--judge", "arithmetic", "--num_processes", 2, "--use_cpu", "--learning_rate", "2"
        )
        assert args.num_processes == 2
        assert (args.module, args.training_script) == (True, "trl_sgpo.scripts.sgpo")
        assert args.training_script_args == ["--judge", "arithmetic", "--use_cpu", "--learning_rate", "2"]

    def test_a_config_file_names_both(self, monkeypatch, tmp_path):
        config = tmp_path / "sgpo.yaml"
        config.write_text("judge: arithmetic\nuse_cpu: true\nnum_processes: 4\naccelerate_config: zero2\n")
        args = self.launched(monkeypatch, "--config", config)
        assert args.num_processes == 4
        assert Path(args.config_file).name == "zero2.yaml"
        assert args.training_script_args == ["--config", str(config)]

    def test_a_misspelt_argument_is_named(self, tmp_path, capsys):
        (tmp_path / "sgpo.yaml").write_text("judge: arithmetic\nuse_cpu: true\nlearning_rte: 1.0\n")
        assert cli.main(["train", "--config", str(tmp_path / "sgpo.yaml"), "--num_proceses", "2"]) == 2
        assert "unknown arguments: --learning_rte 1.0 --num_proceses 2." in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words",
        ["-max_steps 5", "-learning_rate=1e-6", "-num_processes 2", "--max_steps 5 6", "--num_processes 2 extra"],
    )
    def test_no_word_is_dropped(self, words, capsys):
        assert cli.main(["train", "--judge", "arithmetic", "--use_cpu", *words.split()]) == 2
        assert "unknown arguments: " in capsys.readouterr().err

    def test_switches_and_null_in_a_config_file(self, monkeypatch, tmp_path):
        config = tmp_path / "sgpo.yaml"
        config.write_text("use_cpu: true\nmulti_gpu: false\nmain_process_port: null\ncpu: true\nnum_processes: 1\n")
        args = self.launched(monkeypatch, "--config", config)
        assert (args.multi_gpu, args.main_process_port, args.num_processes) == (False, None, 1)

    @pytest.mark.slow
    def test_a_training_whose_config_file_names_the_processes(self, tmp_path, make_model, tokenizer):
        save_model(make_model(), tokenizer, tmp_path / "base")
        write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a b {c} [R] [V] ="} for c in "abcd"])
        (tmp_path / "my_parts.py").write_text(
            "def reward(completions, **kwargs):\n    return [0.0] * len(completions)\n\n\n"
            "def judge(problem, steps):\n    return len(problem + steps[0]) % len(steps)\n"
        )
        config = {
            "num_processes": 1,
            "num_machines": 1,
            "cpu": True,
            "model_name_or_path": "base",
            "dataset_name": "rows.jsonl",
            "reward_funcs": ["my_parts.reward"],
            "judge": "my_parts.judge",
            "output_dir": "out",
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 16,
            "max_steps": 2,
            "dtype": "float32",
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        path = f"{ROOT}{os.pathsep}{tmp_path}"
        result = run("train", "--config", "run.yaml", "--logging_steps", 1, cwd=tmp_path, PYTHONPATH=path, CI="true")
        assert result.returncode == 0, result.stderr[-4000:]
        log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        assert len([entry for entry in log if entry.get("sgpo/judge_calls", 0) > 0]) == 2
