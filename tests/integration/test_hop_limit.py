"""How far the answer goes that holds a session token: on the wire, and behind a hop that routes."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.daemon import instance
from support.guest import IPV4, IPV6, Connection, Guest, Reply, inside, with_token
from support.hops import Wire
from support.lab import batch, ip, until, within
from support.world import World, own

pytestmark = pytest.mark.root

_TOKEN: Final = "/latest/api/token"
_USER_DATA: Final = "/latest/user-data"
_TTL: Final = ("X-aws-ec2-metadata-token-ttl-seconds: 60",)


def _put(connection: Connection) -> Reply:
    return connection.request(_TOKEN, method="PUT", headers=_TTL)


def _given(guest: Guest, limit: int) -> None:
    """Wait until tokens are sent with this limit, or an answer by the settings before would do."""

    def is_sent() -> bool:
        with Wire(guest) as wire, guest.connect() as connection:
            reply = _put(connection)
            return reply.status == 200 and wire.seen(reply.body).limit == limit

    until(is_sent, what=f"a token sent with {limit}")


def _limits(guest: Guest, to: str = IPV4) -> tuple[int, int]:
    """Of a token's answer, and of the answer after it on the same connection."""
    with Wire(guest) as wire, guest.connect(to=to) as connection:
        reply = _put(connection)
        assert reply.status == 200, reply
        first = wire.seen(reply.body)
        after = connection.request(_USER_DATA, headers=with_token(reply.text))
        assert own(guest, after) is None
        second = wire.seen(after.body)
    assert (first.dscp, second.dscp) == (0, 0)
    return first.limit, second.limit


def _tables(namespace: str) -> list[str]:
    told = subprocess.run(
        (*within(namespace), "/usr/sbin/nft", "list", "tables", "inet"),
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split()[-1] for line in told.stdout.splitlines()]


@contextlib.contextmanager
def _container(world: World, guest: Guest, number: int = 77) -> Iterator[Guest]:
    """A machine behind a guest that routes; its address is one more of the guest's instance."""
    lab, address = world.lab, f"10.0.0.{number}"
    name = lab.namespace("container")
    ip(
        *("-n", guest.namespace, "link", "add", "inner", "type", "veth"),
        *("peer", "name", "eth0", "netns", name),
    )
    batch(guest.namespace, ["link set inner up", f"route add {address}/32 dev inner"])
    inside(guest.namespace, _route)
    batch(
        name,
        [
            f"address add {address}/32 dev eth0",
            "link set eth0 up",
            f"route add {guest.addresses[0]}/32 dev eth0",
            f"route add default via {guest.addresses[0]} dev eth0 onlink",
        ],
    )
    port = {"network": guest.network, "mac": guest.mac, "addresses": [*guest.addresses, address]}
    world.daemon.put(
        instances=[instance(f"{guest.network}-5", guest.network, fields={"ports": [port]})]
    )
    inner = Guest("container", name, guest.network, guest.mac, (address,))
    try:
        until(lambda: inner.reaches(timeout_s=1), what="the way through")
        assert inner.ask(_USER_DATA).status == 200
        yield inner
    finally:
        ip("-n", guest.namespace, "link", "del", "inner")
        lab.delete_namespace("container")


def _route() -> None:
    # By default the kernel answers for others after up to 0.8 s.
    for key, value in (
        ("ip_forward", 1),
        ("conf/eth0/proxy_arp", 1),
        ("neigh/eth0/proxy_delay", 0),
    ):
        Path("/proc/sys/net/ipv4", key).write_text(str(value))


def test_it_is_on_the_wire_in_each_kind_of_network_and_gone_by_the_next_answer(
    world: World,
) -> None:
    world.have_policy({"host": {"hop_limit": 7}})
    for guest in world.everybody:
        _given(guest, 7)
        assert _limits(guest) == (7, 64), guest.name
        assert _limits(guest, IPV6) == (7, 64), guest.name


def test_behind_a_hop_a_limit_of_1_never_arrives_and_2_does(world: World) -> None:
    """The kernel sends what got lost again, with what the connection has by then."""
    with _container(world, world.red) as inner:
        world.have_policy({"instances": {"red-5": {"hop_limit": 1}}})
        _given(world.red, 1)
        get = f"GET {_USER_DATA} HTTP/1.1\r\nHost: x\r\n\r\n"
        put = f"PUT {_TOKEN} HTTP/1.1\r\nHost: x\r\n{_TTL[0]}\r\n\r\n"
        with Wire(world.red) as wire, inner.connect() as connection:
            connection.send((put + get).encode())
            first = wire.seen(b"200 OK")
            connection.send(get.encode())
            again = [wire.seen(b"200 OK") for _ in range(4)]
            assert {one.limit for one in (first, *again)} == {1}
            connection.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.socket.recv(65_536)
        assert inner.ask(_USER_DATA).status == 200
        world.have_policy({"instances": {"red-5": {"hop_limit": 2}}})
        with inner.connect() as connection:
            token = _put(connection)
            assert token.status == 200
            assert connection.request(_USER_DATA, headers=with_token(token.text)).status == 200


def test_it_is_one_instances_and_changes_without_a_reload(world: World) -> None:
    pids = world.settled()
    world.have_policy({"instances": {"red-5": {"hop_limit": 3}}})
    _given(world.red, 3)
    table = f"{world.lab.prefix}-hops"
    assert _limits(world.red) == (3, 64)
    assert _limits(world.guests["green"]) == (64, 64)
    assert table in _tables(world.lab.name("red"))
    assert table not in _tables(world.lab.name("green"))
    world.have_policy({"instances": {"red-5": {"hop_limit": 4}}})
    assert _limits(world.red) == (4, 64)
    world.have_policy({})
    assert _limits(world.red) == (64, 64)
    until(lambda: table not in _tables(world.lab.name("red")), what="the rule's end")
    assert world.settled() == pids


def test_it_outlives_a_reload_and_the_controllers_death(world: World) -> None:
    world.have_policy({"host": {"hop_limit": 5}})
    for guest in world.everybody:
        _given(guest, 5)
    world.reload()
    assert _limits(world.red) == (5, 64)
    world.daemon.kill_controller()
    assert _limits(world.red) == (5, 64)
    world.daemon.start()
    for guest in world.everybody:
        assert _limits(guest) == (5, 64)


def test_a_guest_that_is_not_known_yet_gets_its_token_as_far_as_everybody(world: World) -> None:
    """What comes by the resolver is sent on a connection that is not ours to mark: it is to ask again."""
    world.have_policy({"networks": {"red": {"hop_limit": 2}}})
    _given(world.red, 2)
    guest = world.lab.guest("red", 81)
    ports = {"ports": [{"network": "red", "mac": guest.mac}]}
    world.daemon.put(instances=[instance("red-81", "red", 81, fields=ports)])
    first = guest.ask(_TOKEN, method="PUT", headers=_TTL)
    assert (first.status, first.headers["retry-after"], first.body) == (503, "1", b"")
    _given(guest, 2)
    assert _limits(guest) == (2, 64)
