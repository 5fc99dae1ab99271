"""HAProxy spells addresses with inet_ntop, the maps with Python's `str`: they must never differ."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address

from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.core.addresses import link_local_of, text_of
from imdsproxy.core.model import Instance, MacAddress
from imdsproxy.core.records import parse_instance

# Runs of zero groups, of every length and at every place, are what the spellings differ in.
_groups = st.lists(
    st.sampled_from([0, 0, 0, 1, 0xFFFF, 0xFE80, 0x2001]) | st.integers(0, 0xFFFF),
    min_size=8,
    max_size=8,
)
_ipv6 = _groups.map(
    lambda groups: IPv6Address(b"".join(group.to_bytes(2, "big") for group in groups))
)


@given(_ipv6 | st.integers(0, 2**32 - 1).map(IPv4Address))
@example(IPv6Address("::ffff:10.0.0.5"))
@example(IPv6Address("::10.0.0.5"))
@example(IPv6Address("64:ff9b::10.0.0.5"))
@example(IPv6Address("2001:db8:0:1:1:1:1:1"))
@example(IPv6Address("2001:0:0:1:0:0:0:1"))
def test_an_accepted_address_is_spelt_as_the_kernel_and_haproxy_spell_it(
    address: IPv4Address | IPv6Address,
) -> None:
    found = parse_instance(
        {"id": "i", "name": "i", "ports": [{"network": "n", "addresses": [str(address)]}]}
    )
    if isinstance(found, Instance):
        (accepted,) = found.ports[0].addresses
        family = socket.AF_INET if accepted.version == 4 else socket.AF_INET6
        assert text_of(accepted) == socket.inet_ntop(family, accepted.packed)


@given(_ipv6, st.integers(0, 2**48 - 1))
@example(IPv6Address("fe80::1:ff:fe00:0"), 0x020000000000)
@example(IPv6Address("fe80:1::ff:fe00:0"), 0x0000FF000000)
def test_addresses_are_spelt_as_python_spells_them_those_of_macs_too(
    address: IPv6Address, mac: int
) -> None:
    linked = link_local_of(MacAddress(mac.to_bytes(6, "big").hex(":")))
    assert text_of(address) == str(address)
    assert text_of(linked) == socket.inet_ntop(socket.AF_INET6, linked.packed)
