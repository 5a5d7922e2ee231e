"""Against a real `transformers serve`: a server that ignores `response_format` and refuses keys it does not know."""

import logging
import os
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from server import free_port

from trl_sgpo import JudgeItem
from trl_sgpo.judges import endpoint
from trl_sgpo.judges.openai import OpenAIJudge
from trl_sgpo.judges.prompt import JudgePrompt
from trl_sgpo.judges.server_settings import RequestFormat


pytestmark = pytest.mark.slow  # whole commands


for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"`transformers serve` needs {package}: pip install transformers[serving]")

# Short, for a model that reads bytes
PROMPT = JudgePrompt(
    version="tiny",
    rules="Judge.",
    known_wrong="Which step?",
    text_answer="{choices}\nFIRST_ERROR: k",
    json_answer="first_error_step {choices}",
)
ITEMS = [JudgeItem(f"{i} + 3", (f"Add {i}.", f"It is {i}.", "So it is.")) for i in range(4)]


def teach(model, tokenizer, answer):
    """Some steps of overfitting, after which the model gives this answer to any question."""
    rows = []
    for i in range(24):
        item = JudgeItem(f"{i} + 3", (f"Add {i}.", f"It is {i}.", "So it is."))
        for as_json in (False, True):
            messages = PROMPT.ask(item, as_json).messages
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            rows.append(tokenizer(text)["input_ids"])
    target = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    length = max(map(len, rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(300):
        batch = [rows[i] for i in torch.randint(len(rows), (2,), generator=generator)]
        ids = torch.tensor([row + target + [tokenizer.pad_token_id] * (length - len(row)) for row in batch])
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            labels[i, len(row) : len(row) + len(target)] = torch.tensor(target)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.1, f"the tiny model did not learn its answer: loss {loss.item()}"
    model.eval()


@pytest.fixture
def served(tmp_path, make_chat_model, chat_tokenizer):
    """The base URL of a server, and the paths of a model that was taught its answer and of a random one."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        folders = {}
        for name in ("random", "taught"):  # while the server starts
            folders[name] = str(tmp_path / name)
            model = make_chat_model()
            if name == "taught":
                teach(model, chat_tokenizer, "FIRST_ERROR: 2")
            model.save_pretrained(folders[name])
            chat_tokenizer.save_pretrained(folders[name])
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", folders
    finally:
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_a_real_server(served, monkeypatch, caplog):
    url, folders = served
    monkeypatch.setattr(endpoint.log_once, "_logged", set())
    judge = OpenAIJudge(folders["taught"], url, prompt=PROMPT, max_tokens=32, extra_body={"top_k": 5})
    verdicts = judge.judge(ITEMS)
    assert [(verdict.status, verdict.first_error) for verdict in verdicts] == [("error", 1)] * 4, verdicts
    # It took the JSON schema and ignored it; the key that it does not know is not sent any more
    (server,) = judge.servers.endpoints
    assert server.request_format == RequestFormat(output="json_schema")
    assert "extra_body['top_k'] is not sent" in caplog.text
    assert judge.usage["completion_tokens"] == 4 * 15
    before = judge.usage["requests"]
    assert {verdict.first_error for verdict in judge.judge(ITEMS)} == {1}
    assert judge.usage["requests"] == before + 4

    caplog.set_level(logging.INFO)
    noise = OpenAIJudge(folders["random"], url, prompt=PROMPT, max_tokens=32).judge(ITEMS)
    for verdict in noise:
        assert verdict.status == "abstain" or verdict.first_error in range(3)

    missing = OpenAIJudge(folders["random"] + "-missing", url, prompt=PROMPT, max_retries=0).judge(ITEMS[:1])[0]
    assert missing.status == "abstain"
    assert "HTTP" in missing.reason
