"""A load generator for HTTP servers on this machine: small enough to leave the cores to the server.

Raw asyncio streams with connections that are kept open; every request is answered, or its failure is recorded as status
0.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Reply:
    """Of one request: status (0: no connection), headers (lower case), body, seconds, and which request it was."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    number: int

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Keep-alive connections to one server; as many as there are requests at a time."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, number: int = 0
    ) -> Reply:
        """One exchange. ``body``: JSON values. An idle connection that the server closed meanwhile is replaced once."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = {"host": f"{self.host}:{self.port}", "content-length": str(len(content)), **(headers or {})}
        if body is not None:
            lines["content-type"] = "application/json"
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
        start = time.perf_counter()
        reused = bool(self._idle)
        try:
            try:
                status, got, answer = await self._exchange(head.encode() + content)
            except (OSError, asyncio.IncompleteReadError) as error:
                # only when nothing of the answer came: the server closed a connection that was idle
                if not reused or getattr(error, "partial", b""):
                    raise
                self._idle.clear()
                status, got, answer = await self._exchange(head.encode() + content)
        except (OSError, asyncio.IncompleteReadError) as error:
            return Reply(0, {}, repr(error).encode(), time.perf_counter() - start, number)
        return Reply(status, got, answer, time.perf_counter() - start, number)

    async def _exchange(self, message: bytes) -> tuple[int, dict[str, str], bytes]:
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(message)
            top, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in rest if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        except BaseException:
            writer.close()
            raise
        if headers.get("connection", "") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(top.split()[1]), headers, body

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def closed_loop(
    client: Client, path: str, bodies: Iterable[Any], concurrency: int, headers: dict[str, str] | None = None
) -> list[Reply]:
    """Send every body, ``concurrency`` at a time; replies in the order of completion, numbered as the bodies."""
    replies: list[Reply] = []
    numbered = enumerate(bodies)

    async def worker() -> None:
        for number, body in numbered:
            replies.append(await client.request("POST", path, body, headers, number))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return replies


async def open_loop(
    client: Client,
    path: str,
    body: Callable[[int], Any],
    rate: float,
    seconds: float,
    headers: dict[str, str] | None = None,
) -> list[Reply]:
    """Send ``rate`` requests a second whatever the server does, at random times (Poisson); all replies, once all are
    answered."""
    due = random.Random(0)
    tasks: list[asyncio.Task[Reply]] = []
    start = time.perf_counter()
    coming = due.expovariate(rate)
    while coming < seconds:
        await asyncio.sleep(max(0.0, coming - (time.perf_counter() - start)))
        while coming <= time.perf_counter() - start:
            number = len(tasks)
            tasks.append(asyncio.create_task(client.request("POST", path, body(number), headers, number)))
            coming += due.expovariate(rate)
    return list(await asyncio.gather(*tasks))
