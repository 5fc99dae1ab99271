"""Records as JSON and as the controller keeps them in memory: they come out as they were put in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.maps import PackedMap
from imdsproxy.core.model import Instance, InstanceId, IpAddress, MacAddress, Network, NetworkId
from imdsproxy.core.packed import PackedInstances, PackedPairs
from imdsproxy.core.records import parse_records, render_record
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
