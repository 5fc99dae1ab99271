"""A fleet as it is run: etcd, hubs, hosts and guests."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, HostState, StoredHost, host_key, render_host
from imdsproxy.fleet.members import Role, parse_invitation
from imdsproxy.fleet.stream import Hello, render_line
from imdsproxy.model.entities import InstanceId
from imdsproxy.sources.fleet.client import HostFiles
from support.cli import run_main
from support.daemon import instance
from support.fleet_front import read_to_end
from support.fleet_member import Member
from support.fleet_operator import Operator
from support.fleet_world import FleetHost, FleetWorld, fleet_world
from support.guest import Guest, Load, Reply, take_token, with_token
from support.lab import until
from support.patience import patience

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    with fleet_world() as made:
        yield made


def _name(guest: Guest) -> str:
    """Its host name; else as `Guest.reads`."""
    return guest.reads("/latest/meta-data/hostname", timeout_s=3 * patience())


def test_an_instance_that_is_stored_once_is_served_on_its_host_and_follows_its_place(
    world: FleetWorld,
) -> None:
    first, second = world.add_host("a"), world.add_host("b")
    record = instance("web", "blue")
    world.store_network("blue")
    world.place(record, "a")
    here, there = first.lab.guest("blue"), second.lab.guest("blue")
    until(lambda: _name(here) == "web", within_s=20, what="an answer")
    assert _name(here) == "web"
    # To move it, both serve it for a while.
    world.place(record, "a", "b")
    until(lambda: _name(there) == "web", within_s=20, what="an answer at the other host")
    assert _name(here) == "web"
    _sign_anew(world, here, there)
    with here.connect() as kept:
        assert kept.request("/latest/meta-data/hostname").text == "web"
        world.place(record, "b")
        # Its network has no other instance there: guests get an answer nevertheless, also on a connection that is open.
        until(lambda: _name(here) == "404", within_s=20, what="its end at the first host")
        assert kept.request("/latest/meta-data/hostname").status == 404
    assert _name(there) == "web"
    world.place(record)
    until(lambda: _name(there) == "404", within_s=20, what="its removal")


def _sign_anew(world: FleetWorld, *guests: Guest) -> None:
    """Tokens of one host are good on the others, and a key that the fleet replaces goes on being believed."""

    def reads() -> set[int]:
        return {
            guest.ask("/latest/meta-data/hostname", headers=with_token(token)).status
            for guest in guests
            for token in tokens
        }

    operator, tokens = Operator.new(world, "signer").at(world.hubs[0]), list[str]()
    for _ in range(3):
        done = operator.ask("POST", "/v1/token-keys/rotate")
        assert done["applied"], done
        # Other tests may have hosts that are away.
        assert all(one.endswith(": not connected") for one in done["pending"]), done
        tokens += [take_token(guest) for guest in guests]
        assert reads() == {200}
    # Of all hosts the same key signs, and another one after each rotation.
    kids = [token.split(".")[0] for token in tokens]
    assert kids[::2] == kids[1::2]
    assert len(set(kids)) == 3
    revoked = operator.ask("POST", "/v1/instances/web/revoke-tokens")
    assert revoked["applied"], revoked
    assert reads() == {401}


def test_no_token_is_good_any_more_once_its_instance_was_removed_though_the_id_comes_again(
    world: FleetWorld,
) -> None:
    host = world.add_host("again", networks=("teal",))
    guest, operator = host.lab.guest("teal"), Operator.new(world, "otto")
    port = {"network": "teal", "mac": guest.mac, "addresses": [guest.addresses[0]]}
    record = {"id": "again", "name": "again", "ports": [port], "hosts": ["again"]}

    def read(token: str) -> int:
        return guest.ask("/latest/meta-data/hostname", headers=with_token(token)).status

    until(lambda: "again" in operator.connected(), within_s=20, what="the host is connected")
    operator.ask("POST", "/v1/networks", {"id": "teal", "listener": {"bridge": "teal"}})
    assert operator.ask("POST", "/v1/instances", record)["applied"]
    token = take_token(guest)
    assert read(token) == 200
    assert operator.ask("DELETE", "/v1/instances/again")["applied"]
    assert operator.ask("POST", "/v1/instances", record)["applied"]
    assert (read(token), read(take_token(guest))) == (401, 200)


def test_any_hub_answers_a_change_once_its_host_has_it_and_asks_that_host(
    world: FleetWorld,
) -> None:
    host = world.add_host("e", networks=("grey",))
    guest, operator = host.lab.guest("grey"), Operator.new(world, "olga")
    hubs = [operator.at(hub) for hub in world.hubs]
    port = {"network": "grey", "mac": guest.mac, "addresses": [guest.addresses[0]]}
    record = {"id": "asked", "name": "asked", "ports": [port], "hosts": ["e"]}
    until(lambda: "e" in hubs[0].connected(), within_s=20, what="host e is connected")
    hubs[0].ask("POST", "/v1/networks", {"id": "grey", "listener": {"bridge": "grey"}})
    assert hubs[1].ask("POST", "/v1/instances", record)["applied"]
    for number, hub in enumerate(hubs):
        written = hub.ask("PATCH", "/v1/instances/asked", {"hostname": f"named-{number}"})
        (explained,) = hub.ask("GET", "/v1/instances/asked/explain")
        assert written["applied"], written
        assert _name(guest) == f"named-{number}"
        assert (explained["host"], explained["verdict"]) == ("e", "found")


# Who belongs to the fleet


@pytest.mark.parametrize("how", ["revoked", "enrolled again"])
def test_no_stream_of_a_certificate_that_is_no_longer_good_stays_also_before_its_hello(
    world: FleetWorld, how: str
) -> None:
    name = f"spare-{how.partition(' ')[0]}"
    operator = Operator.new(world, f"over-{name}")
    member = operator.join(name)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(member.begun(url)) for url in world.urls for _ in range(2)]
        if how == "revoked":
            operator.do("fleet", "revoke", name)
        else:
            operator.join(name, "again")
        at = time.monotonic()
        for stream in streams:
            assert b'"bye":"revoked"' in read_to_end(stream)
        assert time.monotonic() - at < patience()
    assert [member.is_admitted(url) for url in world.urls] == [False, False]


def test_a_host_joins_with_a_token_once_and_is_cut_off_within_a_second_when_it_is_revoked(
    world: FleetWorld, tmp_path: Path
) -> None:
    operator = Operator.new(world, "anna")
    word, ran = operator.do("fleet", "enrol", "late").out.strip(), []
    for name in ("one", "two"):
        config = tmp_path / f"{name}.yaml"
        config.write_text(f"paths:\n  state_dir: {tmp_path / name}\n")
        with world.etcd.entered():
            ran.append(run_main("--config", str(config), "fleet", "join", stdin=word))
    assert [one.status for one in ran] == [0, 77], ran
    member = Member(world, "late", HostFiles.of(tmp_path / "one/fleet"))
    assert sorted(member.files.read_hubs()) == sorted(world.urls)
    with member.begun(world.urls[1]) as stream:
        stream.sendall(render_line(Hello()))
        found = b""
        while b'"batch"' not in found:
            found += stream.recv(65_536)
        operator.do("fleet", "revoke", "late")
        at = time.monotonic()
        found = read_to_end(stream)
        took = time.monotonic() - at
    assert b'"bye":"revoked"' in found
    assert took < patience()
    assert [member.is_admitted(url) for url in world.urls] == [False, False]
    token = parse_invitation(word).token
    logs = "".join(hub.log.read_text() for hub in world.hubs)
    seen = logs + "".join(one.out + one.err for one in ran)
    assert (token in seen, word in seen, "PRIVATE KEY" in seen) == (False, False, False)
    assert token.encode() not in b"".join(
        one.value for one in world.ask(lambda etcd: etcd.read("/", "0")).kvs
    )


def test_a_host_renews_at_a_hub_and_its_certificate_before_the_last_is_not_good_any_more(
    world: FleetWorld, tmp_path: Path
) -> None:
    member, kept = Operator.new(world, "ben").join("renewed"), tmp_path / "kept.pem"
    kept.write_bytes(member.files.certificate.read_bytes())
    first = replace(member, files=replace(member.files, certificate=kept, key=kept))
    member.renew(world.urls[0])
    assert first.is_admitted(world.urls[0])
    member.renew(world.urls[1])
    assert member.is_admitted(world.urls[1])
    until(lambda: not any(first.is_admitted(url) for url in world.urls), what="its end")


def test_an_operator_whose_name_is_revoked_is_refused_by_every_hub(world: FleetWorld) -> None:
    boss, left = (Operator.new(world, name).at(world.hubs[0]) for name in ("boss", "left"))
    reader = Operator.new(world, "rita", Role.READER).at(world.hubs[0])
    assert left.at(world.hubs[1]).run("fleet", "enrol", "x").status == 0
    assert reader.run("fleet", "enrol", "x").status == 77
    assert reader.run("fleet", "revoke", "left", "--operator").status == 77
    assert boss.run("fleet", "revoke", "left", "--operator").status == 0
    for one in map(left.at, world.hubs):
        until(lambda: one.run("fleet", "enrol", "x").status == 77, what="its end")  # noqa: B023
    assert boss.run("fleet", "revoke", "no-host").status == 66


# Without hubs


def test_guests_read_on_without_any_hub_also_after_a_restart_and_get_what_operators_change_then(
    world: FleetWorld, tmp_path: Path
) -> None:
    host = world.add_host("c", networks=("green",))
    guest = host.lab.guest("green")
    operator = Operator.new(world, "carla")
    (tmp_path / "data").write_bytes(bytes(range(256)) * 400)
    operator.do("network", "add", "green", "--bridge", "green")
    operator.do(
        *("instance", "add", "cd", "--network", "green", "--mac", guest.mac, "--host", "c"),
        *("--address", guest.addresses[0], "--user-data", str(tmp_path / "data")),
    )
    # It is answered once guests read it.
    assert guest.ask("/latest/user-data").body == bytes(range(256)) * 400
    with Load([guest], "/latest/user-data", _has_data) as load:
        for hub in world.hubs:
            hub.end(9)
        until(lambda: not host.source["in_sync"], within_s=20, what="being out of sync")
        host.daemon.kill_controller()
        load.wait_answers(20)
        host.daemon.start(ready=False)
        load.wait_answers(20)
    assert load.report.lost == []
    host.daemon.stop()
    host.daemon.start(ready=False)
    until(lambda: _name(guest) == "cd", within_s=20, what="an answer from disk")
    # It did not wait for a hub.
    assert any("on disk" in str(entry["message"]) for entry in host.daemon.log_entries())
    assert _has_data(guest, guest.ask("/latest/user-data")) is None
    for hub in world.hubs:
        hub.start()
    until(lambda: host.source["in_sync"], within_s=30, what="being in sync")
    operator.do("instance", "set", "cd", "--hostname", "after")
    assert _name(guest) == "after"


def _has_data(guest: Guest, reply: Reply) -> str | None:
    found = reply.status, reply.body
    wanted = 200, bytes(range(256)) * 400
    return None if found == wanted else f"{guest.name} got {reply.status}"


# Many records


def test_an_import_goes_on_by_another_hub_where_its_hub_is_killed(world: FleetWorld) -> None:
    name = HostId("imported")
    world.write({host_key(name): render_host(StoredHost(HostState.ENROLLED, ("7",)))})
    operator, tries = Operator.new(world, "ivan"), list[int]()

    class Lines:
        """Its first hub ends while it gets them."""

        def __iter__(self) -> Iterator[bytes]:
            tries.append(0)
            yield b'{"network": {"id": "many", "listener": {"bridge": "many"}}}\n'
            if len(tries) == 1:
                world.hubs[0].end(9)
            for number in range(200):
                port = {"network": "many", "addresses": [f"10.3.0.{number}"]}
                record = {"id": f"i{number}", "name": "i", "hosts": [name], "ports": [port]}
                yield json.dumps({"instance": record}).encode() + b"\n"

    try:
        with world.etcd.entered():
            written = operator.client.post_records(Lines(), {}, lambda _: None)
            found = operator.client.get("/v1/instances", {"host": name})
    finally:
        world.hubs[0].start()
        world.write({host_key(name): render_host(StoredHost(HostState.REVOKED))})
    assert (written["networks"], written["instances"], len(tries)) == (1, 200, 2)
    assert len(found) == 200


_PASSWORD: Final = "/openstack/latest/password"


def _passwords(host: FleetHost) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in (host.daemon.state / "passwords").iterdir()}


def test_a_posted_password_moves_with_its_instance_and_unreadable_user_data_delays_nothing(
    world: FleetWorld,
) -> None:
    first, second = (world.add_host(name, networks=("pink",)) for name in ("p", "q"))
    away = render_host(StoredHost(HostState.ENROLLED, ("1",)))
    world.write({host_key(HostId("stays-away")): away})
    here, there = first.lab.guest("pink"), second.lab.guest("pink")
    operator = Operator.new(world, "paul")
    ask, port = operator.ask, {"network": "pink", "addresses": [here.addresses[0]]}

    def shown() -> str:
        return str(ask("GET", "/v1/instances/moves/password")["password"]["text"])

    until(lambda: {"p", "q"} <= operator.connected(), within_s=20, what="the hosts are connected")
    ask("POST", "/v1/networks", {"id": "pink", "listener": {"bridge": "pink"}})
    ask("POST", "/v1/instances", {"id": "moves", "name": "moves", "ports": [port], "hosts": ["p"]})
    assert here.ask(_PASSWORD, method="POST", body=b"sealed-by-its-key").status == 200
    assert shown() == "sealed-by-its-key"
    # Both hosts have it while it moves, and then the new one alone.
    key = layout.password_key(InstanceId("moves"))
    until(lambda: world.ask(lambda etcd: etcd.read(key)).kvs, within_s=20, what="it in etcd")
    assert ask("POST", "/v1/instances/moves/move", {"to": "q"})["applied"]
    assert [one.ask(_PASSWORD).body for one in (here, there)] == [b"sealed-by-its-key"] * 2
    assert there.ask(_PASSWORD, method="POST", body=b"another").status == 409
    ask("POST", "/v1/instances/moves/move", {"to": "q", "finish": True})
    until(lambda: _passwords(first) == {}, within_s=20, what="nothing of it on the old host")
    assert _passwords(second) == {"moves": b"sealed-by-its-key"}
    assert shown() == there.ask(_PASSWORD).text == "sealed-by-its-key"
    # Another program changes the user data of an instance before its host gets it.
    spoiled = {
        "id": "spoiled",
        "name": "s",
        "ports": [{"network": "pink"}],
        "user_data": "#!/bin/sh",
    }
    ask("POST", "/v1/instances", {**spoiled, "hosts": ["stays-away"]})
    chunk = layout.blob_key(hashlib.sha256(b"#!/bin/sh").hexdigest(), 0)
    world.write({chunk: b"changed"})
    moved = ask("POST", "/v1/instances/spoiled/move", {"to": "q"})
    assert "user-data-unreadable" in str(moved["pending"])
    for _ in range(3):
        revoked = ask("POST", "/v1/instances/moves/revoke-tokens")
        assert revoked["applied"], revoked
    assert second.source["in_sync"]
    ask("DELETE", "/v1/instances/spoiled")
    ask("DELETE", "/v1/instances/moves")
    until(lambda: _passwords(second) == {}, within_s=20, what="nothing of it anywhere")
