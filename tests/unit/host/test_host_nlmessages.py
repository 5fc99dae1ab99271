from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.hoststate import AddressState, ObservedAddress
from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6
from imdsproxy.host.netlink import (
    parse_address,
)
from imdsproxy.host.nlmessages import (
    attribute,
    iter_messages,
    pack_attributes,
    parse_attributes,
)

_HEADER = struct.Struct("=IHHII")


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=300), max_size=20))
def test_attributes_come_back_as_they_were_put_in(values: dict[int, bytes]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in values.items())
    assert len(data) % 4 == 0
    assert parse_attributes(data) == values
    assert parse_attributes(attribute(0x8000 | 0x12, b"x")) == {0x12: b"x"}
    assert parse_attributes(b"head" + data, 4) == values


@given(st.binary(max_size=200))
def test_nonsense_is_neither_an_error_nor_endless(data: bytes) -> None:
    parse_attributes(data)
    list(iter_messages(data))


@given(st.binary(max_size=200), st.integers(0, 199))
def test_an_attribute_that_is_cut_short_ends_the_list(value: bytes, length: int) -> None:
    data = pack_attributes({1: 7}) + attribute(2, value)
    found = parse_attributes(data[: min(8 + length, len(data) - 1)])
    assert found.pop(1) == struct.pack("=I", 7)
    # A cut in the padding loses nothing of the value.
    assert set(found.values()) <= {value}


def test_messages_are_separated() -> None:
    first = _HEADER.pack(17, 16, 2, 5, 0) + b"a" + b"\0\0\0"
    second = _HEADER.pack(20, 3, 0, 5, 0) + b"done"
    assert list(iter_messages(first + second)) == [(16, 2, 5, b"a"), (3, 0, 5, b"done")]
    assert list(iter_messages(first + second[:-1])) == [(16, 2, 5, b"a")]


def _address(family: int, packed: bytes, flags: int = 0, *more: bytes) -> bytes:
    head = struct.pack("=BBBBI", family, 64, flags & 0xFF, 0, 3)
    return head + attribute(1, packed) + b"".join(more)


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        (0x80, AddressState.USABLE),
        (0x40 | 0x80, AddressState.TENTATIVE),
        (0x08 | 0x40, AddressState.DUPLICATE),
        # Beyond the eight bits of the header: only the attribute has these.
        (0x240, AddressState.TENTATIVE),
    ],
)
def test_an_address_says_whether_it_can_be_bound(flags: int, state: AddressState) -> None:
    payload = _address(socket.AF_INET6, METADATA_IPV6.packed, flags, pack_attributes({8: flags}))
    assert parse_address(payload, {3: "eth0"}) == ObservedAddress(
        "eth0", METADATA_IPV6, 64, state, 0
    )


@pytest.mark.parametrize(
    ("packed", "more", "found"),
    [
        # Who added it.
        (METADATA_IPV4.packed, attribute(11, b"\xa9"), (0xA9, "3")),
        # Its own address counts, and its peer's does not.
        (bytes(4), attribute(2, METADATA_IPV4.packed), (0, "3")),
        (METADATA_IPV4.packed, attribute(2, bytes(4)), None),
        (b"\x0a\0\0\1", b"", None),
    ],
)
def test_an_address_is_read_with_its_origin_where_it_is_the_metadata_address(
    packed: bytes, more: bytes, found: tuple[int, str] | None
) -> None:
    seen = parse_address(_address(socket.AF_INET, packed, 0, more), {})
    assert (None if seen is None else (seen.protocol, seen.device)) == found
