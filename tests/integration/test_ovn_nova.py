"""Guests of a genuine OVN get byte for byte what genuine Nova says of them, by OVN's rows alone.

The table of truth (`support.openstack.table`) is in OVN as Neutron's driver would write it, with the ids of genuine
Neutron. Neutron runs since Nova asks it; the daemon knows neither Neutron nor Keystone. Only `random_seed` is not
compared, which is new in every answer.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_network
from typing import Final

import pytest

from support.daemon import Daemon
from support.guest import IPV4, IPV6, Connection, Guest, Lost
from support.lab import until
from support.openstack.lab import OpenStack, open_openstack
from support.openstack.oracle import Oracle, Request, crawl, said_to_guest
from support.openstack.table import INSTANCES, NETWORKS, PORTS, NetworkPlan, PortPlan, Seed
from support.ovn_lab import OvnLab, OvnNetwork, OvnPort, open_ovn
from support.ovn_world import ovn_settings

pytestmark = [pytest.mark.root, pytest.mark.slow]

OF_INSTANCES: Final = {(one.uuid, one.project_id): one for one in INSTANCES}
PLUGGED: Final = tuple(one for one in PORTS if one.device_owner != "network:distributed")
SERVED: Final = tuple(one for one in PLUGGED if (one.device_id, one.project_id) in OF_INSTANCES)
OTHERS: Final = tuple(one for one in PLUGGED if one not in SERVED)
LATEST: Final = ("/latest/", "/openstack/latest/")
READY_S: Final = 15.0


def _name(plan: PortPlan) -> str:
    return f"{plan.network.removeprefix('net-')}-{plan.addresses[0].rpartition('.')[2]}"


@dataclass(slots=True)
class World:
    """A guest for each port of the table, by its name."""

    openstack: OpenStack
    ovn: OvnLab
    daemon: Daemon
    oracle: Oracle
    guests: dict[str, Guest] = field(default_factory=dict)

    def connect(self, plan: PortPlan, address: str) -> Connection:
        """A connection of a guest's from one of its addresses."""
        to = IPV6 if ":" in address else IPV4
        return self.guests[_name(plan)].connect(to=to, source=address)

    def is_known(self, plan: PortPlan) -> bool:
        """Whether a guest's requests come to Nova, which answers this one to each instance id."""
        try:
            return self.guests[_name(plan)].ask("/", timeout_s=2).status == 200
        except Lost:
            return False


def _cidrs(plan: NetworkPlan) -> tuple[str, ...]:
    return tuple(one for one in (plan.cidr4, plan.cidr6) if one is not None)


def _add_networks(ovn: OvnLab, seed: Seed) -> None:
    """Make the table's networks, each with its metadata port at the second address of each subnet."""
    for number, plan in enumerate(one for one in NETWORKS if not one.external):
        second = [(ip_network(one)[2], one.partition("/")[2]) for one in _cidrs(plan)]
        network = OvnNetwork(
            id=seed.networks[plan.name],
            project=plan.project_id,
            metadata_port=f"5eed0000-{number:04x}-4000-8000-000000000001",
            metadata_mac=f"fa:16:3e:ff:{number:02x}:fe",
            cidrs=tuple(f"{address}/{length}" for address, length in second),
        )
        ovn.put_network(plan.name, network)


def _add_ports(ovn: OvnLab, seed: Seed) -> None:
    """Make the table's ports."""
    lengths = {
        one.name: {":" in cidr: cidr.partition("/")[2] for cidr in _cidrs(one)} for one in NETWORKS
    }
    for port in seed.ports:
        if (plan := port.plan) in PLUGGED:
            ovn.put_port(
                OvnPort(
                    id=port.id,
                    name=_name(plan),
                    network=ovn.networks[plan.network],
                    mac=plan.mac,
                    cidrs=tuple(
                        f"{one}/{lengths[plan.network][':' in one]}" for one in plan.addresses
                    ),
                    instance=port.device_id,
                    project=plan.project_id,
                    owner=plan.device_owner,
                )
            )


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The table's ports and their guests, each known to the daemon."""
    with contextlib.ExitStack() as stack:
        ovn = stack.enter_context(open_ovn())
        openstack = stack.enter_context(open_openstack(namespace=ovn.lab.host))
        for server in openstack.servers.values():
            stack.callback(server.kill)
        daemon = Daemon(ovn.lab)
        stack.callback(daemon.close)
        made = World(openstack, ovn, daemon, Oracle(openstack))
        with ovn.together():
            _add_networks(ovn, openstack.seed)
            _add_ports(ovn, openstack.seed)
        for name in ovn.ports:
            made.guests[name] = ovn.guest(name)
        own = ovn_settings(ovn.open_vswitch, nova=openstack.nova_url, secret=openstack.secret_file)
        # Nobody here is announced late.
        daemon.configure({**own, "resolver": {"hold_s": 0.0}})
        daemon.start()
        for plan in (one for one in PLUGGED if one.device_id):
            until(partial(made.is_known, plan), what=f"{_name(plan)} is known", within_s=READY_S)
        yield made


@pytest.mark.always
@pytest.mark.parametrize("plan", SERVED, ids=_name)
def test_each_guest_gets_every_document_of_every_version_as_nova_says_it_and_nobody_elses(
    world: World, plan: PortPlan
) -> None:
    own = OF_INSTANCES[plan.device_id, plan.project_id]
    everything = [Request(path) for path in world.oracle.documents(own)]
    latest = [one for one in everything if one.target.startswith(LATEST)]
    who = (own.uuid, own.project_id)
    first, *others = (*plan.addresses, plan.link_local)

    assert len(everything) > 180
    assert not crawl(world.oracle, lambda: world.connect(plan, first), who, everything)
    assert len(latest) > 25
    for address in others:
        assert not crawl(world.oracle, partial(world.connect, plan, address), who, latest)


@pytest.mark.parametrize("plan", OTHERS, ids=_name)
def test_a_port_of_no_instance_or_of_another_projects_gets_nothing(
    world: World, plan: PortPlan
) -> None:
    for request in (Request("/latest/user-data"), Request("/openstack/latest/meta_data.json")):
        with world.connect(plan, plan.addresses[0]) as connection:
            got = said_to_guest(connection.request(request.target))
        assert got.status == 404
        if plan.device_id:
            assert got == world.oracle.says(plan.device_id, plan.project_id, request)
        assert not [one for one in INSTANCES if one.name.encode() in got.body]


def test_the_daemon_knows_them_by_ovn_alone(world: World) -> None:
    assert [one["name"] for one in world.daemon.status()["sources"]] == ["ovn"]
