from __future__ import annotations

from typing import cast

import pytest
import yaml

from support.guest_records import BARE, Guest, guest, port

NETWORK_DATA = "/openstack/latest/network_data.json"


def test_network_data_has_a_link_and_a_network_for_each_address() -> None:
    document = Guest().json(NETWORK_DATA)
    (link,) = cast("list[dict[str, object]]", document["links"])
    vif = link.pop("vif_id")
    assert len(cast("str", vif)) == 36
    assert link == {
        "id": "interface0",
        "type": "phy",
        "mtu": 1450,
        "ethernet_mac_address": "fa:16:3e:00:00:01",
    }
    assert document["networks"] == [
        {
            "id": "network0",
            "link": "interface0",
            "network_id": "blue",
            "type": "ipv4",
            "ip_address": "10.0.0.5",
            "netmask": "255.255.255.0",
            "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"}],
            "services": [{"type": "dns", "address": "10.0.0.2"}],
        },
        {
            "id": "network1",
            "link": "interface0",
            "network_id": "blue",
            "type": "ipv6",
            "ip_address": "2001:db8::5",
            "netmask": "ffff:ffff:ffff:ffff::",
            "routes": [{"network": "::", "netmask": "::", "gateway": "2001:db8::1"}],
            "services": [],
        },
    ]
    assert document["services"] == [{"type": "dns", "address": "10.0.0.2"}]


@pytest.mark.parametrize(
    ("addresses", "types"),
    [
        (["192.0.2.7"], ["ipv4_dhcp"]),
        (["192.0.2.7", "192.0.2.8"], ["ipv4_dhcp"]),
        (["2001:db8:1::7"], ["ipv6_slaac"]),
        (["192.0.2.7", "2001:db8:1::7"], ["ipv4_dhcp", "ipv6_slaac"]),
        ([], ["ipv4_dhcp"]),
        (["fe80::7"], ["ipv4_dhcp"]),
    ],
)
def test_without_a_known_subnet_the_guest_is_to_ask(addresses: list[str], types: list[str]) -> None:
    document = Guest(guest(ports=(port(addresses=addresses, network=BARE),))).json(NETWORK_DATA)
    networks = cast("list[dict[str, object]]", document["networks"])
    assert [network["type"] for network in networks] == types
    assert all("ip_address" not in network for network in networks)


def test_a_second_address_of_a_port_brings_no_second_default_route() -> None:
    document = Guest(guest(ports=(port(addresses=["10.0.0.5", "10.0.0.6"]),))).json(NETWORK_DATA)
    networks = cast("list[dict[str, list[object]]]", document["networks"])
    assert [len(network["routes"]) for network in networks] == [1, 0]


def test_a_port_without_a_mac_or_with_a_mac_told_before_is_left_out() -> None:
    ports = (port(None, ["10.0.0.8"]), port(), port(addresses=["10.0.0.9"]))
    document = Guest(guest(ports=ports)).json(NETWORK_DATA)
    links = cast("list[dict[str, object]]", document["links"])
    networks = cast("list[dict[str, object]]", document["networks"])
    assert [link["id"] for link in links] == ["interface1"]
    assert {network["link"] for network in networks} == {"interface1"}


def test_no_mtu_is_null() -> None:
    document = Guest(guest(ports=(port(addresses=[], network=BARE),))).json(NETWORK_DATA)
    links = cast("list[dict[str, object]]", document["links"])
    assert links[0]["mtu"] is None


def network_config(asked: Guest) -> object:
    return yaml.safe_load(asked.read("/nocloud/network-config"))


def test_network_config_matches_by_mac_and_sets_what_is_known() -> None:
    assert network_config(Guest()) == {
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


def test_network_config_asks_where_the_subnet_is_unknown() -> None:
    asked = Guest(guest(ports=(port(addresses=["192.0.2.7", "2001:db8:1::7"], network=BARE),)))
    assert network_config(asked) == {
        "version": 2,
        "ethernets": {
            "interface0": {
                "match": {"macaddress": "fa:16:3e:00:00:01"},
                "dhcp4": True,
                "dhcp6": True,
            }
        },
    }


def test_a_further_ports_default_route_gives_way() -> None:
    ports = (port(), port("fa:16:3e:00:00:02", ["10.0.0.7"]))
    config = cast(
        "dict[str, dict[str, dict[str, list[dict[str, object]]]]]",
        network_config(Guest(guest(ports=ports))),
    )
    metrics = [
        route["metric"]
        for ethernet in config["ethernets"].values()
        for route in ethernet["routes"]
        if route["to"] == "0.0.0.0/0"
    ]
    assert metrics == [100, 200]


def test_network_config_is_empty_where_no_nic_could_be_matched() -> None:
    assert Guest(guest(ports=())).read("/nocloud/network-config") == b""
