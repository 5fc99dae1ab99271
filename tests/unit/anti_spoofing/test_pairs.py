"""Which address goes with which MAC."""

from __future__ import annotations

from imdsproxy.anti_spoofing.plan import (
    ANY_MAC,
    LEARNED_PER_MAC,
    excess_learned,
    plan_pair,
    plan_pairs,
)
from imdsproxy.core.identity import Learned
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId, MacAddress
from imdsproxy.core.observation import AddressKey
from support.record_builders import full, instance, key, network

MAC = MacAddress("52:54:00:12:34:56")
OTHER = MacAddress("52:54:00:00:00:01")
LINK_LOCAL = "fe80::5054:ff:fe12:3456"


def _inventory(*instances: object, mac_check: bool = True) -> Inventory:
    made = Inventory()
    made.observe(full("file", [network("n1", mac_check=mac_check)], instances))  # type: ignore[arg-type]  # for brevity
    return made


def test_every_address_of_a_port_goes_with_its_mac() -> None:
    inventory = _inventory(instance("a", "10.0.0.5", "2001:db8::5", mac=MAC))
    keys = [key("n1", each) for each in ("10.0.0.5", "2001:db8::5", LINK_LOCAL)]
    assert plan_pairs(inventory, keys, {}) == dict.fromkeys(keys, MAC)


def test_an_address_that_nobody_has_has_no_pair() -> None:
    inventory = _inventory(instance("a", "10.0.0.5", mac=MAC))
    assert plan_pair(inventory, key("n1", "10.0.0.6"), {}) is None


def test_a_port_without_a_mac_goes_with_any_and_a_contested_address_with_none() -> None:
    inventory = _inventory(
        instance("a", "10.0.0.5"),
        instance("b", "10.0.0.6", mac=MAC),
        instance("c", "10.0.0.6", mac=OTHER),
    )
    assert plan_pair(inventory, key("n1", "10.0.0.5"), {}) == ANY_MAC
    assert plan_pair(inventory, key("n1", "10.0.0.6"), {}) is None


def test_what_was_learned_goes_with_the_mac_it_was_learned_by_while_that_holds() -> None:
    asked = key("n1", "10.0.0.77")
    learned = {asked: Learned(InstanceId("a"), 0.0, mac=MAC)}
    assert plan_pair(_inventory(instance("a", mac=MAC)), asked, learned) == MAC
    assert plan_pair(_inventory(instance("a", "10.0.0.5", mac=MAC)), asked, learned) is None
    # What a record says comes first.
    claimed = _inventory(instance("a", mac=MAC), instance("b", "10.0.0.77", mac=OTHER))
    assert plan_pair(claimed, asked, learned) == OTHER


def test_a_network_that_checks_no_macs_has_no_pairs() -> None:
    inventory = _inventory(instance("a", "10.0.0.5", mac=MAC), mac_check=False)
    asked = key("n1", "10.0.0.5")
    assert plan_pairs(inventory, [asked], {}) == {asked: None}


def test_the_oldest_learned_addresses_of_a_mac_make_room() -> None:
    def entry(mac: MacAddress) -> Learned:
        return Learned(InstanceId("a"), 0.0, mac=mac)

    mine: list[AddressKey] = [key("n1", f"10.0.0.{number}") for number in range(LEARNED_PER_MAC)]
    learned = {key("n1", "10.9.9.9"): entry(OTHER), **{each: entry(MAC) for each in mine}}
    assert excess_learned(learned, mine[0], MAC) == ()
    assert excess_learned(learned, key("n1", "10.0.1.1"), MAC) == (mine[0],)
    assert excess_learned(learned, key("n2", "10.0.1.1"), MAC) == ()
