"""What is broken of a fleet by `support.fleet_chaos`: each fault lasts as long as its context."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from imdsproxy.errors import EtcdFull, ImdsproxyError
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    HostId,
    StoredInstance,
    host_key,
    instance_key,
    operator_key,
    render_instance,
)
from imdsproxy.fleet.stream import Bye, Hello
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, KeyValue, unchanged
from imdsproxy.model.entities import InstanceId, NetworkId
from support.daemon import alive
from support.etcd_lab import EtcdLab
from support.fleet_history import Outcome
from support.fleet_member import Member
from support.fleet_world import PORT, FleetHost
from support.lab import cut, until
from support.wall_clock import NOTICED_S, WallClock

if TYPE_CHECKING:
    from support.fleet_chaos import Chaos

Fault: TypeAlias = Callable[["Chaos"], AbstractContextManager[object]]

_JUNK_BYTES: Final = 1_000_000
_EMPTY_BYTES: Final = 4_000_000
_STEPS_S: Final = (2, 90, 2 * 3600, 25 * 86_400, 40 * 86_400, 100 * 86_400)
"""Tokens end, then certificates are not good yet, or are to be renewed, or have ended: a host's, and a hub's."""

_RESTARTS: Final = 0.5
"""How often it starts with the wrong clock."""

_FRESH: Final = 0.7
"""How often a backup is made; else the last one is used again."""

_TAGS: Final = 200
_TAG_BYTES: Final = 250


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


def _host_partitioned(chaos: Chaos) -> AbstractContextManager[object]:
    return cut(chaos.a_host().lab.host, PORT)


@contextlib.contextmanager
def _host_restarted(chaos: Chaos) -> Iterator[None]:
    host = chaos.a_host()
    daemon, down = host.daemon, time.monotonic()
    with chaos.history.outage(host.name):
        while left := daemon.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert daemon.process is not None
        daemon.process.wait()
        shutil.rmtree(daemon.runtime)
        yield
        up = time.monotonic()
        daemon.start(ready=False)
        daemon.wait_ready(within_s=60)
    chaos.note(
        f"  {host.name} was down for {up - down:.1f} s, and ready {time.monotonic() - up:.1f} s later"
    )


@contextlib.contextmanager
def _host_not_reading(chaos: Chaos) -> Iterator[None]:
    """Its controller stands still while far more is sent to it than all buffers take."""
    host = chaos.a_host()
    process = host.daemon.process
    assert process is not None
    with _stopped(process.pid):
        until(lambda: _is_full(chaos, host), within_s=60, what="more than the buffers take")
        yield


def _is_full(chaos: Chaos, host: FleetHost) -> bool:
    """Whether the hub has not sent all yet, after one more change of 50 kB."""
    mark = f"{time.monotonic():f}".ljust(_TAG_BYTES, "x")
    record = {"id": "big", "name": "big", "tags": {f"t{number}": mark for number in range(_TAGS)}}
    left = tuple(HostId(name) for name in chaos.world.hosts if name != host.name)
    stored = StoredInstance((host.name,), record, left=left)
    revision = chaos.world.write({instance_key(InstanceId("big")): render_instance(stored)})
    body = {"revision": revision, "timeout_s": 0.1}
    pending = chaos.request("POST", "/fleet/wait", body)["pending"]
    return f"host {host.name}: not sent yet" in pending


@contextlib.contextmanager
def _host_clock_stepped(chaos: Chaos) -> Iterator[None]:
    host = chaos.a_host()
    _step(chaos, host.name, host.clock)
    if chaos.random.random() < _RESTARTS:
        host.daemon.kill_controller()
        host.daemon.start(ready=False)
    yield
    assert host.clock is not None
    host.clock.step(0)


@contextlib.contextmanager
def _hub_clock_stepped(chaos: Chaos) -> Iterator[None]:
    hub = chaos.a_hub()
    _step(chaos, hub.name, hub.clock)
    if chaos.random.random() < _RESTARTS:
        hub.end(signal.SIGKILL)
        hub.start(ready=False)
    yield
    assert hub.clock is not None
    assert hub.process is not None
    hub.clock.step(0)
    if hub.process.poll() is not None:
        # etcd's certificates were not good by its clock, and it ended.
        hub.start()


def _step(chaos: Chaos, name: str, clock: WallClock | None) -> None:
    assert clock is not None
    seconds = chaos.random.choice(_STEPS_S) * chaos.random.choice((-1, 1))
    chaos.note(f"  {name}'s by {seconds:+,} s")
    clock.step(seconds)
    time.sleep(NOTICED_S)


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
    _defragment(etcd)


def _defragment(etcd: EtcdLab) -> None:
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
    # Each member compacts when it comes to it: before that, its space is not to be had, and it is full again.
    _compact(etcd)
    until(lambda: _has_room(etcd), within_s=60, what="room in each member's file")
    etcd.ctl("alarm", "disarm")


def _has_room(etcd: EtcdLab) -> bool:
    _defragment(etcd)
    answers = (etcd.ctl("endpoint", "status", "-w", "json", member=one) for one in etcd.members)
    return all(json.loads(one)[0]["Status"]["dbSize"] < _EMPTY_BYTES for one in answers)


_GARBAGE: Final = (b"garbage", b"[]", b"\xff\xfe", b"7")
_DAMAGED: Final = 4
"""Keys at a time."""


@contextlib.contextmanager
def _damaged(chaos: Chaos) -> Iterator[None]:
    """Another program writes garbage to some keys of any kind, and an operator puts back what was there."""
    world, host = chaos.world, chaos.a_host()
    everything = (
        *(layout.META, layout.BEAT, layout.SUSPECT, layout.ENVELOPE, layout.TOKEN_KEYS),
        *(instance_key(InstanceId(name)) for name in chaos.instances),
        *(layout.override_key(InstanceId(name)) for name in chaos.instances),
        *(layout.password_key(InstanceId(name)) for name in chaos.instances),
        *(layout.network_key(NetworkId(name)) for name in chaos.networks),
        *(f"{layout.POLICIES}fleet", f"{layout.POLICIES}host/{host.name}", layout.grant_key("p")),
        *(host_key(host.name), host_key(HostId("odd")), operator_key("nobody")),
        *(layout.HUBS + chaos.a_hub().name, f"{layout.HUBS}odd", layout.import_key("odd")),
        *(layout.KNOWN_HUBS + chaos.a_hub().name, f"{layout.KNOWN_HUBS}odd"),
        *(f"{layout.PREFIX}other/kind", f"{layout.INSTANCES}no/id"),
    )
    keys = chaos.random.sample(everything, _DAMAGED)
    garbage = {key: chaos.random.choice(_GARBAGE) for key in keys}
    before, written = world.ask(lambda etcd: _write_over(etcd, garbage))
    chaos.note(f"  {', '.join(keys)}")
    if chaos.random.random() < _RESTARTS:
        # It has no good value of before.
        with _hub_killed(chaos):
            pass
    until(lambda: _names_all(chaos, keys, written), within_s=60, what="each key in the status")
    yield
    for key, found in before.items():
        world.ask(lambda etcd, key=key, found=found: _put_back(etcd, key, written, found))  # type: ignore[misc]  # a default


async def _write_over(
    etcd: Etcd, garbage: Mapping[str, bytes]
) -> tuple[dict[str, KeyValue | None], int]:
    """Write garbage over what is there; that, and the revision. Nobody writes between: it is what is put back."""
    while True:
        found = {key: (await etcd.read(key)).kvs for key in garbage}
        before = {key: kvs[0] if kvs else None for key, kvs in found.items()}
        same = [
            unchanged(key, 0 if one is None else one.mod_revision) for key, one in before.items()
        ]
        done = await etcd.commit(same, garbage)
        if isinstance(done, Committed):
            return before, done.revision


def _read(chaos: Chaos, key: str) -> KeyValue | None:
    found = chaos.world.ask(lambda etcd: etcd.read(key)).kvs
    return found[0] if found else None


def _names_all(chaos: Chaos, keys: Sequence[str], written: int) -> bool:
    """Whether the status names each key that still has the garbage: operators and hubs write over some."""
    with contextlib.suppress(ImdsproxyError):
        problems = chaos.request("GET", "/fleet/status")["problems"]
        missing = [one for one in keys if one not in problems]
        return all(
            (now := _read(chaos, one)) is None or now.mod_revision != written for one in missing
        )
    return False


async def _put_back(etcd: Etcd, key: str, written: int, before: KeyValue | None) -> None:
    still = [unchanged(key, written)]
    if before is None:
        await etcd.commit(still, {}, [key])
    else:
        await etcd.commit(still, {key: before.value})


def _is_written(chaos: Chaos, since: float) -> bool:
    known = {Outcome.APPLIED, Outcome.STORED}
    return any(one.sent > since and one.outcome in known for one in chaos.history.writes[-50:])


def _restored(*options: str, times: int = 1, hubs_down: bool = False) -> Fault:
    """Restore etcd from a backup, and accept that.

    Args:
        options: Of `etcdutl snapshot restore`.
        times: How often, always from the same backup.
        hubs_down: Hubs are down during the restore, and started once more before the acceptance: none remembers
            anything but what its journal has.
    """

    @contextlib.contextmanager
    def fault(chaos: Chaos) -> Iterator[None]:
        etcd = chaos.world.etcd
        # The backup has it as a member, unless an older one is used.
        revoked = chaos.join_spare()
        if chaos.backup is None or chaos.random.random() < _FRESH:
            chaos.backup = Path(tempfile.mkdtemp(dir=chaos.world.directory), "backup")
            etcd.ctl("snapshot", "save", str(chaos.backup))
        saved = time.monotonic()
        yield
        chaos.revoke(revoked)
        for _ in range(times):
            # Where nothing is lost, nothing is to be suspected.
            until(lambda: _is_written(chaos, saved), within_s=60, what="a write after the backup")  # noqa: B023
            with _hubs_restarted(chaos) if hubs_down else contextlib.nullcontext():
                etcd.restore(chaos.backup, *options)
            chaos.check_revoked("after a restore")
            until(chaos.is_suspected, within_s=30, what="a suspicion")
            if hubs_down:
                with _hubs_restarted(chaos):
                    pass
                chaos.check_revoked("once hubs were started again")
            chaos.accept_restore()
            chaos.check_revoked("after the acceptance")
            saved = time.monotonic()

    return fault


@contextlib.contextmanager
def _restore_claimed(chaos: Chaos) -> Iterator[None]:
    """One host claims alone that etcd was restored, in one of two ways: operators go on."""
    host, status = chaos.a_host(), chaos.request("GET", "/fleet/status")
    later = chaos.random.random() < 0.5
    incarnation = status["incarnation"] + (chaos.random.randint(1, 500) if later else 0)
    hello = Hello(status["fleet"], incarnation, 2**60, {})
    said = Member.of_host(chaos.world, host).say(chaos.a_hub().url, hello)
    assert isinstance(said, Bye), said
    until(chaos.is_suspected, within_s=30, what="the claim")
    claimed = time.monotonic()
    yield
    until(lambda: _is_written(chaos, claimed), within_s=60, what="a write in spite of the claim")
    chaos.accept_restore()


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
    "a host is restarted": _host_restarted,
    "a host does not read": _host_not_reading,
    "a host's clock is stepped": _host_clock_stepped,
    "a hub's clock is stepped": _hub_clock_stepped,
    "etcd is compacted and defragmented": _compacted,
    "etcd is full": _full,
    "another program writes garbage to etcd": _damaged,
    "etcd is restored": _restored(),
    "etcd is restored with newer revisions": _restored(
        "--bump-revision=1000000", "--mark-compacted"
    ),
    "etcd is restored three times": _restored(times=3),
    "etcd is restored while hubs are down": _restored(hubs_down=True),
    "etcd is restored with newer revisions while hubs are down": _restored(
        "--bump-revision=1000000", "--mark-compacted", hubs_down=True
    ),
    "a host claims a restore": _restore_claimed,
}
