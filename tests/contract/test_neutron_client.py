"""What a client of Neutron promises the source: Neutron's own by REST, and the one in memory that tests use."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

import pytest

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import SourceUnavailable
from imdsproxy.model.entities import MacAddress, NetworkId
from imdsproxy.sources.neutron.client import NeutronClient
from imdsproxy.sources.neutron.ports import ROUTER_OWNERS, NeutronPort, PortQuery, parse_ports
from support.fake_neutron import FakeNeutron
from support.openstack.lab import OpenStack
from support.openstack.table import Port
from support.patience import patience

# openstacksdk warns of a setting that is not set (its defaults for InfluxDB are not empty).
pytestmark = pytest.mark.filterwarnings("ignore:Support for InfluxDB:PendingDeprecationWarning")

KINDS: Final = ("fake", "endpoint", "cloud")


@pytest.fixture(params=KINDS)
async def client(
    request: pytest.FixtureRequest, openstack: OpenStack
) -> AsyncIterator[NeutronClient]:
    """A client with the lab's ports; the fake has been filled from Neutron's list."""
    made: NeutronClient
    if request.param == "fake":
        made = FakeNeutron()
        made.put(*parse_ports({"ports": [*openstack.rest.list("port")]}))
    else:
        endpoint = {"endpoint": f"{openstack.neutron_url}/v2.0/"}
        cloud = {"cloud": "lab", "clouds_file": openstack.clouds_yaml}
        made = NeutronClient(
            NeutronSourceSettings.model_construct(
                timeout_s=10 * patience(), **(cloud if request.param == "cloud" else endpoint)
            )
        )
    yield made
    await made.close()


def _seeded(openstack: OpenStack, network: str, address: str) -> Port:
    return next(
        one
        for one in openstack.seed.ports
        if one.plan.network == network and address in one.plan.addresses
    )


async def test_a_port_is_answered_with_all_that_counts_of_it(
    client: NeutronClient, openstack: OpenStack
) -> None:
    seeded = _seeded(openstack, "net-blue2", "10.0.1.7")
    (found,) = await client.ports(PortQuery(ids=(seeded.id,)))
    assert found.created_at is not None
    assert time.time() - 86_400 < found.created_at <= time.time()
    assert replace(found, created_at=None) == NeutronPort(
        id=seeded.id,
        network=NetworkId(seeded.network_id),
        mac=MacAddress(seeded.plan.mac),
        addresses=(ip_address("10.0.1.7"), ip_address("10.0.1.8")),
        device=seeded.device_id,
        owner="compute:nova",
        project=seeded.plan.project_id,
    )


async def test_filters_hold_all_together_each_by_one_of_its_values(
    client: NeutronClient, openstack: OpenStack
) -> None:
    blue, red = (NetworkId(openstack.seed.networks[name]) for name in ("net-blue", "net-red"))
    addresses = (ip_address("10.0.0.5"), ip_address("10.0.0.6"))
    found = await client.ports(PortQuery(networks=(blue, red), addresses=addresses))
    assert len(found) == 4
    found = await client.ports(PortQuery(networks=(blue,), addresses=addresses))
    assert {each.addresses[0] for each in found} == set(addresses)
    (one,) = await client.ports(PortQuery(networks=(blue,), addresses=(ip_address("fd00:1::5"),)))
    assert one.id == _seeded(openstack, "net-blue", "fd00:1::5").id
    (same,) = await client.ports(PortQuery(networks=(blue,), macs=(MacAddress(str(one.mac)),)))
    assert same == one
    (twin,) = await client.ports(PortQuery(networks=(red,), macs=(MacAddress(str(one.mac)),)))
    assert twin.network == red


async def test_a_routers_interfaces_are_found_by_owner_and_a_ports_place_where_it_is_asked_for(
    client: NeutronClient, openstack: OpenStack
) -> None:
    router = openstack.seed.routers["r-blue"]
    found = await client.ports(PortQuery(devices=(router,), owners=ROUTER_OWNERS))
    wanted = {openstack.seed.networks[name] for name in ("net-blue", "net-blue2")}
    assert {each.network for each in found} == wanted
    assert {each.host for each in found} == {None}
    found = await client.ports(PortQuery(host="lab", limit=100))
    assert {each.host for each in found} == {"lab"}
    assert _seeded(openstack, "net-blue", "10.0.0.5").id in {each.id for each in found}


async def test_what_is_not_there_is_no_failure_alone_or_among_many(
    client: NeutronClient, openstack: OpenStack
) -> None:
    for query in (
        PortQuery(networks=(NetworkId("nothing"),), addresses=(ip_address("10.0.0.5"),)),
        PortQuery(devices=("nothing",), owners=ROUTER_OWNERS),
        PortQuery(host="nowhere", limit=5),
    ):
        assert await client.ports(query) == ()
    seeded = [one.id for one in openstack.seed.ports]
    missing = [f"00000000-0000-4000-8000-0000000000{number:02}" for number in range(32)]
    found = await client.ports(PortQuery(ids=(*seeded, *missing)[:32]))
    assert {each.id for each in found} == set(seeded)


async def test_pages_follow_each_other_to_the_end(client: NeutronClient) -> None:
    everything = sorted(each.id for each in await client.ports(PortQuery()))
    seen: list[str] = []
    after: str | None = None
    while page := await client.ports(PortQuery(limit=4, after=after)):
        assert len(page) <= 4
        seen += [each.id for each in page]
        after = page[-1].id
    assert sorted(seen) == everything
    # One after a port that is gone is refused.
    with pytest.raises(SourceUnavailable):
        await client.ports(PortQuery(limit=4, after="00000000-0000-4000-8000-000000000000"))
