"""A host of a fleet: what a hub sends is what guests read, and stays so when hubs go, and after a restart."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.core.fleet import layout
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records import parse_instance, parse_network
from imdsproxy.core.tokens import TokenKey, instance_key
from support.certificates import make_authority, server_context
from support.daemon import Daemon, instance, user_data_of
from support.fleet_hub import HOST, FleetHub, FleetStore
from support.guest import Guest, inside, take_token, with_token
from support.lab import Lab, RecordMapping, until

pytestmark = pytest.mark.root

_TARGET = "/latest/user-data"
_NAME = "/latest/meta-data/hostname"


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
    """A lab whose daemon follows a hub."""

    lab: Lab
    daemon: Daemon
    hub: FleetHub
    guest: Guest
    other: Guest
    network: Network

    def source(self) -> dict[str, Any]:
        (found,) = (one for one in self.daemon.status()["sources"] if one["name"] == "fleet")
        return dict(found)

    def start_hub(self, store: FleetStore) -> None:
        """Have a hub with this store at the same address."""
        self.hub.close()
        self.hub = _hub(self.lab, self.daemon.directory, store, self.hub.port)


def _hub(lab: Lab, directory: Path, store: FleetStore | None = None, port: int = 0) -> FleetHub:
    authority = make_authority(directory, "ca")
    own = authority.issue("hub", names=["IP:127.0.0.1"])
    authority.issue("host")
    context = server_context(own, clients=authority)

    def listen() -> socket.socket:
        return inside(lab.host, lambda: socket.create_server(("127.0.0.1", port)))

    return FleetHub(store, context=context, listen=listen)


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    lab = Lab()
    try:
        daemon = Daemon(lab)
        try:
            hub = _hub(lab, daemon.directory)
            files = {
                "certificate_file": str(daemon.directory / "host.crt"),
                "private_key_file": str(daemon.directory / "host.key"),
                "ca_file": str(daemon.directory / "ca.crt"),
            }
            fleet = {"enabled": True, "hubs": [hub.url], "silent_s": 5.0, "retry_s": 0.5, **files}
            daemon.configure(
                {
                    "sources": {"fleet": fleet, "sqlite": {"enabled": False}},
                    "resolver": {"hold_s": 0.5},
                }
            )
            network = _network(lab.namespace_network("red"))
            guests = lab.guest("red", 5), lab.guest("red", 6)
            made = FleetWorld(lab, daemon, hub, *guests, network)
            hub.put([network], [_instance("red-5")])
            daemon.start()
            yield made
        finally:
            daemon.close()
            made.hub.close()
    finally:
        lab.close()


def _reports(world: FleetWorld, words: str) -> bool:
    return any(words in one["reason"] for one in world.source()["problems"])


def test_a_host_serves_what_is_placed_on_it_without_hubs_after_a_restart_and_never_an_older_version(
    world: FleetWorld,
) -> None:
    guest, daemon = world.guest, world.daemon
    assert guest.ask(_TARGET).body == user_data_of("red-5")
    # A change is acknowledged once guests read it.
    older = world.hub.store
    before = FleetStore(older.revision, older.incarnation, dict(older.entries), dict(older.blobs))
    revision = world.hub.put([], [_instance("red-5", hostname="second"), _instance("red-6", 6)])
    assert world.hub.wait(revision) == {}
    assert guest.ask(_NAME).text == "second"
    assert world.other.ask(_TARGET).body == user_data_of("red-6")
    assert world.hub.ask("/v1/instances/red-6")[1]["record"]["id"] == "red-6"
    assert world.hub.ask("/v1/reload")[0] == 403
    revision = world.hub.remove_instance("red-6")
    assert world.hub.wait(revision) == {}
    assert world.other.ask(_TARGET).status == 404
    # Without a hub guests get the same, and it is not known who else there is.
    world.hub.away()
    until(lambda: not world.source()["in_sync"], what="being out of sync", within_s=20)
    assert guest.ask(_NAME).text == "second"
    assert world.other.ask(_TARGET).is_to_come_again
    assert world.source()["stale_s"] > 0
    # All processes end, as at a reboot.
    daemon.stop()
    daemon.start(ready=False)
    until(lambda: guest.ask(_NAME).status == 200, what="an answer", within_s=20)
    assert guest.ask(_NAME).text == "second"
    assert guest.ask(_TARGET).body == user_data_of("red-5")
    assert world.other.ask(_TARGET).is_to_come_again
    # A hub with an older state is not followed.
    newer = world.hub.store
    world.start_hub(before)
    until(
        lambda: any(
            "behind" in one["reason"] or "revision" in one["reason"]
            for one in world.source()["problems"]
        ),
        within_s=60,
    )
    assert guest.ask(_NAME).text == "second"
    world.start_hub(newer)
    until(lambda: world.source()["in_sync"], what="being in sync")
    assert world.other.ask(_TARGET).status == 404


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
    revoked = {f"{layout.GUARDS}red-5": b'{"epoch": 1, "reopened_at": 0}'}
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
    world.start_hub(hub.store)
    until(lambda: world.source()["in_sync"], what="being in sync")
    done = world.hub.write({f"{layout.POLICIES}host/{HOST}": b"{}"})
    assert world.hub.wait(done) == {}
    assert _status(world) == 200
