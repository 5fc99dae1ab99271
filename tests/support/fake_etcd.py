"""Answers as etcd's JSON gateway does, for what a genuine etcd cannot be brought to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias

from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.etcd import Etcd

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent for a request, chunk by chunk; it then stays open, or ends."""

    chunks: Sequence[bytes]
    status: int = 200
    ends: bool = True


Handler: TypeAlias = Callable[[str, Json], Answer]


def answer(value: Json, status: int = 200) -> Answer:
    return Answer([json.dumps(value).encode()], status)


def lines(*values: Json, ends: bool = False) -> Answer:
    """Of a watch: it stays open."""
    return Answer([json.dumps(one).encode() + b"\n" for one in values], ends=ends)


def header(revision: int, term: int = 2) -> Json:
    return {"header": {"revision": str(revision), "raft_term": str(term)}}


def text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()


def put(key: str, revision: int, value: str = "x") -> Json:
    """An event."""
    numbers = {"mod_revision": str(revision), "create_revision": str(revision)}
    return {"kv": {"key": text(key), "value": text(value), **numbers}}


def watched(revision: int, *events: Json, term: int = 2, **more: object) -> Json:
    """A line of a watch."""
    return {
        "result": {**header(revision, term), **({"events": list(events)} if events else {}), **more}
    }


@dataclass(slots=True)
class FakeEtcd:
    """One member.

    Attributes:
        handle: Answers a request by its path and body.
        requests: All of them so far.
    """

    handle: Handler
    url: str = ""
    requests: list[tuple[str, Json]] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with (
            contextlib.closing(writer),
            contextlib.suppress(ConnectionError, asyncio.IncompleteReadError),
        ):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.headers.append(head)
                path = head.split()[1].decode()
                size = next(
                    (
                        int(one[15:])
                        for one in head.splitlines()
                        if one.startswith(b"Content-Length:")
                    ),
                    0,
                )
                body = json.loads(await reader.readexactly(size) or b"{}")
                self.requests.append((path, body))
                given = self.handle(path, body)
                writer.write(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n" % given.status)
                for chunk in filter(None, given.chunks):
                    writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    await writer.drain()
                    await asyncio.sleep(0)
                if not given.ends:
                    await reader.read()
                    return
                writer.write(b"0\r\n\r\n")


@contextlib.asynccontextmanager
async def fake_members(*handlers: Handler) -> AsyncIterator[list[FakeEtcd]]:
    """A member for each handler, on loopback."""
    members = [FakeEtcd(one) for one in handlers]
    async with contextlib.AsyncExitStack() as stack:
        for member in members:
            server = await asyncio.start_server(member._serve, "127.0.0.1", 0)
            stack.push_async_callback(server.wait_closed)
            stack.callback(server.close)
            member.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield members


@contextlib.asynccontextmanager
async def client_of(
    *handlers: Handler,
    **options: Any,
) -> AsyncIterator[tuple[Etcd, list[FakeEtcd]]]:
    """A client of such members; it begins with the first."""
    async with fake_members(*handlers) as members:
        urls = [one.url for one in members]
        options = {"timeout_s": 5.0, "silence_s": 1.0} | options
        etcd = Etcd(urls, random=_InOrder(), clock=Clock(), **options)
        try:
            yield etcd, members
        finally:
            await etcd.close()


class _InOrder(Random):
    def shuffle(self, x: MutableSequence[Any]) -> None:
        """Leave members in their order."""
