"""Figures, alerts and dashboard of a fleet: a real Prometheus scrapes real hubs over a real etcd, and a host."""

from collections.abc import Iterator

import pytest

from support.fleet_world import FleetWorld, fleet_world
from support.guest import Guest
from support.lab import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    with fleet_world() as made:
        yield made


def test_each_hub_says_what_it_sees(world: FleetWorld) -> None:
    world.add_host("a")
    places = [Guest("monitor", one.namespace, "", "", (), "lo", port=9467) for one in world.hubs]

    def figures() -> list[str]:
        return [one.ask("/metrics", to="127.0.0.1").text for one in places]

    until(lambda: "imdsproxy_hub_connected_hosts 1.0" in "".join(figures()), within_s=20)
    for text in figures():
        assert 'imdsproxy_hub_hosts{state="enrolled"} 1.0' in text
        assert text.count("imdsproxy_hub_etcd_member_up{") == 3
    assert [one.ask("/readyz", to="127.0.0.1").status for one in places] == [200, 200]
