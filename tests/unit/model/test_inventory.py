"""Who has an address by what the sources say together, and which guest a request is by address and MAC."""

from dataclasses import replace
from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.errors import Problem
from imdsproxy.model.addresses import link_local_of, mac_of
from imdsproxy.model.entities import (
    BridgeListener,
    Instance,
    InstanceId,
    MacAddress,
    Network,
    NetworkId,
    Upstream,
)
from imdsproxy.model.identity import (
    Ambiguous,
    Found,
    How,
    Identity,
    Learned,
    Mismatch,
    Unknown,
    UnknownReason,
    holds,
    identify,
)
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Claimant, Conflict, ConflictKind, Expired, Observation
from support.record_builders import full, instance, key, network, port
from support.record_strategies import macs

N1 = NetworkId("n1")
MAC = MacAddress("52:54:00:12:34:56")
OTHER = MacAddress("52:54:00:00:00:01")
A = instance("a", "10.0.0.5", mac=MAC, ports=[port("n1", "10.0.0.9")])


def loaded(*observations: Observation) -> Inventory:
    inventory = Inventory()
    for observation in observations:
        inventory.observe(observation)
    return inventory


@pytest.fixture
def inventory() -> Inventory:
    return loaded(full("file", [network("n1"), network("n2", bridge="br1")], [A]))


def test_an_instance_is_withheld_once_all_its_sources_have_expired_and_comes_back_as_it_was(
    inventory: Inventory,
) -> None:
    address, other = key("n1", "10.0.0.5"), instance("b", "10.0.0.6")
    inventory.observe(full("fleet", [], [A, other]))
    before = dict(inventory.addresses())
    # The other source still knows of the first instance.
    affected = inventory.observe(Observation("fleet", in_sync=False, expired=True))
    assert affected.instances == {A.id, other.id}
    assert inventory.owner(address) == A.id
    assert inventory.owner(key("n1", "10.0.0.6")) == Expired(other.id, ("fleet",))
    assert identify(inventory, *key("n1", "10.0.0.6")) == Expired(other.id, ("fleet",))
    assert inventory.instances[other.id] == other
    assert inventory.conflicts() == ()
    inventory.observe(full("file", [network("n1")], []))
    assert isinstance(inventory.owner(address), Expired)
    by_mac = identify(inventory, N1, ip_address(_RANDOM), neighbour_mac=MAC)
    assert by_mac == Expired(A.id, ("fleet",))
    inventory.observe(Observation("fleet"))
    assert dict(inventory.addresses()) == before


_BY = Found(A, A.ports[0], How.NEIGHBOUR)
_UNKNOWN = Unknown(UnknownReason.ADDRESS)
_RANDOM = "fe80::1234:5678:9abc:def0"


@pytest.mark.parametrize(
    ("address", "mac", "wanted"),
    [
        # By each of its addresses, with its port's MAC, or where the MAC is unknown.
        *(("10.0.0.5", mac, Found(A, A.ports[0], How.ADDRESS)) for mac in (None, MAC)),
        ("::ffff:10.0.0.5", None, Found(A, A.ports[0], How.ADDRESS)),
        *(("10.0.0.9", mac, Found(A, A.ports[1], How.ADDRESS)) for mac in (None, OTHER)),
        *(("fe80::5054:ff:fe12:3456", mac, Found(A, A.ports[0], How.EUI64)) for mac in (None, MAC)),
        ("fe80::5054:ff:fe12:3456%eth0", None, Found(A, A.ports[0], How.EUI64)),
        *((one, OTHER, Mismatch(A, expected=MAC)) for one in ("10.0.0.5", "fe80::5054:ff:fe12:3456")),
        # By the neighbour table, where the port lists no address of the family.
        (_RANDOM, None, _UNKNOWN),
        *((one, MAC, _BY) for one in (_RANDOM, "169.254.7.7", "2001:db8::77")),
        ("10.0.0.77", MAC, Unknown(UnknownReason.OTHER_ADDRESS)),
        ("fe80::1", OTHER, Unknown(UnknownReason.MAC)),
    ],
)  # fmt: skip
def test_a_guest_is_known_by_its_addresses_together_with_its_mac(
    inventory: Inventory, address: str, mac: MacAddress | None, wanted: Identity
) -> None:
    assert identify(inventory, N1, ip_address(address), neighbour_mac=mac) == wanted


@pytest.mark.parametrize(
    ("address", "wanted"),
    [("10.0.0.77", _UNKNOWN), ("10.0.0.5", Found(A, A.ports[0], How.ADDRESS)), (_RANDOM, _BY)],
)
def test_where_macs_are_not_checked_only_link_local_addresses_are_known_by_one(
    inventory: Inventory, address: str, wanted: Identity
) -> None:
    inventory.observe(full("file", [network("n1", mac_check=False)], [A]))
    mac = OTHER if isinstance(wanted, Found) and wanted.how is How.ADDRESS else MAC
    assert identify(inventory, N1, ip_address(address), neighbour_mac=mac) == wanted


def test_a_link_local_address_in_a_record_does_not_say_where_its_others_are() -> None:
    record = instance("a", "fe80::7", mac=MAC)
    made = loaded(full("file", [network("n1")], [record]))
    found = identify(made, N1, ip_address("2001:db8::77"), neighbour_mac=MAC)
    assert found == Found(record, record.ports[0], How.NEIGHBOUR)


def test_what_was_learned_holds_as_long_as_the_record_says_so() -> None:
    asked = key("n1", "10.0.0.77")
    entry = Learned(A.id, 0.0, mac=MAC)
    made = loaded(full("file", [network("n1")], [instance("a", mac=MAC)]))
    assert holds(made, asked, entry)
    for other in (
        instance("a", mac=OTHER),
        instance("a", "10.0.0.5", mac=MAC),
        instance("b", mac=MAC),
    ):
        made.observe(full("file", [network("n1")], [other]))
        assert not holds(made, asked, entry)


@pytest.mark.parametrize(
    ("name", "reason"), [("n2", UnknownReason.ADDRESS), ("n9", UnknownReason.NETWORK)]
)
def test_the_same_address_in_another_network_is_unknown(
    inventory: Inventory, name: str, reason: UnknownReason
) -> None:
    assert identify(inventory, NetworkId(name), ip_address("10.0.0.5")) == Unknown(reason)


@pytest.mark.parametrize("address", ["10.0.0.5", "fe80::5054:ff:fe12:3456", "fe80::99"])
def test_two_claimants_are_never_guessed_between(inventory: Inventory, address: str) -> None:
    inventory.observe(full("sqlite", [], [instance("b", "10.0.0.5", mac=MAC)]))
    found = identify(inventory, N1, ip_address(address), neighbour_mac=MAC)
    assert found == Ambiguous((Claimant("file", "a"), Claimant("sqlite", "b")))


@given(macs, st.integers(0, 2**128 - 1).map(IPv6Address))
def test_a_mac_comes_back_from_its_link_local_address_and_from_no_other(
    mac: MacAddress, other: IPv6Address
) -> None:
    assert link_local_of(mac).is_link_local
    assert mac_of(link_local_of(mac)) == mac
    seen = mac_of(other)
    assert seen is None or link_local_of(seen) == other
    # RFC 4291 appendix A: 34-56-78-9A-BC-DE gives the interface identifier 3656:78FF:FE9A:BCDE.
    assert link_local_of(MacAddress("34:56:78:9a:bc:de")) == ip_address("fe80::3656:78ff:fe9a:bcde")


# What sources say together

_LINK_LOCAL = "fe80::5054:ff:fe12:3456"


def test_an_instance_owns_its_addresses_and_the_link_local_one_of_its_mac() -> None:
    inventory = loaded(full("file", [network("n1")], [instance("a", "10.0.0.5", mac=MAC)]))
    assert dict(inventory.addresses()) == {key("n1", "10.0.0.5"): "a", key("n1", _LINK_LOCAL): "a"}
    assert inventory.instances_in(N1) == {"a"}
    elsewhere = instance("a", "10.0.0.5", ports=[port("n2", mac=MAC)])
    assert not loaded(full("file", [network("n1")], [elsewhere])).carries_macs(N1)


def test_the_same_address_in_two_networks_has_two_owners() -> None:
    a, b = instance("a", "10.0.0.5"), instance("b", ports=[port("n2", "10.0.0.5", mac=MAC)])
    inventory = loaded(full("file", [network("n1"), network("n2", bridge="br1")], [a, b]))
    assert inventory.owner(key("n1", "10.0.0.5")) == "a"
    assert inventory.owner(key("n2", "10.0.0.5")) == "b"
    assert not inventory.conflicts()
    assert [inventory.carries_macs(NetworkId(name)) for name in ("n1", "n2")] == [False, True]


def test_the_same_record_in_two_sources_is_no_conflict() -> None:
    one = full("file", [network("n1")], [instance("a", "10.0.0.5")])
    inventory = loaded(one, full("sqlite", one.networks.values(), one.instances.values()))
    assert not inventory.conflicts()
    assert inventory.owner(key("n1", "10.0.0.5")) == "a"
    assert inventory.sources_of_instance(InstanceId("a")) == ("file", "sqlite")


def test_who_does_not_say_when_an_instance_was_made_contradicts_nobody_who_does() -> None:
    unsaid = instance("a", "10.0.0.5")
    dated = replace(unsaid, created_at=7)
    for first, second in ((unsaid, dated), (dated, unsaid)):
        inventory = loaded(full("file", [network("n1")], [first]), full("sqlite", [], [second]))
        assert not inventory.conflicts()
        assert inventory.instances[InstanceId("a")] == dated
        inventory.observe(full("sqlite", [], [replace(second, created_at=8)]))
        assert bool(inventory.conflicts()) is (first is dated)
        inventory.observe(full("sqlite", [], [replace(second, name="other")]))
        assert inventory.conflicts()


def test_two_versions_of_an_instance_contest_every_address_of_either() -> None:
    inventory = loaded(
        full("file", [network("n1")], [instance("a", "10.0.0.5")]),
        full("sqlite", [], [instance("a", "10.0.0.6")]),
    )
    wanted = Conflict(ConflictKind.INSTANCE, "a", (Claimant("file", "a"), Claimant("sqlite", "a")))
    assert inventory.owner(key("n1", "10.0.0.5")) == wanted
    assert inventory.owner(key("n1", "10.0.0.6")) == wanted
    assert inventory.conflicts() == (wanted,)
    assert InstanceId("a") not in inventory.instances


def test_an_address_of_two_instances_is_contested_and_their_others_are_not() -> None:
    a = instance("a", "10.0.0.5", "10.0.0.6", mac=MAC)
    b = instance("b", "10.0.0.5", "10.0.0.7", mac=MAC)
    inventory = loaded(full("file", [network("n1")], [a]), full("sqlite", [], [b]))
    wanted = Conflict(
        ConflictKind.ADDRESS, "n1/10.0.0.5", (Claimant("file", "a"), Claimant("sqlite", "b"))
    )
    assert "a (file), b (sqlite)" in str(wanted)
    assert dict(inventory.addresses()) == {
        key("n1", "10.0.0.5"): wanted,
        key("n1", "10.0.0.6"): "a",
        key("n1", "10.0.0.7"): "b",
        key("n1", _LINK_LOCAL): replace(wanted, subject=f"n1/{_LINK_LOCAL}"),
    }
    assert inventory.instances.keys() == {"a", "b"}


def test_a_port_of_an_unknown_network_claims_nothing_until_the_network_comes() -> None:
    inventory = loaded(full("file", [], [instance("a", "10.0.0.5", mac=MAC)]))
    assert not dict(inventory.addresses())
    assert [one.problem().field for one in inventory.stranded()] == ["instances.a.ports[0].network"]
    affected = inventory.observe(Observation("sqlite", networks={N1: network("n1")}))
    assert affected.networks == {"n1"}
    assert affected.instances == {"a"}
    assert affected.addresses == {key("n1", "10.0.0.5"), key("n1", _LINK_LOCAL)}
    assert inventory.owner(key("n1", "10.0.0.5")) == "a"
    assert not list(inventory.stranded())


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (network("n1", mtu=1500), Network(N1, BridgeListener("br0"))),
        # One that has MACs checked is enough.
        (network("n1", mac_check=False), Network(N1, BridgeListener("br0"), mac_check=True)),
        (network("n1", bridge="br1"), None),
    ],
)
def test_sources_that_differ_on_a_network_keep_the_listener_that_they_agree_on(
    other: Network, kept: Network | None
) -> None:
    first = full("file", [network("n1", mtu=1400)], [instance("a", "10.0.0.5")])
    inventory = loaded(first, full("sqlite", [other]))
    assert inventory.networks.get(N1) == kept
    assert inventory.knows(N1)
    owner = inventory.owner(key("n1", "10.0.0.5"))
    assert isinstance(owner, Conflict)
    assert owner.kind is ConflictKind.NETWORK


def test_it_is_in_sync_when_every_expected_source_is() -> None:
    inventory = Inventory(["file", "sqlite"])
    refused = (Problem("instances[0].id", "is empty", file="x.yaml", line=3),)
    last = Observation("file", in_sync=False, problems=refused)
    steps = [full("file"), full("sqlite"), last]
    told = [(inventory.observe(step).in_sync, inventory.in_sync) for step in steps]
    assert told == [(False, False), (True, True), (True, False)]
    reports = [(one.in_sync, one.problems) for one in inventory.reports.values()]
    assert reports == [(False, refused), (True, ())]
    assert not Inventory().in_sync


def _nova(name: str, address: str) -> Instance:
    return replace(instance(name, address), upstream=Upstream.NOVA, project="p")


@pytest.mark.parametrize("first", ["store", "neutron"])
def test_an_id_that_a_tenant_has_chosen_takes_nothing_from_whose_it_is(first: str) -> None:
    inventory = Inventory(["neutron", "store"])
    ours, theirs = instance("a", "10.0.0.5"), _nova("a", "10.0.0.66")
    told = {
        "store": full("store", [network("n1")], [ours]),
        "neutron": replace(full("neutron", [], [theirs]), defers=True),
    }
    for name in sorted(told, key=lambda name: name != first):
        inventory.observe(told[name])

    assert inventory.conflicts() == ()
    assert inventory.instances[ours.id] == ours
    assert inventory.sources_of_instance(ours.id) == ("store",)
    assert inventory.owner(key("n1", "10.0.0.5")) == "a"
    assert inventory.owner(key("n1", "10.0.0.66")) is None
    # Where no other source has the id, the one that defers counts again.
    affected = inventory.observe(full("store", [network("n1")], []))
    assert key("n1", "10.0.0.66") in affected.addresses
    assert inventory.owner(key("n1", "10.0.0.66")) == "a"
    assert inventory.instances[theirs.id] == theirs
