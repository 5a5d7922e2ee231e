"""
Every recipe once, by the commands of its README, with settings so small that it ends in seconds. Nothing needs a network: the
models and the data are made here, and the judge of gsm8k is a server on loopback.
"""

import json
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from recipes.quickstart.run import BASE
from trl_sgpo.tasks.rewrite_chain import build_model, build_tokenizer


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]


def run(*command, **overrides):
    """Runs `python ...` in the root of the repository, with `--name value` for each override."""
    words = [str(word) for name, value in overrides.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, *map(str, command), *words], capture_output=True, text=True, cwd=ROOT, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def base(tmp_path):
    """The quickstart's base model, so much smaller and without its pretraining. The recipes take a base that is there."""
    tokenizer = build_tokenizer()
    build_model(replace(BASE, layers=1, width=16, heads=2), tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "pretrain_config.json").write_text(json.dumps(asdict(BASE)))
    return tmp_path / "base"


def test_quickstart(base, tmp_path):
    printed = run("recipes/quickstart/run.py", tokens=500, output=tmp_path)
    assert "GRPO 0" in printed
    assert "SGPO 0" in printed
    assert (tmp_path / "curves.png").stat().st_size > 0
    for arm in ("grpo", "sgpo"):
        assert f"model_name: {arm}-seed0" in (tmp_path / f"{arm}-seed0" / "README.md").read_text()


def test_quickstart_without_matplotlib(base, tmp_path):
    """It says at once that there will be no picture, and does the rest."""
    script = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path('recipes/quickstart/run.py', run_name='__main__')"
    printed = run("-c", script, tokens=100, output=tmp_path)
    assert printed.startswith("No curves will be drawn, because matplotlib is not installed")
    assert "SGPO 0" in printed
    assert not (tmp_path / "curves.png").exists()


def test_judge(base, tmp_path):
    """The data, the judge, and a policy that it judges."""
    run("recipes/judge/make_data.py", base=base, output=tmp_path, rows=64, **{"test-rows": 8})
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(len(row["completions"]) == len(row["labels"]) for row in rows)
    run(
        *("-m", "trl_sgpo.scripts.judge_train", "--config", "recipes/judge/rewrite_chain.yaml"),
        data=tmp_path / "train.jsonl",
        exclude=tmp_path / "test_noise.jsonl",
        model_name_or_path=base,
        output_dir=tmp_path / "prm",
        dev_share=0.5,
        max_steps=2,
        warmup_steps=1,
    )
    assert "f1" in (tmp_path / "prm" / "judge_train.json").read_text()
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "a b c [R] [V] =", "solution": "b c d [V] ; d c b"}) + "\n")
    run(
        *("-m", "trl_sgpo.scripts.sgpo", "--config", "recipes/quickstart/sgpo.yaml"),
        judge="recipes.judge.judges.FinishedPRMJudge",
        judge_args=json.dumps({"model": str(tmp_path / "prm")}),
        model_name_or_path=base,
        dataset_name=problems,
        output_dir=tmp_path / "policy",
        per_device_train_batch_size=8,
        max_steps=1,
    )
    state = json.loads((tmp_path / "policy" / "trainer_state.json").read_text())
    assert state["log_history"][0]["sgpo/abstain_rate"] == 0


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that finds the first step of everything wrong."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "FIRST_ERROR: 1"}
        answer = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("arm", ["grpo", "sgpo"])
def test_gsm8k(arm, tmp_path, gsm8k_path, chat_tokenizer, make_chat_model):
    pytest.importorskip("peft")
    pytest.importorskip("aiohttp")
    make_chat_model().save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = {"model": "m", "base_url": f"http://127.0.0.1:{server.server_port}/v1"}
    try:
        run(
            *("-m", "trl_sgpo.scripts.sgpo", "--config", f"recipes/gsm8k/{arm}.yaml"),
            **({"judge_args": json.dumps(judge)} if arm == "sgpo" else {}),
            model_name_or_path=tmp_path / "model",
            dataset_name=gsm8k_path,
            output_dir=tmp_path / "out",
            dtype="float32",
            bf16="false",
            use_cpu="true",
            gradient_accumulation_steps=1,
            max_completion_length=16,
            max_steps=1,
            report_to="none",
        )
    finally:
        server.shutdown()
    (table,) = (tmp_path / "out" / "completions").iterdir()
    judged = pd.read_parquet(table).get("judge_first_error")
    assert judged is None if arm == "grpo" else (judged == 0).any()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
