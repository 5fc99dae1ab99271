"""Records as JSON and as the controller keeps them in memory: they come out as they were put in."""

import json
import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.haproxy.rules.maps import PackedMap
from imdsproxy.model.addresses import link_local_of, text_of
from imdsproxy.model.entities import Instance, InstanceId, IpAddress, MacAddress, Network, NetworkId
from imdsproxy.model.packed import PackedInstances, PackedPairs
from imdsproxy.model.records import parse_instance, parse_records, render_record
from support.record_strategies import ids, instances, ipv4, macs, networks


@given(instances, networks)
def test_records_come_back_from_json_as_they_were(instance: Instance, network: Network) -> None:
    document = {"networks": [render_record(network)], "instances": [render_record(instance)]}
    records = parse_records(json.loads(json.dumps(document)))
    assert records.instances == [instance]
    assert records.networks == [network]


@pytest.mark.slow
@given(st.lists(instances, unique_by=lambda one: one.id, max_size=4))
def test_an_instance_comes_out_as_it_was_put_in(told: list[Instance]) -> None:
    known = {InstanceId(one.id): one for one in told}
    packed = PackedInstances(known)
    assert packed == known
    assert packed.part(known) == known
    again = PackedInstances()
    assert [again.take(key, packed) for key in known] == [True] * len(known)
    assert [again.take(key, known) for key in known] == [False] * len(known)
    assert again == known
    for key, one in known.items():
        ports = [(port.network, port.mac, port.addresses) for port in one.ports]
        assert ports == [
            (network, mac, tuple(addresses)) for network, mac, addresses in packed.ports(key)
        ]


@given(st.dictionaries(st.builds("{}/{}".format, ids, ids), ids, max_size=30), ids)
def test_a_packed_map_has_the_entries_that_it_was_made_of(
    entries: dict[str, str], other: str
) -> None:
    packed = PackedMap(sorted(entries.items()))
    assert packed == entries
    assert len(packed) == len(entries)
    assert packed.get(other) is None


_ADDRESSES = st.dictionaries(ipv4, macs, max_size=3)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | _ADDRESSES), max_size=12))
def test_packed_pairs_are_what_was_put_in_whichever_network_was_used_last(
    steps: list[tuple[str, dict[IpAddress, MacAddress] | None]],
) -> None:
    packed, plain = PackedPairs(), dict[NetworkId, dict[IpAddress, MacAddress]]()
    for name, pairs in steps:
        network = NetworkId(name)
        if pairs is None:
            assert packed.pop(network, None) == plain.pop(network, None)
        else:
            packed[network] = plain[network] = pairs
        assert packed.get(NetworkId("a")) == plain.get(NetworkId("a"))
    assert dict(packed) == plain
    assert packed.total == sum(map(len, plain.values()))


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
