"""What reaches the Hub: model, card and numbers of a run and of a judge, and nothing that is private."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from solutions_to_learn import write_solutions
from toys import save_model, write_rows


ROOT = Path(__file__).parents[2]
TOKEN, KEY = "hf_thetokenofatest", "sk-thekeyofatest"

pytestmark = pytest.mark.slow


@pytest.fixture
def hub():
    hub = LoopbackHub()
    yield hub
    hub.close()


def run(hub, script, config, folder):
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf_home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "JUDGE_KEY": KEY,
        "CI": "true",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", f"trl_sgpo.scripts.{script}", "--config", "run.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def private_things(files, folder):
    """What of this machine and its secrets stands in the files, by file."""
    secrets = (TOKEN, KEY)
    places = (str(folder), str(Path.home()), socket.gethostname())
    found = {}
    for name, data in files.items():
        # transformers pushes the pickled arguments of every run, with the paths in them
        words = secrets if name == "training_args.bin" else (*secrets, *places)
        held = [word for word in words if len(word) > 3 and word.encode() in data]
        if held:
            found[name] = held
    return found


def test_a_run(hub, tmp_path, make_model, tokenizer):
    save_model(make_model(), tokenizer, tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a b {c} [R] [V] ="} for c in "abcd"])
    (tmp_path / "my_parts.py").write_text(
        "def reward(completions, **kwargs):\n    return [0.0] * len(completions)\n\n\n"
        "def judge(problem, steps):\n    return len(problem + steps[0]) % len(steps)\n"
    )
    config = {
        "model_name_or_path": "base",
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "reward_funcs": ["my_parts.reward"],
        "judge": "my_parts.judge",
        "output_dir": str(tmp_path / "out"),
        "hub_model_id": "tiny-sgpo",
        "push_to_hub": True,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 16,
        "max_steps": 2,
        "save_steps": 1,
        "log_completions": True,
        "dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    result = run(hub, "sgpo", config, tmp_path)
    assert hub.strangers == [] or all("agent-harnesses" in path for path in hub.strangers)
    assert hub.tokens == {TOKEN}
    files = hub.repos["me/tiny-sgpo"]
    assert {"README.md", "model.safetensors", "config.json"} <= files.keys()
    assert ("PUT", f"/objects/{next(iter(hub.objects))}") in hub.requests  # the weights went by LFS
    card = ModelCard(files["README.md"].decode())
    assert {"trl", "sgpo"} <= set(card.data.tags)
    assert "my_parts.judge" in card.text
    assert "arxiv.org" in card.text or "huggingface.co/papers/2505.11595" in card.text
    assert private_things(files, tmp_path) == {}
    assert f"Model pushed to {hub.url}/me/tiny-sgpo." in result.stdout


def test_a_judge(hub, tmp_path, make_model, tokenizer):
    config = {
        "data": [str(write_solutions(tmp_path / "train.jsonl"))],
        "model_name_or_path": str(save_model(make_model(), tokenizer, tmp_path / "base")),
        "output_dir": str(tmp_path / "judge"),
        "hub_model_id": "me/tiny-judge",
        "push_to_hub": True,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    run(hub, "judge_train", config, tmp_path)
    files = hub.repos["me/tiny-judge"]
    assert {"README.md", "model.safetensors", "judge_train.json"} <= files.keys()
    assert "training_args.bin" not in files
    card = ModelCard(files["README.md"].decode())
    assert "trl_sgpo.judges" in card.text
    assert "| what | value |" in card.text
    assert private_things(files, tmp_path) == {}
