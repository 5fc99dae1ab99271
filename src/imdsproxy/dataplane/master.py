"""A client of HAProxy's master socket: one connection a command, every answer read to its end.

A connection made before a reload stays with the process that drains, so none is kept.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable
from pathlib import Path
from typing import Final

from imdsproxy.core.haproxy import runtime
from imdsproxy.core.haproxy.maps import split_payload
from imdsproxy.errors import CommandRefused, RuntimeUnavailable

_PAYLOAD_LIMIT: Final = 14_000
"""Bytes of data in one command: HAProxy's buffer is 16 kB and holds the command line too."""

_RELOAD_DEADLINE_S: Final = 30.0
"""200,000 records load in half a second."""


class WorkerEnded(Exception):
    """The worker that a command was for is gone: what it would have answered does not matter any more."""


class MasterClient:
    """Commands to the master and, through it, to each worker.

    Attributes:
        commands: How many were answered (`ok`) and how many were not (`failed`).

    Args:
        path: The master socket.
        deadline_s: How long one command may take; a reload takes longer.
    """

    def __init__(self, path: Path, *, deadline_s: float = 3.0) -> None:
        self._path = path
        self._deadline_s = deadline_s
        self.commands: Counter[str] = Counter(ok=0, failed=0)

    async def read_processes(self) -> runtime.Processes:
        """The processes that run now.

        Raises:
            RuntimeUnavailable: The master does not answer.
        """
        answer = await self._send("show proc", self._deadline_s)
        processes = runtime.parse_processes(answer)
        if processes is None:
            raise RuntimeUnavailable(f"HAProxy's master gave no process list but {answer[:200]!r}")
        return processes

    async def send_reload(self) -> str | None:
        """Have the master start a new worker from the file; its log where that fails.

        Raises:
            RuntimeUnavailable: The master does not answer within the deadline.
        """
        return runtime.parse_reload(await self._send("reload", _RELOAD_DEADLINE_S))

    async def read_load(self, worker: int) -> runtime.Load | None:
        """How full a worker is; its own socket answers even when it is full.

        Raises:
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
        return runtime.parse_load(await self.send(worker, "show info"))

    async def read_stat(
        self, worker: int, columns: Collection[str] | None = None
    ) -> list[dict[str, str]]:
        """`show stat` of one worker; only these columns of it, or all.

        Raises:
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
        return runtime.parse_stat(await self.send(worker, "show stat"), columns)

    async def read_number(self, worker: int, variable: str) -> int | None:
        """An integer that a worker's rules keep in a variable; `None` where they keep none.

        Raises:
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
        _, _, rest = (await self.send(worker, f"get var {variable}")).partition("value=<")
        text = rest.partition(">")[0]
        return int(text) if text.isdigit() else None

    async def send(self, worker: int, command: str, payload: str | None = None) -> str:
        """One command to one worker; its answer without the closing line break.

        Raises:
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
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
        """Each worker and its answers, as they come; of draining ones too, and those of a reload that we did not order.

        One that does not answer has none: it ends, or HAProxy does, and the next look shows which.

        Raises:
            RuntimeUnavailable: The master does not answer.
        """
        for worker in (await self.read_processes()).workers:
            answers: list[str] = []
            with contextlib.suppress(WorkerEnded, RuntimeUnavailable):
                answers = [await self.send(worker, command) for command in commands]
            yield worker, answers

    async def send_upsert(self, worker: int, path: str, key: str, value: str) -> None:
        """Give a key its value, whether the map has it or not.

        Raises:
            CommandRefused: HAProxy answers with an error.
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
        answer = await self.send(worker, f"set map {path} {key} {value}")
        if "not found" in answer:
            await self.send_additions(worker, path, [(key, value)])
        elif answer:
            raise CommandRefused(f"set map {key}: {answer}")

    async def send_additions(self, worker: int, path: str, entries: list[tuple[str, str]]) -> None:
        """Add entries that the map does not have.

        Raises:
            CommandRefused: HAProxy answers with an error.
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
        for payload in split_payload(entries, _PAYLOAD_LIMIT):
            await self._expect_silence(worker, f"add map {path}", payload)

    async def send_removal(self, worker: int, path: str, key: str) -> None:
        """Take a key out; that it is not there is as good.

        Raises:
            CommandRefused: HAProxy answers with an error.
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
        answer = await self.send(worker, f"del map {path} {key}")
        if answer and "not found" not in answer:
            raise CommandRefused(f"del map {key}: {answer}")

    async def send_swap(self, worker: int, path: str, entries: Iterable[tuple[str, str]]) -> None:
        """Replace a map's whole content at once (`prepare`, `add @version`, `commit`).

        Raises:
            CommandRefused: HAProxy answers with an error.
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
        answer = await self.send(worker, f"prepare map {path}")
        version = answer.rpartition(":")[2].strip()
        if not version.isdigit():
            raise CommandRefused(f"prepare map {path}: {answer}")
        for payload in split_payload(entries, _PAYLOAD_LIMIT):
            await self._expect_silence(worker, f"add map @{version} {path}", payload)
        await self._expect_silence(worker, f"commit map @{version} {path}")

    async def read_entry(self, worker: int, path: str, key: str) -> str | None:
        """The value that a worker's map has for a key, `None` where it has none.

        Raises:
            RuntimeUnavailable: The master does not answer.
            WorkerEnded: The worker is gone.
        """
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
            # Even "done" is a line break: an end without one is a process that went away.
            raise RuntimeUnavailable(f"HAProxy's master at {self._path} hung up on {command}")
        return answer.decode("utf-8", "replace")


async def exchange(path: Path, request: str, deadline_s: float, *, end: bool = False) -> bytes:
    """Everything that is answered on a unix socket until the end of the connection.

    Args:
        path: The socket.
        request: All that is sent.
        deadline_s: How long all of it may take.
        end: Show that nothing else follows, by an end of our side.

    Raises:
        OSError: Nothing answers there; `TimeoutError` where it takes too long.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(request.encode())
            if end:
                writer.write_eof()
            answer = b""
            while chunk := await reader.read(65_536):
                answer += chunk
                # After a refusal of the target's pid the master may miss that our side has ended, and would keep the
                # connection open until a time-out.
                if answer.startswith(b"Can't ") and answer.endswith(b"\n"):
                    break
            return answer
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
