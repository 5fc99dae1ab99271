"""The rule for hop limits in a real kernel: what it makes of a DSCP, and what it leaves alone."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from imdsproxy.anti_spoofing.kernel import KernelHopLimits
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.wire import ANSWER_DSCP, NEXT_TO_MARK, VERIFIED_PORT
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from support.guest import inside
from support.hostlab import HostLab

pytestmark = pytest.mark.root

_METADATA: Final = ("169.254.169.254", "fe80::a9fe:a9fe")


@dataclass
class Rig:
    lab: HostLab
    kernel: KernelHopLimits
    place: NamespaceRef

    def sent(self, address: str, port: int, dscps: tuple[int, ...]) -> list[tuple[int, int]]:
        """Limit and DSCP of what a connection from there sends while it has each of these."""
        return inside(self.place.name, lambda: _send(address, port, dscps))


@pytest.fixture
def rig(lab: HostLab) -> Iterator[Rig]:
    place = lab.namespace("place")
    lab.ip("-n", place, "link", "set", "lo", "up")
    for address in ("169.254.169.254/32", "10.0.0.9/32"):
        lab.ip("-n", place, "address", "add", address, "dev", "lo")
    lab.ip("-n", place, "address", "add", "fe80::a9fe:a9fe/64", "dev", "lo", "nodad")
    directory = NamespaceDirectory()
    ref = directory.identity(place)
    assert ref is not None
    with contextlib.closing(NamespaceThread(directory)) as thread:
        yield Rig(lab, KernelHopLimits(thread, f"{lab.naming.prefix}-hops"), ref)


def _send(address: str, port: int, dscps: tuple[int, ...]) -> list[tuple[int, int]]:
    v6 = ":" in address
    family = socket.AF_INET6 if v6 else socket.AF_INET
    level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
    option = socket.IPV6_TCLASS if v6 else socket.IP_TOS
    target = (address, port, 0, 1) if v6 else (address, port)
    found = []
    with contextlib.ExitStack() as stack:
        listener, client, wire = (
            stack.enter_context(one)
            for one in (
                socket.socket(family),
                socket.socket(family),
                socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)),
            )
        )
        listener.bind(target)
        listener.listen()
        wire.bind(("lo", 0))
        wire.settimeout(5)
        client.settimeout(5)
        client.connect(target)
        server = stack.enter_context(listener.accept()[0])
        for number, dscp in enumerate(dscps):
            text = b"answer %d." % number
            server.setsockopt(level, option, dscp << 2)
            server.sendall(text)
            # Whoever has it has found its checksums right.
            assert client.recv(100) == text
            data = b""
            while not data.endswith(text):
                data = wire.recv(65_536)
            (head,) = struct.unpack(">H", data[:2])
            found.append((data[7], head >> 6 & 63) if v6 else (data[8], head >> 2 & 63))
    return found


@pytest.mark.parametrize("port", [80, VERIFIED_PORT])
@pytest.mark.parametrize("address", _METADATA)
async def test_the_dscp_becomes_the_limit_and_the_mac_filters_mark_stays(
    rig: Rig, address: str, port: int
) -> None:
    assert await rig.kernel.open([rig.place]) == {rig.place: None}
    assert rig.sent(address, port, (1, 2, NEXT_TO_MARK, ANSWER_DSCP, 63, 0)) == [
        (1, 0),
        (2, 0),
        (NEXT_TO_MARK, 0),
        (64, ANSWER_DSCP),
        (63, 0),
        (64, 0),
    ]


async def test_what_others_send_is_left_alone(rig: Rig) -> None:
    await rig.kernel.open([rig.place])
    assert rig.sent("10.0.0.9", 80, (1,)) == [(64, 1)]
    assert rig.sent(_METADATA[0], 8080, (1,)) == [(64, 1)]


async def test_it_is_there_once_and_gone_when_it_is_taken_away(rig: Rig) -> None:
    for _ in range(2):
        assert await rig.kernel.open([rig.place]) == {rig.place: None}
        assert await rig.kernel.restore([rig.place.name, "imdst-none"]) == {rig.place}
    for _ in range(2):
        names = (rig.place.name, "imdst-none")
        await rig.kernel.close([(one, rig.kernel.table) for one in names])
    assert rig.sent(_METADATA[0], 80, (1,)) == [(64, 1)]


async def test_another_namespace_of_the_name_is_not_taken_for_it(rig: Rig) -> None:
    gone = NamespaceRef(rig.place.name, rig.place.inode + 1)
    (error,) = (await rig.kernel.open([gone])).values()
    assert error is not None
    assert "is gone" in error.message
