"""What operators do in a fleet: a hub's API over a real etcd, with hosts that acknowledge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imdsproxy.errors import SourceRefused
from support.etcd_lab import EtcdLab, etcd_lab
from support.hub_api import Hub, open_hub

pytestmark = pytest.mark.root

NETWORK = {"id": "blue", "listener": {"bridge": "br-blue"}}


@pytest.fixture(scope="module")
def lab() -> Iterator[EtcdLab]:
    with etcd_lab(1, tls=False) as made:
        yield made


@pytest.fixture(scope="module")
def hub(lab: EtcdLab) -> Iterator[Hub]:
    with open_hub(lab) as made:
        made.enrol("a", "b", "c")
        made.connect("a")
        made.client.request("POST", "/v1/networks", body=NETWORK)
        yield made


def instance(name: str, address: str, *hosts: str, **more: object) -> dict[str, object]:
    ports = [{"network": "blue", "addresses": [address]}]
    return {"id": name, "name": name, "ports": ports, "hosts": list(hosts), **more}


def test_an_added_instance_is_answered_once_its_host_has_it(hub: Hub) -> None:
    written = hub.client.request("POST", "/v1/instances", body=instance("web", "10.0.0.5", "a"))
    assert written["applied"]
    assert written["hosts"] == ["a"]


def test_an_address_that_another_instance_has_is_refused_with_its_hosts(hub: Hub) -> None:
    hub.client.request("POST", "/v1/instances", body=instance("first", "10.0.0.6", "a"))
    with pytest.raises(SourceRefused) as refused:
        hub.client.request("POST", "/v1/instances", body=instance("second", "10.0.0.6", "b"))
    (problem,) = refused.value.problems
    assert problem.reason == "10.0.0.6 in network blue belongs to instance first (on a)"


def test_the_status_of_a_fleet_has_each_member_of_etcd(hub: Hub) -> None:
    (member,) = hub.client.get("/fleet/status")["etcd"]
    assert member["leads"]
    assert 0 < member["bytes"] < member["quota_bytes"]
    assert member["problems"] == []
