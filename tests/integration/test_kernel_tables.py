"""Our tables in a real kernel: who gets through, whom answers reach, and how far."""

import contextlib
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Final

import pytest

from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model.entities import METADATA_IPV4, IpAddress, MacAddress, NetworkId
from imdsproxy.model.wire import ANSWER_DSCP, NEXT_TO_MARK, VERIFIED_PORT
from imdsproxy.network.anti_spoofing.kernel import KernelHopLimits, KernelMacFilters, TableGone
from imdsproxy.network.anti_spoofing.plan import ANY_MAC, MacFilter
from support.guest import inside
from support.hostlab import HostLab
from support.impostor import open_wire, syn_frame
from support.lab import until
from support.patience import patience

pytestmark = pytest.mark.root

_ADDRESS: Final = "10.0.0.5"
_OTHER: Final = MacAddress("02:00:00:00:00:99")
_SENDERS: Final = 2048
"""Connections whose sender a mac_filter keeps."""


class Echo(socketserver.ThreadingTCPServer):
    """Says which port took a connection, for each byte that comes; marks its answers where it is told to."""

    # As HAProxy binds: who does it otherwise is in its way.
    allow_reuse_address = allow_reuse_port = daemon_threads = True
    marks = False

    def __init__(self, port: int, word: bytes) -> None:
        super().__init__((str(METADATA_IPV4), port), _Answer)
        self.word = word
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Answer(socketserver.BaseRequestHandler):
    server: Echo

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self.request.recv(1):
                if self.server.marks:
                    self.request.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, ANSWER_DSCP << 2)
                self.request.sendall(self.server.word)


@dataclass
class Rig:
    lab: HostLab
    kernel: KernelMacFilters
    thread: NamespaceThread
    mac_filter: MacFilter
    guest: str
    mac: MacAddress
    unverified: Echo
    verified: Echo

    @property
    def place(self) -> str:
        assert self.mac_filter.namespace is not None
        return self.mac_filter.namespace.name

    @property
    def pair(self) -> dict[IpAddress, MacAddress]:
        return {ip_address(_ADDRESS): self.mac}

    async def have(self, pairs: dict[IpAddress, MacAddress]) -> None:
        """A mac_filter that lets these through."""
        name = self.mac_filter.network
        assert await self.kernel.open([self.mac_filter]) == {name: None}
        filled = await self.kernel.fill([(self.mac_filter, {}, pairs)], fresh={name}, busy={name})
        assert filled == {name: None}

    def connect(self) -> socket.socket:
        made = inside(self.guest, socket.socket)
        made.settimeout(0.5 * patience())
        try:
            made.connect((str(METADATA_IPV4), 80))
        except OSError:
            made.close()
            raise
        return made


@pytest.fixture
def rig(lab: HostLab) -> Iterator[Rig]:
    place = lab.namespace("place")
    bridge = "br0"
    lab.ip("-n", place, "link", "add", bridge, "type", "bridge", "forward_delay", "0")
    lab.ip("-n", place, "link", "set", bridge, "up")
    for address in ("10.0.0.1/24", f"{METADATA_IPV4}/32"):
        lab.address(place, address, bridge)
    guest = lab.namespace("guest")
    mac = MacAddress("02:00:00:00:00:05")
    lab.ip(
        *("-n", place, "link", "add", "v1", "master", bridge, "up", "type", "veth"),
        *("peer", "name", "eth0", "address", mac, "netns", guest),
    )
    lab.ip("-n", guest, "link", "set", "eth0", "up")
    lab.address(guest, f"{_ADDRESS}/24", "eth0")
    lab.ip("-n", guest, "route", "add", f"{METADATA_IPV4}/32", "dev", "eth0")
    # The kernel notices a carrier a moment later; what is sent before that is lost.
    until(lambda: "state forwarding" in lab.ip("-n", place, "-d", "link", "show", "v1"))
    directory = NamespaceDirectory()
    ref = directory.identity(place)
    assert ref is not None
    network = NetworkId("net")
    mac_filter = MacFilter(network, ref, ((bridge, 2),), lab.naming.link(network))
    echoes = [
        inside(place, partial(Echo, port, word))
        for port, word in ((80, b"u"), (VERIFIED_PORT, b"v"))
    ]
    with contextlib.closing(NamespaceThread(directory)) as thread:
        yield Rig(lab, KernelMacFilters(thread), thread, mac_filter, guest, mac, *echoes)
    for echo in echoes:
        echo.shutdown()
        echo.server_close()


def _ask(connection: socket.socket) -> bytes:
    connection.sendall(b"?")
    return connection.recv(1)


async def test_only_a_pair_or_any_mac_gets_through_and_what_began_unverified_goes_on_so(
    rig: Rig,
) -> None:
    await rig.have({})
    address, has = ip_address(_ADDRESS), dict[IpAddress, MacAddress]()
    with rig.connect() as first:
        assert _ask(first) == b"u"
        for mac, answer in ((_OTHER, b"u"), (rig.mac, b"v"), (ANY_MAC, b"v")):
            await rig.kernel.change(rig.mac_filter, has=has, wanted={address: mac})
            has = {address: mac}
            with rig.connect() as connection:
                assert [_ask(connection) for _ in range(2)] == [answer] * 2
            assert _ask(first) == b"u"


async def test_connections_from_before_the_filter_go_on(rig: Rig) -> None:
    with rig.connect() as connection:
        assert _ask(connection) == b"u"
        await rig.have(rig.pair)
        assert _ask(connection) == b"u"
        with rig.connect() as later:
            assert _ask(later) == b"v"


async def test_a_released_filter_leads_connections_that_begin_past_it_and_keeps_those_that_are_open(
    rig: Rig,
) -> None:
    await rig.have(rig.pair)
    with rig.connect() as before:
        assert _ask(before) == b"v"
        assert await rig.kernel.has_connections(rig.place)
        await rig.kernel.release([(rig.place, rig.mac_filter.table)])
        with rig.connect() as after:
            assert [_ask(after) for _ in range(2)] == [b"u"] * 2
        assert _ask(before) == b"v"


@pytest.mark.parametrize("verified", [False, True])
async def test_a_connection_counts_as_open_whether_it_is_verified_or_not(
    rig: Rig, *, verified: bool
) -> None:
    await rig.have(rig.pair if verified else {})
    assert not await rig.kernel.has_connections(rig.place)
    with rig.connect() as connection:
        assert _ask(connection) == (b"v" if verified else b"u")
        assert await rig.kernel.has_connections(rig.place)


async def test_a_withdrawn_pair_ends_its_connections_on_both_sides(rig: Rig) -> None:
    await rig.have(rig.pair)
    with rig.connect() as connection:
        assert _ask(connection) == b"v"
        await rig.kernel.change(rig.mac_filter, has=rig.pair)
        with pytest.raises(ConnectionResetError):
            _ask(connection)
        listed = rig.lab.run(
            *("/usr/bin/nsenter", f"--net=/run/netns/{rig.place}", "--"),
            *("ss", "-Htn", "state", "established", "sport", "=", f":{VERIFIED_PORT}"),
        )
        assert listed == ""
    with rig.connect() as later:
        assert _ask(later) == b"u"


@pytest.mark.parametrize("why", ["bound", "any mac", ""])
async def test_a_marked_answer_is_sent_only_where_it_is_for_that_mac_or_for_any(
    rig: Rig, why: str
) -> None:
    await rig.have({})
    rig.unverified.marks = True
    address = ip_address(_ADDRESS)
    with rig.connect() as connection:
        if why == "bound":
            port = connection.getsockname()[1]
            assert await rig.kernel.bind_answers(rig.mac_filter, address, port, rig.mac)
        elif why:
            await rig.kernel.change(rig.mac_filter, wanted={address: ANY_MAC})
        with contextlib.nullcontext() if why else pytest.raises(TimeoutError):
            assert _ask(connection) == b"u"


@pytest.mark.parametrize("first", [True, False])
async def test_answers_on_a_connection_never_go_to_a_second_mac(rig: Rig, *, first: bool) -> None:
    await rig.have({})
    rig.unverified.marks = True
    _believe(rig, rig.mac if first else _OTHER, "permanent")
    with rig.connect() as connection, _wire(rig) as wire:
        address, port = ip_address(_ADDRESS), connection.getsockname()[1]
        macs = (rig.mac, _OTHER) if first else (_OTHER, rig.mac)
        told = [
            await rig.kernel.bind_answers(rig.mac_filter, address, port, mac)
            for mac in (macs[0], *macs)
        ]
        assert told == [True, True, False]
        if first:
            assert _ask(connection) == b"u"
        else:
            with pytest.raises(TimeoutError):
                _ask(connection)
        heard = {frame[:6] for frame in _heard(wire) if _payload(frame) == b"u"}
    assert heard == {bytes.fromhex(macs[0].replace(":", ""))}


def _wire(rig: Rig) -> socket.socket:
    """What arrives at the guest, also for other MACs: the bridge does not know where those are."""
    return open_wire(rig.guest, "eth0", timeout_s=0.2)


def _payload(frame: bytes) -> bytes:
    """What TCP carries in a frame of IPv4; nothing in another one, whose last bytes may be any."""
    packet = frame[14:]
    if frame[12:14] != b"\x08\0" or packet[9] != socket.IPPROTO_TCP:
        return b""
    (length,) = struct.unpack_from(">H", packet, 2)
    segment = packet[(packet[0] & 15) * 4 : length]
    return segment[(segment[12] >> 4) * 4 :]


def _own_mac(rig: Rig) -> bytes:
    (link,) = json.loads(rig.lab.ip("-j", "-n", rig.place, "link", "show", "br0"))
    return bytes.fromhex(link["address"].replace(":", ""))


def _heard(wire: socket.socket) -> list[bytes]:
    heard = []
    with contextlib.suppress(TimeoutError):
        while True:
            heard.append(wire.recv(2000))
    return heard


_TAGS: Final = {
    "plain": b"",
    "vlan 0": b"\x81\0\0\0",
    "vlan 0 twice": b"\x81\0\0\0\x81\0\0\0",
    "service vlan 0, vlan 0": b"\x88\xa8\0\0\x81\0\0\0",
    "vlan 0 three times": b"\x81\0\0\0\x81\0\0\0\x81\0\0\0",
}


@pytest.mark.parametrize("tags", _TAGS.values(), ids=_TAGS)
async def test_no_guest_gets_around_a_filter(rig: Rig, tags: bytes) -> None:
    # A good pair: the test goes around the filter, not through it.
    await rig.have(rig.pair)
    ports = (20_000, VERIFIED_PORT)
    frame = syn_frame(mac=rig.mac, to=_own_mac(rig), source=_ADDRESS, ports=ports, tags=tags)
    with _wire(rig) as wire:
        wire.send(frame)
        answers = [one for one in _heard(wire) if one[12:14] == b"\x08\0" and one[23] == 6]
    assert not [one for one in answers if one[36:38] == frame[-20:-18]]


async def test_a_verified_answer_reaches_the_mac_of_its_pair_and_no_other(rig: Rig) -> None:
    await rig.have(rig.pair)
    with rig.connect() as connection:
        assert _ask(connection) == b"v"
        # As after forged ARP.
        _believe(rig, _OTHER, "permanent")
        with _wire(rig) as wire:
            assert _ask(connection) == b"v"
            heard = _heard(wire)
        theirs = bytes.fromhex(_OTHER.replace(":", ""))
        assert not [frame for frame in heard if frame[:6] == theirs and frame[12:14] == b"\x08\0"]


async def test_a_filter_that_is_there_is_kept_as_it_is_also_with_thousands_of_pairs(
    rig: Rig,
) -> None:
    pairs = {
        **{ip_address(0x0A010000 + number): _OTHER for number in range(5000)},
        ip_address(_ADDRESS): rig.mac,
        ip_address("2001:db8::5"): _OTHER,
        ip_address("10.0.0.6"): ANY_MAC,
        ip_address("2001:db8::6"): ANY_MAC,
    }
    await rig.have(pairs)
    with rig.connect() as connection:
        assert _ask(connection) == b"v"
        (opened,) = (await rig.kernel.open([rig.mac_filter])).values()
        assert opened == pairs
        assert _ask(connection) == b"v"


async def test_a_filter_that_is_gone_is_an_error(rig: Rig) -> None:
    await rig.have({})
    await rig.kernel.close([(rig.place, rig.mac_filter.table), (rig.place, "never"), ("gone", "x")])
    for pairs in ({"wanted": rig.pair}, {"has": rig.pair}):
        with pytest.raises(TableGone):
            await rig.kernel.change(rig.mac_filter, **pairs)


def _believe(rig: Rig, mac: MacAddress, nud: str = "reachable") -> None:
    """Have the host take the guest's address for another's."""
    words = ("neigh", "replace", _ADDRESS, "lladdr", mac, "dev", "br0", "nud", nud)
    rig.lab.ip("-n", rig.place, *words)


def _believed(rig: Rig) -> str:
    return rig.lab.ip("-n", rig.place, "neigh", "show", _ADDRESS, "dev", "br0")


async def test_what_is_unverified_is_answered_to_the_mac_that_it_came_from(rig: Rig) -> None:
    await rig.have({})
    _believe(rig, _OTHER, "permanent")
    with rig.connect() as connection:
        assert _ask(connection) == b"u"
        port = connection.getsockname()[1]
        address = ip_address(_ADDRESS)
        assert await rig.kernel.sender(rig.mac_filter, address, port) == rig.mac
        assert await rig.kernel.sender(rig.mac_filter, address, port ^ 1) is None
        assert await rig.kernel.sender(rig.mac_filter, ip_address("fe80::5"), port) is None
    await rig.kernel.close([(rig.place, rig.mac_filter.table)])
    assert await rig.kernel.sender(rig.mac_filter, address, port) is None


async def test_a_port_that_another_guest_uses_again_is_answered_to_that_one(rig: Rig) -> None:
    await rig.have({})
    with rig.connect() as connection:
        used = connection.getsockname()
        # Reset, not closed: the port is free at once.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rig.lab.ip("-n", rig.guest, "link", "set", "eth0", "address", _OTHER)
    with inside(rig.guest, socket.socket) as again:
        again.settimeout(5)
        again.bind(used)
        again.connect((str(METADATA_IPV4), 80))
        assert _ask(again) == b"u"
    assert await rig.kernel.sender(rig.mac_filter, ip_address(_ADDRESS), used[1]) == _OTHER


@pytest.mark.parametrize(("others", "adopted"), [(0, False), (100, False), (0, True)])
async def test_who_gets_a_pair_is_answered_though_the_host_takes_its_address_for_another_s(
    rig: Rig, others: int, *, adopted: bool
) -> None:
    before = {ip_address(_ADDRESS): _OTHER} if adopted else {}
    await rig.have(before)
    _believe(rig, _OTHER)
    many = {ip_address(0x0A010000 + number): _OTHER for number in range(others)}
    if adopted:
        change = (rig.mac_filter, before, rig.pair)
        assert await rig.kernel.fill([change], fresh=(), busy=()) == {rig.mac_filter.network: None}
    else:
        await rig.kernel.change(rig.mac_filter, wanted=rig.pair | many)
    assert rig.mac in _believed(rig)
    with rig.connect() as connection:
        assert _ask(connection) == b"v"


async def test_what_an_operator_made_permanent_stays_and_what_nobody_knows_is_not_made_up(
    rig: Rig,
) -> None:
    await rig.have({})
    _believe(rig, _OTHER, "permanent")
    await rig.kernel.change(rig.mac_filter, wanted=rig.pair | {ip_address("10.0.0.77"): _OTHER})
    assert _OTHER in _believed(rig)
    assert "10.0.0.77" not in rig.lab.ip("-n", rig.place, "neigh")


async def test_where_a_flood_leaves_no_room_for_senders_the_neighbour_table_counts(
    rig: Rig,
) -> None:
    await rig.have({})
    to = _own_mac(rig)
    with _wire(rig) as wire:
        for number in range(_SENDERS + 500):
            source = str(ip_address(0x0A000100 + number))
            wire.send(syn_frame(mac=rig.mac, to=to, source=source, ports=(4000, 80)))
    with rig.connect() as connection:
        assert _ask(connection) == b"u"
        port = connection.getsockname()[1]
        assert await rig.kernel.sender(rig.mac_filter, ip_address(_ADDRESS), port) is None
    await rig.kernel.change(rig.mac_filter, wanted=rig.pair)
    with rig.connect() as connection:
        assert _ask(connection) == b"v"


# The rule for hop limits: what it makes of a DSCP, and what it leaves alone

_METADATA: Final = ("169.254.169.254", "fe80::a9fe:a9fe")


@dataclass
class Hops:
    lab: HostLab
    kernel: KernelHopLimits
    place: NamespaceRef

    def sent(self, address: str, port: int, dscps: tuple[int, ...]) -> list[tuple[int, int]]:
        """Limit and DSCP of what a connection from there sends while it has each of these."""
        return inside(self.place.name, lambda: _send(address, port, dscps))


@pytest.fixture
def hops(lab: HostLab) -> Iterator[Hops]:
    place = lab.namespace("place")
    lab.ip("-n", place, "link", "set", "lo", "up")
    for address in ("169.254.169.254/32", "10.0.0.9/32"):
        lab.ip("-n", place, "address", "add", address, "dev", "lo")
    lab.ip("-n", place, "address", "add", "fe80::a9fe:a9fe/64", "dev", "lo", "nodad")
    directory = NamespaceDirectory()
    ref = directory.identity(place)
    assert ref is not None
    with contextlib.closing(NamespaceThread(directory)) as thread:
        yield Hops(lab, KernelHopLimits(thread, f"{lab.naming.prefix}-hops"), ref)


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
    hops: Hops, address: str, port: int
) -> None:
    assert await hops.kernel.open([hops.place]) == {hops.place: None}
    assert hops.sent(address, port, (1, 2, NEXT_TO_MARK, ANSWER_DSCP, 63, 0)) == [
        (1, 0),
        (2, 0),
        (NEXT_TO_MARK, 0),
        (64, ANSWER_DSCP),
        (63, 0),
        (64, 0),
    ]


async def test_what_others_send_is_left_alone(hops: Hops) -> None:
    await hops.kernel.open([hops.place])
    assert hops.sent("10.0.0.9", 80, (1,)) == [(64, 1)]
    assert hops.sent(_METADATA[0], 8080, (1,)) == [(64, 1)]


async def test_it_is_there_once_and_gone_when_it_is_taken_away(hops: Hops) -> None:
    for _ in range(2):
        assert await hops.kernel.open([hops.place]) == {hops.place: None}
        assert await hops.kernel.restore([hops.place.name, "imdst-none"]) == {hops.place}
    for _ in range(2):
        names = (hops.place.name, "imdst-none")
        await hops.kernel.close([(one, hops.kernel.table) for one in names])
    assert hops.sent(_METADATA[0], 80, (1,)) == [(64, 1)]


async def test_another_namespace_of_the_name_is_not_taken_for_it(hops: Hops) -> None:
    gone = NamespaceRef(hops.place.name, hops.place.inode + 1)
    (error,) = (await hops.kernel.open([gone])).values()
    assert error is not None
    assert "is gone" in error.message
