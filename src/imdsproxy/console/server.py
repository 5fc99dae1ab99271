"""Server of the console: one socket on 127.0.0.1 until the session ends."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

from uvicorn import Config, Server

from imdsproxy.api.client import AdminClient
from imdsproxy.console.access import Access
from imdsproxy.console.app import console_app

_LOOK_EVERY_S: Final = 1.0
_END_S: Final = 1


def run_console(
    daemon: AdminClient, listener: socket.socket, announce: Callable[[str], None]
) -> str:
    """Serve until the link or the session expires, or until a signal.

    Returns:
        The reason for the end.
    """
    access = Access(time.monotonic)
    port = listener.getsockname()[1]
    announce(f"http://127.0.0.1:{port}/{access.place}/open?key={access.key}")
    config = Config(
        console_app(daemon, access),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_END_S,
    )
    asyncio.run(_serve(Server(config), listener, access))
    return (
        "the session was not used for an hour"
        if access.opened
        else "the link was not opened in time"
    )


async def _serve(server: Server, listener: socket.socket, access: Access) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not serving.done():
        await asyncio.wait([serving], timeout=_LOOK_EVERY_S)
        server.should_exit = server.should_exit or access.is_over()
    await serving
