"""Passes a host's connection on to a hub's unix socket and says whose it is, as HAProxy does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from imdsproxy.fleet.members import HEADER_NAME, HEADER_ROLE, HEADER_SERIAL
from imdsproxy.fleet.stream import STREAM_PATH


async def pass_on(
    head: bytes,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    inner: str,
    *,
    host: str,
    serial: str = "1",
) -> None:
    """Pass on a connection whose first head was read.

    Args:
        head: As the host sent it.
        reader: What follows.
        writer: To the host.
        inner: The hub's socket.
        host: The host's name.
        serial: The number of its certificate.
    """
    there, behind = await asyncio.open_unix_connection(inner)
    who = f"{HEADER_ROLE}: host\r\n{HEADER_NAME}: {host}\r\n{HEADER_SERIAL}: {serial}\r\n"
    behind.write(head[:-2] + who.encode() + b"\r\n")
    ways = [
        asyncio.ensure_future(_copy(reader, behind)),
        asyncio.ensure_future(_copy(there, writer)),
    ]
    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    for one in ways:
        one.cancel()
    await asyncio.gather(*ways, return_exceptions=True)
    behind.close()


@contextlib.asynccontextmanager
async def host_front(stream: str, api: str, host: str, serial: str) -> AsyncIterator[str]:
    """The URL at which a host reaches a hub by these sockets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, EOFError):
                head = await reader.readuntil(b"\r\n\r\n")
                streams = head.startswith(f"GET {STREAM_PATH} ".encode())
                if not streams:
                    # Each request has to come with a head that was read.
                    head = head[:-2] + b"connection: close\r\n\r\n"
                await pass_on(
                    head, reader, writer, stream if streams else api, host=host, serial=serial
                )
                await writer.drain()
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
