"""The audit log of a daemon whose guests ask: every line is JSON, and none tells a secret."""

from __future__ import annotations

import stat
import threading
import time
from typing import Final

import pytest

from support.audit_log import AuditLog, order_audit
from support.lab import until
from support.nova_world import INSTANCES, open_nova_world
from support.world import World, own

pytestmark = pytest.mark.root

_LEAF: Final = "/latest/meta-data/instance-id"


@pytest.fixture
def log(world: World) -> AuditLog:
    log = AuditLog(world.daemon)
    log.path.unlink(missing_ok=True)
    order_audit(world, "all")
    return log


def test_a_line_says_who_asked_what_and_what_became_of_it(world: World, log: AuditLog) -> None:
    begun = time.time()
    red = {"network": "red", "address": world.red.addresses[0], "instance": "red-5"}
    world.red.ask(f"{_LEAF}?a=b", headers=("User-Agent: Cloud-Init/24.1",))
    line = log.wait(**red, method="GET", path=_LEAF, status=200, agent="Cloud-Init/24.1")
    assert begun - 1 <= line["time"] <= time.time() + 1
    assert (line["token"], line["refused"]) == ("no", "-")
    # HAProxy may have the document, or only what the first read left behind.
    # One read in some is looked at closely, by chance.
    by = line["by"].replace("documents.sampled/", "documents/")
    assert by in ("documents/documents-0", "documents/documents-1", "guests/<CACHE>")
    assert line["ms"] >= 0
    world.red.ask("/latest/user-data")
    world.red.ask("/latest/user-data", headers=("User-Agent: again",))
    assert log.wait(agent="again")["by"] in ("guests/<CACHE>", "documents.sampled/<CACHE>")
    stranger = world.lab.guest("red", 66)
    assert stranger.ask(_LEAF).status == 404
    log.wait(address=stranger.addresses[0], instance="-", by="resolver/resolver", status=404)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o640


@pytest.mark.slow
def test_what_an_operator_gets_has_a_line_with_the_instance(world: World, log: AuditLog) -> None:
    who = ("--network", "red", "--from", world.red.addresses[0])
    got = world.daemon.command("get", "--include", *who, "/latest/got-by-operator")
    assert "x-imdsproxy-told" not in got.out
    line = log.wait(path="/latest/got-by-operator")
    assert (line["instance"], line["network"]) == ("red-5", "red")


def test_a_request_that_comes_back_from_the_resolver_has_one_line() -> None:
    with open_nova_world() as nova:
        log = AuditLog(nova.daemon)
        settings = {**nova.daemon.settings, "audit": {"mode": "all", "destination": str(log.path)}}
        nova.daemon.reconfigure(settings)
        head = "POST /openstack/2013-10-17/password HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        reply = nova.red.raw(head.encode() + b"1\r\na\r\n0\r\n\r\n", method="POST")
        assert "x-imdsproxy-told" not in reply.headers
        nova.red.ask("/last")
        log.wait(path="/last")
        (line,) = [one for one in log.lines() if one["method"] == "POST"]
        assert (line["instance"], line["network"]) == (INSTANCES["red"], "red")
        assert line["by"].startswith("nova.default.once/")


@pytest.mark.slow
def test_the_mode_changes_without_losing_a_request(world: World) -> None:
    ended, wrong, count = threading.Event(), list[str](), 0

    def ask() -> None:
        nonlocal count
        while not ended.is_set():
            found = own(world.red, world.red.ask("/latest/user-data"))
            count += 1
            if found:
                wrong.append(found)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for mode in ("all", "sampled", "off", "all"):
            order_audit(world, mode)
    finally:
        ended.set()
        asking.join(20)
    assert count > 20
    assert not wrong
    order_audit(world, "sampled")
    for _ in range(20):
        world.red.ask("/sampled")
    order_audit(world, "all")
    log = AuditLog(world.daemon)
    # Lines come in the order in which HAProxy has answered.
    world.red.ask("/after-all-of-them")
    log.wait(path="/after-all-of-them")
    assert sum(one["path"] == "/sampled" for one in log.lines()) < 10


@pytest.mark.slow
def test_lines_outlast_a_reload_and_a_controller(world: World, log: AuditLog) -> None:
    world.reload()
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


def test_what_a_worker_answers_while_it_is_replaced_has_a_line(world: World, log: AuditLog) -> None:
    with world.red.connect() as kept:
        kept.request("/before-the-reload")
        log.wait(path="/before-the-reload")
        world.reload()
        until(lambda: world.daemon.status()["haproxy"]["old_workers"], what="an old worker")
        kept.request("/by-the-old-worker")
        line = log.wait(path="/by-the-old-worker")
    assert (line["instance"], line["network"]) == ("red-5", "red")
