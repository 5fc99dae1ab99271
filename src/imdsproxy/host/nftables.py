"""The messages of nf_tables (nfnetlink, `linux/netfilter/nf_tables.h`): tables, chains, rules, sets and their elements.

Our own for the reasons of ADR 12: nft(8) takes 4 ms for each call, and a thousand networks have a table each.
Changes are batches: all of one is done, or nothing.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from imdsproxy.host.nlmessages import (
    ACK,
    CREATE,
    NetlinkRefused,
    NetlinkSocket,
    attribute,
    iter_messages,
    pack_message,
    parse_attributes,
    parse_list,
    raise_error,
    text,
)

NETFILTER: Final = 12
"""The netlink protocol."""

_SUBSYSTEM: Final = 10 << 8
INET: Final = 1
"""The family of tables that see packets of both families of IP."""

NETDEV: Final = 5
"""The family of tables on devices, which see packets with their MACs."""

_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM, _GETSETELEM, _DELSETELEM = 3, 6, 9, 12, 13, 14
DELTABLE: Final = _SUBSYSTEM | _DELTABLE
_APPEND: Final = 0x800
_NESTED: Final = 0x8000
_NFGEN: Final = struct.Struct(">BBH")
_ERROR: Final = 2
_RECEIVE_BYTES: Final = 64 * 1024
_ELEMENTS_AT_ONCE: Final = 512
"""Fits into an attribute, whose length has 16 bits."""

_REGISTER: Final = 8
"""The first of sixteen registers of four bytes; what is looked up lies in several, one after the other."""

LINK, NETWORK, TRANSPORT = 0, 1, 2
PROTOCOL, FAMILY, L4_PROTOCOL = 1, 15, 16
_DYNAMIC_OPS: Final = {"add": 0, "update": 1, "delete": 2}


class Hook(IntEnum):
    """The hook of a base chain: the first two of family `netdev`, the last of `inet`."""

    INGRESS = 0
    EGRESS = 1
    OUTPUT = 3


class Verdict(IntEnum):
    """The verdict of a rule."""

    DROP = 0
    ACCEPT = 1
    JUMP = -3
    GOTO = -4
    RETURN = -5


@dataclass(frozen=True, slots=True)
class SetKind:
    """A set, or a map.

    Attributes:
        types: Of its key's parts, in nft(8)'s numbers, for `nft list`.
        value: For a map: type and length of what each key leads to.
        length: Of the key in bytes, each part filled up to four.
        size: The most elements; 0 for no limit. Needed where packets add them.
        timeout_ms: After which an element goes; 0 for never.
        dynamic: Packets change it.
    """

    name: str
    types: tuple[int, ...]
    length: int
    size: int = 0
    timeout_ms: int = 0
    dynamic: bool = False
    value: tuple[int, int] | None = None


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


def _nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def _expression(name: str, *parts: bytes) -> bytes:
    return _nested(1, text(1, name), _nested(2, *parts))


def _value(kind: int, value: bytes) -> bytes:
    return _nested(kind, attribute(1, value))


def meta(key: int) -> bytes:
    """Load something about the packet into the first register."""
    return _expression("meta", _number(2, key), _number(1, _REGISTER))


def payload(base: int, offset: int, length: int, *, into: int = 0) -> bytes:
    """Load bytes of a header into a register, counted from 0."""
    return _expression(
        "payload",
        *(_number(1, _REGISTER + into), _number(2, base), _number(3, offset), _number(4, length)),
    )


def compare(value: bytes) -> bytes:
    """Go on only where the first register is `value`."""
    return _expression("cmp", _number(1, _REGISTER), _number(2, 0), _value(3, value))


def differs(value: bytes) -> bytes:
    """Go on only where the first register is not `value`."""
    return _expression("cmp", _number(1, _REGISTER), _number(2, 1), _value(3, value))


def bitwise(mask: bytes) -> bytes:
    """Keep these bits of the first register."""
    return replace_bits(mask, bytes(len(mask)))


def replace_bits(mask: bytes, value: bytes) -> bytes:
    """Keep these bits of the first register, and turn over those of `value`."""
    return _expression(
        "bitwise",
        *(_number(1, _REGISTER), _number(2, _REGISTER), _number(3, len(mask))),
        *(_value(4, mask), _value(5, value)),
    )


def shift_right(bits: int) -> bytes:
    """Shift the first register, a number of four bytes in this machine's order."""
    return _expression(
        "bitwise",
        *(_number(1, _REGISTER), _number(2, _REGISTER), _number(3, 4)),
        *(_number(6, 2), _value(7, struct.pack("=I", bits))),
    )


def swap_bytes() -> bytes:
    """Turn the first two bytes of the first register from the network's order into this machine's, or back."""
    return _expression(
        "byteorder",
        *(_number(1, _REGISTER), _number(2, _REGISTER), _number(3, 0)),
        *(_number(4, 2), _number(5, 2)),
    )


def store(
    base: int, offset: int, length: int, *, checksum: int | None = None, register: int = 0
) -> bytes:
    """Write a register over bytes of a header, and mend the checksum at `checksum` in it."""
    mended = () if checksum is None else (_number(6, 1), _number(7, checksum))
    return _expression(
        "payload",
        *(
            _number(5, _REGISTER + register),
            _number(2, base),
            _number(3, offset),
            _number(4, length),
        ),
        *mended,
    )


def lookup(name: str, *, into: int | None = None) -> bytes:
    """Go on only where what the registers hold is in a set; a map's value goes into a register."""
    value = () if into is None else (_number(3, _REGISTER + into),)
    return _expression("lookup", text(1, name), _number(2, _REGISTER), *value)


def remember(name: str, what: str, *, value: int | None = None) -> bytes:
    """Add the registers' content to a set (`update`) or remove it (`delete`); a map's value is in a register."""
    data = () if value is None else (_number(5, _REGISTER + value),)
    return _expression(
        "dynset", text(1, name), _number(3, _DYNAMIC_OPS[what]), _number(4, _REGISTER), *data
    )


def rewrite(offset: int, value: bytes, *, checksum: int) -> bytes:
    """Write over bytes of the transport header, and mend its checksum."""
    load = _expression("immediate", _number(1, _REGISTER), _value(2, value))
    return load + store(TRANSPORT, offset, len(value), checksum=checksum)


def present6(header: int) -> bytes:
    """Go on only where an IPv6 packet has an extension header."""
    load = _expression(
        "exthdr",
        *(_number(1, _REGISTER), attribute(2, bytes((header,))), _number(3, 0), _number(4, 1)),
        *(_number(5, 1), _number(6, 0)),
    )
    return load + compare(b"\x01")


def verdict(what: Verdict, chain: str = "") -> bytes:
    """End a rule."""
    target = (text(2, chain),) if chain else ()
    return _expression(
        "immediate", _number(1, 0), _nested(2, _nested(2, _number(1, what), *target))
    )


class Batch:
    """Changes to one table, done all at once."""

    def __init__(self, table: str, family: int = NETDEV) -> None:
        self.table = table
        self.family = family
        self._table = text(1, table)
        self.messages: list[tuple[int, int, bytes]] = []

    def take(self, other: Batch) -> None:
        """Also do what another batch does, to this table; their names are of one length."""
        before, here = other._table, self._table
        self.messages += [
            (kind, flags, body.replace(before, here, 1)) for kind, flags, body in other.messages
        ]

    def _add(self, kind: int, flags: int, *parts: bytes) -> None:
        self.messages.append((kind, flags, b"".join(parts)))

    def make_table(self, comment: str = "") -> None:
        """Make it; one that is there stays. The comment (NFTA_TABLE_USERDATA) is kept with it."""
        kept = (attribute(6, comment.encode()),) if comment else ()
        self._add(_NEWTABLE, CREATE, self._table, *kept)

    def drop_table(self) -> None:
        """Remove it with all that is in it."""
        self._add(_DELTABLE, 0, self._table)

    def make_set(self, kind: SetKind, number: int) -> None:
        """Make a set; `number` is this batch's own name for it."""
        types = 0
        for one in kind.types:
            types = types << 6 | one
        flags = (0x10 if kind.timeout_ms else 0) | (0x20 if kind.dynamic else 0)
        flags |= 0 if kind.value is None else 0x08
        parts = [self._table, text(2, kind.name), _number(10, number), _number(3, flags)]
        parts += [_number(4, types), _number(5, kind.length)]
        if kind.value is not None:
            parts += [_number(6, kind.value[0]), _number(7, kind.value[1])]
        if kind.timeout_ms:
            parts.append(attribute(11, struct.pack(">Q", kind.timeout_ms)))
        if kind.size:
            parts.append(_nested(9, _number(1, kind.size)))
        self._add(_NEWSET, CREATE, *parts)

    def make_chain(self, name: str) -> None:
        """Make a chain that others lead to."""
        self._add(_NEWCHAIN, CREATE, self._table, text(3, name))

    def make_base_chain(
        self, name: str, hook: Hook, priority: int, devices: Iterable[str] = ()
    ) -> None:
        """Make a chain that every packet goes through: of these devices, in family `netdev`."""
        where = [_number(1, hook), _number(2, priority)]
        if named := [text(1, device) for device in devices]:
            where.append(_nested(4, *named))
        self._add(
            _NEWCHAIN,
            CREATE,
            *(self._table, text(3, name), _nested(4, *where), _number(5, Verdict.ACCEPT)),
            text(7, "filter"),
        )

    def make_rule(self, chain: str, *expressions: bytes) -> None:
        """Append a rule."""
        parts = self._table, text(2, chain), _nested(4, *expressions)
        self._add(_NEWRULE, CREATE | _APPEND, *parts)

    def add_elements(self, name: str, keys: Iterable[bytes]) -> None:
        """Add keys to a set; those that are in it stay."""
        self._elements(_NEWSETELEM, CREATE, name, keys)

    def add_value(self, name: str, key: bytes, value: bytes) -> None:
        """Map a key to a value; refused (EEXIST, EBUSY) where the key has another one."""
        element = _nested(1, _nested(1, attribute(1, key)), _nested(2, attribute(1, value)))
        self._add(_NEWSETELEM, CREATE, self._table, text(2, name), _nested(3, element))

    def remove_elements(self, name: str, keys: Iterable[bytes]) -> None:
        """Remove keys from a set; each must be in it."""
        self._elements(_DELSETELEM, 0, name, keys)

    def _elements(self, kind: int, flags: int, name: str, keys: Iterable[bytes]) -> None:
        elements = [_nested(1, _nested(1, attribute(1, key))) for key in keys]
        for start in range(0, len(elements), _ELEMENTS_AT_ONCE):
            some = elements[start : start + _ELEMENTS_AT_ONCE]
            self._add(kind, flags, self._table, text(2, name), _nested(3, *some))


class NetfilterSocket(NetlinkSocket):
    """Speaks to nf_tables in the namespace of the thread that makes it."""

    def __init__(self) -> None:
        super().__init__(NETFILTER)

    def commit(self, batch: Batch) -> None:
        """Do a batch, or a part of a very large one after the other.

        Raises:
            NetlinkRefused: With the first error; nothing of the part has been done.
        """
        for part in _parts(batch.messages):
            self._commit(part, batch.family)

    def _commit(self, messages: list[tuple[int, int, bytes]], family: int) -> None:
        head = _NFGEN.pack(family, 0, 0)
        fence = _NFGEN.pack(0, 0, _SUBSYSTEM >> 8)
        self._sequence += 1
        packed = [pack_message(_BATCH_BEGIN, 0, self._sequence, fence)]
        for number, (kind, flags, body) in enumerate(messages, start=1):
            self._sequence += 1
            answer = ACK if number == len(messages) else 0
            packed.append(
                pack_message(_SUBSYSTEM | kind, flags | answer, self._sequence, head + body)
            )
        last = self._sequence
        self._sequence += 1
        packed.append(pack_message(_BATCH_END, 0, self._sequence, fence))
        self._socket.send(b"".join(packed))
        self._await(last)

    def _await(self, last: int) -> None:
        failure: NetlinkRefused | None = None
        while True:
            for kind, flags, sequence, body in iter_messages(self._socket.recv(_RECEIVE_BYTES)):
                if kind != _ERROR:
                    continue
                try:
                    raise_error(body, flags)
                except NetlinkRefused as error:
                    failure = failure or error
                # A batch that is refused as a whole is refused at its first message.
                if sequence == last or (failure is not None and sequence < last):
                    if failure is not None:
                        self._drain()
                        raise failure
                    return

    def _drain(self) -> None:
        self._socket.setblocking(False)
        try:
            while True:
                self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        finally:
            self._socket.setblocking(True)

    def comment(self, table: str, family: int = NETDEV) -> str | None:
        """The comment of a table; `None` where there is none of that name."""
        found = self._find(_GETTABLE, text(1, table), family)
        return None if found is None else found.get(6, b"").decode(errors="replace")

    def elements(self, table: str, name: str) -> list[bytes]:
        """The keys in a set."""
        question = _NFGEN.pack(NETDEV, 0, 0) + text(1, table) + text(2, name)
        answers = self.dump(_SUBSYSTEM | _GETSETELEM, question)
        return [key for one in answers for key in _keys(one.payload)]

    def value(self, table: str, name: str, key: bytes) -> bytes | None:
        """The value of a key in a map."""
        wanted = _nested(3, _nested(1, _nested(1, attribute(1, key))))
        found = self._find(_GETSETELEM, text(1, table) + text(2, name) + wanted, NETDEV)
        if found is None:
            return None
        (element,) = parse_list(found.get(3, b""))
        return parse_attributes(parse_attributes(element).get(2, b"")).get(1)

    def _find(self, kind: int, body: bytes, family: int) -> dict[int, bytes] | None:
        try:
            answer = self.get(_SUBSYSTEM | kind, _NFGEN.pack(family, 0, 0) + body)
        except NetlinkRefused as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return parse_attributes(answer.payload, _NFGEN.size)


def commit(batch: Batch) -> None:
    """Do a batch in the namespace of the calling thread.

    Raises:
        NetlinkRefused: See `NetfilterSocket.commit`.
    """
    with NetfilterSocket() as channel:
        channel.commit(batch)


def table_of(payload: bytes) -> str:
    """The name of the table in a message about one."""
    return parse_attributes(payload, _NFGEN.size).get(1, b"").rstrip(b"\0").decode(errors="replace")


def _parts(messages: list[tuple[int, int, bytes]]) -> Iterator[list[tuple[int, int, bytes]]]:
    """So much as a socket takes at once; only elements are ever that many."""
    part: list[tuple[int, int, bytes]] = []
    size = 0
    for message in messages:
        if part and size + len(message[2]) > _RECEIVE_BYTES:
            yield part
            part, size = [], 0
        part.append(message)
        size += len(message[2])
    if part:
        yield part


def _keys(body: bytes) -> Iterator[bytes]:
    listed = parse_attributes(body, _NFGEN.size).get(3, b"")
    for element in parse_list(listed):
        key = parse_attributes(element).get(1, b"")
        yield parse_attributes(key).get(1, b"")
