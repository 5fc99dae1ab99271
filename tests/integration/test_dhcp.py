"""Networks without a router: neutron-dhcp-agent makes their namespaces; its HAProxies or imdsproxy listen there."""

import json
from collections.abc import Iterator

import pytest

from support.lab import until
from support.neutron_agents import NeutronHost, open_agents

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def host() -> Iterator[NeutronHost]:
    with open_agents("dhcp", enable_isolated_metadata="true") as host:
        host.give("dhcp", "net-green")
        yield host


def test_a_guest_of_an_isolated_network_is_answered_by_neutrons_own_agents(
    host: NeutronHost,
) -> None:
    port = host.port("net-green", "10.0.0.5")
    guest = host.guest(port, via=host.dhcp_address("net-green"))
    until(guest.reaches, within_s=20)
    reply = guest.ask("/openstack/latest/meta_data.json")
    assert (reply.status, json.loads(reply.body)["uuid"]) == (200, port.device_id)
