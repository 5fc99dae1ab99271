from __future__ import annotations

import pytest

from imdsproxy.anti_spoofing.host_rules import GuardedPort, rules_for
from imdsproxy.cli.checks.guests import check_bridges, check_kernel, checked_devices

_NFT = """
table bridge guests {
	chain from {
		type filter hook prerouting priority -300; policy accept;
		iifname "vnet0" ether saddr != 52:54:00:12:34:56 drop
	}
}
table bridge other {
	chain x {
		iifname "vnet1" ip saddr 10.0.0.1 accept
	}
}
"""
_EBTABLES = """*nat
:PREROUTING ACCEPT
-A PREROUTING -i vnet7 -j libvirt-I-vnet7
-A I-vnet7-mac -s 52:54:0:12:34:56 -j RETURN
"""


def test_a_kernel_that_can_is_fine_and_one_that_cannot_says_what_then() -> None:
    assert check_kernel("").ok
    finding = check_kernel("Operation not supported")
    assert not finding.ok
    assert "--no-mac-check" in finding.hint


def test_devices_of_networks_that_check_macs_are_looked_at() -> None:
    records: list[dict[str, object]] = [
        {"id": "a", "listener": {"bridge": "virbr0"}},
        {"id": "b", "listener": {"interface": "br1"}},
        {"id": "c", "listener": {"namespace": "ns"}},
        {"id": "d", "listener": {"bridge": "br2"}, "mac_check": False},
    ]
    assert checked_devices(records) == ["br1", "virbr0"]


def test_a_bridge_whose_guests_may_use_any_mac_is_a_warning() -> None:
    ports = (GuardedPort("vnet0", "locked"), GuardedPort("vnet1"), GuardedPort("vnet2"))
    (finding,) = check_bridges({"virbr0": ports, "eth0": None, "empty": ()})
    assert finding.ok
    assert finding.warning
    assert "virbr0" in finding.text
    assert "vnet1, vnet2 " in finding.text
    assert "anti-spoofing" in finding.hint


def test_what_was_seen_is_said() -> None:
    (finding,) = check_bridges({"virbr0": (GuardedPort("vnet0", "locked"),)})
    assert not finding.warning
    assert "vnet0 (locked)" in finding.text


@pytest.mark.parametrize(
    ("port", "rules", "found"),
    [
        ("vnet0", _NFT, True),
        ("vnet1", _NFT, False),
        ("vnet", _NFT, False),
        ("vnet7", _EBTABLES, True),
        ("vnet0", "", False),
    ],
)
def test_a_rule_is_one_that_names_the_port_beside_a_mac(
    port: str, rules: str, *, found: bool
) -> None:
    assert bool(rules_for(port, rules)) is found
