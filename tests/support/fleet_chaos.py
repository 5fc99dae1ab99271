"""Break a fleet in every way, in an order that a seed decides, while operators write and guests read.

    script/chaos --minutes 60

Every answer is checked against what was written (`support.fleet_history`). It ends with 1 where one may not be.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from imdsproxy.errors import (
    AdminError,
    AdminUnavailable,
    ImdsproxyError,
    NotFound,
    SourceUnavailable,
)
from imdsproxy.fleet.layout import override_key, parse_override
from imdsproxy.model.entities import InstanceId
from support.fleet_faults import FAULTS
from support.fleet_history import Answer, History, Outcome, Write
from support.fleet_member import Member
from support.fleet_operator import Operator
from support.fleet_world import FleetHost, FleetWorld, HubProcess, fleet_world
from support.guest import Guest, Lost
from support.lab import until

HOSTS: Final = ("a", "b", "c")
NETWORKS: Final = ("blue", "red")
_GUESTS: Final = {"i1": ("blue", 5), "i2": ("red", 5), "i3": ("blue", 6), "i4": ("red", 6)}
_TARGET: Final = "/latest/meta-data/hostname"
_ANSWER_S: Final = 3.0
_READ_PAUSE_S: Final = 0.02
_WRITE_PAUSE_S: Final = 0.2
_LINES: Final = 60
_SPARES: Final = 3
_WATCHED: Final = "i1"
"""The instance whose tokens are revoked."""

ETCD_FLAGS: Final = ("--quota-backend-bytes=16777216",)
"""So that it is full soon."""


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
    backup: Path | None = None
    unfounded: list[str] = field(default_factory=list)
    revoked: list[Member] = field(default_factory=list)
    epoch: int = 0
    random: random.Random = field(init=False)
    _guests: dict[tuple[str, str], Guest] = field(default_factory=dict)
    _places: dict[str, frozenset[str]] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _failures: list[BaseException] = field(default_factory=list)
    _operator: Operator = field(init=False)
    _next: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311 - it is to come out the same again
        self._operator = Operator.new(self.world, "op")

    @property
    def instances(self) -> tuple[str, ...]:
        """The instances of all guests."""
        return tuple(_GUESTS)

    @property
    def networks(self) -> tuple[str, ...]:
        """Their networks."""
        return NETWORKS

    def request(self, method: str, path: str, body: object = None) -> Any:
        """Ask a hub."""
        return self._operator.ask(method, path, body)

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
            begun, status = time.monotonic(), None
            try:
                reply = guest.ask(_TARGET, timeout_s=_ANSWER_S)
                status, text = reply.status, reply.text if reply.status == 200 else ""
            except Lost as lost:
                text = str(lost)
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
            names = [one for one in sorted(FAULTS) if self.world.clocks or "clock" not in one]
            self._next = self.random.sample(names, len(names))
        name = self._next.pop()
        hold, rest = self.random.uniform(0.5, 4.0), self.random.uniform(0.2, 1.5)
        self.note(f"{name} for {hold:.1f} s")
        with FAULTS[name](self):
            time.sleep(hold)
        self.faults[name] += 1
        time.sleep(rest)
        if self.is_suspected():
            # A fault that restores has accepted it already: no other one looks like it.
            self.complain(f"after {name!r} a restored backup is suspected")
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

    # What no restore may take back

    def join_spare(self) -> Member:
        """A host that joins, to be revoked."""
        name = f"spare-{len(self.revoked)}-{self.random.randrange(1_000_000)}"
        return self._operator.join(name)

    def revoke(self, spare: Member) -> None:
        """Revoke a host, and an instance's tokens."""
        self.request("POST", "/fleet/revoked-hosts", {"name": spare.name})
        self.revoked = [*self.revoked[-_SPARES:], spare]
        with contextlib.suppress(NotFound):
            revoked = self.request("POST", f"/v1/instances/{_WATCHED}/revoke-tokens")
            self.epoch = revoked["epoch"]

    def check_revoked(self, when: str) -> None:
        """Note what a hub takes that was revoked, and an epoch that went back."""
        for hub in self.world.hubs:
            for spare in self.revoked:
                if spare.is_admitted(hub.url):
                    self.complain(f"{when} {hub.name} admits {spare.name}, which was revoked")
        key = override_key(InstanceId(_WATCHED))
        found = self.world.ask(lambda etcd: etcd.read(key)).kvs
        epoch = parse_override(found[0].value).epoch if found else 0
        # Before the acceptance the hubs have just begun to put it back.
        if epoch < self.epoch and "acceptance" in when:
            self.complain(f"{when} the epoch is {epoch}, and it was {self.epoch}")

    def complain(self, what: str) -> None:
        """Note what may not be."""
        self.unfounded.append(what)
        self.note(f"  {what}")

    def _in_force_everywhere(self, revision: int) -> bool:
        with contextlib.suppress(ImdsproxyError):
            body = {"revision": revision, "timeout_s": 10}
            return bool(self.request("POST", "/fleet/wait", body)["applied"])
        return False

    def note(self, words: str) -> None:
        """Say what happens."""
        self.say.write(f"{time.strftime('%H:%M:%S')} {words}\n")
        self.say.flush()

    @staticmethod
    def at(moment: float) -> str:
        """The time of day of a moment of the monotonic clock."""
        return time.strftime("%H:%M:%S", time.localtime(time.time() + moment - time.monotonic()))

    def a_hub(self) -> HubProcess:
        """One of the hubs."""
        return self.random.choice(self.world.hubs)

    def a_host(self) -> FleetHost:
        """One of the hosts."""
        return self.random.choice(sorted(self.world.hosts.values(), key=lambda one: one.name))


def _report(chaos: Chaos, found: Sequence[str]) -> None:
    """Print what there was of all, and what may not be."""
    for words, number in sorted((chaos.history.counts() + chaos.faults).items()):
        sys.stdout.write(f"{number:>9,} {words}\n")
    unserved = chaos.history.unserved()
    for one in unserved:
        sys.stdout.write(f"not served at {chaos.at(one.begun)}: {one}\n")
    sys.stdout.write(f"{len(unserved):>9,} not served\n")
    for violation in found[:20]:
        sys.stdout.write(f"{violation}\n")
    sys.stdout.write(f"{len(found):>9,} answers that may not be\n")


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Break a fleet while guests read, and check their answers."
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(words)
    with ExitStack() as stack:
        world = stack.enter_context(fleet_world(etcd_flags=ETCD_FLAGS, clocks=True))
        chaos = Chaos(world, options.seed, sys.stderr)
        chaos.prepare()
        chaos.note(f"seed {options.seed}, for {options.minutes:g} minutes")
        try:
            found = chaos.run(options.minutes * 60)
        except BaseException:
            for hub in world.hubs:
                lines = hub.log.read_text().splitlines()
                sys.stderr.write("\n".join((hub.name, *lines[-_LINES:], "")))
            # What was answered until then is to be known nevertheless.
            _report(chaos, list(chaos.history.violations()))
            raise
    _report(chaos, found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
