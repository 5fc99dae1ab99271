"""A host of a fleet: what a hub sends is what guests read, and stays so when hubs go."""

import contextlib
import shutil
import socket
import sqlite3
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.fleet import layout
from imdsproxy.host.certificates import (
    make_key,
    parse_certificate,
    render_certificate,
    render_key,
)
from imdsproxy.hub.pki.authority import Authority, make_authority, parse_request
from imdsproxy.hub.pki.enrolment import Certified
from imdsproxy.model.entities import Instance, Network
from imdsproxy.model.records import parse_instance, parse_network
from imdsproxy.model.tokens import TokenKey, instance_key
from imdsproxy.sources.fleet.client import HostFiles
from imdsproxy.sources.fleet.kept import KeptItems
from support.daemon import Daemon, instance, user_data_of
from support.fleet_hub import HOST, FleetHub
from support.guest import Guest, inside, take_token, with_token
from support.lab import Lab, RecordMapping, until

pytestmark = pytest.mark.root

_TARGET: Final = "/latest/user-data"
_NAME: Final = "/latest/meta-data/hostname"
_NOW: Final = datetime.now(UTC)
_LONG_AGO: Final = _NOW - timedelta(days=25)
"""More than two thirds of a certificate's life."""


def _instance(name: str, number: int = 5, **fields: object) -> Instance:
    found = parse_instance(instance(name, "red", number, fields=fields))
    assert isinstance(found, Instance)
    return found


def _network(record: RecordMapping) -> Network:
    found = parse_network(record)
    assert isinstance(found, Network)
    return found


@dataclass
class FleetWorld:
    """A lab whose daemon has joined a fleet, and follows a hub."""

    lab: Lab
    daemon: Daemon
    hub: FleetHub
    guest: Guest
    other: Guest
    network: Network

    def source(self) -> dict[str, Any]:
        (found,) = (one for one in self.daemon.status()["sources"] if one["name"] == "fleet")
        return dict(found)


def _join(authority: Authority, files: HostFiles, hub: str) -> None:
    """Have a host what `imdsproxy fleet join` gave it long ago."""
    files.hubs.parent.mkdir(parents=True, mode=0o700)
    files.hubs.write_text(f"{hub}\n")
    files.authority.write_bytes(render_certificate(authority.certificate))
    key = make_key()
    signed = authority.certify_host(key.public_key(), HOST, _LONG_AGO)
    files.certificate.write_bytes(render_key(key) + render_certificate(signed))
    files.certificate.chmod(0o600)


def _server(authority: Authority, directory: Path) -> ssl.SSLContext:
    key = make_key()
    signed = authority.certify_hub(key.public_key(), "hub1", ["127.0.0.1"], _NOW)
    pem, ca_file = directory / "hub.pem", directory / "ca.crt"
    pem.write_bytes(render_key(key) + render_certificate(signed))
    ca_file.write_bytes(render_certificate(authority.certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca_file)
    return context


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    lab = Lab()
    authority = make_authority("fleet", _LONG_AGO)

    def listen(port: int) -> socket.socket:
        return inside(lab.host, lambda: socket.create_server(("127.0.0.1", port)))

    def certify(request: str) -> Certified:
        signed = authority.certify_host(parse_request(request), HOST, _NOW)
        return Certified(render_certificate(signed).decode(), authority.trusted.decode())

    try:
        daemon = Daemon(lab)
        hub = FleetHub(context=_server(authority, daemon.directory), listen=listen)
        hub.certify = certify
        try:
            _join(authority, HostFiles.of(daemon.state / "fleet"), hub.url)
            fleet = {"enabled": True, "retry_s": 0.5, "serve_without_hubs_s": 3600.0}
            sources = {"fleet": fleet, "sqlite": {"enabled": False}}
            daemon.configure({"sources": sources, "resolver": {"hold_s": 0.5}})
            network = _network(lab.namespace_network("red"))
            hub.put([network], [_instance("red-5")])
            daemon.start()
            guests = lab.guest("red", 5), lab.guest("red", 6)
            yield FleetWorld(lab, daemon, hub, *guests, network)
        finally:
            daemon.close()
            hub.close()
    finally:
        lab.close()


def test_a_host_serves_what_its_hub_sends_and_the_same_without_one(
    world: FleetWorld,
) -> None:
    guest, hub = world.guest, world.hub
    assert guest.ask(_TARGET).body == user_data_of("red-5")
    # A change is acknowledged once guests read it.
    revision = hub.put([], [_instance("red-5", hostname="second"), _instance("red-6", 6)])
    assert hub.wait(revision) == {}
    assert guest.ask(_NAME).text == "second"
    assert world.other.ask(_TARGET).body == user_data_of("red-6")
    # What the hub may ask for, and no more.
    assert hub.ask("/v1/instances/red-6")[1]["record"]["id"] == "red-6"
    assert hub.ask("/v1/instances/red-6/../../reload")[0] == 403
    assert hub.wait(hub.remove_instance("red-6")) == {}
    assert world.other.ask(_TARGET).status == 404
    # Without a hub guests get the same, and it is not known who else there is.
    hub.away()
    until(lambda: not world.source()["in_sync"], what="being out of sync")
    assert guest.ask(_NAME).text == "second"
    assert world.other.ask(_TARGET).is_to_come_again
    assert world.source()["stale_s"] > 0
    hub.back()
    until(lambda: world.source()["in_sync"], what="being in sync")
    assert world.other.ask(_TARGET).status == 404


def test_user_data_that_is_damaged_on_disk_is_served_to_nobody_and_comes_again_from_a_hub(
    world: FleetWorld,
) -> None:
    daemon, hub = world.daemon, world.hub
    until(lambda: world.guest.ask(_TARGET).body == user_data_of("red-5"), what="user data")
    daemon.stop()
    hub.away()
    with contextlib.closing(sqlite3.connect(daemon.state / "fleet.sqlite")) as connection:
        assert connection.execute("UPDATE user_data SET data = ?", (b"forged",)).rowcount
        connection.commit()
    # What was made of it is made again.
    shutil.rmtree(daemon.state / "documents")
    (daemon.state / "compiled.sqlite").unlink()
    daemon.start(ready=False)

    def problems() -> str:
        return str(world.source()["problems"])

    until(lambda: "is damaged" in problems(), what="the problem", within_s=20)
    answer = world.guest.ask(_TARGET)
    assert answer.is_to_come_again
    hub.back()
    until(lambda: world.guest.ask(_TARGET).body == user_data_of("red-5"), what="user data")
    until(lambda: "is damaged" not in problems(), what="the end of the problem")


_FIRST, _SECOND = (TokenKey(letter * 32) for letter in (b"f", b"g"))


def _status(world: FleetWorld, token: str = "") -> int:
    return world.guest.ask(_TARGET, headers=with_token(token) if token else ()).status


def _signed_by(token: str, fleet_key: TokenKey) -> bool:
    return token.startswith(instance_key(fleet_key, "red-5").kid)


def test_a_fleet_signs_its_instances_tokens_revokes_them_and_requires_them_over_every_restart(
    world: FleetWorld,
) -> None:
    daemon, old = world.daemon, take_token(world.guest)
    hub = world.hub
    assert hub.wait(hub.have_token_keys(_FIRST)) == {}
    tokens = [take_token(world.guest)]
    assert _signed_by(tokens[0], _FIRST)
    # That of this host's own key is none of the instance's any more.
    assert [_status(world, one) for one in (old, *tokens)] == [401, 200]
    for keys in ((_FIRST, _SECOND), (_SECOND, _FIRST)):
        assert hub.wait(hub.have_token_keys(*keys)) == {}
        tokens.append(take_token(world.guest))
        assert _signed_by(tokens[-1], keys[0])
        assert {_status(world, one) for one in tokens} == {200}
    # A host alone revokes nothing; the fleet does.
    refused = daemon.command("token", "revoke", "red-5")
    assert refused.status != 0
    assert "--fleet URL" in refused.err
    assert {_status(world, one) for one in tokens} == {200}
    revoked = {f"{layout.OVERRIDES}red-5": b'{"epoch": 1, "reopened_at": 0}'}
    assert hub.wait(hub.write(revoked)) == {}
    assert {_status(world, one) for one in tokens} == {401}
    tokens = [take_token(world.guest)]
    required = {f"{layout.POLICIES}host/{HOST}": b'{"tokens": "required"}'}
    assert hub.wait(hub.write(required)) == {}
    assert [_status(world), _status(world, tokens[0])] == [401, 200]
    explained = daemon.explain("red", "10.0.0.5")["rules"]
    assert (explained["of_fleet"], explained["token_epoch"]) == (True, 1)
    assert {"name": "tokens", "value": "required", "origin": "fleet-host"} in explained["rules"]
    # Without a hub the same is in force, through a death of the controller and a restart of all.
    hub.away()
    daemon.kill_controller()
    assert [_status(world), _status(world, tokens[0])] == [401, 200]
    daemon.start(ready=False)
    until(lambda: not world.source()["in_sync"], what="a source without hubs", within_s=20)
    assert [_status(world), _status(world, tokens[0])] == [401, 200]
    daemon.stop()
    daemon.start(ready=False)
    until(lambda: _status(world, tokens[0]) == 200, what="an answer", within_s=20)
    assert _status(world) == 401
    assert _signed_by(take_token(world.guest), _SECOND)
    hub.back()
    until(lambda: world.source()["in_sync"], what="being in sync")
    done = hub.write({f"{layout.POLICIES}host/{HOST}": b"{}"})
    assert hub.wait(done) == {}
    assert _status(world) == 200


def test_what_no_hub_has_vouched_for_too_long_gets_neither_documents_nor_tokens(
    world: FleetWorld,
) -> None:
    daemon, guest, hub = world.daemon, world.guest, world.hub
    assert hub.wait(hub.put([], [_instance("red-6", 6)])) == {}
    token = take_token(guest)
    daemon.stop()
    hub.away()
    # As after an hour without a hub.
    with contextlib.closing(KeptItems(daemon.state / "fleet.sqlite")) as kept:
        kept.open()
        assert kept.vouched is not None
        kept.note(replace(kept.vouched, at=kept.vouched.at - 3700, up_s=kept.vouched.up_s - 3700))
    daemon.start(ready=False)
    until(world.source, what="a source without hubs", within_s=20)
    until(lambda: daemon.explain("red", "10.0.0.5")["installed"] == "!", what="the map's value")
    for one in (guest, world.other):
        assert one.ask(_TARGET).is_to_come_again
        assert one.ask(_TARGET, headers=with_token(token)).is_to_come_again
    lifetime = ["X-aws-ec2-metadata-token-ttl-seconds: 60"]
    assert guest.ask("/latest/api/token", method="PUT", headers=lifetime).is_to_come_again
    explained = daemon.explain("red", "10.0.0.5")
    assert (explained["verdict"], explained["answer"]) == ("expired", 503)
    fleet = daemon.status()["fleet"]
    assert (fleet["serves_for_s"], fleet["items"] > 0) == (0.0, True)
    assert "guests of the fleet's instances get 503" in daemon.command("status").out
    # What was removed meanwhile is not served for a moment.
    hub.remove_instance("red-6")
    hub.back()
    until(lambda: guest.ask(_TARGET).status == 200, what="being served again")
    assert guest.ask(_TARGET, headers=with_token(token)).status == 200
    assert world.other.ask(_TARGET).status == 404


def test_a_network_that_cannot_be_served_is_acknowledged_with_the_reason_and_then_without(
    world: FleetWorld,
) -> None:
    lab, hub = world.lab, world.hub
    namespace = lab.name("late")
    record: RecordMapping = {"id": "late", "listener": {"namespace": namespace}}
    late = parse_instance(instance("late-5", "late"))
    assert isinstance(late, Instance)
    revision = hub.put([_network(record)], [late])
    until(lambda: "late" in world.daemon.not_served(), what="the network that is not served")
    until(lambda: f"namespace {namespace}" in hub.wait(revision, 0.0).get(HOST, ""))
    lab.namespace_network("late")
    until(lambda: hub.wait(revision, 0.0) == {}, what="the acknowledgement")
    assert lab.guest("late").ask(_TARGET).body == user_data_of("late-5")
    assert hub.wait(hub.remove_instance("late-5")) == {}


def test_a_host_renews_its_certificate_without_what_that_needs_staying_in_memory(
    world: FleetWorld,
) -> None:
    files = HostFiles.of(world.daemon.state / "fleet")
    until(lambda: not _is_old(files), what="the next certificate")
    assert files.certificate.stat().st_mode & 0o777 == 0o600
    maps = Path(f"/proc/{world.daemon.pids().controller}/maps").read_text()
    assert "cryptography" not in maps


def _is_old(files: HostFiles) -> bool:
    found = parse_certificate(files.certificate.read_bytes(), "the host's")
    return found.not_valid_before_utc < _NOW - timedelta(days=2)
