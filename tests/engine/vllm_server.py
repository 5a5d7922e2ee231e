"""A real vLLM server on this machine's CPU. Tests start one at a time, with tiny random models: no network, no GPU."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from server import free_port


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCHDYNAMO_DISABLE": "1",  # else vLLM compiles its sampler, even with --enforce-eager
    "PYTHONUNBUFFERED": "1",
}
START_SECONDS = 900  # far more than needed: on a busy machine a start is slow


class Server:
    """A running server: its address without `/v1`, and what it counts."""

    def __init__(self, url):
        self.url = url

    def metric(self, name):
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"the server has no metric {name}"
        return sum(map(float, values))


@contextmanager
def serving(model, log, *options):
    """`vllm serve` with the model of a folder, which it calls "m". At the end no process of it is left."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **ENVIRONMENT}
        )
    server = Server(f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the engine is a process of its own
        process.wait()
