"""A daemon that is still starting, on a socket of its own beside a served admin API, until a test lets it go on."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Final

from imdsproxy.api.starting import StartingServer
from imdsproxy.documents.http import serve
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.reconcile.progress import Step
from support.admin_server import AdminServer, make_app

_ASKED: Final = 3


@dataclass
class StartingDaemon:
    """What listens at `path`: first a `StartingServer`, after `go_on` the API of `server`."""

    server: AdminServer
    path: Path
    listener: socket
    starting: StartingServer
    serving: asyncio.Task[None] | None = None
    going: asyncio.Task[None] | None = None

    def show(self, *steps: Step) -> None:
        self.starting.steps = lambda: steps

    def go_on(self) -> None:
        asyncio.run_coroutine_threadsafe(self._go_on(), self.server.loop).result(20)

    def go_on_when_asked(self) -> None:
        """Go on after some answers, so that a client has seen how far the start is."""
        show, left = self.starting.steps, iter(range(_ASKED, 0, -1))

        def count() -> Sequence[Step]:
            if next(left, 0) == 1:
                self.going = asyncio.create_task(self._go_on())
            return show()

        self.starting.steps = count

    async def _go_on(self) -> None:
        await self.starting.end()
        self.serving = asyncio.create_task(serve(make_app(), self.listener))

    async def begin(self) -> None:
        await self.starting.__aenter__()

    async def close(self) -> None:
        await self.starting.end()
        if self.serving is not None:
            self.serving.cancel()
            await asyncio.wait([self.serving])
        self.listener.close()


@contextlib.contextmanager
def starting_daemon(server: AdminServer, steps: Sequence[Step] = ()) -> Iterator[StartingDaemon]:
    """Runs in the loop of `server`."""
    path = server.socket.with_name("starting.sock")
    listener = open_unix_socket(path, mode=0o600)
    daemon = StartingDaemon(server, path, listener, StartingServer(listener))
    daemon.show(*steps)
    asyncio.run_coroutine_threadsafe(daemon.begin(), server.loop).result(20)
    try:
        yield daemon
    finally:
        asyncio.run_coroutine_threadsafe(daemon.close(), server.loop).result(20)
