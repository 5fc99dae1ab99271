"""Three members of etcd on loopback, which share the machine's processors and disk."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from socket import socket
from typing import Final

from bench.place import BenchError
from bench.procs import end_all, wait_until
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed

__all__ = ["EtcdMembers", "free_port"]

_MEMBERS: Final = 3
_START_S: Final = 60.0
_AT_ONCE: Final = 100
_WRITERS: Final = 6


def free_port() -> int:
    """Return a port of loopback that no process listens on."""
    with socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class EtcdMembers:
    """Debian's etcd, without TLS.

    Args:
        directory: Directory of the members' data.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        peers = [f"http://127.0.0.1:{free_port()}" for _ in range(_MEMBERS)]
        self.endpoints = tuple(f"http://127.0.0.1:{free_port()}" for _ in range(_MEMBERS))
        self._processes = [
            self._spawn(number, peers, endpoint) for number, endpoint in enumerate(self.endpoints)
        ]
        if not wait_until(self._healthy, _START_S, every_s=0.05):
            self.stop()
            raise BenchError("etcd does not become healthy")

    def _spawn(self, number: int, peers: list[str], endpoint: str) -> subprocess.Popen[bytes]:
        cluster = ",".join(f"m{one}={url}" for one, url in enumerate(peers))
        words = {
            "name": f"m{number}",
            "data-dir": str(self._directory / f"m{number}"),
            "listen-client-urls": endpoint,
            "advertise-client-urls": endpoint,
            "listen-peer-urls": peers[number],
            "initial-advertise-peer-urls": peers[number],
            "initial-cluster": cluster,
            "quota-backend-bytes": "8589934592",
            "auto-compaction-retention": "1h",
            "log-level": "error",
        }
        with (self._directory / f"m{number}.log").open("wb") as log:
            return subprocess.Popen(
                ["/usr/bin/etcd", *(f"--{key}={value}" for key, value in words.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _healthy(self) -> bool:
        try:
            for endpoint in self.endpoints:
                health = f"{endpoint}/health"
                with urllib.request.urlopen(health, timeout=5) as answer:  # noqa: S310 - it is http
                    if b'"true"' not in answer.read():
                        return False
        except OSError:
            return False
        return True

    @property
    def pids(self) -> tuple[int, ...]:
        """Pids of the members."""
        return tuple(one.pid for one in self._processes)

    def open(self) -> Etcd:
        """Return a client of all members; the caller closes it."""
        order = random.Random(1)  # noqa: S311 - no secret
        return Etcd(self.endpoints, random=order, clock=Clock(), timeout_s=30)

    def fill(self, pairs: Iterable[tuple[str, bytes]]) -> None:
        """Write all these pairs, in many transactions."""
        asyncio.run(self._fill(iter(pairs)))

    async def _fill(self, pairs: Iterator[tuple[str, bytes]]) -> None:
        etcd = self.open()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_WRITERS):
                    group.create_task(_write(etcd, pairs))
        finally:
            await etcd.close()

    def stop(self) -> None:
        end_all(self.pids)
        for one in self._processes:
            one.wait()


async def _write(etcd: Etcd, pairs: Iterator[tuple[str, bytes]]) -> None:
    while puts := dict(itertools.islice(pairs, _AT_ONCE)):
        if not isinstance(await etcd.commit((), puts), Committed):
            raise BenchError("etcd refused a write without a condition")
