"""
What does the HTTP client cost a judged round, and how much of what a server can serve does `OpenAIJudge` get out of it?

    python -m benchmarks.judge_throughput.run

A round is 512 completions of 64 problems, judged by `OpenAIJudge`. Only the transport differs: aiohttp itself, or the `openai`
package's `AsyncOpenAI.post` on its default transport (httpx2) or on its aiohttp transport. The transports take turns, and every
other repeat turns their order around, so that a ratio compares rounds that ran side by side. The server is a process of its own.

In three settings the server takes 1 s or 0.2 s for an answer of 1 kB, however many requests are under way. In the last setting it
takes 50 ms and works on 64 requests at a time. What it can serve there is measured and not computed: bare sockets, with requests
written beforehand, ask it the same number of times. The server also checks that the completions of a problem come one after the other.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import weakref
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from benchmarks.common import commit, write_results
from trl_sgpo import JudgeItem
from trl_sgpo.judges import servers
from trl_sgpo.judges.background import close_in_background, own
from trl_sgpo.judges.endpoint import Endpoint
from trl_sgpo.judges.openai import OpenAIJudge


HERE = Path(__file__).parent
REQUESTS, GROUP = 512, 8
STEP = "We multiply 12 by 7 and get 84, so that x < y, and the sum is 84 + 3 = 87, which is more than before. "
# Seconds per answer, requests that the server works on at a time, requests under way
SETTINGS = {
    "1 s, 64 under way": (1.0, 10_000, 64),
    "1 s, 256 under way": (1.0, 10_000, 256),
    "0.2 s, 64 under way": (0.2, 10_000, 64),
    "50 ms, 64 served at a time": (0.05, 64, 128),
}
SCHEDULING = {os.SCHED_OTHER: "normal", os.SCHED_RR: "real time", os.SCHED_FIFO: "real time"}
FAST = "50 ms, 64 served at a time"
BASELINE = "aiohttp"


def make_items() -> list[JudgeItem]:
    """64 problems with eight completions each, six steps of 200 characters, the groups dealt out like cards."""
    return [
        JudgeItem(
            problem=f"Problem {p}: find the value of x. " + "Some more is known of it. " * 8,
            steps=tuple(f"{STEP * 2}{p} {g} {i}" for i in range(6)),
            reference="x is 87, for " + STEP * 2,
        )
        for g in range(GROUP)
        for p in range(REQUESTS // GROUP)
    ]


class Protocol(asyncio.Protocol):
    """HTTP/1.1 with as little as a client needs, so that the server costs less of the processor than any client."""

    slots: asyncio.Semaphore
    latency: float
    order: list[int]

    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""

    def data_received(self, data):
        self.buffer += data
        while (head := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = self.buffer[:head].lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]
            end = head + 4 + int(length)
            if len(self.buffer) < end:
                return
            body, self.buffer = self.buffer[head + 4 : end], self.buffer[end:]
            if body == b"order":
                self.send(json.dumps(self.order).encode())
                self.order.clear()
            else:
                problem = int(body.split(b"Problem ", 1)[1].split(b":", 1)[0])
                self.order.append(problem)
                self.task = asyncio.ensure_future(self.answer(problem))

    async def answer(self, problem):
        async with self.slots:
            await asyncio.sleep(self.latency)
        verdict = {"analysis": STEP * 6, "first_error_step": str(problem % 6 + 1)}
        message = {"role": "assistant", "content": json.dumps(verdict)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 700, "completion_tokens": 300, "total_tokens": 1000}
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        self.send(json.dumps(answer).encode())

    def send(self, data):
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.transport.write(head.encode() + data)


async def serve(latency: float, slots: int) -> None:
    Protocol.latency, Protocol.slots, Protocol.order = latency, asyncio.Semaphore(slots), []
    # 256 connections are opened at once: the default backlog of 100 would refuse some for a second
    server = await asyncio.get_running_loop().create_server(Protocol, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def post(connection, request):
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    return await reader.readexactly(int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]))


def written(body: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class Bare:
    """Bare sockets, kept open, and requests that are ready to be sent."""

    def __init__(self, port, items, connections):
        prompt = OpenAIJudge("m", "http://x/v1").prompt
        bodies = [{"model": "m", "messages": prompt.ask(item, as_json=True).messages} for item in items]
        self.requests = [written(json.dumps(body).encode()) for body in bodies]
        self.loop = asyncio.new_event_loop()
        self.connections = [
            self.loop.run_until_complete(asyncio.open_connection("127.0.0.1", port)) for _ in range(connections)
        ]
        self.control = self.loop.run_until_complete(asyncio.open_connection("127.0.0.1", port))

    def __call__(self):
        waiting = iter(self.requests)

        async def work(connection):
            for request in waiting:
                await post(connection, request)

        async def all_of_them():
            await asyncio.gather(*(work(connection) for connection in self.connections))

        self.loop.run_until_complete(all_of_them())

    def order(self) -> list[int]:
        """Problems in the order in which the server saw them since it was last asked."""
        return json.loads(self.loop.run_until_complete(post(self.control, written(b"order"))))


def package_endpoint(on_aiohttp: bool, under_way: int) -> type[Endpoint]:
    """An endpoint whose transport is the `openai` package's."""
    import httpx2
    from openai import APIStatusError, AsyncOpenAI, DefaultAioHttpClient, DefaultAsyncHttpxClient

    class PackageEndpoint(Endpoint):
        client = None

        async def _post(self, data, headers):
            if self.client is None:
                http_client = (DefaultAioHttpClient if on_aiohttp else DefaultAsyncHttpxClient)(
                    # Not None: the aiohttp transport takes that for aiohttp's own default of 100 connections
                    limits=httpx2.Limits(
                        max_connections=under_way, max_keepalive_connections=under_way, keepalive_expiry=60
                    ),
                    timeout=httpx2.Timeout(None, connect=10.0),
                    follow_redirects=False,
                    trust_env=False,
                )
                self.client = AsyncOpenAI(
                    api_key="none", base_url=self.url, max_retries=0, timeout=None, http_client=http_client
                )
                own(self.client)
                weakref.finalize(self, close_in_background, self.client, asyncio.get_running_loop(), os.getpid())
            try:
                response = await self.client.post(
                    "/chat/completions", cast_to=httpx2.Response, content=data, options={"headers": headers}
                )
            except APIStatusError as error:
                response = error.response
            return response.status_code, response.headers, response.content

    return PackageEndpoint


TRANSPORTS = {
    "aiohttp": lambda under_way: Endpoint,
    "openai": lambda under_way: package_endpoint(False, under_way),
    "openai[aiohttp]": lambda under_way: package_endpoint(True, under_way),
}


def judged_round(name: str, url: str, under_way: int, items: list[JudgeItem]):
    """A function that judges all completions over one transport and checks the verdicts."""
    judge = OpenAIJudge("m", url, max_concurrency=under_way)
    expected = [int(item.problem.split()[1].rstrip(":")) % 6 for item in items]
    endpoint = TRANSPORTS[name](under_way)

    def work():
        servers.Endpoint = endpoint  # used when the judge connects, in its first round
        verdicts = judge.judge(items)
        assert [verdict.first_error for verdict in verdicts] == expected, "the order of the verdicts is not kept"

    return work


def timed(work):
    """Seconds, and seconds of this process's processor time."""
    gc.collect()  # a full collection takes 0.1 s beside torch, and it would hit any of them
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def bootstrap(values, draws=2000):
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws)]]


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(setting: str, repeats: int) -> dict:
    """The wall time of a round over every transport, and its ratio to that of aiohttp in the same repeat."""
    latency, slots, under_way = SETTINGS[setting]
    items = make_items()
    command = [sys.executable, "-m", "benchmarks.judge_throughput.run", "--serve", str(latency), str(slots)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1])
    try:
        port = int(server.stdout.readline())
        url = f"http://127.0.0.1:{port}/v1"
        bare = Bare(port, items, under_way if setting == FAST else 1)
        clients = {name: judged_round(name, url, under_way, items) for name in TRANSPORTS}
        if setting == FAST:
            clients["bare sockets"] = bare
        adjacent = []
        seconds, cpu = {name: [] for name in clients}, {name: [] for name in clients}
        for repeat in range(-1, repeats):  # the first one warms up
            for name in list(clients) if repeat % 2 == 0 else list(clients)[::-1]:
                bare.order()
                wall, own = timed(clients[name])
                seen = bare.order()
                if name != "bare sockets":
                    adjacent.append(sum(a == b for a, b in pairwise(seen)) / (REQUESTS - REQUESTS // GROUP))
                if repeat >= 0:
                    seconds[name].append(wall)
                    cpu[name].append(own)
        result = {
            "latency_seconds": latency,
            "under_way": under_way,
            "repeats": repeats,
            "server_alone_seconds": REQUESTS / min(slots, under_way) * latency,
            "share_of_completions_adjacent_to_their_problem": min(adjacent),
            "transports": {},
        }
        for name in clients:
            ratios = [a / b for a, b in zip(seconds[name], seconds[BASELINE], strict=True)]
            result["transports"][name] = {
                "seconds": spread(seconds[name]),
                "ratio_to_aiohttp": {**spread(ratios), "interval_95": bootstrap(ratios)},
                "processor_ms_per_request": 1000 * statistics.median(cpu[name]) / REQUESTS,
            }
            if setting == FAST:
                shares = [b / a for a, b in zip(seconds[name], seconds["bare sockets"], strict=True)]
                result["transports"][name] |= {
                    "requests_per_second": spread([REQUESTS / s for s in seconds[name]]),
                    "share_of_bare_sockets": {**spread(shares), "interval_95": bootstrap(shares)},
                }
        if setting == FAST:
            one_by_one = OpenAIJudge("m", url, max_concurrency=1)
            one_by_one.judge(items[:1])
            slow, _ = timed(lambda: one_by_one.judge(items[:64]))
            result["one_by_one_requests_per_second"] = 64 / slow
        return result
    finally:
        server.terminate()
        server.wait()


def table(settings: dict) -> str:
    """The record's numbers as the README's table."""
    lines = [
        "| setting | transport | seconds per round, median (min to max) | ratio to aiohttp, median (min to max) | processor time per "
        "request, ms |",
        "|---|---|---|---|---|",
    ]
    for setting, result in settings.items():
        for name, row in result["transports"].items():
            s, r = row["seconds"], row["ratio_to_aiohttp"]
            lines.append(
                f"| {setting} | {name} | {s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f}) | {r['median']:.3f} "
                f"({r['min']:.3f} to {r['max']:.3f}) | {row['processor_ms_per_request']:.2f} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", nargs=2, metavar=("LATENCY", "SLOTS"), help="Be the server.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(float(args.serve[0]), int(args.serve[1])))
        return
    result = {
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("aiohttp", "openai", "httpx2", "trl")},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "scheduling": SCHEDULING[os.sched_getscheduler(0)],
        "load_average_before": os.getloadavg()[0],
        "requests": REQUESTS,
        "settings": {},
    }
    for setting in args.settings:
        result["settings"][setting] = measure(setting, args.repeats)
        print(table({setting: result["settings"][setting]}), flush=True)
    result["load_average_after"] = os.getloadavg()[0]
    write_results(args.output, result)
    print(table(result["settings"]))


if __name__ == "__main__":
    main()
