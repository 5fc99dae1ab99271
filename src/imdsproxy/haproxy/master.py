"""Client of HAProxy's master socket: one connection for each command, every answer read to its end.

A connection opened before a reload stays with the draining process, so connections are not reused.
"""

import asyncio
import contextlib
import errno
import socket
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable
from pathlib import Path
from typing import Final

from imdsproxy.errors import CommandRefused, Ignoring, RuntimeUnavailable
from imdsproxy.haproxy.rules import runtime
from imdsproxy.haproxy.rules.maps import split_payload

_PAYLOAD_LIMIT: Final = 14_000
"""Maximum bytes of data in one command: HAProxy's buffer is 16 kB and holds the command line too."""

_RELOAD_DEADLINE_S: Final = 30.0
"""Deadline for a reload, in seconds; 200,000 records load in half a second."""


class WorkerEnded(Exception):
    """Raised if the worker has ended: its answer does not matter any longer."""


class MasterClient:
    """Client for commands to the master and, through the master, to each worker.

    Commands raise `RuntimeUnavailable` if the master does not answer within the deadline, commands to a worker
    `WorkerEnded` if the worker is gone, and changes of maps `CommandRefused` if HAProxy answers with an error.

    Attributes:
        commands: Number of answered (`ok`) and unanswered (`failed`) commands.
    """

    def __init__(self, path: Path, *, deadline_s: float = 3.0) -> None:
        self._path = path
        self._deadline_s = deadline_s
        self.commands: Counter[str] = Counter(ok=0, failed=0)

    async def read_processes(self) -> runtime.Processes:
        answer = await self._send("show proc", self._deadline_s)
        processes = runtime.parse_processes(answer)
        if processes is None:
            raise RuntimeUnavailable(f"HAProxy's master gave no process list but {answer[:200]!r}")
        return processes

    async def send_reload(self) -> str | None:
        """Tell the master to start a new worker from the file; return the log of a failure."""
        return runtime.parse_reload(await self._send("reload", _RELOAD_DEADLINE_S))

    async def read_load(self, worker: int) -> runtime.Load | None:
        """Return a worker's load. The worker's own socket answers even when all connections are in use."""
        return runtime.parse_load(await self.send(worker, "show info"))

    async def read_stat(
        self, worker: int, columns: Collection[str] | None = None
    ) -> list[dict[str, str]]:
        return runtime.parse_stat(await self.send(worker, "show stat"), columns)

    async def read_number(self, worker: int, variable: str) -> int | None:
        """Return an integer from a variable of a worker's rules; `None` if the variable is not set."""
        _, _, rest = (await self.send(worker, f"get var {variable}")).partition("value=<")
        text = rest.partition(">")[0]
        return int(text) if text.isdigit() else None

    async def send(self, worker: int, command: str, payload: str | None = None) -> str:
        """Send one command to one worker; return the answer without the closing line break."""
        if ";" in command or "\n" in command:
            raise ValueError(f"a command is one line without a semicolon: {command!r}")
        line = f"@!{worker} {command}"
        if payload is not None:
            line = f"{line} <<\n{payload}"
        answer = (await self._send(line, self._deadline_s)).strip("\n")
        if answer.startswith(("Can't find the target PID", "Can't connect to the target")):
            raise WorkerEnded(str(worker))
        return answer

    async def ask_workers(self, *commands: str) -> AsyncIterator[tuple[int, list[str]]]:
        """Yield each worker and its answers as they arrive; also draining workers, and those of reloads by others.

        A worker that does not answer yields no answers: it is ending, or HAProxy is, and the next look shows which.
        """
        for worker in (await self.read_processes()).workers:
            answers: list[str] = []
            with contextlib.suppress(WorkerEnded, RuntimeUnavailable):
                answers = [await self.send(worker, command) for command in commands]
            yield worker, answers

    async def send_upsert(self, worker: int, path: str, key: str, value: str) -> None:
        answer = await self.send(worker, f"set map {path} {key} {value}")
        if "not found" in answer:
            await self.send_additions(worker, path, [(key, value)])
        elif answer:
            raise CommandRefused(f"set map {key}: {answer}")

    async def send_additions(self, worker: int, path: str, entries: list[tuple[str, str]]) -> None:
        """Add entries that the map lacks."""
        for payload in split_payload(entries, _PAYLOAD_LIMIT):
            await self._expect_silence(worker, f"add map {path}", payload)

    async def send_removal(self, worker: int, path: str, key: str) -> None:
        """Remove a key; a missing key is no error."""
        answer = await self.send(worker, f"del map {path} {key}")
        if answer and "not found" not in answer:
            raise CommandRefused(f"del map {key}: {answer}")

    async def send_swap(self, worker: int, path: str, entries: Iterable[tuple[str, str]]) -> None:
        """Replace a map's whole content at once (`prepare`, `add @version`, `commit`)."""
        answer = await self.send(worker, f"prepare map {path}")
        version = answer.rpartition(":")[2].strip()
        if not version.isdigit():
            raise CommandRefused(f"prepare map {path}: {answer}")
        for payload in split_payload(entries, _PAYLOAD_LIMIT):
            await self._expect_silence(worker, f"add map @{version} {path}", payload)
        await self._expect_silence(worker, f"commit map @{version} {path}")

    async def read_entry(self, worker: int, path: str, key: str) -> str | None:
        """Return the value of a key in a worker's map; `None` if the map lacks the key."""
        answer = await self.send(worker, f"get map {path} {key}")
        _, found, rest = answer.partition('value="')
        return rest.partition('"')[0] if found else None

    async def _expect_silence(self, worker: int, command: str, payload: str | None = None) -> None:
        answer = await self.send(worker, command, payload)
        if answer:
            raise CommandRefused(f"{command}: {answer[:500]}")

    async def _send(self, line: str, deadline_s: float) -> str:
        command = repr(line.partition(" <<")[0])
        try:
            answer = await exchange(self._path, f"{line}\n", deadline_s, end=True)
        except OSError as error:
            self.commands["failed"] += 1
            late = f"gave no answer to {command} in {deadline_s:g} s"
            why = late if isinstance(error, TimeoutError) else f"cannot be reached: {error}"
            raise RuntimeUnavailable(f"HAProxy's master at {self._path} {why}") from error
        self.commands["ok" if answer else "failed"] += 1
        if not answer:
            # Even an empty answer is a line break: an end without one means that the process has gone.
            raise RuntimeUnavailable(
                f"HAProxy's master at {self._path} closed the connection at {command}"
            )
        return answer.decode("utf-8", "replace")


async def exchange(path: Path, request: str, deadline_s: float, *, end: bool = False) -> bytes:
    """Send a request to a unix socket; return everything that arrives until the connection ends.

    `end` shuts down our side after the request, to show that nothing else follows. Raises `OSError` if no process
    answers there, `TimeoutError` after the deadline.
    """
    # Without streams: an exchange takes 38 µs of processor time instead of 104, and the watchdog asks every second.
    loop, kind = asyncio.get_running_loop(), socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as channel:
        async with asyncio.timeout(deadline_s):
            await loop.sock_connect(channel, str(path))
            # A process that refuses the request may close early: its answer is still to be read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await loop.sock_sendall(channel, request.encode())
            if end:
                with Ignoring(errno.ENOTCONN):
                    channel.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := await loop.sock_recv(channel, 65_536):
                answer += chunk
                # After a refusal of the target's pid the master may miss that our side has ended, and would keep the
                # connection open until a timeout.
                if answer.startswith(b"Can't ") and answer.endswith(b"\n"):
                    break
            return answer
