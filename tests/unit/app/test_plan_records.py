from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest

from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.haproxy.model import Bind
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.inventory import AddressKey, Inventory, Observation
from imdsproxy.core.model import (
    METADATA_IPV4,
    Instance,
    InstanceId,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
)
from imdsproxy.core.plan import (
    compute_maxconn,
    link_name,
    networks_of,
    plan_binds,
    plan_links,
    plan_record,
    plan_records,
    record_key,
)

_RED = NetworkId("red")
_ADDRESS = IPv4Address("10.0.0.5")
_KEY: AddressKey = (_RED, _ADDRESS)


def _instance(name: str, address: IPv4Address = _ADDRESS) -> Instance:
    port = Port(_RED, MacAddress("02:00:00:00:00:05"), (address,))
    return Instance(InstanceId(name), name, name, ports=(port,))


def _inventory(*sources: tuple[str, Instance]) -> Inventory:
    inventory = Inventory(name for name, _ in sources)
    network = Network(_RED, NamespaceListener("red"))
    for name, instance in sources:
        inventory.observe(Observation(name, True, {_RED: network}, {instance.id: instance}))
    return inventory


def test_an_address_leads_to_its_instance_in_its_revision() -> None:
    value = plan_record(_inventory(("a", _instance("web"))), _KEY, {InstanceId("web"): "r1"}, {})
    assert value == "web|r1"


def test_an_instance_that_is_not_compiled_is_not_known_yet() -> None:
    assert plan_record(_inventory(("a", _instance("web"))), _KEY, {}, {}) is None


def test_an_address_of_two_instances_is_a_conflict_whatever_is_compiled() -> None:
    inventory = _inventory(("a", _instance("web")), ("b", _instance("db")))
    revisions = {InstanceId("web"): "r1", InstanceId("db"): "r2"}
    assert plan_record(inventory, _KEY, revisions, {}) == "!"


def test_a_learned_address_counts_only_where_no_record_claims_it() -> None:
    inventory = _inventory(("a", _instance("web")))
    revisions = {InstanceId("web"): "r1", InstanceId("db"): "r2"}
    learned: dict[AddressKey, InstanceId] = {
        _KEY: InstanceId("db"),
        (_RED, IPv6Address("fe80::1")): InstanceId("db"),
    }
    assert plan_records(inventory, learned, revisions, learned) == {
        "red/10.0.0.5": "web|r1",
        "red/fe80::1": "db|r2",
    }


def test_nobody_s_address_is_to_be_unknown() -> None:
    inventory = _inventory(("a", _instance("web")))
    assert plan_record(inventory, (_RED, IPv4Address("10.0.0.9")), {}, {}) is None


def test_the_key_is_what_haproxy_makes_of_bind_and_source() -> None:
    assert record_key((_RED, IPv6Address("FE80:0:0:0:0:FF:FE00:5"))) == "red/fe80::ff:fe00:5"


def test_a_namespace_made_again_has_another_link() -> None:
    one, other = NamespaceRef("red", 1), NamespaceRef("red", 2)
    assert link_name(one) != link_name(other)
    endpoints = [Endpoint(_RED, METADATA_IPV4, 80, None, one)]
    assert plan_links(endpoints) == {link_name(one): "red"}
    assert plan_binds(endpoints, "../x") == (
        Bind(_RED, METADATA_IPV4, 80, None, f"../x/{link_name(one)}"),
    )


def test_a_device_made_again_has_another_link_in_a_namespace_and_on_the_host() -> None:
    for place, target in ((NamespaceRef("red", 4), "red"), (None, "/proc/self/ns/net")):
        one, other = (Endpoint(_RED, METADATA_IPV4, 80, "br0", place, index) for index in (7, 9))
        assert plan_links([one]).keys().isdisjoint(plan_links([other]))
        (link,) = plan_links([one])
        assert plan_links([one]) == {link: target}
        assert plan_binds([one], "../x") == (Bind(_RED, METADATA_IPV4, 80, "br0", f"../x/{link}"),)


def test_an_interface_of_unknown_index_needs_no_link() -> None:
    endpoints = [Endpoint(_RED, METADATA_IPV4, 80, "virbr0", None)]
    assert plan_links(endpoints) == {}
    assert plan_binds(endpoints, "../x") == (Bind(_RED, METADATA_IPV4, 80, "virbr0"),)
    assert networks_of(endpoints) == {_RED}


@pytest.mark.parametrize(
    ("wanted", "binds", "hard", "expected", "limited"),
    [
        (0, 2, -1, 4096, False),
        (0, 2, 20_000, 4096, False),
        (0, 2000, 20_000, 7872, True),
        (100, 2, 20_000, 100, False),
        (50_000, 2, 1024, 382, True),
        (0, 0, 100, 64, True),
    ],
)
def test_maxconn_never_needs_more_descriptors_than_there_are(
    wanted: int, binds: int, hard: int, expected: int, *, limited: bool
) -> None:
    budget = compute_maxconn(wanted, binds, hard)
    assert (budget.maxconn, budget.limited_by_descriptors) == (expected, limited)
