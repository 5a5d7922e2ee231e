"""
How much of what a server can serve does `OpenAIJudge` get out of it?

    python -m benchmarks.judge_throughput.run

The server works on 64 requests at a time and takes 50 ms for each. Others wait in its queue. What it can serve is measured, not
computed: a load generator of bare sockets sends the same number of requests, written beforehand. The two take turns, in an order
that alternates too, and so does the client of the `openai` package. The server is a process of its own. There are 512 completions
of 64 problems. The server also checks that the completions of a problem come one after the other.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from benchmarks.common import commit, write_results
from trl_sgpo import JudgeItem
from trl_sgpo.judges.openai import OpenAIJudge


HERE = Path(__file__).parent
REQUESTS, GROUP = 512, 8
SLOTS, LATENCY = 64, 0.05
STEP = "We multiply 12 by 7 and get 84, so that x < y, and the sum is 84 + 3 = 87, which is more than before. "


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
            await asyncio.sleep(LATENCY)
        message = {"role": "assistant", "content": f"Some words on it.\nFIRST_ERROR: {problem % 6 + 1}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 700, "completion_tokens": 9, "total_tokens": 709}
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


async def serve():
    Protocol.slots, Protocol.order = asyncio.Semaphore(SLOTS), []
    server = await asyncio.get_running_loop().create_server(Protocol, "127.0.0.1", 0)
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


class Package:
    """The client of the `openai` package, used as its documentation says, with the same requests and concurrency."""

    def __init__(self, url, items, concurrency):
        from httpx2 import Limits
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        prompt = OpenAIJudge("m", url).prompt
        self.messages = [prompt.ask(item, as_json=True).messages for item in items]
        self.loop = asyncio.new_event_loop()
        limits = Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self.client = AsyncOpenAI(api_key="none", base_url=url, http_client=DefaultAsyncHttpxClient(limits=limits))
        self.slots = asyncio.Semaphore(concurrency)

    def __call__(self):
        async def one(messages):
            async with self.slots:
                answer = await self.client.chat.completions.create(
                    model="m", messages=messages, max_tokens=1024, temperature=0.0
                )
                return answer.choices[0].message.content

        async def all_of_them():
            await asyncio.gather(*(one(messages) for messages in self.messages))

        self.loop.run_until_complete(all_of_them())


def timed(work):
    """Seconds, and seconds of this process's processor time."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def bootstrap(values, draws=2000):
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws)]]


def measure(repeats: int) -> dict:
    items = make_items()
    command = [sys.executable, "-m", "benchmarks.judge_throughput.run", "--serve"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1])
    try:
        port = int(server.stdout.readline())
        url = f"http://127.0.0.1:{port}/v1"
        judge = OpenAIJudge("m", url)
        bare = Bare(port, items, judge.max_concurrency)
        expected = [int(item.problem.split()[1].rstrip(":")) % 6 for item in items]
        adjacent = []

        def ours():
            verdicts = judge.judge(items)
            assert [verdict.first_error for verdict in verdicts] == expected, "the order of the verdicts is not kept"

        arms = {"bare": bare, "ours": ours}
        try:
            arms["openai"] = Package(url, items, judge.max_concurrency)
        except ImportError:
            print("The package openai is not installed: no comparison with it.", file=sys.stderr)
        seconds, cpu = {name: [] for name in arms}, {name: [] for name in arms}
        for repeat in range(-1, repeats):  # the first one warms up
            names = list(arms) if repeat % 2 == 0 else list(arms)[::-1]
            for name in names:
                bare.order()
                wall, own = timed(arms[name])
                if name == "ours":
                    seen = bare.order()
                    adjacent.append(sum(a == b for a, b in pairwise(seen)) / (REQUESTS - REQUESTS // GROUP))
                if repeat >= 0:
                    seconds[name].append(wall)
                    cpu[name].append(own)
        one_by_one = OpenAIJudge("m", url, max_concurrency=1)
        one_by_one.judge(items[:1])
        part = items[:64]
        slow, _ = timed(lambda: one_by_one.judge(part))
        rates = {name: [REQUESTS / s for s in seconds[name]] for name in arms}
        result = {}
        for name in arms:
            ratios = [a / b for a, b in zip(rates[name], rates["bare"], strict=True)]
            result[name] = {
                "requests_per_second_median": statistics.median(rates[name]),
                "requests_per_second_range": [min(rates[name]), max(rates[name])],
                "ratio_to_bare_median": statistics.median(ratios),
                "ratio_to_bare_95_interval": bootstrap(ratios),
                "ratio_to_bare_range": [min(ratios), max(ratios)],
                "processor_ms_per_request": 1000 * statistics.median(cpu[name]) / REQUESTS,
            }
        result["one_by_one"] = {"requests_per_second": len(part) / slow}
        result["ours"]["ratio_to_one_by_one"] = statistics.median(rates["ours"]) * slow / len(part)
        result["ours"]["share_of_completions_adjacent_to_their_problem"] = min(adjacent)
        return result
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true", help="Be the server.")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    names = ("aiohttp", "openai", "httpx2", "trl")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    result = {
        "commit": commit(),
        "versions": versions,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "requests": REQUESTS,
        "slots": SLOTS,
        "latency_seconds": LATENCY,
        "repeats": args.repeats,
        **measure(args.repeats),
    }
    write_results(HERE / "results.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
