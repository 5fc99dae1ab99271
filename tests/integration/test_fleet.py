"""A fleet as it is run: etcd, hubs, hosts and guests."""

import asyncio
import contextlib
import hashlib
import json
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.api.client import FleetClient
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, HostState, StoredHost, host_key, render_host
from imdsproxy.fleet.members import Role, parse_invitation
from imdsproxy.fleet.stream import STREAM_PATH, UPGRADE, Hello, render_line
from imdsproxy.model.entities import InstanceId
from imdsproxy.sources.fleet.client import HostFiles, HubClient
from imdsproxy.sources.fleet.membership import join, renew_if_due
from support.cli import Ran, run_main
from support.daemon import instance
from support.fleet_world import FleetHost, FleetWorld, fleet_world
from support.guest import Guest, Load, Lost, Reply, take_token, with_token
from support.lab import until
from support.patience import patience

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    with fleet_world() as made:
        yield made


def _name(guest: Guest) -> str | int | None:
    """Its host name, or the status of another answer, or nothing where there is none."""
    try:
        # Where its network has gone nothing answers at all.
        answer = guest.ask("/latest/meta-data/hostname", timeout_s=3 * patience())
    except Lost:
        return None
    return answer.text if answer.status == 200 else answer.status


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
        until(lambda: _name(here) == 404, within_s=20, what="its end at the first host")
        assert kept.request("/latest/meta-data/hostname").status == 404
    assert _name(there) == "web"
    world.place(record)
    until(lambda: _name(there) == 404, within_s=20, what="its removal")


def _sign_anew(world: FleetWorld, *guests: Guest) -> None:
    """Tokens of one host are good on the others, and a key that the fleet replaces goes on being believed."""

    def reads() -> set[int]:
        return {
            guest.ask("/latest/meta-data/hostname", headers=with_token(token)).status
            for guest in guests
            for token in tokens
        }

    client, tokens = FleetClient(world.operator("signer"), urls=(world.urls[0],)), list[str]()
    for _ in range(3):
        with world.etcd.entered():
            done = client.request("POST", "/v1/token-keys/rotate")
        assert done["applied"], done
        # Other tests may have hosts that are away.
        assert all(one.endswith(": not connected") for one in done["pending"]), done
        tokens += [take_token(guest) for guest in guests]
        assert reads() == {200}
    # Of all hosts the same key signs, and another one after each rotation.
    kids = [token.split(".")[0] for token in tokens]
    assert kids[::2] == kids[1::2]
    assert len(set(kids)) == 3
    with world.etcd.entered():
        revoked = client.request("POST", "/v1/instances/web/revoke-tokens")
    assert revoked["applied"], revoked
    assert reads() == {401}


def test_no_token_is_good_any_more_once_its_instance_was_removed_though_the_id_comes_again(
    world: FleetWorld,
) -> None:
    host = world.add_host("again", networks=("teal",))
    guest, hub = host.lab.guest("teal"), FleetClient(world.operator("otto"), urls=tuple(world.urls))
    port = {"network": "teal", "mac": guest.mac, "addresses": [guest.addresses[0]]}
    record = {"id": "again", "name": "again", "ports": [port], "hosts": ["again"]}

    def read(token: str) -> int:
        return guest.ask("/latest/meta-data/hostname", headers=with_token(token)).status

    with world.etcd.entered():
        until(lambda: "again" in _connected(hub), within_s=20, what="the host is connected")
        hub.request("POST", "/v1/networks", body={"id": "teal", "listener": {"bridge": "teal"}})
        assert hub.request("POST", "/v1/instances", body=record)["applied"]
    token = take_token(guest)
    assert read(token) == 200
    with world.etcd.entered():
        assert hub.request("DELETE", "/v1/instances/again")["applied"]
        assert hub.request("POST", "/v1/instances", body=record)["applied"]
    assert (read(token), read(take_token(guest))) == (401, 200)


def test_any_hub_answers_a_change_once_its_host_has_it_and_asks_that_host(
    world: FleetWorld,
) -> None:
    host = world.add_host("e", networks=("grey",))
    guest, operator = host.lab.guest("grey"), world.operator("olga")
    hubs = [FleetClient(operator, urls=(url,)) for url in world.urls]
    port = {"network": "grey", "mac": guest.mac, "addresses": [guest.addresses[0]]}
    record = {"id": "asked", "name": "asked", "ports": [port], "hosts": ["e"]}
    with world.etcd.entered():
        until(lambda: "e" in _connected(hubs[0]), within_s=20, what="host e is connected")
        hubs[0].request("POST", "/v1/networks", body={"id": "grey", "listener": {"bridge": "grey"}})
        assert hubs[1].request("POST", "/v1/instances", body=record)["applied"]
    for number, hub in enumerate(hubs):
        with world.etcd.entered():
            body = {"hostname": f"named-{number}"}
            written = hub.request("PATCH", "/v1/instances/asked", body=body)
            (explained,) = hub.get("/v1/instances/asked/explain")
        assert written["applied"], written
        assert _name(guest) == f"named-{number}"
        assert (explained["host"], explained["verdict"]) == ("e", "found")


def _connected(hub: FleetClient) -> set[str]:
    return {one["host"] for one in hub.get("/fleet/hosts") if one["hub"] is not None}


# Who belongs to the fleet


@contextlib.contextmanager
def _stream(world: FleetWorld, url: str, files: HostFiles) -> Iterator[ssl.SSLSocket]:
    """A host's stream as far as the hub's answer to its hello."""
    address, port = url.removeprefix("https://").split(":")
    with world.etcd.entered():
        sock = socket.create_connection((address, int(port)), timeout=10 * patience())
    with files.context().wrap_socket(sock, server_hostname=address) as stream:
        upgrade = f"Connection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n"
        stream.sendall(f"GET {STREAM_PATH} HTTP/1.1\r\nHost: hub\r\n{upgrade}".encode())
        yield stream


def _refused(world: FleetWorld, url: str, files: HostFiles) -> bool:
    with _stream(world, url, files) as stream:
        return stream.recv(65_536).startswith(b"HTTP/1.1 403 ")


def _join(
    operator: Sequence[str], name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Make the files of a host by a new invitation."""
    config = directory / "imdsproxy.yaml"
    directory.mkdir()
    config.write_text(f"paths:\n  state_dir: {directory}\n")
    word = run_main(capsys, "fleet", "enrol", name, *operator).out.strip()
    joined = run_main(capsys, "--config", str(config), "fleet", "join", stdin=word)
    assert joined.status == 0, joined


@pytest.mark.parametrize("how", ["revoked", "enrolled again"])
def test_no_stream_of_a_certificate_that_is_no_longer_good_stays_also_before_its_hello(
    world: FleetWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    name = f"spare-{how.partition(' ')[0]}"
    certificate = world.operator(f"over-{name}")
    operator = ("--fleet-certificate", str(certificate), "--fleet", world.urls[0])
    with world.etcd.entered():
        _join(operator, name, tmp_path / "captured", capsys)
    files = HostFiles.of(tmp_path / "captured/fleet")
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(_stream(world, url, files)) for url in world.urls for _ in range(2)
        ]
        for stream in streams:
            assert stream.recv(65_536).startswith(b"HTTP/1.1 101 ")
        with world.etcd.entered():
            if how == "revoked":
                assert run_main(capsys, "fleet", "revoke", name, *operator).status == 0
            else:
                _join(operator, name, tmp_path / "again", capsys)
        at = time.monotonic()
        for stream in streams:
            found = b""
            while chunk := stream.recv(65_536):
                found += chunk
            assert b'"bye":"revoked"' in found
        assert time.monotonic() - at < patience()
    assert [_refused(world, url, files) for url in world.urls] == [True, True]


def test_a_host_joins_with_a_token_once_and_is_cut_off_within_a_second_when_it_is_revoked(
    world: FleetWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = ("--fleet-certificate", str(world.operator("anna")), "--fleet", world.urls[0])
    with world.etcd.entered():
        invited = run_main(capsys, "fleet", "enrol", "late", *operator)
        assert invited.status == 0, invited
        word = invited.out.strip()
        ran = []
        for name in ("one", "two"):
            config = tmp_path / f"{name}.yaml"
            config.write_text(f"paths:\n  state_dir: {tmp_path / name}\n")
            ran.append(run_main(capsys, "--config", str(config), "fleet", "join", stdin=word))
    assert [one.status for one in ran] == [0, 77], ran
    files = HostFiles.of(tmp_path / "one/fleet")
    assert sorted(files.read_hubs()) == sorted(world.urls)
    with _stream(world, world.urls[1], files) as stream:
        stream.sendall(render_line(Hello()))
        found = b""
        while b'"batch"' not in found:
            found += stream.recv(65_536)
        with world.etcd.entered():
            revoked = run_main(capsys, "fleet", "revoke", "late", *operator)
        at = time.monotonic()
        assert revoked.status == 0, revoked
        found = b""
        while chunk := stream.recv(65_536):
            found += chunk
        took = time.monotonic() - at
    assert b'"bye":"revoked"' in found
    assert took < patience()
    assert [_refused(world, url, files) for url in world.urls] == [True, True]
    token = parse_invitation(word).token
    logs = "".join(hub.log.read_text() for hub in world.hubs)
    seen = logs + "".join(one.out + one.err for one in ran)
    assert (token in seen, word in seen, "PRIVATE KEY" in seen) == (False, False, False)
    assert token.encode() not in b"".join(
        one.value for one in world.ask(lambda etcd: etcd.read("/", "0")).kvs
    )


async def _renew(files: HostFiles, hubs: Sequence[str]) -> bool:
    return await renew_if_due(
        files, HubClient(files, 10 * patience()), hubs, datetime.now(UTC) + timedelta(days=21)
    )


def test_a_host_renews_at_a_hub_and_its_certificate_before_the_last_is_not_good_any_more(
    world: FleetWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = ("--fleet-certificate", str(world.operator("ben")), "--fleet", world.urls[0])
    files, kept = HostFiles.of(tmp_path / "fleet"), tmp_path / "kept.pem"
    with world.etcd.entered():
        invited = run_main(capsys, "fleet", "enrol", "renewed", *operator)
        join(parse_invitation(invited.out), files)
        kept.write_bytes(files.certificate.read_bytes())
        first = replace(files, certificate=kept, key=kept)
        assert asyncio.run(_renew(files, world.urls[:1]))
        assert not _refused(world, world.urls[0], first)
        assert asyncio.run(_renew(files, world.urls[1:]))
    assert not _refused(world, world.urls[1], files)
    until(lambda: all(_refused(world, url, first) for url in world.urls), what="its end")


def test_an_operator_whose_name_is_revoked_is_refused_by_every_hub(
    world: FleetWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    boss, left, reader = (
        world.operator("boss"), world.operator("left"), world.operator("rita", Role.READER),
    )  # fmt: skip

    def run(pem: Path, url: str, *words: str) -> Ran:
        with world.etcd.entered():
            return run_main(
                capsys, "fleet", *words, "--fleet-certificate", str(pem), "--fleet", url
            )

    assert run(left, world.urls[1], "enrol", "x").status == 0
    assert run(reader, world.urls[0], "enrol", "x").status == 77
    assert run(reader, world.urls[0], "revoke", "left", "--operator").status == 77
    assert run(boss, world.urls[0], "revoke", "left", "--operator").status == 0
    for url in world.urls:
        until(lambda: run(left, url, "enrol", "x").status == 77, what="its end")  # noqa: B023
    assert run(boss, world.urls[0], "revoke", "no-host").status == 66


# Without hubs


def test_guests_read_on_without_any_hub_also_after_a_restart_and_get_what_operators_change_then(
    world: FleetWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = world.add_host("c", networks=("green",))
    guest = host.lab.guest("green")
    urls = (word for url in world.urls for word in ("--fleet", url))
    operator = ("--fleet-certificate", str(world.operator("carla")), *urls)

    def run(*words: str) -> Ran:
        with world.etcd.entered():
            return run_main(capsys, *operator, *words)

    (tmp_path / "data").write_bytes(bytes(range(256)) * 400)
    assert run("network", "add", "green", "--bridge", "green").status == 0
    added = run(
        *("instance", "add", "cd", "--network", "green", "--mac", guest.mac, "--host", "c"),
        *("--address", guest.addresses[0], "--user-data", str(tmp_path / "data")),
    )
    assert added.status == 0, added
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
    changed = run("instance", "set", "cd", "--hostname", "after")
    assert changed.status == 0, changed
    assert _name(guest) == "after"


def _has_data(guest: Guest, reply: Reply) -> str | None:
    found = reply.status, reply.body
    wanted = 200, bytes(range(256)) * 400
    return None if found == wanted else f"{guest.name} got {reply.status}"


# Many records


def test_an_import_goes_on_by_another_hub_where_its_hub_is_killed(world: FleetWorld) -> None:
    name = HostId("imported")
    world.write({host_key(name): render_host(StoredHost(HostState.ENROLLED, ("7",)))})
    client, tries = FleetClient(world.operator("ivan"), urls=tuple(world.urls)), list[int]()

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
            written = client.post_records(Lines(), {}, lambda _: None)
            found = client.get("/v1/instances", {"host": name})
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
    hub = FleetClient(world.operator("paul"), urls=tuple(world.urls))
    port = {"network": "pink", "addresses": [here.addresses[0]]}

    def ask(method: str, path: str, body: object = None) -> Any:
        with world.etcd.entered():
            return hub.request(method, path, body=body)

    def shown() -> str:
        with world.etcd.entered():
            return str(hub.get("/v1/instances/moves/password")["password"]["text"])

    until(lambda: {"p", "q"} <= _hosts(world, hub), within_s=20, what="the hosts are connected")
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


def _hosts(world: FleetWorld, hub: FleetClient) -> set[str]:
    with world.etcd.entered():
        return _connected(hub)
