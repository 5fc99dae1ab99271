"""Guests of a genuine OVN are served by imdsproxy alone: no Neutron, no agent, nothing but OVN's databases."""

import re
from collections.abc import Iterator

import pytest

from support.guest import IPV4, IPV6
from support.lab import until
from support.ovn_world import OvnWorld, open_ovn_world

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[OvnWorld]:
    """Two networks with equal addresses, and a pair of guests with the same MAC as well."""
    with open_ovn_world() as made:
        for name in ("a", "b"):
            made.ovn.add_network(name)
        for name in ("a1", "b1"):
            made.add(name, name[0], 11)
        for name in ("a2", "b2"):
            made.add(name, name[0], 12, mac="fa:16:3e:02:00:02")
        made.daemon.start()
        made.wait_own()
        yield made


@pytest.mark.parametrize("to", [IPV4, IPV6])
def test_every_guest_is_itself_in_networks_with_equal_addresses_and_macs(
    world: OvnWorld, to: str
) -> None:
    for name in world.guests:
        assert world.asks_as(name, to=to) == world.ovn.ports[name].instance


def test_each_network_has_the_namespace_and_the_port_that_neutron_would_make(
    world: OvnWorld,
) -> None:
    plugged = world.ovn.plugged()
    for network in (world.ovn.networks[name] for name in "ab"):
        assert network.namespace in world.ovn.left_over()
        assert plugged[network.devices[0]] == network.metadata_port


def test_neutron_sees_a_metadata_agent_that_is_alive(world: OvnWorld) -> None:
    world.ovn.sync()
    until(
        lambda: re.search(r"neutron:ovn-metadata-sb-cfg=\d", world.ovn.agent_ids()),
        what="the heartbeat",
        within_s=15,
    )
    assert "neutron:ovn-metadata-id=" in world.ovn.agent_ids()


def test_a_port_that_comes_changes_moves_and_goes_is_in_force_at_once(world: OvnWorld) -> None:
    before = world.daemon.status()["instances"]
    world.add("a3", "a", 13)
    try:
        world.wait_own("a3")
        world.ovn.change("a3", device_id="other-instance")
        until(lambda: world.asks_as("a3") == "other-instance", what="the new instance")
        world.ovn.change("a3", cidrs="10.0.0.14/24")
        until(lambda: world.asks_as("a3") == "404", what="no instance at the old address")
        world.ovn.change("a3", cidrs="10.0.0.13/24")
        until(lambda: world.asks_as("a3") == "other-instance", what="the instance again")
        world.ovn.remove_port("a3")
        until(lambda: world.daemon.status()["instances"] == before, what="no record of it")
    finally:
        del world.guests["a3"]


def test_two_ports_with_one_address_in_a_network_are_a_conflict_and_no_guess(
    world: OvnWorld,
) -> None:
    world.ovn.add_port("a4", "a", 11)
    world.ovn.guest("a4")
    try:
        until(lambda: world.daemon.status()["conflicts"], what="the conflict")
        assert world.asks_as("a1") != world.ovn.ports["a4"].instance
    finally:
        world.ovn.remove_port("a4")
    world.wait_own("a1")


def test_guests_are_served_on_while_ovn_controller_is_stopped_and_its_row_is_gone(
    world: OvnWorld,
) -> None:
    world.ovn.stop_controller()
    try:
        _are_served(world)
        assert {world.ovn.networks[name].namespace for name in "ab"} <= set(world.ovn.left_over())
    finally:
        world.ovn.sync()
    world.wait_own()


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
def test_guests_are_served_on_over_a_southbound_database_that_is_killed_and_started(
    world: OvnWorld, *, empty: bool
) -> None:
    try:
        with world.ovn.without_southbound(empty=empty):
            until(lambda: not world.daemon.status()["sources"][0]["in_sync"], what="the loss")
            _are_served(world)
        until(
            lambda: "no connection" not in str(world.daemon.status()),
            what="a connection",
            within_s=30,
        )
        _are_served(world)
    finally:
        world.ovn.sync()
    world.wait_own()


def _are_served(world: OvnWorld) -> None:
    for name in world.guests:
        assert world.asks_as(name) == world.ovn.ports[name].instance


def test_a_network_without_ports_here_loses_its_namespace_and_its_port(world: OvnWorld) -> None:
    network = world.ovn.add_network("c")
    world.add("c1", "c")
    try:
        world.wait_own("c1")
    finally:
        del world.guests["c1"]
        world.ovn.unbind("c1")
    until(lambda: network.namespace not in world.ovn.left_over(), what="the namespace's end")
    until(lambda: network.devices[0] not in world.ovn.plugged(), what="the port's end")
    assert network.devices[0] not in world.ovn.lab.host_links()
