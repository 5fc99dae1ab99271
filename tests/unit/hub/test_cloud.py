"""Guests of Nova on a host, from Nova's servers and Neutron's ports."""

from dataclasses import dataclass, field, replace
from typing import Final

import pytest

from imdsproxy.config.identity import CloudSettings
from imdsproxy.errors import SourceUnavailable
from imdsproxy.fleet.layout import HostId
from imdsproxy.hub.hosts.cloud import CloudGuests, Server, parse_servers, plan_placed
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.sources.neutron.ports import NeutronPort

_HOST: Final = HostId("kvm1")
_WEB: Final = Server(InstanceId("web"), "blue", "kvm1", "az-1", 1_700_000_000)
_PORT: Final = NeutronPort(
    "p1", NetworkId("n1"), None, (), "web", "compute:nova", "blue", host="kvm1"
)


def test_an_instance_has_nova_s_facts_and_neutron_s_networks() -> None:
    found = plan_placed(_HOST, [_WEB], [_PORT, replace(_PORT, id="p2", network=NetworkId("n2"))])
    (web,) = found.values()
    assert (web.project, web.availability_zone, web.created_at) == ("blue", "az-1", 1_700_000_000)
    assert [port.network for port in web.ports] == ["n1", "n2"]


@pytest.mark.parametrize(
    ("server", "port"),
    [
        (_WEB, replace(_PORT, project="red")),
        (_WEB, replace(_PORT, host="kvm2")),
        (_WEB, replace(_PORT, host=None)),
        (_WEB, replace(_PORT, device="db")),
        (_WEB, replace(_PORT, owner="network:dhcp")),
        (replace(_WEB, host="kvm2"), _PORT),
        (replace(_WEB, project="red"), _PORT),
    ],
    ids=[
        "a port of another project",
        "a port bound elsewhere",
        "an unbound port",
        "another instance's port",
        "a port of a service",
        "an instance elsewhere",
        "an instance of another project",
    ],
)
def test_what_nova_and_neutron_do_not_both_say_proves_nothing(
    server: Server, port: NeutronPort
) -> None:
    assert plan_placed(_HOST, [server], [port]) == {}


def test_a_forged_port_does_not_take_the_instance_s_own_one_away() -> None:
    forged = replace(_PORT, id="p0", network=NetworkId("theirs"), project="red")
    (web,) = plan_placed(_HOST, [_WEB], [forged, _PORT]).values()
    assert [port.network for port in web.ports] == ["n1"]


def test_servers_are_parsed_and_those_on_no_host_left_out() -> None:
    row = {
        "id": "web",
        "tenant_id": "blue",
        "OS-EXT-SRV-ATTR:host": "kvm1",
        "OS-EXT-AZ:availability_zone": "az-1",
        "created": "2023-11-14T22:13:20Z",
    }
    shelved = {**row, "id": "s", "OS-EXT-SRV-ATTR:host": None}
    bare = {**row, "id": "b", "OS-EXT-AZ:availability_zone": "", "created": "soon"}
    found = parse_servers({"servers": [row, shelved, bare]})
    assert found == (_WEB, Server(InstanceId("b"), "blue", "kvm1", None, None))


@pytest.mark.parametrize(
    "answer",
    [None, [], {}, {"servers": {}}, {"servers": [None]}, {"servers": [{"id": 1, "tenant_id": ""}]}],
)
def test_an_answer_that_is_no_list_of_servers_is_an_error(answer: object) -> None:
    with pytest.raises(ValueError, match="no"):
        parse_servers(answer)


@dataclass(slots=True)
class _Cloud:
    """OpenStack with a clock of the test's own; counts how often a host was asked about."""

    now: float = 100.0
    servers: list[Server] = field(default_factory=lambda: [_WEB])
    reads: int = 0
    away: bool = False

    def guests(self) -> CloudGuests:
        return CloudGuests(self._servers, self._ports, 60.0, lambda: self.now)

    async def _servers(self, _: HostId) -> list[Server]:
        self.reads += 1
        if self.away:
            raise SourceUnavailable("Nova is away")
        return self.servers

    async def _ports(self, _: HostId) -> list[NeutronPort]:
        return [_PORT]


async def test_an_answer_about_a_host_counts_for_its_time_and_no_longer() -> None:
    cloud = _Cloud()
    guests = cloud.guests()
    assert await guests.find(_HOST, _WEB.id) is not None
    cloud.servers.clear()
    cloud.now += 59
    assert await guests.find(_HOST, _WEB.id) is not None
    assert cloud.reads == 1
    cloud.now += 1
    assert await guests.find(_HOST, _WEB.id) is None


async def test_an_instance_that_is_new_is_found_soon_and_an_invented_one_asks_seldom() -> None:
    cloud = _Cloud(servers=[])
    guests = cloud.guests()
    for name in ("web", "a", "b", "c"):
        assert await guests.find(_HOST, InstanceId(name)) is None
    assert cloud.reads == 1
    cloud.servers.append(_WEB)
    cloud.now += 2
    assert await guests.find(_HOST, _WEB.id) is not None


async def test_an_outage_is_an_error_and_never_an_earlier_answer() -> None:
    cloud = _Cloud()
    guests = cloud.guests()
    assert await guests.find(_HOST, _WEB.id) is not None
    cloud.away, cloud.now = True, cloud.now + 60
    with pytest.raises(SourceUnavailable):
        await guests.find(_HOST, _WEB.id)
    assert guests.failure == "Nova is away"
    cloud.away = False
    assert await guests.find(_HOST, _WEB.id) is not None
    assert guests.failure is None


@pytest.mark.parametrize(
    "shape",
    [
        {"enabled": True},
        {"enabled": True, "compute_endpoint": "http://nova"},
        {"cloud": "c", "network_endpoint": "http://neutron"},
    ],
)
def test_settings_that_do_not_say_where_both_services_are_are_refused(
    shape: dict[str, object],
) -> None:
    with pytest.raises(ValueError, match=r"cloud|compute_endpoint"):
        CloudSettings.model_validate(shape)
