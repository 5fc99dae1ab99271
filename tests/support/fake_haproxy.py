"""HAProxy's master socket, as far as the data plane uses it, without HAProxy.

The contract suite holds it to what the real one answers.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from imdsproxy.errors import ConfigRejected
from imdsproxy.haproxy.launch import Launcher
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.master import MasterClient
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.maps import GENERATION_KEY, parse_map
from imdsproxy.haproxy.rules.runtime import Processes
from imdsproxy.host.clock import Clock

MASTER: Final = 2**22 + 1
"""No process can have this pid: what waits for its end does not wait."""


@dataclass(slots=True)
class FakeWorker:
    """A process with its maps, read from the files when it starts."""

    pid: int
    maps: dict[str, list[tuple[str, str]]]
    prepared: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    versions: int = 0

    def lookup(self, overlay: Path, base: Path, key: str) -> str | None:
        """What a request with this key would find."""
        for path in (overlay, base):
            for name, value in self.maps[str(path)]:
                if name == key:
                    return None if value == "-" else value
        return None


@dataclass(slots=True)
class FakeHaproxy:
    """A master and its workers.

    Attributes:
        commands: Every line that was sent to a worker, with its pid.
        stop_answering_after: Commands to workers that are still answered; `None` for all.
        events: What a ring of a worker holds.
        tables: What a worker has in its tables, by their names.
        refuse_reload: What the master says of a reload that fails; empty for one that succeeds.
    """

    socket: Path
    maps: tuple[Path, ...]
    workers: list[FakeWorker] = field(default_factory=list)
    old: list[FakeWorker] = field(default_factory=list)
    commands: list[tuple[int, str]] = field(default_factory=list)
    stop_answering_after: int | None = None
    events: str = ""
    tables: dict[str, str] = field(default_factory=dict)
    refuse_reload: str = ""
    reloads: int = 0
    next_pid: int = 1001
    server: asyncio.Server | None = None

    async def start(self) -> None:
        self.workers = [self.fork()]
        self.server = await asyncio.start_unix_server(self._serve, str(self.socket))

    async def close(self) -> None:
        if self.server is not None:
            # A connection of a client that was cancelled may be on its way: accepted, made a transport, attached.
            for _ in range(5):
                await asyncio.sleep(0)
            self.server.close()
            await self.server.wait_closed()

    def fork(self) -> FakeWorker:
        """A worker that has just read the files."""
        self.next_pid += 1
        maps: dict[str, list[tuple[str, str]]] = {}
        for path in self.maps:
            generation, entries = parse_map(path.read_text())
            head = [] if generation is None else [(GENERATION_KEY, generation)]
            maps[str(path)] = [*head, *entries.items()]
        return FakeWorker(self.next_pid, maps)

    def all(self) -> list[FakeWorker]:
        return [*self.workers, *self.old]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = (await reader.read(-1)).decode()
        answer = self._answer(text)
        if answer is not None:
            writer.write(f"{answer}\n".encode())
        writer.close()
        await writer.wait_closed()

    def _answer(self, text: str) -> str | None:
        line, _, payload = text.partition("\n")
        if line == "show proc":
            return self._show_proc()
        if line == "reload" and self.refuse_reload:
            return f"Success=0\n--\n{self.refuse_reload}\n"
        if line == "reload":
            self.reloads += 1
            self.old = [*self.workers, *self.old]
            self.workers = [self.fork()]
            return "Success=1\n--\n[NOTICE] reloaded\n"
        prefix, _, command = line.partition(" ")
        pid = int(prefix.removeprefix("@!"))
        if self.stop_answering_after is not None:
            if self.stop_answering_after == 0:
                return None
            self.stop_answering_after -= 1
        self.commands.append((pid, command))
        for worker in self.all():
            if worker.pid == pid:
                shown = command.startswith(("show events ", "show table "))
                return self._show(command) if shown else _run(worker, command, payload)
        return f"Can't find the target PID matching the prefix '@!{pid}'\n"

    def _show(self, command: str) -> str:
        """What it keeps for reports: rings and tables."""
        _, kind, name, *_ = command.split()
        return self.events if kind == "events" else self.tables.get(name, "# table\n")

    def _show_proc(self) -> str:
        lines = [
            "#<PID>          <type>          <reloads>       <uptime>        <version>",
            f"{MASTER} master {self.reloads} [failed: 0] 0d00h00m01s 3.0.11",
            "# workers",
            *(f"{worker.pid} worker 0 0d00h00m01s 3.0.11" for worker in self.workers),
        ]
        if self.old:
            lines.append("# old workers")
            lines += [f"{worker.pid} worker 1 0d00h00m01s 3.0.11" for worker in self.old]
        return "\n".join([*lines, "# programs", ""])


@dataclass(slots=True)
class FakeLauncher:
    """Starts the fake instead of a program.

    Attributes:
        refuse: Why it does not start; empty when it does.
        config: With the word POISON in it, it does not start either.
    """

    fake: FakeHaproxy
    master: MasterClient
    config: Path
    refuse: str = ""
    started: int = 0
    killed: list[Processes] = field(default_factory=list)

    async def start(self) -> Processes:
        if self.refuse or "POISON" in self.config.read_text():
            raise ConfigRejected(f"HAProxy did not start: {self.refuse}")
        self.started += 1
        await self.fake.start()
        return await self.master.read_processes()

    async def kill(self, processes: Processes) -> None:
        self.killed.append(processes)

    async def end_lost(self) -> None:
        """None is lost: the fake's socket is always there."""


def control_fake(layout: Layout, script: str) -> tuple[FakeHaproxy, FakeLauncher, Haproxy]:
    """A fake without records that is not started yet, and what controls it.

    Args:
        layout: Of a directory that is there.
        script: What runs as `haproxy -c`.
    """
    fake = FakeHaproxy(layout.master_socket, (layout.base_map, layout.overlay_map))
    records = RecordApplier(layout)
    records.write_all({})
    program = layout.runtime / "haproxy"
    program.write_text(script)
    program.chmod(0o755)
    launcher = FakeLauncher(fake, records.master, layout.config)
    return fake, launcher, Haproxy(str(program), cast("Launcher", launcher), records, Clock())


def _run(worker: FakeWorker, command: str, payload: str) -> str:  # noqa: PLR0911 - a flat choice of commands
    words = command.removesuffix(" <<").split(" ")
    match words:
        case ["set", "map", path, key, value]:
            return _set(worker.maps[path], key, value)
        case ["add", "map", path]:
            worker.maps[path] += _entries(payload)
        case ["add", "map", version, path]:
            worker.prepared[path, version.removeprefix("@")] += _entries(payload)
        case ["del", "map", path, key]:
            left = [entry for entry in worker.maps[path] if entry[0] != key]
            if len(left) == len(worker.maps[path]):
                return "Key not found.\n"
            worker.maps[path] = left
        case ["get", "map", path, key]:
            found = next((value for name, value in worker.maps[path] if name == key), None)
            if found is None:
                return "type=str, case=sensitive, found=no\n"
            return f'type=str, case=sensitive, found=yes, idx=tree, key="{key}", value="{found}", type="str"\n'
        case ["prepare", "map", path]:
            worker.versions += 1
            worker.prepared[path, str(worker.versions)] = []
            return f"New version created: {worker.versions}\n"
        case ["commit", "map", version, path]:
            worker.maps[path] = worker.prepared.pop((path, version.removeprefix("@")))
        case _:
            return "Unknown command\n"
    return ""


def _set(entries: list[tuple[str, str]], key: str, value: str) -> str:
    if all(name != key for name, _ in entries):
        return "entry not found.\n"
    entries[:] = [(name, value if name == key else old) for name, old in entries]
    return ""


def _entries(payload: str) -> list[tuple[str, str]]:
    found = []
    for line in payload.splitlines():
        key, _, value = line.partition(" ")
        if key:
            found.append((key, value))
    return found
