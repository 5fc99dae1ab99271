"""Break a fleet in every way, in an order that a seed decides, while operators write and guests read.

    script/chaos --minutes 60

Every answer is checked against what was written (`support.fleet_history`). It ends with 1 where one may not be.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO, TypeAlias

from imdsproxy.admin_client import FleetClient
from imdsproxy.errors import (
    AdminError,
    AdminUnavailable,
    EtcdFull,
    ImdsproxyError,
    SourceUnavailable,
)
from support.daemon import alive
from support.etcd_lab import EtcdLab
from support.fleet_history import Answer, History, Outcome, Write
from support.fleet_world import FleetHost, FleetWorld, HubProcess, fleet_world
from support.guest import Guest, Lost
from support.lab import run, until, within

HOSTS: Final = ("a", "b", "c")
NETWORKS: Final = ("blue", "red")
_GUESTS: Final = {"i1": ("blue", 5), "i2": ("red", 5), "i3": ("blue", 6), "i4": ("red", 6)}
_TARGET: Final = "/latest/meta-data/hostname"
_ANSWER_S: Final = 3.0
_READ_PAUSE_S: Final = 0.02
_WRITE_PAUSE_S: Final = 0.2
_LINES: Final = 60
_JUNK_BYTES: Final = 1_000_000
ETCD_FLAGS: Final = ("--quota-backend-bytes=16777216",)
"""So that it is full soon."""


Fault: TypeAlias = Callable[["Chaos"], AbstractContextManager[object]]


@dataclass(slots=True)
class Chaos:
    """One run.

    Args:
        world: The fleet.
        seed: Decides what is broken when, and what is written.
        say: Where each fault is noted.
    """

    world: FleetWorld
    seed: int
    say: TextIO
    history: History = field(default_factory=History)
    faults: Counter[str] = field(default_factory=Counter)
    unfounded: list[str] = field(default_factory=list)
    random: random.Random = field(init=False)
    _guests: dict[tuple[str, str], Guest] = field(default_factory=dict)
    _places: dict[str, frozenset[str]] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _failures: list[BaseException] = field(default_factory=list)
    _client: FleetClient | None = None
    _next: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311 - it is to come out the same again

    @property
    def client(self) -> FleetClient:
        """An operator's."""
        if self._client is None:
            urls = tuple(self.world.urls)
            self._client = FleetClient(self.world.operator("op"), timeout_s=20, urls=urls)
        return self._client

    def request(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
        """Ask a hub, as an operator on a machine of the hubs' network."""
        with self.world.etcd.entered():
            return self.client.request(method, path, body=body)

    # What goes on all the time

    def prepare(self) -> None:
        """Hosts with the same networks and addresses, and an instance for each guest, in force."""
        for name in HOSTS:
            host = self.world.add_host(name, networks=NETWORKS, start=False)
            for instance, (network, number) in _GUESTS.items():
                self._guests[name, instance] = host.lab.guest(network, number)
        for host in self.world.hosts.values():
            host.daemon.start(ready=False)
        for host in self.world.hosts.values():
            host.daemon.wait_ready(within_s=60)
        for network in NETWORKS:
            self.request("POST", "/v1/networks", {"id": network, "listener": {"bridge": network}})
        for number, instance in enumerate(_GUESTS):
            self.write(instance, frozenset({HOSTS[number % len(HOSTS)]}))

    def write(self, instance: str, hosts: frozenset[str]) -> Outcome:
        """Write the next version of an instance, and note what came of it."""
        version = self._versions.get(instance, 0) + 1
        network, number = _GUESTS[instance]
        mac = f"fa:16:3e:00:00:{number:02x}"
        port = {"network": network, "mac": mac, "addresses": [f"10.0.0.{number}"]}
        body = {
            "id": instance,
            "name": instance,
            "hostname": f"{instance}-v{version}",
            "ports": [port],
            "hosts": sorted(hosts),
        }
        self._versions[instance] = version
        sent = time.monotonic()
        try:
            if hosts:
                answer = self.request("PUT", f"/v1/instances/{instance}", body)
            else:
                answer = self.request("DELETE", f"/v1/instances/{instance}")
            outcome = Outcome.APPLIED if answer["applied"] else Outcome.STORED
        except (AdminUnavailable, SourceUnavailable):
            outcome = Outcome.UNKNOWN
        except (AdminError, ImdsproxyError) as error:
            outcome = Outcome.REFUSED
            self.note(f"  version {version} of {instance} is refused: {error.message}")
        done = time.monotonic()
        self.history.writes.append(Write(instance, version, hosts, sent, done, outcome))
        if outcome is not Outcome.REFUSED:
            self._places[instance] = hosts
        return outcome

    def _write_on(self) -> None:
        order = random.Random(self.seed + 1)  # noqa: S311 - as above
        while not self._ended.wait(_WRITE_PAUSE_S):
            instance = order.choice(sorted(_GUESTS))
            places = self._places.get(instance, frozenset())
            match order.random():
                case chance if not places or chance < 0.6:
                    self.write(instance, places or frozenset({order.choice(HOSTS)}))
                case chance if chance < 0.9:
                    to = frozenset({order.choice(HOSTS)})
                    if self.write(instance, places | to) is Outcome.APPLIED:
                        self.write(instance, to)
                case _:
                    self.write(instance, frozenset())

    def _read_on(self, host: str, instance: str) -> None:
        guest = self._guests[host, instance]
        while not self._ended.wait(_READ_PAUSE_S):
            begun, status, text = time.monotonic(), None, ""
            with contextlib.suppress(Lost):
                reply = guest.ask(_TARGET, timeout_s=_ANSWER_S)
                status, text = reply.status, reply.text if reply.status == 200 else ""
            ended = time.monotonic()
            self.history.answers.append(Answer(host, instance, begun, ended, status, text))

    # Faults

    def run(self, seconds: float) -> list[str]:
        """Break one thing after another for so long; what may not have been answered."""
        threads = [threading.Thread(target=self._guarded, args=(self._write_on,))]
        threads += [
            threading.Thread(target=self._guarded, args=(self._read_on, *where))
            for where in self._guests
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and not self._failures:
                self._break_once()
            self.settle()
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]
        return [*self.unfounded, *self.history.violations()]

    def _guarded(self, work: Callable[..., None], *arguments: str) -> None:
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - it is raised in the main thread
            self._failures.append(error)

    def _break_once(self) -> None:
        if not self._next:
            self._next = self.random.sample(sorted(FAULTS), len(FAULTS))
        name = self._next.pop()
        hold, rest = self.random.uniform(0.5, 4.0), self.random.uniform(0.2, 1.5)
        self.note(f"{name} for {hold:.1f} s")
        with FAULTS[name](self):
            time.sleep(hold)
        self.faults[name] += 1
        time.sleep(rest)
        if self.is_suspected():
            # A fault that restores has accepted it already: no other one looks like it.
            self.unfounded.append(f"after {name!r} a restored backup is suspected")
            self.accept_restore()

    def settle(self) -> None:
        """Wait until everything is whole again: a write comes in force."""
        until(self._is_whole, within_s=60, pause_s=0.5, what="a write that is in force")

    def is_suspected(self) -> bool:
        """Whether hubs refuse to write, because a restore is suspected."""
        with contextlib.suppress(ImdsproxyError):
            return self.request("GET", "/fleet/status")["suspect"] is not None
        return False

    def _is_whole(self) -> bool:
        if self.is_suspected():
            self.accept_restore()
        return self.history.writes[-1].outcome is Outcome.APPLIED

    def accept_restore(self) -> None:
        """Take what etcd has as the truth."""
        begun = time.monotonic()
        self.history.resets.append((begun, float("inf")))
        revision = self.request("POST", "/fleet/accept-restore")["revision"]
        until(
            lambda: self._in_force_everywhere(revision),
            within_s=60,
            pause_s=0.5,
            what="the restored state on every host",
        )
        self.history.resets[-1] = begun, time.monotonic()

    def _in_force_everywhere(self, revision: int) -> bool:
        with contextlib.suppress(ImdsproxyError):
            body = {"revision": revision, "timeout_s": 10}
            return bool(self.request("POST", "/fleet/wait", body)["applied"])
        return False

    def note(self, words: str) -> None:
        """Say what happens."""
        self.say.write(f"{time.strftime('%H:%M:%S')} {words}\n")
        self.say.flush()

    def a_hub(self) -> HubProcess:
        """One of the hubs."""
        return self.random.choice(self.world.hubs)

    def a_host(self) -> FleetHost:
        """One of the hosts."""
        return self.random.choice(sorted(self.world.hosts.values(), key=lambda one: one.name))


@contextlib.contextmanager
def _stopped(pid: int, number: signal.Signals = signal.SIGSTOP) -> Iterator[None]:
    os.kill(pid, number)
    try:
        yield
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGCONT)


def _member_killed(chaos: Chaos) -> AbstractContextManager[object]:
    return chaos.world.etcd.killed(chaos.random.choice(chaos.world.etcd.members))


def _member_paused(chaos: Chaos) -> AbstractContextManager[object]:
    return chaos.world.etcd.paused(chaos.random.choice(chaos.world.etcd.members))


def _member_partitioned(chaos: Chaos) -> AbstractContextManager[object]:
    member = chaos.random.choice(chaos.world.etcd.members)
    return chaos.world.etcd.partitioned(member, clients=chaos.random.random() < 0.5)


def _quorum_lost(chaos: Chaos) -> AbstractContextManager[object]:
    return chaos.world.etcd.killed(*chaos.random.sample(chaos.world.etcd.members, 2))


@contextlib.contextmanager
def _hub_killed(chaos: Chaos) -> Iterator[None]:
    hub = chaos.a_hub()
    hub.end(signal.SIGKILL)
    yield
    hub.start()


@contextlib.contextmanager
def _hubs_restarted(chaos: Chaos) -> Iterator[None]:
    for hub in chaos.world.hubs:
        hub.end(signal.SIGTERM)
    yield
    for hub in chaos.world.hubs:
        hub.start()


def _hub_paused(chaos: Chaos) -> AbstractContextManager[object]:
    process = chaos.a_hub().process
    assert process is not None
    return _stopped(process.pid)


@contextlib.contextmanager
def _controller_killed(chaos: Chaos) -> Iterator[None]:
    host = chaos.a_host()
    host.daemon.kill_controller()
    yield
    host.daemon.start(ready=False)


def _controller_paused(chaos: Chaos) -> AbstractContextManager[object]:
    process = chaos.a_host().daemon.process
    assert process is not None
    return _stopped(process.pid)


@contextlib.contextmanager
def _host_partitioned(chaos: Chaos) -> Iterator[None]:
    nft = (*within(chaos.a_host().lab.host), "nft")
    rules = "".join(
        f"chain {hook} {{ type filter hook {hook} priority 0; tcp {way} 8469 drop; }}\n"
        for hook, way in (("input", "sport"), ("output", "dport"))
    )
    run(*nft, "-f", "-", stdin=f"table inet cut {{ {rules} }}\n")
    yield
    run(*nft, "delete", "table", "inet", "cut")


@contextlib.contextmanager
def _compacted(chaos: Chaos) -> Iterator[None]:
    etcd = chaos.world.etcd
    # A hub that does not follow meanwhile finds that its place is gone.
    with _hub_paused(chaos):
        yield
        # etcd refuses to compact where nothing was written since.
        chaos.world.write({"junk/compacted": b""})
        _compact(etcd)


def _compact(etcd: EtcdLab) -> None:
    """Forget all versions but the newest, and give their space back."""
    revision = json.loads(etcd.ctl("get", "x", "-w", "json"))["header"]["revision"]
    etcd.ctl("compact", str(revision))
    for member in etcd.members:
        etcd.ctl("defrag", member=member)


@contextlib.contextmanager
def _full(chaos: Chaos) -> Iterator[None]:
    etcd = chaos.world.etcd
    with contextlib.suppress(EtcdFull):
        for number in itertools.count():
            value = chaos.random.randbytes(_JUNK_BYTES)
            chaos.world.write({f"junk/{number}": value})
    yield
    etcd.ctl("del", "--prefix", "junk/")
    _compact(etcd)
    etcd.ctl("alarm", "disarm")


def _restored(*options: str) -> Fault:
    @contextlib.contextmanager
    def fault(chaos: Chaos) -> Iterator[None]:
        etcd = chaos.world.etcd
        snapshot = Path(tempfile.mkdtemp(dir=chaos.world.directory), "backup")
        etcd.ctl("snapshot", "save", str(snapshot))
        yield
        etcd.restore(snapshot, *options)
        until(chaos.is_suspected, within_s=30, what="a suspicion")
        chaos.accept_restore()

    return fault


FAULTS: Final[dict[str, Fault]] = {
    "a member is killed": _member_killed,
    "a member hangs": _member_paused,
    "a member is cut off": _member_partitioned,
    "two members are killed": _quorum_lost,
    "a hub is killed": _hub_killed,
    "all hubs are restarted": _hubs_restarted,
    "a hub hangs": _hub_paused,
    "a controller is killed": _controller_killed,
    "a controller hangs": _controller_paused,
    "a host is cut off": _host_partitioned,
    "etcd is compacted and defragmented": _compacted,
    "etcd is full": _full,
    "etcd is restored": _restored(),
    "etcd is restored with newer revisions": _restored(
        "--bump-revision=1000000", "--mark-compacted"
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Break a fleet while guests read, and check their answers."
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(words)
    with ExitStack() as stack:
        world = stack.enter_context(fleet_world(etcd_flags=ETCD_FLAGS))
        chaos = Chaos(world, options.seed, sys.stderr)
        chaos.prepare()
        chaos.note(f"seed {options.seed}, for {options.minutes:g} minutes")
        try:
            found = chaos.run(options.minutes * 60)
        except BaseException:
            for hub in world.hubs:
                lines = hub.log.read_text().splitlines()
                sys.stderr.write("\n".join((hub.name, *lines[-_LINES:], "")))
            raise
    for words_of, number in sorted((chaos.history.counts() + chaos.faults).items()):
        sys.stdout.write(f"{number:>9,} {words_of}\n")
    for where, number in chaos.history.unserved().items():
        sys.stdout.write(f"{number:>9,} not served: {where}\n")
    for one in found[:20]:
        sys.stdout.write(f"{one}\n")
    sys.stdout.write(f"{len(found):>9,} answers that may not be\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
