"""Messages of nf_tables (nfnetlink, `linux/netfilter/nf_tables.h`): tables, chains, rules, sets and their elements.

ADR 12 has the reasons for our own code: nft(8) takes 4 ms for each call, and a thousand networks have a table each.
Changes are batches: the kernel applies all of a batch, or nothing. The header defines the numbers of attributes.
"""

import errno
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from imdsproxy.host import nlmessages as nl

NETFILTER: Final = 12
"""Netlink protocol."""

_SUBSYSTEM: Final = 10 << 8
INET: Final = 1
"""Family of tables that see packets of both IP families."""

ARP, BRIDGE = 3, 7
"""Families of tables that see ARP packets of the host, and frames on bridges."""

NETDEV: Final = 5
"""Family of tables on devices, which see packets with their MACs."""

_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM, _GETSETELEM, _DELSETELEM = 3, 6, 9, 12, 13, 14
_NEWOBJECT, _GETOBJECT, _COUNTER = 18, 19, 1
DELTABLE: Final = _SUBSYSTEM | _DELTABLE
_APPEND: Final = 0x800
_NFGEN: Final = struct.Struct(">BBH")
_BATCH_BYTES: Final = 64 * 1024
_ELEMENTS_AT_ONCE: Final = 512
"""Number of elements that fit into an attribute, whose length has 16 bits."""

_ELEMENT: Final = 1 | nl.NESTED
_REGISTER: Final = 8
"""First of sixteen 4-byte registers; a key of several parts fills consecutive ones."""

LINK, NETWORK, TRANSPORT = 0, 1, 2
PROTOCOL, INPUT_DEVICE, OUTPUT_DEVICE, FAMILY, L4_PROTOCOL = 1, 6, 7, 15, 16
_PACKET_TYPE: Final = 19

_CONNECTION_STATUS: Final = 2
_DESTINATION_REWRITTEN: Final = 1 << 5

DEVICE_NAME: Final = 41
"""Type of a set's key, in nft(8)'s numbers."""

_KEYS_OF_HOST: Final = b"\0\4" + struct.pack("=I", 1)

INGRESS, EGRESS = 0, 1
"""Hooks of base chains of family `netdev`."""

PREROUTING, INPUT, OUTPUT = 0, 1, 3
"""Hooks of base chains of family `inet`."""

ARP_INPUT, BRIDGE_FORWARD = 0, 2
"""Hooks of base chains of families `arp` and `bridge`."""

DROP, ACCEPT, JUMP, GOTO, RETURN = 0, 1, -3, -4, -5
"""Verdicts of rules."""

Element: TypeAlias = tuple[bytes] | tuple[bytes, bytes]
"""Key of a set, or key and value of a map."""

Change: TypeAlias = tuple[int, int, bytes]
"""Type and flags of a message, and its attributes after the table's name."""


def _pack(values: Mapping[int, nl.Value]) -> bytes:
    return nl.pack_attributes(values, ">I")


def _pack_element(element: Element) -> bytes:
    packed = b"".join(
        nl.attribute(kind | nl.NESTED, nl.attribute(1, part))
        for kind, part in enumerate(element, 1)
    )
    return nl.attribute(_ELEMENT, packed)


def _expression(name: str, values: Mapping[int, nl.Value]) -> bytes:
    return _pack({1: {1: name, 2: values}})


def meta(key: int) -> bytes:
    """Load a property of the packet into the first register."""
    return _expression("meta", {2: key, 1: _REGISTER})


def payload(base: int, offset: int, length: int, *, into: int = 0) -> bytes:
    """Load bytes of a header into a register, counted from 0."""
    return _expression("payload", {1: _REGISTER + into, 2: base, 3: offset, 4: length})


def compare(value: bytes, *, differs: bool = False, register: int = 0) -> bytes:
    """Continue the rule only if a register is `value`, or `differs`."""
    return _expression("cmp", {1: _REGISTER + register, 2: int(differs), 3: {1: value}})


def bitwise(mask: bytes, flip: bytes = b"") -> bytes:
    """Keep these bits of the first register, and invert those in `flip`."""
    values = {4: {1: mask}, 5: {1: flip or bytes(len(mask))}}
    return _expression("bitwise", {1: _REGISTER, 2: _REGISTER, 3: len(mask), **values})


def shift_right(bits: int) -> bytes:
    """Shift the first register to the right: a 4-byte number in this machine's byte order."""
    by = struct.pack("=I", bits)
    return _expression("bitwise", {1: _REGISTER, 2: _REGISTER, 3: 4, 6: 2, 7: {1: by}})


def swap_bytes() -> bytes:
    """Convert the first two bytes of the first register from network to host byte order, or back."""
    return _expression("byteorder", {1: _REGISTER, 2: _REGISTER, 3: 0, 4: 2, 5: 2})


def store(
    base: int, offset: int, length: int, *, checksum: int | None = None, register: int = 0
) -> bytes:
    """Write a register over bytes of a header, and correct the checksum at `checksum`."""
    mends = None if checksum is None else 1
    where = {5: _REGISTER + register, 2: base, 3: offset, 4: length}
    return _expression("payload", {**where, 6: mends, 7: checksum})


def lookup(name: str, *, into: int | None = None, absent: bool = False) -> bytes:
    """Continue only if the registers' content is in a set, or `absent`; store a map's value in a register."""
    value = None if into is None else _REGISTER + into
    return _expression("lookup", {1: name, 2: _REGISTER, 3: value, 5: 1 if absent else None})


def remember(
    name: str, *, value: int | None = None, delete: bool = False, timeout_ms: int = 0
) -> bytes:
    """Add the registers' content to a set, or remove it; a map's value comes from a register.

    An existing element keeps its value, and its timeout restarts: the set's, or `timeout_ms`.
    """
    data = None if value is None else _REGISTER + value
    timeout = struct.pack(">Q", timeout_ms) if timeout_ms else None
    return _expression(
        "dynset", {1: name, 3: 2 if delete else 1, 4: _REGISTER, 5: data, 6: timeout}
    )


def count(name: str) -> bytes:
    return _expression("objref", {1: _COUNTER, 2: name})


def rewrite(offset: int, value: bytes, *, checksum: int) -> bytes:
    """Overwrite bytes of the transport header, and correct its checksum."""
    load = _expression("immediate", {1: _REGISTER, 2: {1: value}})
    return load + store(TRANSPORT, offset, len(value), checksum=checksum)


def is_redirected(*, differs: bool = False) -> bytes:
    """Continue only for a packet of a connection whose destination was rewritten, or `differs`."""
    load = _expression("ct", {1: _REGISTER, 2: _CONNECTION_STATUS})
    rewritten = load + bitwise(struct.pack("=I", _DESTINATION_REWRITTEN))
    return rewritten + compare(bytes(4), differs=not differs)


def redirect(port: int) -> bytes:
    """Redirect a new connection to a port of this namespace, at the address of its input device."""
    load = _expression("immediate", {1: _REGISTER, 2: {1: struct.pack(">H", port)}})
    return load + _expression("redir", {1: _REGISTER})


def untrack() -> bytes:
    """Keep the packet from connection tracking, and so from NAT."""
    return _expression("notrack", {})


def be_for_host() -> bytes:
    """Mark a frame as sent to the host's own MAC (PACKET_HOST)."""
    load = _expression("immediate", {1: _REGISTER, 2: {1: b"\0"}})
    return load + _expression("meta", {2: _PACKET_TYPE, 3: _REGISTER})


def present6(header: int) -> bytes:
    """Continue only if an IPv6 packet has an extension header."""
    flags = {3: 0, 4: 1, 5: 1, 6: 0}
    load = _expression("exthdr", {1: _REGISTER, 2: bytes((header,)), **flags})
    return load + compare(b"\x01")


def verdict(what: int, chain: str = "") -> bytes:
    return _expression("immediate", {1: 0, 2: {2: {1: what, 2: chain or None}}})


class Batch:
    """Changes to one table, applied all at once; without the table's name, so that other tables can reuse them."""

    def __init__(self, table: str, family: int = NETDEV) -> None:
        self.table = table
        self.family = family
        self.changes: list[Change] = []

    def _add(self, kind: int, flags: int, values: Mapping[int, nl.Value]) -> None:
        self.changes.append((kind, flags, _pack(values)))

    def make_table(self, comment: str = "") -> None:
        """Create the table unless it exists. The comment (NFTA_TABLE_USERDATA) is stored with it."""
        self._add(_NEWTABLE, nl.CREATE, {6: comment.encode() or None})

    def drop_table(self) -> None:
        self._add(_DELTABLE, 0, {})

    def make_set(
        self,
        name: str,
        types: Collection[int],
        length: int,
        *,
        size: int = 0,
        timeout_ms: int = 0,
        dynamic: bool = False,
        value: tuple[int, int] | None = None,
    ) -> None:
        """Create a set, or a map.

        Args:
            types: Types of the key's parts, in nft(8)'s numbers, for `nft list`.
            length: Length of the key in bytes, each part padded to four.
            size: Maximum number of elements; 0 for no limit. Required if packets add elements.
            timeout_ms: Time after which an element expires; 0 for never.
        """
        packed = 0
        for one in types:
            packed = packed << 6 | one
        flags = 0x10 * bool(timeout_ms) | 0x20 * dynamic | 0x08 * (value is not None)
        kind, bytes_ = value or (None, None)
        timeout = struct.pack(">Q", timeout_ms) if timeout_ms else None
        values: dict[int, nl.Value] = {2: name, 10: len(self.changes) + 1, 3: flags}
        # Without the key's byte order nft(8) does not list names of devices.
        order = _KEYS_OF_HOST if DEVICE_NAME in types else None
        values |= {4: packed, 5: length, 6: kind, 7: bytes_, 11: timeout, 13: order}
        self._add(_NEWSET, nl.CREATE, {**values, 9: {1: size} if size else None})

    def make_counter(self, name: str) -> None:
        zero = bytes(8)
        self._add(_NEWOBJECT, nl.CREATE, {2: name, 3: _COUNTER, 4: {1: zero, 2: zero}})

    def make_chain(self, name: str) -> None:
        self._add(_NEWCHAIN, nl.CREATE, {3: name})

    def make_base_chain(
        self,
        name: str,
        hook: int,
        priority: int,
        devices: Sequence[str] = (),
        *,
        kind: str = "filter",
    ) -> None:
        """Create a chain for every packet (with kind `nat`, for the first packet of a connection).

        In family `netdev` the chain sees the packets of these devices.
        """
        where = {1: hook, 2: priority, 4: devices or None}
        self._add(_NEWCHAIN, nl.CREATE, {3: name, 4: where, 5: ACCEPT, 7: kind})

    def make_rule(self, chain: str, *expressions: bytes) -> None:
        self._add(_NEWRULE, nl.CREATE | _APPEND, {2: chain, 4 | nl.NESTED: b"".join(expressions)})

    def insert_rule(self, chain: str, *expressions: bytes) -> None:
        self._add(_NEWRULE, nl.CREATE, {2: chain, 4 | nl.NESTED: b"".join(expressions)})

    def add_elements(self, name: str, elements: Sequence[Element]) -> None:
        """Add elements to a set or map; existing ones stay.

        The kernel refuses (EEXIST, EBUSY) if a map has another value for a key.
        """
        self._elements(_NEWSETELEM, nl.CREATE, name, elements)

    def remove_elements(self, name: str, elements: Sequence[Element]) -> None:
        """Remove elements from a set or map, which must have them all."""
        self._elements(_DELSETELEM, 0, name, elements)

    def _elements(self, kind: int, flags: int, name: str, elements: Sequence[Element]) -> None:
        for start in range(0, len(elements), _ELEMENTS_AT_ONCE):
            # Packed by hand: for hundreds of thousands of elements this is four times as fast as attribute by
            # attribute.
            listed = map(_pack_element, elements[start : start + _ELEMENTS_AT_ONCE])
            self._add(kind, flags, {2: name, 3 | nl.NESTED: b"".join(listed)})


class NetfilterSocket(nl.NetlinkSocket):
    """Socket to nf_tables in the namespace of the thread that creates it."""

    def __init__(self) -> None:
        super().__init__(NETFILTER)

    def commit(self, batch: Batch) -> None:
        """Apply a batch; a very large one is applied in parts.

        Raises `NetlinkRefused`, with the first error, if the kernel refused this part. Use another socket then.
        """
        head = _NFGEN.pack(batch.family, 0, 0) + _pack({1: batch.table})
        fence = _NFGEN.pack(0, 0, _SUBSYSTEM >> 8)
        for part in _parts(batch.changes):
            first = self._sequence + 1
            packed = [nl.pack_message(_BATCH_BEGIN, 0, first, fence)]
            for self._sequence, (kind, flags, values) in enumerate(part, start=first):
                asked = flags | (nl.ACK if self._sequence == first + len(part) - 1 else 0)
                message = _SUBSYSTEM | kind, asked, self._sequence, head + values
                packed.append(nl.pack_message(*message))
            packed.append(nl.pack_message(_BATCH_END, 0, self._sequence, fence))
            self._socket.send(b"".join(packed))
            self._collect(first)

    def comment(self, table: str, family: int = NETDEV) -> str | None:
        """Return the comment of a table; `None` if there is no such table."""
        found = self._find(_GETTABLE, _pack({1: table}), family)
        return None if found is None else nl.string(found.get(6))

    def elements(self, table: str, name: str) -> Iterator[bytes]:
        question = _NFGEN.pack(NETDEV, 0, 0) + _pack({1: table, 2: name})
        for answer in self.dump(_SUBSYSTEM | _GETSETELEM, question):
            for element in nl.parse_list(nl.parse_attributes(answer, _NFGEN.size).get(3, b"")):
                yield nl.parse_attributes(nl.parse_attributes(element).get(1, b"")).get(1, b"")

    def value(self, table: str, name: str, key: bytes) -> bytes | None:
        wanted = _pack({1: table, 2: name, 3: [{1: {1: key}}]})
        found = self._find(_GETSETELEM, wanted, NETDEV)
        if found is None:
            return None
        (element,) = nl.parse_list(found.get(3, b""))
        return nl.parse_attributes(nl.parse_attributes(element).get(2, b"")).get(1)

    def counted(self, table: str, name: str) -> int | None:
        """Return the packets in a counter; `None` if there is no such counter."""
        wanted = _pack({1: table, 2: name, 3: _COUNTER})
        found = self._find(_GETOBJECT, wanted, NETDEV)
        if found is None:
            return None
        return int.from_bytes(nl.parse_attributes(found.get(4, b"")).get(2, b""))

    def _find(self, kind: int, body: bytes, family: int) -> dict[int, bytes] | None:
        question = _NFGEN.pack(family, 0, 0) + body
        answer = self.find(_SUBSYSTEM | kind, question, errno.ENOENT)
        return None if answer is None else nl.parse_attributes(answer, _NFGEN.size)


def commit(batch: Batch) -> None:
    """Apply a batch in the namespace of the calling thread, as `NetfilterSocket.commit`."""
    with NetfilterSocket() as channel:
        channel.commit(batch)


def ensure_table(
    channel: NetfilterSocket, batch: Batch, comment: str, fill: Callable[[Batch], None]
) -> bool:
    """Create a table, or replace one with another comment; return false if it is up to date."""
    present = channel.comment(batch.table, batch.family)
    if present == comment:
        return False
    if present is not None:
        # Drop only an existing table: the kernel then waits 12 ms until no packet is in it.
        batch.drop_table()
    batch.make_table(comment)
    fill(batch)
    channel.commit(batch)
    return True


def replace_table(table: str, family: int, content: Sequence[Change]) -> None:
    """Replace a table in the namespace of the calling thread; without content only remove it."""
    batch = Batch(table, family)
    with NetfilterSocket() as channel:
        if channel.comment(table, family) is not None:
            batch.drop_table()
        if content:
            batch.make_table()
            batch.changes += content
        if batch.changes:
            channel.commit(batch)


def table_of(payload: bytes) -> str:
    return nl.string(nl.parse_attributes(payload, _NFGEN.size).get(1))


def _parts(changes: list[Change]) -> Iterator[list[Change]]:
    """Split changes into parts that fit into one send; only elements can be that many."""
    part: list[Change] = []
    size = 0
    for change in changes:
        if part and size + len(change[2]) > _BATCH_BYTES:
            yield part
            part, size = [], 0
        part.append(change)
        size += len(change[2])
    if part:
        yield part
