"""What a guest finds that tries every port of the metadata addresses: metadata, and no way to administer anything."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Final

import pytest

from support.guest import IPV4, IPV6, Guest, Lost, inside
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_METADATA: Final = 80
_UNVERIFIED: Final = 254
"""Where the kernel leads what came with another MAC than its address goes with."""

_TYPE: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_AT_ONCE: Final = 800
_WITHIN_S: Final = 0.1
"""Guest and host are one kernel, which answers at once what it answers at all; an interface says nothing."""
_LISTENERS: Final = {"red": "a namespace", "blue": "a bridge", "grey": "an interface"}
_BODIES: Final = (b"", b"no instance has this address in this network")
_ADMIN: Final = (
    "/metrics",
    "/haproxy?stats",
    "/stats",
    "/;csv",
    "/admin/stats",
    "/v1/status",
    "/v1/instances",
    "/v1/records",
    "/v1/documents?network=green&address=10.0.0.5&path=/latest/user-data",
    "/v1/haproxy-configuration",
    "/docs",
    "/openapi.json",
    "/livez",
    "/readyz",
    "/health",
    "/debug",
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Every listener that the daemon can have is there, on the host's loopback."""
    settings: dict[str, dict[str, object]] = {
        "resolver": {"hold_s": 0.0},
        "metrics": {"listen": "127.0.0.1:9465", "haproxy_listen": "127.0.0.1:9466"},
    }
    with open_world(settings) as world:
        ports = _open_ports(world.lab.host, "127.0.0.1")
        # Else there would be nothing to find.
        assert {9465, 9466} <= ports
        yield world


def _open_ports(namespace: str, address: str, device: str = "lo") -> set[int]:
    """The ports at which a connection is taken that is made in a namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = inside(namespace, lambda: _scan(family, address, device))
    assert len(found) < 100, f"{len(found)} ports of {address}"
    return found


def _scan(family: int, address: str, device: str) -> set[int]:
    scope = socket.if_nametoindex(device) if ip_address(address).is_link_local else 0
    found: set[int] = set()
    for first in range(1, 65_536, _AT_ONCE):
        with ExitStack() as stack:
            asked = {}
            for port in range(first, min(first + _AT_ONCE, 65_536)):
                sock = stack.enter_context(socket.socket(family, _TYPE))
                target = (address, port, 0, scope) if family == socket.AF_INET6 else (address, port)
                code = sock.connect_ex(target)
                if code in (0, errno.EINPROGRESS):
                    asked[sock.fileno()] = sock, port
            found |= _opened(asked)
    return found


def _opened(asked: dict[int, tuple[socket.socket, int]]) -> set[int]:
    """Which of them get connected; whoever says nothing in time is not there."""
    found = set()
    poll = select.poll()
    for descriptor in asked:
        poll.register(descriptor, select.POLLOUT)
    while asked and (ready := poll.poll(_WITHIN_S * 1_000)):
        for descriptor, _ in ready:
            poll.unregister(descriptor)
            sock, port = asked.pop(descriptor)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                found.add(port)
    return found


@pytest.mark.parametrize("to", [IPV4, IPV6])
@pytest.mark.parametrize("network", _LISTENERS)
def test_a_guest_finds_metadata_and_nothing_else_at_any_port(
    world: World, network: str, to: str
) -> None:
    guest = world.guests[network]
    found = _open_ports(guest.namespace, to, guest.device)
    assert _METADATA in found
    assert found <= {_METADATA, _UNVERIFIED}
    for port in found:
        _has_no_admin_surface(guest, to, port)


def _has_no_admin_surface(guest: Guest, to: str, port: int) -> None:
    asker = Guest(guest.name, guest.namespace, guest.network, guest.mac, guest.addresses, port=port)
    for target in _ADMIN:
        for method in ("GET", "POST", "OPTIONS"):
            with contextlib.suppress(Lost):
                got = asker.ask(target, to=to, method=method)
                assert got.status in (400, 403, 404, 405, 503), (port, method, target, got)
                assert got.body in _BODIES or got.status == 503, (port, method, target, got)


def test_a_guest_that_nobody_knows_finds_no_more(world: World) -> None:
    stranger = world.lab.guest("red", 77)
    until(stranger.reaches, what="the stranger's reaching it")
    found = _open_ports(stranger.namespace, IPV4, stranger.device)
    assert _METADATA in found
    assert found <= {_METADATA, _UNVERIFIED}
    for port in found:
        _has_no_admin_surface(stranger, IPV4, port)
