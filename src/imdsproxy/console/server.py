"""The console's server: one socket on 127.0.0.1, for as long as the session lasts."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

from uvicorn import Config, Server

from imdsproxy.admin_client import AdminClient
from imdsproxy.console.access import Access
from imdsproxy.console.app import console_app

_LOOK_EVERY_S: Final = 1.0
_END_S: Final = 1


def run_console(
    daemon: AdminClient, listener: socket.socket, announce: Callable[[str], None]
) -> str:
    """Serve until the link was not opened in time, or the session not used for long; a signal ends it, too.

    Args:
        daemon: Whose networks and guests.
        listener: On 127.0.0.1.
        announce: Given the link.

    Returns:
        Why it has ended.
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
