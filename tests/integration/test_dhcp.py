"""Networks without a router: neutron-dhcp-agent makes their namespaces; its HAProxies or imdsproxy listen there."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest

from support.daemon import Daemon
from support.guest import Guest
from support.lab import until
from support.neutron_agents import NeutronHost, open_agents

pytestmark = pytest.mark.root

_WITHIN_S = 60.0


@dataclass(slots=True)
class DhcpWorld:
    """A genuine DHCP agent with an isolated network, and a daemon that serves nothing yet."""

    host: NeutronHost
    daemon: Daemon
    guest: Guest
    instance: str

    def asked_uuid(self) -> str:
        """Who the guest is, by what it reads; else the status."""
        reply = self.guest.ask("/openstack/latest/meta_data.json")
        return str(json.loads(reply.body)["uuid"]) if reply.status == 200 else str(reply.status)

    def networks(self) -> dict[str, str]:
        """The namespaces of imdsproxy's networks, each with why it is not served; empty where it is."""
        return {
            one["record"]["listener"]["namespace"]: one["left_out"]["code"]
            if one["left_out"]
            else ""
            for one in self.daemon.admin.get("/v1/networks")
        }


@pytest.fixture(scope="module")
def world() -> Iterator[DhcpWorld]:
    options = {"enable_isolated_metadata": "true"}
    with open_agents("dhcp", **options) as host, closing(Daemon(host.lab)) as daemon:
        host.give("dhcp", "net-green")
        port = host.port("net-green", "10.0.0.5")
        guest = host.guest(port, via=host.dhcp_address("net-green"))
        until(guest.reaches, within_s=_WITHIN_S)
        daemon.configure(host.settings({"dhcp": True}))
        daemon.start()
        yield DhcpWorld(host, daemon, guest, port.device_id)


def test_a_guest_of_an_isolated_network_is_answered_by_neutrons_own_agents(
    world: DhcpWorld,
) -> None:
    assert world.asked_uuid() == world.instance


def test_imdsproxy_listens_where_the_agent_wants_metadata_and_reports_its_haproxy(
    world: DhcpWorld,
) -> None:
    wanted = {world.host.dhcp_namespace("net-green"): "foreign-listener"}
    until(lambda: world.networks() == wanted, within_s=_WITHIN_S)
