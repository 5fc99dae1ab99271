"""Identity tokens in a fleet for guests of Nova, whose place genuine Nova and Neutron prove to a hub."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from imdsproxy.config.identity import CloudSettings
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.members import IDENTITY_DOCUMENT_PATH, IDENTITY_PATH
from imdsproxy.hub.hosts.cloud import open_cloud
from imdsproxy.model.entities import InstanceId
from imdsproxy.sources.fleet.client import HubClient
from support.daemon import instance
from support.fleet_member import Member
from support.fleet_operator import Operator
from support.fleet_world import FleetHost, FleetWorld, fleet_world
from support.identity.fleet import Signers
from support.identity.requests import claims_of, request_token, wait_token
from support.lab import until
from support.openstack.lab import OpenStack, open_openstack
from support.openstack.table import BLUE, RED

pytestmark = [pytest.mark.root, pytest.mark.slow]

_HOST: Final = "lab"
_PLACE: Final = "nova"
_POLICY: Final = b'{"audiences":["any","vault"],"identity_document":true}'


@dataclass(frozen=True, slots=True)
class _Site:
    """Fleet whose one hub asks OpenStack, and a host of the name that Nova has for it."""

    world: FleetWorld
    openstack: OpenStack
    host: FleetHost

    @property
    def network(self) -> str:
        return self.openstack.seed.networks["net-blue"]

    def uuid(self, name: str) -> str:
        return self.openstack.instances[name].uuid


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Site]:
    audiences = {"any": {"placement": "any"}}
    signers = Signers(tmp_path_factory.mktemp("issuer"), audiences)
    identity = {"enabled": True, "user": "daemon"}
    with (
        fleet_world(1, beside_hub=signers, identity=identity) as world,
        open_openstack(namespace=world.hubs[0].namespace) as openstack,
    ):
        openstack.compute.start()
        world.write({f"{layout.POLICIES}fleet": _POLICY})
        _ask_openstack(world, openstack)
        host = world.add_host(_HOST, networks=(), start=False)
        made = _Site(world, openstack, host)
        _have_guests(made)
        yield made


def _ask_openstack(world: FleetWorld, openstack: OpenStack) -> None:
    """Restart the hub, which asks OpenStack from now on."""
    (hub,) = world.hubs
    settings = yaml.safe_load(hub.config.read_text())
    settings["identity"] |= {
        "openstack": {
            "enabled": True,
            "compute_endpoint": openstack.compute_url,
            "network_endpoint": openstack.neutron_url,
            "proof_s": 1,
        }
    }
    hub.config.write_text(yaml.safe_dump(settings))
    hub.end()
    hub.start()


def _have_guests(site: _Site) -> None:
    """Start the host, which has the network and the instance of Nova from files, as from Neutron or OVN."""
    daemon = site.host.daemon
    records = daemon.directory / "records"
    records.mkdir()
    network = {**site.host.lab.bridge_network(_PLACE), "id": site.network}
    blue = instance(site.uuid("blue-1"), site.network, fields={"project": BLUE, "upstream": "nova"})
    blue = {key: value for key, value in blue.items() if key != "user_data"}
    (records / "guests.yaml").write_text(
        yaml.safe_dump({"networks": [network], "instances": [blue]})
    )
    sources: Any = daemon.settings["sources"]
    files = {"enabled": True, "directory": str(records)}
    # Nobody answers there: the guests of this test ask for tokens only.
    chosen = {
        "endpoints": [{"url": "http://127.0.0.1:9"}],
        "secret_file": str(daemon.write_secret("secret", "of nobody")),
    }
    nova = {"endpoint_sets": {"default": chosen}}
    daemon.configure({**daemon.settings, "sources": {**sources, "file": files}, "nova": nova})
    # HAProxy's check takes Nova out sooner or later, and no host is ready without Nova.
    daemon.start(ready=False)


def _ask(site: _Site, instance: str, **request: object) -> dict[str, Any]:
    """Request a token as one who has captured the host."""
    one = {"instance": instance, "network": site.network, "audience": "vault", **request}
    status, shape = _post(site, IDENTITY_PATH, {"tokens": [one]})
    assert status == 200, shape
    (answer,) = shape["answers"]
    found: dict[str, Any] = answer
    return found


def _post(site: _Site, path: str, shape: object) -> tuple[int, Any]:
    member = Member.of_host(site.world, site.host)
    body = json.dumps(shape).encode()
    with site.world.etcd.entered():
        client = HubClient(member.files, 5)
        status, data = asyncio.run(client.request("POST", site.world.urls[0], path, body=body))
    return status, json.loads(data)


def test_a_guest_of_nova_gets_a_token_with_nova_s_facts(site: _Site) -> None:
    guest = site.host.lab.guest(_PLACE)
    claims = claims_of(wait_token(guest))
    assert claims["placement"] == "nova"
    assert (claims["instance_id"], claims["project_id"]) == (site.uuid("blue-1"), BLUE)
    assert (claims["network_id"], claims["availability_zone"]) == (site.network, "nova")
    assert claims["instance_created"] > 1_700_000_000
    assert request_token(guest, "any").status == 200


def test_a_captured_host_gets_no_token_of_what_nova_does_not_have_there(site: _Site) -> None:
    red = site.uuid("red-2")
    answer = _ask(site, red, network=site.openstack.seed.networks["net-red"], project=BLUE)
    assert claims_of(answer["token"]["text"])["project_id"] == RED
    # A tenant of blue has written red's id on a port of its own (OSSA-2013-033).
    assert _ask(site, red) == {"refused": "subject"}
    assert _ask(site, "dddddddd-0001-4000-8000-000000000001") == {"refused": "subject"}
    assert _ask(site, site.uuid("blue-1"), network="elsewhere") == {"refused": "subject"}
    assert _ask(site, "invented", audience="any", project=BLUE) == {"refused": "subject"}


def test_another_host_of_the_fleet_gets_no_token_of_nova_s_guests_here(site: _Site) -> None:
    other = site.world.add_host("lab-2", start=False)
    there = _Site(site.world, site.openstack, other)
    assert _ask(there, site.uuid("blue-1")) == {"refused": "subject"}
    assert _ask(there, site.uuid("blue-1"), audience="any", project=BLUE) == {"refused": "subject"}


def test_the_signed_document_of_a_guest_of_nova_is_signed(site: _Site) -> None:
    place = {"instance": site.uuid("blue-1"), "network": site.network}
    status, shape = _post(site, IDENTITY_DOCUMENT_PATH, place)
    assert status == 200, shape
    assert json.loads(shape["documents"]["document"])["accountId"] == BLUE


def test_an_outage_of_nova_is_said_and_no_token_is_given_meanwhile(site: _Site) -> None:
    operator = Operator.new(site.world, "nora")
    site.openstack.compute.stop()
    one = {"instance": site.uuid("blue-1"), "network": site.network, "audience": "vault"}

    def is_refused() -> bool:
        status, shape = _post(site, IDENTITY_PATH, {"tokens": [one]})
        return status == 503 and "Nova cannot be asked" in shape["message"]

    until(is_refused, within_s=20, what="the refusal")
    recorded = instance("recorded", site.network, 7)
    site.world.place(recorded, site.host.name)
    # The fleet's own record does not need Nova, and is not refused with the guest of Nova.
    until(lambda: "token" in _ask(site, "recorded"), what="a token of the fleet's record")
    status, shape = _post(site, IDENTITY_PATH, {"tokens": [one, {**one, "instance": "recorded"}]})
    assert (status, shape["answers"][0]) == (200, {"refused": "unreadable"})
    assert "token" in shape["answers"][1]
    site.world.place(recorded)
    assert "Nova cannot be asked" in json.dumps(operator.do("fleet", "status", "--json").json)
    site.openstack.compute.start()
    until(lambda: "token" in _ask(site, site.uuid("blue-1")), within_s=20, what="a token")
    assert "Nova" not in json.dumps(operator.do("fleet", "status", "--json").json["hubs"])


def test_without_openstack_there_is_nothing_but_the_host_s_word(site: _Site) -> None:
    (hub,) = site.world.hubs
    before = hub.config.read_text()
    settings = yaml.safe_load(before)
    del settings["identity"]["openstack"]
    hub.config.write_text(yaml.safe_dump(settings))
    hub.end()
    hub.start()
    try:
        assert _ask(site, "invented", project=BLUE) == {"refused": "placement"}
        token = _ask(site, "invented", audience="any", project=BLUE)["token"]["text"]
        claims = claims_of(token)
        assert (claims["placement"], claims["project_id"]) == ("host", BLUE)
        place = {"instance": "invented", "network": site.network}
        assert _post(site, IDENTITY_DOCUMENT_PATH, place)[1]["refused"] == "subject"
    finally:
        hub.config.write_text(before)
        hub.end()
        hub.start()


async def test_pages_of_servers_follow_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("imdsproxy.hub.hosts.cloud._PAGE", 2)
    with open_openstack(tmp_path) as openstack:
        openstack.compute.start()
        settings = CloudSettings(
            enabled=True,
            compute_endpoint=openstack.compute_url,
            network_endpoint=openstack.neutron_url,
            timeout_s=30,
        )
        guests = open_cloud(settings, asyncio.get_running_loop().time)
        for one in openstack.instances.values():
            found = await guests.find(HostId("lab"), InstanceId(one.uuid))
            assert found is not None, one.name
            assert found.project == one.project_id
