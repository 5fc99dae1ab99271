"""The admin API on a real unix socket, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imdsproxy.admin.api import admin_app
from imdsproxy.cli.admin_client import AdminClient
from imdsproxy.controller.http import serve
from imdsproxy.serving.bind import open_unix_socket
from support.fake_operations import FakeOperations


@dataclass(frozen=True)
class AdminServer:
    """A served fake: change `operations`, ask through `client`, or name `socket` to the CLI."""

    operations: FakeOperations
    socket: Path

    @property
    def client(self) -> AdminClient:
        return AdminClient(self.socket, timeout_s=20)


@contextlib.contextmanager
def admin_server(directory: Path) -> Iterator[AdminServer]:
    """Serve a fresh fake until the context ends; nothing is left behind."""
    operations = FakeOperations()
    path = directory / "admin.sock"
    operations.on_stop = lambda: path.unlink(missing_ok=True)
    listener = open_unix_socket(path, mode=0o600)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()

    async def until_stopped() -> None:
        task = asyncio.create_task(serve(admin_app(operations, version="1.2.3"), listener))
        started.set()
        await stop.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    thread = threading.Thread(target=lambda: loop.run_until_complete(until_stopped()))
    thread.start()
    try:
        started.wait(10)
        yield AdminServer(operations, path)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        listener.close()
        path.unlink(missing_ok=True)
