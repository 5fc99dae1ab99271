"""Guests known by their MACs, and guests that take another's address, through real namespaces and a real HAProxy."""

import os
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest

from imdsproxy.errors import ImdsproxyError
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.host.names import Naming
from imdsproxy.model.entities import NetworkId
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from support.daemon import instance, user_data_of
from support.guest import IPV4, IPV6, Connection, Guest, Lost, inside
from support.impostor import Impostor
from support.lab import batch, ip, run, until, within
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_TARGET: Final = "/latest/user-data"


def by_mac(guest: Guest, name: str) -> dict[str, object]:
    """A record that has nothing but the guest's MAC."""
    port = {"network": guest.network, "mac": guest.mac}
    return {**instance(name, guest.network), "ports": [port]}


def reads(guest: Guest, name: str, *, to: str = IPV4, source: str | None = None) -> None:
    reply = guest.ask(_TARGET, to=to, source=source)
    assert (reply.status, reply.body) == (200, user_data_of(name))


def table(world: World, network: str, place: str | None = None) -> str:
    """The network's table as nft(8) lists it; empty where there is none."""
    name = Naming(world.lab.prefix).link(NetworkId(network))
    words = (*within(world.lab.name(place or network)), "nft", "list", "table", "netdev", name)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def macs(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.daemon.status()["macs"]
    return found


def is_itself_again(guest: Guest, name: str, *, to: str = IPV4) -> None:
    """Nobody has its address any more: by its own ARP and ND the host learns where it is."""
    run(*within(guest.namespace), "ip", "neigh", "flush", "dev", "eth0")
    own = user_data_of(name).decode()
    until(lambda: guest.reads(_TARGET, to=to, timeout_s=0.5) == own, what="the guest's own answer")


def cut(connection: Connection) -> bool:
    """Whether a request on a kept connection gets nothing any more."""
    try:
        return connection.request(_TARGET).status != 200
    except Lost:
        return True


def without_address(guest: Guest) -> None:
    batch(guest.namespace, [f"address del {guest.addresses[0]}/24 dev eth0"])


def with_address(guest: Guest, address: str) -> None:
    batch(
        guest.namespace,
        [f"address add {address}/24 dev eth0", "route replace 169.254.169.254/32 dev eth0"],
    )


@pytest.mark.parametrize("network", ["red", "blue", "grey"])
def test_a_guest_is_known_by_its_mac_alone_from_its_first_request_on(
    world: World, network: str
) -> None:
    guest = world.lab.guest(network, 77)
    world.daemon.put(instances=[by_mac(guest, "bare")])
    for to in (IPV4, IPV6):
        for _ in range(3):
            reads(guest, "bare", to=to)
    told = world.daemon.explain(network, guest.addresses[0])
    assert (told["verdict"], told["how"]) == ("found", "neighbour")
    assert told["pair"]["granted"] == told["pair"]["seen"] == guest.mac
    world.all_right()


def test_a_guest_s_every_ipv6_address_is_known_by_its_mac(world: World) -> None:
    guest = world.lab.guest("red", 77, privacy="fe80::5eed:7")
    world.daemon.put(instances=[by_mac(guest, "bare")])
    for source in ("fe80::5eed:7", "2001:db8::4d"):
        for _ in range(2):
            reads(guest, "bare", to=IPV6, source=source)


def test_an_address_follows_its_lease_at_the_first_request(world: World) -> None:
    first, second = world.lab.guest("red", 102), world.lab.guest("red", 103)
    world.daemon.put(instances=[by_mac(first, "first"), by_mac(second, "second")])
    without_address(first)
    without_address(second)
    for _ in range(3):
        for guest, name in ((first, "first"), (second, "second")):
            with_address(guest, "10.0.0.90")
            reads(guest, name, source="10.0.0.90")
            reads(guest, name, source="10.0.0.90")
            batch(guest.namespace, ["address del 10.0.0.90/24 dev eth0"])


def test_an_address_that_leaves_its_guest_is_forgotten_by_an_event(world: World) -> None:
    guest = world.lab.guest("red", 104)
    world.daemon.put(instances=[by_mac(guest, "bare")])
    reads(guest, "bare")
    assert macs(world)["learned"] == 1
    ip("-n", world.lab.name("red"), "neigh", "del", guest.addresses[0], "dev", "br0")
    until(lambda: macs(world)["learned"] == 0, within_s=1, what="a forgotten address")
    reads(guest, "bare")


@pytest.mark.parametrize("to", [IPV4, IPV6])
def test_a_connection_that_the_filter_has_not_seen_begin_is_answered_after_its_network_is_release_networks(
    world: World, to: str
) -> None:
    guest = world.lab.guest("red", 105)
    world.daemon.put(instances=[by_mac(guest, "bare")])
    try:
        with guest.connect(to=to) as connection:
            world.daemon.admin.request("POST", "/v1/release", body={"networks": ["red"]})
            reply = connection.request(_TARGET)
            assert (reply.status, reply.body) == (200, user_data_of("bare"))
    finally:
        # A controller that starts listens everywhere again.
        world.daemon.kill_controller()


def test_another_mac_in_the_record_ends_kept_connections(world: World) -> None:
    with world.red.connect() as kept:
        assert own(world.red, kept.request(_TARGET)) is None
        world.daemon.put(instances=[instance("red-5", "red", mac="fa:16:3e:99:99:99")])
        kept.socket.settimeout(0.5)
        assert cut(kept)
    assert world.red.ask(_TARGET).status == 403


@pytest.mark.parametrize(("to", "address"), [(IPV4, "10.0.0.5"), (IPV6, "2001:db8::5")])
def test_a_mismatch_is_403_counted_and_explained(world: World, to: str, address: str) -> None:
    world.daemon.put(instances=[instance("red-5", "red", mac="fa:16:3e:99:99:99")])
    # The guest still knows the MAC of the host, and the host no longer that of the guest.
    world.red.ask(_TARGET, to=to, source=address)
    world.lab.forget_neighbours()
    before = macs(world)["mismatches"].get("red", 0)
    reply = world.red.ask(_TARGET, to=to, source=address)
    assert reply.status == 403
    assert "retry-after" not in reply.headers
    assert macs(world)["mismatches"]["red"] == before + 1
    told = world.daemon.explain("red", address)
    assert (told["verdict"], told["answer"], told["instance"]) == ("mismatch", 403, "red-5")
    assert told["pair"]["seen"] == world.red.mac
    assert told["pair"]["expected"] == "fa:16:3e:99:99:99"
    shown = world.daemon.command("explain", "--network", "red", "--from", address)
    assert world.red.mac in shown.out
    assert "None" not in shown.out
    assert shown.status == 1
    got = world.daemon.command("get", "--network", "red", "--from", address, _TARGET)
    assert got.status == 1


def test_explain_goes_by_a_refusal_that_is_newer_than_the_neighbour_table(world: World) -> None:
    # A MAC of its own: a refusal of an earlier test counts as long as the neighbour table has what it had then.
    of_the_record = "fa:16:3e:99:99:98"
    world.daemon.put(instances=[instance("red-5", "red", mac=of_the_record)])
    with world.lab.neighbour("red", "10.0.0.5", of_the_record):
        assert world.daemon.explain("red", "10.0.0.5")["verdict"] == "found"

        def is_refused() -> bool:
            assert world.red.ask(_TARGET, source="10.0.0.5").status == 403
            return bool(world.daemon.explain("red", "10.0.0.5")["verdict"] == "mismatch")

        # A refusal is noted once a second: the last one may be of the test before.
        until(is_refused, within_s=3, what="the refusal")
        refused = world.daemon.explain("red", "10.0.0.5")
    assert (refused["verdict"], refused["answer"]) == ("mismatch", 403)
    assert refused["pair"]["seen"] == world.red.mac
    assert f"the neighbour table has MAC {of_the_record}" in " ".join(refused["why"])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["red", "blue", "grey"])
@pytest.mark.parametrize("to", [IPV4, IPV6])
def test_a_guest_that_takes_its_neighbour_s_address_reads_nothing(
    world: World, network: str, to: str
) -> None:
    victim = world.guests[network]
    address = victim.addresses[0] if to == IPV4 else victim.link_local
    thief = world.lab.guest(network, 66)
    world.daemon.put(instances=[instance("thief", network, 66)])
    secret = user_data_of(f"{network}-5")
    with victim.connect(to=to) as kept, Impostor(thief, address) as impostor:
        tries = impostor.try_for(1.5, _TARGET, source=address, to=to, at_least=501)
        # The victim goes on asking, and gets its answers, whatever ARP says.
        assert own(victim, kept.request(_TARGET)) is None
        for _ in range(3):
            assert own(victim, victim.ask(_TARGET, to=to)) is None
        heard = bytes(impostor.heard)
    assert secret not in heard
    assert tries.bodies == set()
    assert set(tries.statuses) <= {403, 503, None}, tries.statuses
    assert tries.statuses[403] > 100, tries.statuses
    assert tries.count > 500, tries.statuses
    is_itself_again(victim, f"{network}-5", to=to)
    assert macs(world)["mismatches"][network] >= tries.statuses[403]


def test_the_same_guest_reads_all_of_it_where_nobody_checks(world: World) -> None:
    """What the test above relies on: the address can be taken, and the wire be heard."""
    (network,) = (one for one in world.networks if one["id"] == "red")
    world.daemon.put([{**network, "mac_check": False}])
    thief = world.lab.guest("red", 66)
    secret = user_data_of("red-5")
    with Impostor(thief, "10.0.0.5") as impostor:
        tries = impostor.try_for(1.0, _TARGET, source="10.0.0.5", to=IPV4)
        heard = bytes(impostor.heard)
    assert tries.bodies == {secret}
    assert secret in heard
    # It stays for half a minute while connections of before have not ended.
    until(lambda: table(world, "red") == "", within_s=40, what="no table")
    world.daemon.put([network])
    until(lambda: table(world, "red"), what="the filter")
    is_itself_again(world.red, "red-5")
    world.all_right()


def test_of_two_guests_known_by_mac_alone_neither_reads_the_other_s(world: World) -> None:
    victim, thief = world.lab.guest("red", 108), world.lab.guest("red", 109)
    world.daemon.put(instances=[by_mac(victim, "victim"), by_mac(thief, "thief")])
    reads(victim, "victim")
    address = victim.addresses[0]
    with Impostor(thief, address) as impostor:
        seen: set[bytes] = set()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            seen |= impostor.try_for(0.05, _TARGET, source=address, to=IPV4).bodies
            try:
                reply = victim.ask(_TARGET, timeout_s=0.1)
            except Lost:
                continue
            assert reply.body == user_data_of("victim") or reply.status in (403, 503)
        heard = bytes(impostor.heard)
    # The lease is the thief's now, as far as anybody can see: it reads its own.
    assert seen <= {user_data_of("thief")}
    assert user_data_of("victim") not in heard
    is_itself_again(victim, "victim")


def _pairs4(listed: str) -> str:
    """The sets of pairs in a table as nft(8) lists it."""
    return listed.partition("set good4")[2].partition("set begun4")[0]


def test_without_a_controller_known_guests_go_on_and_impostors_do_not(world: World) -> None:
    bare, thief = world.lab.guest("red", 110), world.lab.guest("red", 66)
    world.daemon.put(instances=[by_mac(bare, "bare"), instance("thief", "red", 66)])
    reads(bare, "bare")
    before = table(world, "red")
    world.daemon.kill_controller()
    for guest, name in ((bare, "bare"), (world.red, "red-5")):
        for _ in range(3):
            reads(guest, name)
    with Impostor(thief, "10.0.0.5") as impostor:
        tries = impostor.try_for(0.5, _TARGET, source="10.0.0.5", to=IPV4)
    assert tries.bodies == set()
    assert set(tries.statuses) <= {503, None}, tries.statuses
    is_itself_again(world.red, "red-5")
    world.daemon.start()
    assert _pairs4(before) == _pairs4(table(world, "red"))
    reads(bare, "bare")
    assert macs(world)["learned"] == 1
    world.all_right()


def _die_after(owner: type, name: str, armed: Path) -> None:
    """Have a process kill itself after its next call of a coroutine method, once a file is there."""
    do = getattr(owner, name)

    async def do_and_die(*words: object) -> object:
        result = await do(*words)
        die_if_armed()
        return result

    def die_if_armed() -> None:
        if armed.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(owner, name, do_and_die).start()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(MacFilters, "withdraw"), (RecordApplier, "apply"), (MacFilters, "grant")],
)
def test_a_controller_killed_while_a_guest_s_mac_changes_leaves_the_guest_served(
    world: World, owner: type, name: str
) -> None:
    armed = world.daemon.directory / "armed"
    world.daemon.put(instances=[instance("red-5", "red", mac="fa:16:3e:99:99:97")])
    assert world.red.ask(_TARGET).status == 403
    world.daemon.kill_controller()
    world.daemon.start(before=partial(_die_after, owner, name, armed))
    armed.touch()
    with pytest.raises(ImdsproxyError):
        world.daemon.put(instances=[instance("red-5", "red")])
    # Nobody but the kernel and HAProxy is there.
    reads(world.red, "red-5")
    armed.unlink()
    world.daemon.kill_controller()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(MacFilters, "withdraw"), (RecordApplier, "apply"), (MacFilters, "grant")],
)
def test_a_start_after_a_kill_while_an_address_moves_serves_its_new_owner(
    world: World, owner: type, name: str
) -> None:
    armed, other = world.daemon.directory / "armed", "fa:16:3e:99:99:96"
    world.daemon.put(instances=[instance("red-5", "red", mac=other)])
    world.daemon.kill_controller()
    world.daemon.start(before=partial(_die_after, owner, name, armed))
    armed.touch()
    moved = instance("mover", "red", 9, mac=other)
    with pytest.raises(ImdsproxyError):
        world.daemon.put(instances=[{**moved, "id": "red-5"}, instance("heir", "red", 5)])
    armed.unlink()
    world.daemon.kill_controller()
    world.daemon.start()
    reads(world.red, "heir")


def test_who_flushes_all_tables_does_not_let_anybody_in(world: World) -> None:
    run(*within(world.lab.name("red")), "nft", "flush", "ruleset")
    until(lambda: table(world, "red"), within_s=1, what="the table's return")
    until(lambda: own(world.red, world.red.ask(_TARGET)) is None, within_s=1, what="an answer")
    assert "10.0.0.5 . fa:16:3e:00:00:05" in table(world, "red")


def test_without_its_table_a_filter_lets_no_guest_through(world: World) -> None:
    with world.looking_away():
        run(*within(world.lab.name("red")), "nft", "flush", "ruleset")
        with pytest.raises(Lost):
            world.red.ask(_TARGET, timeout_s=0.5)
    until(lambda: own(world.red, world.red.ask(_TARGET)) is None, what="an answer")


def test_where_the_port_behind_the_filter_is_taken_no_guest_with_a_mac_is_answered(
    world: World,
) -> None:
    network = world.lab.namespace_network("busy")
    guest = world.lab.guest("busy", 7)
    holder = inside(world.lab.name("busy"), socket.socket)
    with holder:
        holder.bind(("0.0.0.0", 254))
        holder.listen()
        world.daemon.put([network], [instance("busy-7", "busy", 7)])
        told = world.daemon.status()["problems"]
        assert any("port 254" in one["reason"] and one["hint"] for one in told), told
        assert guest.ask(_TARGET).status == 503
        world.all_right()
    until(lambda: macs(world)["refused"] == 0, within_s=5, what="the filter")
    # The filter is created, then HAProxy listens behind it, then it is filled.
    until(lambda: guest.ask(_TARGET).status == 200, within_s=5, what="an answer")
    reads(guest, "busy-7")


def test_nothing_is_left_at_the_end() -> None:
    with open_world() as world:
        assert table(world, "red")
        assert table(world, "grey", "host")
        world.daemon.stop()
        assert table(world, "red") == ""
        assert table(world, "grey", "host") == ""
