"""script/demo --fleet: etcd, two hubs, three hosts; an instance moves while it reads, and parts are killed.

Every machine is a network namespace. The commands that are printed are the ones that are run.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.table import Table

from demo.fleet_operator import DemoError, Operator
from support.fleet_world import FleetWorld, fleet_world
from support.guest import Guest, Lost

_TARGET: Final = "/latest/meta-data/hostname"
_PAUSE_S: Final = 0.01
_GUESTS: Final = (("web", "blue", 5, "a"), ("db", "red", 5, "b"), ("mail", "blue", 6, "c"))


@dataclass(slots=True)
class Reader:
    """A guest that reads its host name again and again.

    Attributes:
        hosts: Where it has run, in order.
        names: The host names that it got, in order.
    """

    instance: str
    guest: Guest
    hosts: list[str]
    names: list[str] = field(default_factory=list)
    answered: int = 0
    lost: int = 0
    longest_s: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def end(self) -> None:
        """Stop reading."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def moves(self, guest: Guest, host: str) -> None:
        """It runs on another host now."""
        self.guest = guest
        self.hosts.append(host)

    def _read(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            begun = time.monotonic()
            try:
                reply = self.guest.ask(_TARGET)
            except Lost:
                self.lost += 1
                continue
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            name = reply.text if reply.status == 200 else f"status {reply.status}"  # noqa: PLR2004
            self.answered += 1
            if name not in self.names[-1:]:
                self.names.append(name)


@dataclass(slots=True)
class Demonstration:
    """One run."""

    world: FleetWorld
    operator: Operator
    readers: dict[str, Reader] = field(default_factory=dict)

    def run(self) -> bool:
        """All of it; whether every guest got its own, always."""
        world = self.world
        self.operator.say(
            "Three hosts join, each with the networks blue and red, whose addresses are the same"
        )
        for name in ("a", "b", "c"):
            world.add_host(name, networks=("blue", "red"))
        self.operator.say(
            "An operator stores networks and instances once; each goes to its host alone"
        )
        for network in ("blue", "red"):
            self.operator.imdsproxy(f"network add {network} --bridge {network}")
        for instance, network, number, host in _GUESTS:
            self.operator.imdsproxy(
                f"instance add {instance} --host {host} -n {network} "
                f"--mac fa:16:3e:00:00:{number:02x} --address 10.0.0.{number}"
            )
            guest = world.hosts[host].lab.guest(network, number, name=instance)
            self.readers[instance] = Reader(instance, guest, [host])
        for reader in self.readers.values():
            reader.start()
        try:
            self._move()
            self._kill()
        finally:
            for reader in self.readers.values():
                reader.end()
        self.operator.imdsproxy("fleet hosts")
        self.operator.console.print(self._table())
        expected = {"web": ["web"], "db": ["db", "db-2"], "mail": ["mail", "mail-2", "mail-3"]}
        return all(
            reader.lost == 0 and reader.names == expected[instance]
            for instance, reader in self.readers.items()
        )

    def _move(self) -> None:
        self.operator.say(
            "web moves from a to b while it reads: both serve it until its guest is there"
        )
        self.operator.imdsproxy("instance move web --to b")
        guest = self.world.hosts["b"].lab.guest("blue", 5, name="web")
        self.readers["web"].moves(guest, "b")
        self.operator.imdsproxy("instance move web --finish")

    def _kill(self) -> None:
        world = self.world
        first, second = world.hubs
        self.operator.say(f"{first.name} is killed; a change goes by {second.name}")
        first.end(signal.SIGKILL)
        self.operator.imdsproxy("instance set db --hostname db-2")
        leader = world.etcd.leader()
        self.operator.say(
            f"{leader.name}, the leader of etcd, is killed; a change goes by the two others"
        )
        with world.etcd.killed(leader):
            self.operator.imdsproxy("instance set mail --hostname mail-2")
            self.operator.say("The other hub is killed, too: guests read on, from their own hosts")
            second.end(signal.SIGKILL)
            time.sleep(2)
        self.operator.say("Both hubs are started again; a change is in force at once")
        for hub in world.hubs:
            hub.start()
        self.operator.imdsproxy("instance set mail --hostname mail-3")

    def _table(self) -> Table:
        table = Table(
            "guest", "network", "address", "ran on", "read", "requests", "lost", "longest"
        )
        for instance, network, number, _ in _GUESTS:
            reader = self.readers[instance]
            table.add_row(
                *(instance, network, f"10.0.0.{number}", " → ".join(reader.hosts)),
                *(" → ".join(reader.names), f"{reader.answered:,}", str(reader.lost)),
                f"{reader.longest_s * 1000:.0f} ms",
            )
        return table


def main(words: Sequence[str]) -> int:
    """Run it; the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    if words:
        console.print("script/demo: --fleet goes with no other option", style="red")
        return 2
    console.print("etcd of three members, two hubs in front of it", style="bold")
    try:
        with fleet_world() as world:
            good = Demonstration(world, Operator(world, console)).run()
    except DemoError as error:
        console.print(f"script/demo: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    words_of = "Every guest read its own, always." if good else "A guest did not read its own."
    console.print(words_of, style="green" if good else "red")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
