"""Writes to a fleet's store, one after the other, on kept connections."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Self

from bench.etcd import EtcdMembers
from bench.place import BenchError
from imdsproxy.hub.etcd import Committed, Etcd

__all__ = ["Operator", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
    """A write; times are of the monotonic clock.

    Attributes:
        sent: When it was sent.
        committed: When the answer was there.
    """

    revision: int
    sent: float
    committed: float


class Operator:
    """What a hub does for an operator's write, without its checks."""

    def __init__(self, members: EtcdMembers) -> None:
        self._members = members
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._etcd: Etcd | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._etcd is not None:
            asyncio.run_coroutine_threadsafe(self._etcd.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def write(self, key: str, value: bytes) -> Written:
        """One key."""
        return asyncio.run_coroutine_threadsafe(self._write(key, value), self._loop).result()

    async def _write(self, key: str, value: bytes) -> Written:
        if self._etcd is None:
            self._etcd = self._members.open()
        sent = time.monotonic()
        done = await self._etcd.commit((), {key: value})
        if not isinstance(done, Committed):
            raise BenchError("etcd refused a write without a condition")
        return Written(done.revision, sent, time.monotonic())
