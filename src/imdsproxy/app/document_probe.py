"""Asks HAProxy for a document of our own, as a guest would: readiness is what guests get, not what processes run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.core.compiled import compile_instance, compiled_path
from imdsproxy.core.model import Instance
from imdsproxy.core.wire import PROBE_INSTANCE
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.errors import HostRefused, ImdsproxyError, Problem
from imdsproxy.host.account import Account, find_closed
from imdsproxy.serving.store import DiskFiles

_EVERY_S: Final = 2.0
_FAILURES: Final = 2
"""One may fail while a worker is replaced."""

_INSTANCE: Final = Instance(PROBE_INSTANCE, "probe", "probe")
_UNASKED: Final = Problem("documents", "no document has been asked for yet", "a moment")


@dataclass(slots=True)
class DocumentProbe:
    """Reads a document of its own through HAProxy and the document server, again and again.

    The record's id is none that a record may have, and HAProxy gives it on a socket of root's only: no guest can
    read it. Its revision is none that is on disk, so that the file is read each time.

    Args:
        account: The document server's.
        needed: Off where there is no document server.

    Attributes:
        problem: Why guests get no documents.
    """

    haproxy: Haproxy
    files: DiskFiles
    account: Callable[[], Account | None]
    needed: bool = True
    problem: Problem | None = field(init=False)
    _failures: int = 0

    def __post_init__(self) -> None:
        self.problem = _UNASKED if self.needed else None

    async def run(self) -> None:
        """Ask until cancelled."""
        while self.needed:
            await asyncio.sleep(_EVERY_S)
            await self.ask()

    async def ask(self) -> None:
        """Ask once, if there is anybody to ask; one failure after good answers changes nothing."""
        if not self.needed:
            return
        found = await self._ask()
        self._failures = 0 if found is None else self._failures + 1
        if found is not None and self.problem is None and self._failures < _FAILURES:
            return
        if found is not None and found != self.problem:
            structlog.get_logger().error("no documents", reason=found.reason, hint=found.hint)
        elif found is None and self._failed:
            structlog.get_logger().info("documents are answered again")
        self.problem = found

    @property
    def _failed(self) -> bool:
        return self.problem is not None and self.problem is not _UNASKED

    async def _ask(self) -> Problem | None:
        try:
            self.files.apply(_INSTANCE.id, compile_instance(_INSTANCE, {}))
        except ImdsproxyError as error:
            return Problem("documents", error.message, error.hint)
        status, body = await self.haproxy.fetch_probe_document()
        if status == 200 and body == _INSTANCE.ec2_id.encode():  # noqa: PLR2004 - HTTP
            return None
        if status is None and self.haproxy.full is not None:
            # It waits, as guests do: the watchdog reports that, and nothing is known of the documents.
            return self.problem
        path = self.files.directory / compiled_path(_INSTANCE.id)
        try:
            closed = await asyncio.to_thread(find_closed, self.account(), path.parent)
        except HostRefused as error:
            return Problem("documents.user", error.message, error.hint)
        if closed is not None:
            return Problem(
                "paths.state_dir",
                f"the document server's account cannot enter {closed}: guests get 503",
                "have it enter (chmod o+x, setfacl), or move paths.state_dir",
            )
        answer = "no answer" if status is None else f"status {status}"
        return Problem(
            "documents",
            f"a document asked of HAProxy has {answer}: guests get 503",
            "imdsproxy check; journalctl -u imdsproxy-documents -u imdsproxy-haproxy",
        )
