"""The audit log of a daemon whose guests ask: every line is JSON, and none tells a secret."""

from __future__ import annotations

import stat
import threading
import time
from typing import Any, Final, cast

import pytest

from support.audit_log import AuditLog, order_audit
from support.lab import until
from support.world import World, own

pytestmark = pytest.mark.root

_SECRET: Final = "s3cret"
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
    assert log.wait(agent="again")["by"] == "guests/<CACHE>"
    stranger = world.lab.guest("red", 66)
    assert stranger.ask(_LEAF).status == 404
    log.wait(address=stranger.addresses[0], instance="-", by="resolver/resolver", status=404)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o640


def test_tokens_are_told_by_a_word(world: World, log: AuditLog) -> None:
    ttl = ("X-aws-ec2-metadata-token-ttl-seconds: 60", "User-Agent: giver")
    token = world.red.ask("/latest/api/token", method="PUT", headers=ttl).text
    assert log.wait(agent="giver")["refused"] == "-"
    header = "X-aws-ec2-metadata-token: "
    assert world.red.ask(_LEAF, headers=(header + token, "User-Agent: good")).status == 200
    assert world.red.ask(_LEAF, headers=(header + _SECRET, "User-Agent: bad")).status == 401
    with world.red.connect() as kept:
        for agent in ("first", "again"):
            kept.request(_LEAF, headers=(header + token, f"User-Agent: {agent}"))
            assert log.wait(agent=agent)["token"] == "yes"
    good, bad = log.wait(agent="good"), log.wait(agent="bad")
    assert (good["token"], good["refused"], good["status"]) == ("yes", "-", 200)
    assert (bad["token"], bad["refused"], bad["status"]) == ("bad", "token", 401)
    assert bad["by"] == "documents.checked/<NOSRV>"
    assert token.rpartition(".")[2] not in log.text()
    assert _SECRET not in log.text()


def test_the_rule_that_refuses_is_named(world: World, log: AuditLog) -> None:
    host = {"tokens": "required", "refuse_forwarded": True}
    order_audit(world, "all", policy={"host": host, "networks": {"green": {"endpoint": False}}})
    until(lambda: world.red.ask(_LEAF).status == 401)
    until(lambda: world.guests["green"].ask(_LEAF).status == 403)
    world.red.ask("/openstack/latest/meta_data.json", headers=("Forwarded: for=a",))
    world.red.ask("/latest/../x")
    world.red.ask("/latest/api/token", method="PUT")
    log.wait(network="red", status=401, refused="token-required")
    log.wait(network="green", status=403, refused="endpoint", instance="green-5")
    log.wait(path="/openstack/latest/meta_data.json", status=403, refused="forwarded")
    log.wait(path="/latest/../x", status=400, refused="path")
    log.wait(path="/latest/api/token", status=400, refused="token-request")


def test_what_an_operator_gets_has_a_line_with_the_instance(world: World, log: AuditLog) -> None:
    who = ("--network", "red", "--from", world.red.addresses[0])
    got = world.daemon.command("get", "--include", *who, "/latest/got-by-operator")
    assert "x-imdsproxy-told" not in got.out
    line = log.wait(path="/latest/got-by-operator")
    assert (line["instance"], line["network"]) == ("red-5", "red")


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


def test_who_watches_sees_the_same(world: World, log: AuditLog) -> None:
    admin = world.daemon.admin
    cursor = cast("Any", admin.get("/v1/watch"))["cursor"]
    until(world.is_watched)
    world.red.ask("/seen-by-both?q")
    log.wait(path="/seen-by-both")
    (seen,) = cast("Any", admin.get("/v1/watch", {"cursor": str(cursor)}))["requests"]
    assert (seen["path"], seen["instance"], seen["method"]) == ("/seen-by-both", "red-5", "GET")
