"""The command line against a whole fleet, as an operator uses it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import parse_password
from imdsproxy.fleet.members import Role
from imdsproxy.hub.hosts.sealed import PLACE, sealed_keys
from imdsproxy.hub.pki.files import FleetFiles
from imdsproxy.hub.store.envelope import name_of
from imdsproxy.hub.store.etcd_messages import prefix_end
from imdsproxy.model.entities import InstanceId
from support.cli import run_main
from support.fleet_operator import ServedFleet, served_fleet
from support.fleet_world import HubProcess
from support.guest import take_token, with_token
from support.lab import until, within

pytestmark = pytest.mark.root

_HOSTNAME = "/latest/meta-data/hostname"
_PASSWORD = "/openstack/latest/password"


@pytest.fixture(scope="module")
def opened() -> Iterator[ServedFleet]:
    """Beside host `a`, `away` is enrolled, and never connected; the stranger's network `red` has no record."""
    with served_fleet("red") as made:
        made.world.add_host("away", start=False)
        made.world.operator("rita", Role.READER)
        made.world.operator("mallory", scope="shop")
        yield made


@pytest.fixture
def fleet(opened: ServedFleet) -> ServedFleet:
    opened.have_web()
    return opened


@pytest.mark.parametrize("hub", [0, 1])
def test_what_a_guest_reads_is_asked_of_its_host_by_any_hub(fleet: ServedFleet, hub: int) -> None:
    at = ("-n", "blue", "--from", fleet.guest.addresses[0])
    read = fleet("get", _HOSTNAME, *at, hub=hub)
    assert (read.status, read.out) == (0, fleet.guest.ask(_HOSTNAME).text)
    for words in (("web",), at):
        explained = fleet("explain", *words, "--json", hub=hub)
        assert explained.status == 0, explained
        (one,) = [explained.json] if words is at else explained.json
        assert (one["host"], one["instance"], one["verdict"]) == ("a", "web", "found")
    probed = fleet("explain", "web", "--probe", hub=hub)
    assert "host a" in probed.words
    assert "200 OK" in probed.words
    nowhere = fleet("get", _HOSTNAME, "-n", "blue", "--from", "10.0.0.77", hub=hub)
    assert (nowhere.status, "no instance of the fleet has 10.0.0.77" in nowhere.err) == (66, True)


@pytest.mark.parametrize("hub", [0, 1])
def test_a_password_that_a_guest_posts_is_read_and_cleared_by_any_hub(
    fleet: ServedFleet, hub: int
) -> None:
    none = fleet("instance", "password", "web", hub=hub)
    assert (none.status, "has posted no password" in none.err) == (66, True)
    assert fleet.guest.ask(_PASSWORD, method="POST", body=b"c2VjcmV0").status == 200
    assert fleet("instance", "password", "web", hub=hub).out.strip() == "c2VjcmV0"
    assert fleet("instance", "password", "web", hub=hub, name="rita").status == 77
    cleared = fleet("instance", "password", "web", "--clear", hub=hub)
    assert (cleared.status, cleared.out) == (0, "done: password of instance web cleared\n")
    assert fleet("instance", "password", "web", "--clear", hub=hub).status == 66
    assert fleet.guest.ask(_PASSWORD).body == b""


@pytest.mark.parametrize("words", [("--instance", "web"), ("--host", "a", "-n", "blue")])
def test_guests_of_an_instance_or_a_host_are_watched_by_a_hub(
    fleet: ServedFleet, words: tuple[str, ...]
) -> None:
    options = ("--fleet", fleet.world.urls[1], "--fleet-certificate")
    program = (sys.executable, "-m", "imdsproxy", *options, str(fleet.operator().certificate))
    with subprocess.Popen(
        (*within(fleet.world.etcd.lab.host), *program, "watch", "--json", *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "LANG": "C.UTF-8"},
    ) as watching:
        try:
            assert watching.stdout is not None
            os.set_blocking(watching.stdout.fileno(), False)
            found = b""

            def is_seen() -> bool:
                nonlocal found
                fleet.guest.ask("/latest/meta-data/watched")
                assert watching.stdout is not None
                found += watching.stdout.read() or b""
                return b"\n" in found

            until(is_seen, within_s=20, what="a request that is shown")
        finally:
            watching.kill()
    first = json.loads(found.splitlines()[0])
    assert (first["instance"], first["path"]) == ("web", "/latest/meta-data/watched")


def test_a_watch_of_a_whole_fleet_is_refused_with_what_to_give_in_its_place(
    fleet: ServedFleet,
) -> None:
    for words in ((), ("-n", "blue")):
        ran = fleet("watch", *words)
        assert (ran.status, "--instance ID or --host HOST" in ran.err) == (64, True), ran
    ran = fleet("watch", "--host", "none")
    assert (ran.status, "the fleet has no host none" in ran.err) == (66, True)


def test_a_new_key_signs_tokens_by_the_command_line_and_hosts_that_are_away_are_named(
    fleet: ServedFleet,
) -> None:
    before = take_token(fleet.guest)
    ran = fleet("token", "rotate")
    assert ran.status == 0, ran
    assert "in the fleet's etcd signs tokens; later: host away: not connected" in ran.words
    after = take_token(fleet.guest)
    assert after.split(".")[0] != before.split(".")[0]
    for token in (before, after):
        assert fleet.guest.ask(_HOSTNAME, headers=with_token(token)).status == 200


def test_what_is_not_in_force_is_said_by_words_and_exit_status(fleet: ServedFleet) -> None:
    late = fleet("fleet", "wait", "1", "--timeout", "1")
    assert (late.status, late.words) == (
        75,
        "not yet: revision 1 is in force on all but: host away: not connected",
    )
    assert fleet("fleet", "wait", "1", "--host", "a").words == "done: revision 1 is in force"
    unknown = fleet("fleet", "wait", "1", "--host", "none")
    assert (unknown.status, "the fleet has no host none" in unknown.err) == (66, True)
    assert fleet("network", "add", "lonely", "--bridge", "lonely").status == 0
    assert "lonely bridge lonely 0 on no host" in fleet("network", "list").words
    assert "# hosts: a # revision: " in fleet("network", "show", "blue").words
    assert fleet("network", "remove", "lonely").status == 0
    assert "lonely" not in fleet("network", "list").words
    status = fleet("fleet", "status").words
    assert "records 1 network, 1 instance" in status
    assert "hosts 1 of 2 connected absent away" in status


def _is_there(fleet: ServedFleet, hub: HubProcess) -> bool:
    return bool(fleet.world.ask(lambda etcd: etcd.read(layout.HUBS + hub.name)).kvs)


def _password(fleet: ServedFleet) -> bytes | None:
    """The sealed password of `web`."""
    key = layout.password_key(InstanceId("web"))
    found = fleet.world.ask(lambda etcd: etcd.read(key)).kvs
    return parse_password(found[0].value).sealed if found else None


def _sealing(fleet: ServedFleet) -> set[str]:
    """Names of the keys that open what is sealed in etcd."""
    blobs = fleet.world.ask(lambda etcd: etcd.read(layout.BLOBS, prefix_end(layout.BLOBS))).kvs
    keys = fleet.world.ask(lambda etcd: etcd.read(PLACE)).kvs
    assert (len(blobs), len(keys)) == (2, 1)
    password = _password(fleet)
    assert password is not None
    sealed = sealed_keys(keys[0].value), password
    return {name_of(one.value) for one in blobs} | set(map(name_of, sealed))


def test_hubs_that_are_stopped_go_at_once_and_secrets_are_sealed_anew_once_each_has_the_next_key(
    fleet: ServedFleet, tmp_path: Path
) -> None:
    files = [FleetFiles(fleet.world.directory / f"{hub.name}.fleet") for hub in fleet.world.hubs]
    data = os.urandom(layout.CHUNK_BYTES).hex()
    (tmp_path / "data").write_text(data)
    assert fleet("instance", "set", "web", "--user-data", str(tmp_path / "data")).status == 0
    assert fleet.guest.ask(_PASSWORD, method="POST", body=b"c2VhbGVk").status == 200
    until(lambda: _password(fleet), within_s=20, what="the password in etcd")
    assert _sealing(fleet) == {"1"}
    made = run_main("fleet", "envelope-key", "-d", str(files[0].directory), "--json")
    assert (made.status, made.json["key"]) == (0, "2")
    for number, hub in enumerate(fleet.world.hubs):
        hub.end()
        # From then on no other hub asks it.
        assert not _is_there(fleet, hub)
        hub.start()
        until(lambda: _is_there(fleet, hub), within_s=20, what="it")  # noqa: B023
        if number == 0:
            early = fleet("fleet", "reseal")
            assert (early.status, "hub2 does not have the key 2" in early.err) == (64, True), early
            files[1].envelope_key.write_bytes(files[0].envelope_key.read_bytes())
    done = fleet("fleet", "reseal", hub=1)
    assert done.status == 0, done
    assert "all secrets in etcd are sealed with the key 2; 4 were sealed again" in done.words
    assert _sealing(fleet) == {"2"}
    again = fleet("fleet", "reseal", "--json")
    assert again.json == {"key": "2", "changed": 0}
    # The key before opens nothing any more.
    files[0].envelope_key.write_bytes(files[0].envelope_key.read_bytes().splitlines(True)[1])
    fleet.world.hubs[0].end()
    fleet.world.hubs[0].start()
    assert fleet("instance", "show", "web", "--json").json["record"]["user_data"] == data
    assert fleet("token", "revoke", "web").status == 0
    assert fleet.guest.ask("/latest/user-data").text == data
    assert fleet("instance", "password", "web").out.strip() == "c2VhbGVk"
    assert fleet("instance", "password", "web", "--clear").status == 0
    assert fleet.guest.ask(_PASSWORD).body == b""


def test_a_projects_operator_serves_no_guest_of_another_project_and_keeps_no_owner_out(
    fleet: ServedFleet,
) -> None:
    guest = fleet.stranger
    address = guest.addresses[0]
    made = fleet(
        "network", "add", "shopred", "--bridge", "red", "--project", "shop", name="mallory"
    )
    assert (made.status, "may not create a network with the listener bridge red" in made.err) == (
        77,
        True,
    )
    port = ("-n", "shopred", "--mac", guest.mac, "--address", address)
    squat = ("instance", "add", "squat", *port, "--project", "shop", "--hostname", "owned-by-shop")
    assert fleet(*squat, "--host", "a", name="mallory").status != 0
    # Neither the host nor the listener alone is enough.
    assert fleet("grant", "add", "shop", "--host", "a").status == 0
    assert fleet(*squat, "--host", "a", name="mallory").status != 0
    assert fleet("network", "add", "red", "--bridge", "red", "--project", "red").status == 0
    port = ("-n", "red", "--mac", guest.mac, "--address", address)
    assert fleet("instance", "add", "owner", *port, "--project", "red", "--host", "a").status == 0
    assert guest.ask(_HOSTNAME).text == "owner"
    assert fleet("instance", "remove", "owner").status == 0
    assert fleet("network", "remove", "red").status == 0
    # What was given is seen, added to and taken away.
    given = ("--host", "away", "--address", "blue=10.0.0.64/26", "--listener", "bridge=br-shop")
    assert fleet("grant", "add", "shop", *given).status == 0
    shown = fleet("grant", "show", "shop", name="mallory").words
    assert shown == "hosts: a, away listeners: bridge br-shop addresses: 10.0.0.64/26 in blue"
    assert fleet("grant", "remove", "shop", *given).status == 0
    assert fleet("grant", "list", name="mallory").words.endswith(" shop hosts: a")
    assert fleet("grant", "clear", "shop").status == 0
    assert fleet("grant", "show", "shop", name="mallory").words == "nothing"


def test_a_projects_operator_serves_guests_behind_a_listener_that_the_project_was_given(
    fleet: ServedFleet,
) -> None:
    guest = fleet.stranger
    given = ("--host", "a", "--listener", "bridge=red")
    assert fleet("grant", "add", "shop", *given).status == 0
    network = ("shopnet", "--bridge", "red", "--project", "shop")
    assert fleet("network", "add", *network, name="mallory").status == 0
    at = ("-n", "shopnet", "--address", guest.addresses[0])
    added = ("instance", "add", "till", *at, "--mac", guest.mac, "--project", "shop", "--host", "a")
    assert fleet(*added, name="mallory").status == 0
    assert guest.ask(_HOSTNAME).text == "till"
    asked = ("-n", "shopnet", "--from", guest.addresses[0])
    assert fleet("get", _HOSTNAME, *asked, name="mallory").out == "till"
    for hub in (0, 1):
        explained = fleet("explain", *asked, "--json", hub=hub, name="mallory")
        assert (explained.json["instance"], explained.json["verdict"]) == ("till", "found")
    # Of `web` it learns nothing, by name, by address or by its host.
    for words in (
        ("instance", "show", "web"),
        ("get", _HOSTNAME, "-n", "blue", "--from", fleet.guest.addresses[0]),
        ("explain", "web"),
        ("explain", "-n", "blue", "--from", fleet.guest.addresses[0]),
        ("network", "show", "blue"),
        ("fleet", "wait", "1", "--host", "away"),
    ):
        ran = fleet(*words, name="mallory")
        assert (ran.status, "web" in ran.err.replace("instance web", "")) == (66, False), ran
    assert fleet("fleet", "wait", "1", name="mallory").words == "done: revision 1 is in force"
    assert fleet("instance", "remove", "till", name="mallory").status == 0
    assert fleet("network", "remove", "shopnet", name="mallory").status == 0
    assert fleet("grant", "clear", "shop").status == 0


def test_a_conflict_and_a_move_that_is_over_are_said_by_exit_status(fleet: ServedFleet) -> None:
    port = ("-n", "blue", "--address", fleet.guest.addresses[0])
    taken = fleet("instance", "add", "late", *port, "--host", "a")
    assert (taken.status, "belongs to instance web (on a)" in taken.err) == (73, True)
    assert fleet("network", "remove", "blue").status == 73
    assert fleet("instance", "move", "web", "--finish", "--to", "away").status == 73
    assert fleet("instance", "add", "late", "-n", "none", "--host", "a").status == 69
    assert fleet("instance", "move", "web").status == 64
    # The answer may have been lost.
    for step in ("--finish", "--cancel"):
        again = fleet("instance", "move", "web", step)
        assert (again.status, again.words) == (0, "done: instance web is on a")
