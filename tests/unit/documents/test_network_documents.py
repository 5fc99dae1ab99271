from __future__ import annotations

from typing import Any, Final

import pytest
import yaml

from imdsproxy.core.model import Network
from support.guest_records import BARE, BLUE, GUEST, Guest, guest, port

V4: Final = {
    "network_id": "blue",
    "type": "ipv4",
    "ip_address": "10.0.0.5",
    "netmask": "255.255.255.0",
    "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"}],
    "services": [{"type": "dns", "address": "10.0.0.2"}],
}
V6: Final = {
    "network_id": "blue",
    "type": "ipv6",
    "ip_address": "2001:db8::5",
    "netmask": "ffff:ffff:ffff:ffff::",
    "routes": [{"network": "::", "netmask": "::", "gateway": "2001:db8::1"}],
    "services": [],
}


def _network_data(asked: Guest) -> Any:  # noqa: ANN401 - JSON
    return asked.json("/openstack/latest/network_data.json")


def _network_config(asked: Guest) -> Any:  # noqa: ANN401 - YAML
    return yaml.safe_load(asked.read("/nocloud/network-config"))


def test_a_port_has_a_link_and_a_network_for_each_address() -> None:
    document = _network_data(Guest())
    (link,) = document["links"]
    assert len(link.pop("vif_id")) == 36
    assert link == {
        "id": "interface0",
        "type": "phy",
        "mtu": 1450,
        "ethernet_mac_address": "fa:16:3e:00:00:01",
    }
    networks = [
        {"id": f"network{n}", "link": "interface0", **one} for n, one in enumerate((V4, V6))
    ]
    assert document["networks"] == networks
    assert document["services"] == V4["services"]
    assert _network_config(Guest()) == {
        "version": 2,
        "ethernets": {
            "interface0": {
                "match": {"macaddress": "fa:16:3e:00:00:01"},
                "mtu": 1450,
                "dhcp4": False,
                "dhcp6": False,
                "addresses": ["10.0.0.5/24", "2001:db8::5/64"],
                "routes": [
                    {"to": "0.0.0.0/0", "via": "10.0.0.1", "metric": 100},
                    {"to": "::/0", "via": "2001:db8::1", "metric": 100},
                ],
                "nameservers": {"addresses": ["10.0.0.2"]},
            }
        },
    }


@pytest.mark.parametrize(
    ("addresses", "types", "dhcp"),
    [
        (["192.0.2.7"], ["ipv4_dhcp"], (True, False)),
        (["192.0.2.7", "192.0.2.8"], ["ipv4_dhcp"], (True, False)),
        (["2001:db8:1::7"], ["ipv6_slaac"], (False, True)),
        (["192.0.2.7", "2001:db8:1::7"], ["ipv4_dhcp", "ipv6_slaac"], (True, True)),
        ([], ["ipv4_dhcp"], (True, False)),
        (["fe80::7"], ["ipv4_dhcp"], (True, False)),
    ],
)
def test_without_a_known_subnet_the_guest_is_to_ask(
    addresses: list[str], types: list[str], dhcp: tuple[bool, bool]
) -> None:
    asked = Guest(guest(ports=(port(addresses=addresses, network=BARE),)))
    document = _network_data(asked)
    assert document["links"][0]["mtu"] is None
    assert document["networks"] == [
        {"id": f"network{n}", "link": "interface0", "network_id": "bare", "type": one}
        for n, one in enumerate(types)
    ]
    ethernet = {"match": {"macaddress": "fa:16:3e:00:00:01"}}
    expected = {**ethernet, "dhcp4": dhcp[0], "dhcp6": dhcp[1]}
    assert _network_config(asked) == {"version": 2, "ethernets": {"interface0": expected}}


def test_a_further_default_route_is_left_away_or_gives_way() -> None:
    twice = Guest(guest(ports=(port(addresses=["10.0.0.5", "10.0.0.6"]),)))
    assert [len(one["routes"]) for one in _network_data(twice)["networks"]] == [1, 0]
    ports = (port(addresses=["10.0.0.5"]), port("fa:16:3e:00:00:02", ["10.0.0.7"]))
    ethernets = _network_config(Guest(guest(ports=ports)))["ethernets"].values()
    assert [route["metric"] for one in ethernets for route in one["routes"]] == [100, 200]


@pytest.mark.parametrize("network", [BLUE, BARE])
def test_a_port_without_a_mac_of_its_own_is_left_out(network: Network) -> None:
    ports = (port(None, ["10.0.0.8"]), *GUEST.ports, port(addresses=["10.0.0.9"], network=network))
    asked = Guest(guest(ports=ports))
    assert [link["id"] for link in _network_data(asked)["links"]] == ["interface1"]
    assert {one["link"] for one in _network_data(asked)["networks"]} == {"interface1"}
    assert list(_network_config(asked)["ethernets"]) == ["interface1"]
    none = Guest(guest(ports=()))
    assert none.read("/nocloud/network-config") == b""
    assert none.status("/openstack/latest/network_data.json") == 404
