"""What another program writes to etcd, and what a captured host sends: a genuine fleet goes on, and reports it."""

import contextlib
import json
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import partial
from http.client import HTTPConnection

import pytest

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, host_key, operator_key
from imdsproxy.model.entities import InstanceId, NetworkId
from support.fleet_front import read_to_end
from support.fleet_member import Member
from support.fleet_operator import ServedFleet, served_fleet
from support.fleet_world import METRICS_PORT, HubProcess
from support.guest import take_token, with_token
from support.lab import until
from support.patience import patience

pytestmark = pytest.mark.root

_HOSTNAME = "/latest/meta-data/hostname"
_WEB, _BLUE = InstanceId("web"), NetworkId("blue")
_DAMAGED = {
    layout.BEAT: b"garbage",
    layout.SUSPECT: b"{}",
    layout.ENVELOPE: b'{"key": []}',
    layout.TOKEN_KEYS: b'{"sealed": 7}',
    layout.instance_key(_WEB): b'{"hosts": "a"}',
    layout.network_key(_BLUE): b"\xff\xfe",
    layout.override_key(_WEB): b'{"epoch": true, "reopened_at": []}',
    layout.password_key(_WEB): b'{"sealed": []}',
    f"{layout.POLICIES}fleet": b"[]",
    layout.grant_key("shop"): b'{"hosts": 7}',
    host_key(HostId("odd")): b'{"state": "enrolled"}',
    operator_key("gone"): b"garbage",
    operator_key("vague"): b"garbage",
    f"{layout.HUBS}hubx": b"{}",
    f"{layout.KNOWN_HUBS}hubx": b"[7]",
    layout.import_key("broken"): b'{"done": "x"}',
    f"{layout.PREFIX}other/kind": b"{}",
    f"{layout.INSTANCES}no/id": b"{}",
}
_MENDED_BY_HUBS = {layout.BEAT}


@pytest.fixture(scope="module")
def opened() -> Iterator[ServedFleet]:
    with served_fleet("green") as made:
        made.world.operator("vague")
        yield made


@pytest.fixture
def fleet(opened: ServedFleet) -> ServedFleet:
    opened.have_web()
    return opened


def _problems(fleet: ServedFleet, hub: int) -> dict[str, str]:
    return dict(fleet("fleet", "status", "--json", hub=hub).json["problems"])


def _name(fleet: ServedFleet) -> str:
    return fleet.guest.reads(_HOSTNAME, timeout_s=3 * patience())


def _has_problems(fleet: ServedFleet, hub: int, keys: AbstractSet[str]) -> bool:
    found = _problems(fleet, hub)
    return found.keys() - _MENDED_BY_HUBS == keys


def _restart(hub: HubProcess) -> None:
    hub.end()
    hub.start()


def test_a_fleet_goes_on_with_garbage_at_every_kind_of_key_and_names_each(
    fleet: ServedFleet,
) -> None:
    world = fleet.world
    token = take_token(fleet.guest)
    fleet("policy", "set", "fleet", "--sealed", "on")
    (meta,) = world.ask(lambda etcd: etcd.read(layout.META)).kvs
    world.write({**_DAMAGED, layout.META: b"garbage"})
    # The second has good values of before, the first finds them in etcd's history.
    _restart(world.hubs[0])
    until(lambda: _is_followed(fleet), within_s=30, what="a hub that the host follows")
    for hub in (0, 1):
        wanted = {layout.META, *_DAMAGED} - _MENDED_BY_HUBS
        until(partial(_has_problems, fleet, hub, wanted), within_s=20, what="each key")
        status = fleet("fleet", "status", "--json", hub=hub).json
        assert status["suspect"] is None, status
    _check_each_hub(fleet, token)
    # All else is written and in force.
    assert fleet("network", "add", "green", "--bridge", "green").status == 0
    mail = fleet.stranger
    port = "-n", "green", "--mac", mail.mac, "--address", mail.addresses[0]
    added = fleet("instance", "add", "mail", *port, "--host", "a")
    assert added.status == 0, added
    assert mail.ask(_HOSTNAME).text == "mail"
    for words in (
        ("instance", "list"), ("network", "list"), ("fleet", "hosts"), ("policy", "list"),
        ("instance", "show", "mail"), ("fleet", "status"),
    ):  # fmt: skip
        ran = fleet(*words)
        assert ran.status == 0, (words, ran)
    assert fleet("instance", "show", "web").status == 0
    world.write({layout.META: meta.value})
    # Nor is it a revocation: the operator learns that nothing is known, and gets nothing.
    denied = fleet("instance", "list", name="vague")
    assert (denied.status, "is not readable in etcd" in denied.err) == (77, True), denied
    # What cannot be read is no reason to accept anything.
    assert fleet("fleet", "accept-restore").status == 64
    _mend(fleet)


def _check_each_hub(fleet: ServedFleet, token: str) -> None:
    """Whichever hub the host follows, its guest gets what it got before."""
    for other in reversed(fleet.world.hubs):
        other.end()
        until(lambda: _is_followed(fleet), within_s=30, what="the other hub")
        assert _name(fleet) == "web"
        assert fleet.guest.ask(_HOSTNAME, headers=with_token(token)).status == 200
        other.start()


def _is_followed(fleet: ServedFleet) -> bool:
    return bool(fleet.host.source["in_sync"])


def test_what_cannot_be_read_is_revoked_removed_and_written_over(fleet: ServedFleet) -> None:
    world = fleet.world
    token = take_token(fleet.guest)
    written = world.write(_DAMAGED)
    # No history is left, and no hub that has good values of before.
    world.etcd.ctl("compact", str(written))
    for hub in world.hubs:
        _restart(hub)
    until(lambda: _is_followed(fleet), within_s=30, what="a hub that the host follows")
    assert fleet("fleet", "status", "--json").json["suspect"] is None
    _check_each_hub(fleet, token)
    shown = fleet("instance", "show", "web")
    assert shown.status != 66
    assert "not readable in etcd" in shown.err
    assert fleet("token", "revoke", "web").status == 75
    _mend(fleet)
    assert fleet("instance", "set", "web", "--hostname", "mended").status == 0
    assert _name(fleet) == "mended"
    # The revocation is in force with the record.
    assert fleet.guest.ask(_HOSTNAME, headers=with_token(token)).status == 401
    assert fleet("instance", "set", "web", "--hostname", "web").status == 0


def _mend(fleet: ServedFleet) -> None:
    """Write over what cannot be read, as an operator does, and delete what no command writes."""
    assert fleet("fleet", "revoke", "odd").status == 0
    assert fleet("fleet", "revoke", "gone", "--operator").status == 0
    assert fleet("policy", "clear", "fleet").status == 0
    assert fleet("fleet", "reseal").status != 0
    assert fleet("token", "rotate").status == 0
    assert fleet("network", "add", "blue", "--bridge", "blue").status == 0
    written = fleet("instance", "add", "web", *fleet.port, "--host", "a")
    assert written.status == 0, written
    assert fleet("token", "revoke", "web").status == 0
    assert fleet("instance", "password", "web", "--clear").status == 0
    assert fleet("fleet", "reseal").status == 0
    assert fleet("grant", "clear", "shop").status == 0
    assert _name(fleet) == "web"
    left = {
        layout.SUSPECT, f"{layout.HUBS}hubx", f"{layout.KNOWN_HUBS}hubx",
        layout.import_key("broken"), operator_key("vague"),
        f"{layout.PREFIX}other/kind", f"{layout.INSTANCES}no/id",
    }  # fmt: skip
    for hub in (0, 1):
        until(partial(_has_problems, fleet, hub, left), within_s=20, what=f"{left}")
    for key in left:
        fleet.world.etcd.ctl("del", key)
    for hub in (0, 1):
        until(partial(_has_problems, fleet, hub, set()), within_s=20, what="no problem")
    assert fleet("fleet", "status", "--json").json["suspect"] is None


def test_a_hub_without_the_key_that_seals_serves_no_host_and_says_why(fleet: ServedFleet) -> None:
    world = fleet.world
    hub, other = world.hubs
    place = world.files.envelope_key
    before = place.read_bytes()
    name = before.split()[0]
    try:
        place.write_bytes(name + b" " + b"A" * 43 + b"=\n")
        _restart(hub)
        until(lambda: _is_followed(fleet), within_s=30, what="the other hub")
        with world.etcd.entered():
            asked = HTTPConnection(hub.address, METRICS_PORT, timeout=20 * patience())
            asked.request("GET", "/readyz")
        with contextlib.closing(asked):
            answer = asked.getresponse()
            body = answer.read()
        assert (answer.status, b"which this hub does not have" in body) == (503, True), body
        assert "copy envelope.key" in _problems(fleet, 0)[f"hub {hub.name}"]
        assert "no host is served" in hub.log.read_text()
        other.end()
        until(lambda: not _is_followed(fleet), within_s=30, what="no hub")
        # It keeps its keys, as all else.
        take_token(fleet.guest)
        assert _name(fleet) == "web"
    finally:
        place.write_bytes(before)
        _restart(hub)
        if other.process is not None and other.process.poll() is not None:
            other.start()
    until(lambda: _is_followed(fleet), within_s=30, what="a hub that the host follows")
    assert fleet("fleet", "status", "--json").json["suspect"] is None


def test_what_a_captured_host_sends_ends_no_hub(fleet: ServedFleet) -> None:
    world = fleet.world
    evil = world.add_host("evil", networks=(), start=False)
    until(lambda: "evil" in fleet("fleet", "hosts").words, what="it at the hub")
    at = [hub.process.pid for hub in world.hubs if hub.process is not None]
    member = Member.of_host(world, evil)
    hello = {"format": 1, "fleet": None, "incarnation": 1, "revision": 1}
    for items in ({"instance/" + "x" * 2_000_000: 1}, {"instance/web": 10**30}, [7]):
        for hub in (0, 1):
            with member.begun(world.urls[hub]) as stream:
                stream.sendall(json.dumps({"hello": {**hello, "items": items}}).encode() + b"\n")
                assert b'"bye":"format"' in read_to_end(stream)
    # What it lacks or claims to have stops nothing.
    with member.begun(world.urls[0]) as stream:
        stream.sendall(
            json.dumps({"hello": {**hello, "items": {"instance/none": 9}}}).encode() + b"\n"
        )
        assert fleet("instance", "set", "web", "--hostname", "web").status == 0
    assert fleet("fleet", "revoke", "evil").status == 0
    assert [hub.process.pid for hub in world.hubs if hub.process is not None] == at
    assert [hub.process.poll() for hub in world.hubs if hub.process is not None] == [None, None]
    assert _name(fleet) == "web"
