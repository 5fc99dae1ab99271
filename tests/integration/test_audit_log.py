"""The audit log of a daemon whose guests ask: over reloads and deaths, and where it cannot be written.

What is in a line is in test_request_lines.py, how lines are written in tests/unit/controller.
"""

import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.audit_log import AuditLog, order_audit
from support.guest import Guest
from support.health import METRICS, ask_operator
from support.lab import until
from support.patience import patience
from support.world import World, open_world

pytestmark = pytest.mark.root

_LEAF: Final = "/latest/meta-data/instance-id"


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    # What listens is not changed while it runs.
    with open_world({"metrics": METRICS}) as world:
        yield world


def _order(world: World, mode: str, path: Path | None = None) -> AuditLog:
    log = AuditLog(world.daemon, path)
    log.path.unlink(missing_ok=True)
    order_audit(world, mode, os.fspath(log.path), metrics=METRICS)
    return log


def _ask_until_written(world: World, log: AuditLog, path: str) -> None:
    """HAProxy notices by lines that it cannot send that their reader is another one: the first ones may be lost."""
    until(lambda: world.red.ask(path).status and log.has(path=path), what=f"a line of {path}")


def test_who_asked_and_who_answered_has_one_line_also_by_the_resolver_and_an_operator(
    world: World,
) -> None:
    log = _order(world, "all")
    red = {"network": "red", "address": world.red.addresses[0], "instance": "red-5"}
    world.red.ask(_LEAF)
    line = log.wait(**red, path=_LEAF, status=200)
    # HAProxy may have the document, or only what the first read left behind; one in some is looked at closely.
    assert (
        line["by"]
        .replace("documents.sampled/", "documents/")
        .startswith(("documents/", "guests/<CACHE>"))
    )
    stranger = world.lab.guest("red", 66)
    assert stranger.ask(_LEAF).status == 404
    log.wait(address=stranger.addresses[0], instance="-", by="resolver/resolver", status=404)
    who = ("--network", "red", "--from", world.red.addresses[0])
    got = world.daemon.command("get", "--include", *who, "/latest/got-by-operator")
    assert "x-imdsproxy-audited" not in got.out
    log.wait(path="/latest/got-by-operator", network="red", instance="red-5")
    assert [one["path"] for one in log.lines()].count("/latest/got-by-operator") == 1
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o640
    # One in a thousand.
    order_audit(world, "sampled", os.fspath(log.path), metrics=METRICS)
    for _ in range(20):
        world.red.ask("/sampled")
    order_audit(world, "all", os.fspath(log.path), metrics=METRICS)
    # Lines come in the order in which HAProxy has answered.
    _ask_until_written(world, log, "/after-all-of-them")
    assert sum(one["path"] == "/sampled" for one in log.lines()) < 10


@pytest.mark.slow
def test_lines_outlast_a_reload_and_a_controller(world: World) -> None:
    log = _order(world, "all")
    with world.red.connect() as kept:
        kept.request("/before-the-reload")
        log.wait(path="/before-the-reload")
        world.reload()
        until(lambda: world.daemon.status()["haproxy"]["old_workers"], what="an old worker")
        kept.request("/by-the-old-worker")
        log.wait(path="/by-the-old-worker", instance="red-5", network="red")
    world.red.ask("/after-the-reload")
    log.wait(path="/after-the-reload")
    world.daemon.kill_controller()
    # HAProxy notices that the reader is gone by a line that it cannot send. On a busy machine it may send
    # some together, so these come with pauses between them.
    left = iter(range(15, -1, -1))
    until(lambda: world.red.ask("/the-first").status and next(left) == 0, what="15 requests")
    world.red.ask("/without-a-controller")
    world.daemon.start()
    log.wait(path="/without-a-controller")


# Where it cannot be written


_TOGETHER: Final = 50
_MANY: Final = 12_000


def _ask_often(guest: Guest, agent: str = "u") -> None:
    """Far more in a minute than a guest could that waits for a disk, which is answered some times a second."""
    request = f"GET {_LEAF} HTTP/1.1\r\nHost: x\r\nUser-Agent: {agent * 190}\r\n\r\n".encode()
    began = time.monotonic()
    with guest.connect() as kept:
        for _ in range(_MANY // _TOGETHER):
            kept.send(request * _TOGETHER)
            assert all(kept.read().status == 200 for _ in range(_TOGETHER))
    assert time.monotonic() - began < 60 * patience()


@pytest.mark.slow
def test_a_disk_that_hangs_is_told_and_slows_no_guest(world: World, tmp_path: Path) -> None:
    # Who opens it for writing waits for a reader, as for a disk.
    os.mkfifo(hangs := tmp_path / "hangs")
    order_audit(world, "all", os.fspath(hangs), metrics=METRICS)
    world.red.ask("/while-it-hangs")
    until(lambda: "has not come back for" in str(world.daemon.status()["problems"]), what="a word")
    assert "\nimdsproxy_audit_failing 1.0\n" in ask_operator(world.lab, "/metrics").text
    ready = ask_operator(world.lab, "/readyz")
    assert ready.status == 200
    told = json.loads(ready.text)["degraded"]
    assert any(one.startswith(f"audit.destination: {hangs}: a write") for one in told), told
    _ask_often(world.red)
    # The end of a controller does not wait for the disk either.
    world.daemon.kill_controller(signal.SIGTERM)
    later = AuditLog(world.daemon, tmp_path / "later.log")
    audit = {"mode": "all", "destination": os.fspath(later.path)}
    world.daemon.configure({**world.settings, "audit": audit})
    world.daemon.start()
    _ask_until_written(world, later, "/after-the-disk")


@pytest.mark.slow
def test_a_controller_that_stands_still_slows_no_guest_and_every_line_is_there_or_counted(
    world: World, tmp_path: Path
) -> None:
    log = _order(world, "all", tmp_path / "audit.log")
    # A worker of before counts its requests by numbers of its own.
    world.settled()
    with world.looking_away():
        # More than HAProxy's ring has room for: what is left out is left out there.
        _ask_often(world.red, "v")
    # At first the ring has no room for this one either.
    _ask_until_written(world, log, "/end")
    lines = log.lines()
    lost = sum(one.get("lost", 0) for one in lines)
    numbers = [one["number"] for one in lines if one.get("agent") == "v" * 190]
    assert lost > 0
    assert len(numbers) == len(set(numbers)) > _MANY / 4
    assert sum(one.get("agent") == "v" * 190 for one in lines) + lost >= _MANY
    told = world.daemon.status()["audit"]
    assert (told["written"], told["lost"]) >= (len(numbers), lost)
