from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.addresses import from_number
from imdsproxy.core.haproxy.maps import PackedMap
from imdsproxy.core.model import Instance, InstanceId
from imdsproxy.core.packed import PackedInstances
from support.record_strategies import ids, instances


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
            (network, mac, tuple(map(from_number, numbers)))
            for network, mac, numbers in packed.ports(key)
        ]


@given(st.dictionaries(st.builds("{}/{}".format, ids, ids), ids, max_size=30), ids)
def test_a_packed_map_has_the_entries_that_it_was_made_of(
    entries: dict[str, str], other: str
) -> None:
    packed = PackedMap(sorted(entries.items()))
    assert packed == entries
    assert len(packed) == len(entries)
    assert packed.get(other) is None
