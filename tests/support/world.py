"""A lab with a running daemon: four networks of three kinds, whose guests have the same addresses."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from support.daemon import Daemon, Pids, alive, instance, user_data_of
from support.guest import IPV4, Guest, Reply
from support.holders import holders
from support.lab import Lab, LabState, RecordMapping, until

RIGHT_WITHIN_S: Final = 1.0
"""How long what changed on the host may take to be right, or to be reported."""

_DEFAULTS: Final = (
    Path("/run/imdsproxy"),
    Path("/var/lib/imdsproxy"),
    Path("/var/lib/imdsproxy-hub"),
    Path("/etc/imdsproxy"),
)


def own_name(guest: Guest) -> str:
    """The id of the instance that a guest is."""
    return f"{guest.network}-{guest.addresses[0].rpartition('.')[2]}"


def own(guest: Guest, reply: Reply) -> str | None:
    """What is wrong with an answer to `/latest/user-data`; `None` when it is the guest's own."""
    if reply.status == 200 and reply.body == user_data_of(own_name(guest)):
        return None
    return f"{guest.name} got {reply.status} {reply.body[:80]!r}"


def reads_own(guest: Guest, to: str = IPV4, *, timeout_s: float | None = 0.3) -> bool:
    """Whether a guest is answered in time, with its own."""
    return guest.is_served("/latest/user-data", own, to=to, timeout_s=timeout_s)


@dataclass(slots=True)
class World:
    """What most tests of the data plane begin with.

    Attributes:
        settings: Those that it was opened with, over those that every test has.
        guests: One in each network, by network: `red` and `green` are namespaces, `blue` is a bridge,
            `grey` an interface.
    """

    lab: Lab
    daemon: Daemon
    settings: Mapping[str, Mapping[str, object]]
    guests: dict[str, Guest]
    networks: list[RecordMapping]
    instances: list[RecordMapping]
    state: LabState
    _flipped: bool = field(default=False)
    _spare: RecordMapping | None = field(default=None)

    @property
    def red(self) -> Guest:
        return self.guests["red"]

    @property
    def everybody(self) -> list[Guest]:
        return list(self.guests.values())

    def all_right(self) -> None:
        """Every guest reads its own."""
        for guest in self.everybody:
            wrong = own(guest, guest.ask("/latest/user-data"))
            assert wrong is None, wrong

    def wait_all_right(self) -> None:
        """Wait until every guest reads its own: a reload under way may have begun with the state of before."""
        reads = partial(reads_own, timeout_s=None)
        until(lambda: all(map(reads, self.everybody)), what="every guest's own documents")

    def have_policy(self, policy: Mapping[str, object]) -> None:
        """Have the daemon's settings say this of policies."""
        self.daemon.reconfigure({**self.settings, "policy": policy})

    def reload(self) -> None:
        """Have HAProxy reload: a network comes, or goes."""
        if self._spare is None:
            self._spare = self.lab.namespace_network("spare")
        if self._flipped:
            self.daemon.remove_network("spare")
        else:
            self.daemon.put([self._spare])
        self._flipped = not self._flipped

    def heal(self) -> None:
        """Have everything as it was at first, whatever a test did."""
        for pid in self.daemon.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        process = self.daemon.process
        if process is None or process.poll() is not None:
            self.daemon.start(ready=False)
        if self.daemon.settings != self.settings:
            self.daemon.reconfigure(self.settings)
        self._restore_records()
        self._remove_passwords()
        self._flipped, self._spare = False, None
        self.lab.restore(self.state, self.everybody)
        self.lab.forget_neighbours()
        self.daemon.wait_ready()
        serving = len(self.networks)
        until(lambda: self.daemon.status()["serving"] == serving, what="all networks' service")
        try:
            until(lambda: not self.daemon.not_served(), what="no left-out listener")
        except AssertionError as error:
            error.add_note(f"not served: {self.daemon.not_served()}")
            error.add_note(self.daemon.log.read_text()[-4000:])
            raise
        until(self.daemon.resolver_up, what="the resolver's return")
        self.daemon.forget_floods()
        os.truncate(self.daemon.log, 0)

    def _remove_passwords(self) -> None:
        for posted in (self.daemon.state / "passwords").iterdir():
            posted.unlink()

    def _restore_records(self) -> None:
        instances = cast("list[Mapping[str, Any]]", self.daemon.admin.get("/v1/instances"))
        networks = cast("list[Mapping[str, Any]]", self.daemon.admin.get("/v1/networks"))
        # Together, what is asked meanwhile is one change.
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(self.daemon.remove_instance, _extra(instances, self.instances)))
            list(pool.map(self.daemon.remove_network, _extra(networks, self.networks)))
        self.daemon.put(self.networks, self.instances)

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """The controller sees nothing of what happens in here, only what has become of it."""
        controller = self.pids().controller
        os.kill(controller, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(controller, signal.SIGCONT)

    def freed(self, inode: int, *, within_s: float = RIGHT_WITHIN_S) -> None:
        """Wait until the daemon has let go of a namespace."""
        until(
            lambda: not holders({inode}, self.daemon.processes()),
            within_s=within_s,
            what="its being let go of",
        )

    def has_other_master(self, than: int) -> bool:
        """Whether HAProxy was started anew, and the controller knows it."""
        return self.daemon.status()["haproxy"]["master"] not in (None, than)

    def is_watched(self) -> bool:
        """Whether HAProxy tells of requests because somebody watches."""
        return "ring watched" in (self.daemon.runtime / "haproxy.cfg").read_text()

    def pids(self) -> Pids:
        return self.daemon.pids()

    def settled(self) -> Pids:
        """The processes, once no old worker drains any more."""
        until(lambda: not self.daemon.status()["haproxy"]["old_workers"], what="old workers' end")
        return self.daemon.pids()


def _extra(present: Iterable[Mapping[str, Any]], wanted: Iterable[RecordMapping]) -> list[str]:
    ids = {one["id"] for one in wanted}
    return [one["record"]["id"] for one in present if one["record"]["id"] not in ids]


@contextlib.contextmanager
def open_world(
    settings: Mapping[str, Mapping[str, object]] | None = None,
    *,
    prepare: Callable[[Daemon], None] = lambda _: None,
) -> Iterator[World]:
    """A world that is gone without a trace at the end.

    Args:
        settings: Laid over those that every test has; `{directory}` in a text is the daemon's own.
        prepare: Called before the daemon is started.
    """
    before = {path for path in _DEFAULTS if path.exists()}
    lab = Lab()
    try:
        daemon = Daemon(lab, settings or {})
        try:
            prepare(daemon)
            world = _fill(lab, daemon)
            yield world
        finally:
            processes = daemon.processes()
            daemon.close()
            made = lab.made_by_daemon()
            links = [name for name in lab.host_links() if name.startswith(lab.prefix)]
        assert not made, f"namespaces that the daemon left: {made}"
        assert not links, f"links that the daemon left: {links}"
        until(lambda: not any(map(alive, processes)), what=f"the end of {processes}")
    finally:
        lab.close()
    assert not lab.leftovers()
    assert {path for path in _DEFAULTS if path.exists()} <= before, "files outside its directory"


def _fill(lab: Lab, daemon: Daemon) -> World:
    networks = [
        lab.namespace_network("red"),
        lab.namespace_network("green"),
        lab.bridge_network("blue"),
        lab.interface_network("grey"),
    ]
    guests = {str(one["id"]): lab.guest(str(one["id"])) for one in networks}
    instances = [instance(own_name(guest), guest.network) for guest in guests.values()]
    daemon.start()
    daemon.put(networks, instances)
    until(lambda: daemon.status()["serving"] == len(networks), what="all networks' service")
    return World(lab, daemon, daemon.settings, guests, networks, instances, lab.state())
