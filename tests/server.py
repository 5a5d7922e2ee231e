"""A chat completions server on loopback that does wrong whatever a server can do wrong."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from trl_sgpo.judges import endpoint, pace, servers


class Clock:
    """The clock of deadlines and breakers: it goes on as always, and a test may set it forward."""

    def __init__(self, monkeypatch):
        self.skipped = 0.0
        for module in (endpoint, pace, servers):
            monkeypatch.setattr(module, "monotonic", lambda: time.monotonic() + self.skipped)

    def skip(self, seconds):
        self.skipped += seconds


def free_port() -> int:
    """A port of loopback at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Request:
    """One request as the server saw it."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str = ""

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]

    @property
    def number(self) -> int:
        """The number in `Problem 7`, as the problems of the tests are called."""
        return int(self.question.split("Problem ", 1)[1].split()[0])


@dataclass
class Answer:
    """
    What the server sends. `content` is the judge's text, or `body` all of the response; `seconds` it waits before, or until
    `after` is set; `trickle` seconds it waits before each byte; `cut` it closes the connection after half of the body.
    """

    content: Any = "FIRST_ERROR: 1"
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    after: threading.Event | None = None
    trickle: float = 0.0
    cut: bool = False
    finish_reason: str = "stop"
    message: Any = "content"
    close: bool = False

    def data(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        if self.body is not None:
            return json.dumps(self.body).encode()
        if self.status >= 400:
            return json.dumps({"error": {"message": self.content}}).encode()
        message = {"role": "assistant", "content": self.content} if self.message == "content" else self.message
        choice = {"index": 0, "finish_reason": self.finish_reason, "message": message}
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        return json.dumps({"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}).encode()


class Server:
    """
    Answers requests with what `reply(request)` gives: an [`Answer`], a text or a status code.

    Attributes:
        requests (`list[Request]`): What came, in order.
        connections (`int`): How many were opened.
        lost (`int`): How many requests the client gave up.
        peak (`int`): Most requests under way at one time.
    """

    def __init__(self, reply=lambda request: "FIRST_ERROR: 1", port=0):
        self.reply = reply
        self.requests: list[Request] = []
        self.connections = self.lost = self.peak = self.under_way = 0
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Starts to listen, after a [`Server.stop`] at the same port."""

        async def listen():
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(5)

    def stop(self) -> None:
        """Goes down: refuses connections and breaks those that are open."""

        async def leave():
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(leave(), self._loop).result(5)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _serve(self, reader, writer):
        self.connections += 1
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines if ":" in line)}
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                request = Request(body, headers, first.split()[1])
                self.requests.append(request)
                self.under_way += 1
                self.peak = max(self.peak, self.under_way)
                answering = asyncio.ensure_future(self._answer(request, writer))
                gone = asyncio.ensure_future(reader.read(1))  # the client sends nothing before it has the answer
                await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
                self.under_way -= 1
                if not answering.done():
                    self.lost += 1
                    answering.cancel()
                    return
                if answering.result():
                    gone.cancel()
                    return
                if gone.done():
                    return
                gone.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await gone
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, request, writer) -> bool:
        """Sends the answer. Returns whether the connection has to be closed."""
        answer = self.reply(request)
        if isinstance(answer, int):
            answer = Answer("no", status=answer)
        elif not isinstance(answer, Answer):
            answer = Answer(answer)
        await asyncio.sleep(answer.seconds)
        while answer.after is not None and not answer.after.is_set():
            await asyncio.sleep(0.01)
        data = answer.data()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **answer.headers}
        writer.write(f"HTTP/1.1 {answer.status} X\r\n".encode())
        writer.write("".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n")
        if answer.cut:
            writer.write(data[: len(data) // 2])
            await writer.drain()
            return True
        if answer.trickle:
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(answer.trickle)
        else:
            writer.write(data)
        await writer.drain()
        return answer.close


@contextlib.contextmanager
def started():
    """A function that starts servers, which are closed at the end."""
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.close()
