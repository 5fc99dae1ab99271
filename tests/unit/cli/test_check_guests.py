from __future__ import annotations

import json
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import pytest

from imdsproxy.anti_spoofing import host_rules
from imdsproxy.anti_spoofing.host_rules import (
    DroppingChain,
    parse_dropping_chains,
    passes_forward_chain,
    rules_for,
)
from imdsproxy.cli.checks.guests import (
    bridge_finding,
    check_daemon,
    check_macs,
    check_networks,
    check_records,
    checked_devices,
    find_obstacles,
)
from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
    Subnet,
)
from support.check_subject import subject, summarise

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
_INPUT = DroppingChain("inet filter input", "input")
_FORWARD = DroppingChain("ip filter FORWARD", "forward")
_GOOD = "networks:\n- id: a\n  listener: {bridge: b}\n"


def test_every_bad_record_is_reported_with_its_file_and_line(tmp_path: Path) -> None:
    missing = {"file": {"enabled": True, "directory": f"{tmp_path}/none"}}
    assert [one.exit_status for one in check_records(subject({"sources": missing}))] == [69]
    assert check_records(subject()) == []
    there = {"sources": {"file": {"enabled": True, "directory": str(tmp_path)}}}
    (tmp_path / "a.yaml").write_text(_GOOD)
    assert summarise(check_records(subject(there))) == [(0, False, f"1 in {tmp_path}")]

    (tmp_path / "a.yaml").write_text(f"{_GOOD}  mtu: x\n")
    (tmp_path / "b.json").write_text('{"instances": [{"id": "i"}]}')
    (tmp_path / "c.yaml").write_text("networks: [")
    (tmp_path / "d.yaml").mkdir()
    (tmp_path / "notes.txt").write_text("networks: [")
    found = summarise(check_records(subject(there)))
    assert [status for status, _, _ in found] == [69] * 4
    assert found[0][2].startswith(f"{tmp_path}/a.yaml:4: networks[0].mtu")


def test_a_running_daemon_reports_what_it_does_not_serve() -> None:
    network = {"network": "blue", "code": "x", "reason": "no namespace", "hint": "make it"}
    readiness = {"ready": False, "reasons": ["a", "b"]}
    on = subject(status={"left_out": [network], "readiness": readiness, "controller": 7})
    assert summarise([*check_networks(on), *check_daemon(on)]) == [
        (71, False, "network blue is not served: no namespace"),
        (71, False, "runs and is not ready (pid 7): a; b"),
    ]


@pytest.mark.parametrize("refusal", ["", "Operation not supported"])
def test_a_kernel_that_cannot_check_macs_is_wrong_with_what_to_do_then(
    monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(host_rules, "try_mac_filter", lambda: refusal)
    (finding,) = check_macs(subject())
    assert finding.ok is not bool(refusal)
    assert refusal in finding.text
    assert ("--no-mac-check" in finding.hint) is bool(refusal)


def test_devices_of_networks_that_check_macs_are_looked_at() -> None:
    networks = [
        Network(NetworkId("a"), BridgeListener("virbr0")),
        Network(NetworkId("b"), InterfaceListener("br1")),
        Network(NetworkId("c"), NamespaceListener("ns")),
        Network(NetworkId("d"), BridgeListener("br2"), mac_check=False),
    ]
    assert checked_devices(networks) == ["br1", "virbr0"]


def test_a_bridge_whose_guests_may_use_any_mac_is_a_warning() -> None:
    guarded = {"vnet0": "locked"}
    finding = bridge_finding("virbr0", {**guarded, "vnet1": "", "vnet2": ""})
    assert (finding.ok, finding.warning) == (True, True)
    assert "bridge virbr0: " in finding.text
    assert "vnet1, vnet2 " in finding.text
    assert "anti-spoofing" in finding.hint
    text = "bridge virbr0: guests are kept to their MACs: vnet0 (locked)"
    assert summarise([bridge_finding("virbr0", guarded)]) == [(0, False, text)]


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


def _rule_for(word: str) -> DroppingChain:
    return DroppingChain("inet filter input", "input", f"… {word} …")


_ETH1, _BR0 = InterfaceListener("eth1"), BridgeListener("br0")


@pytest.mark.parametrize(
    ("listener", "cidr", "chains", "own_way", "bridged", "hints"),
    [
        (_ETH1, "10.0.0.0/24", [_INPUT, _FORWARD], True, True,
         ['nft insert rule inet filter input iifname "eth1" ip daddr 169.254.169.254']),
        # A bridge's packets pass a host's input by, and its forwarding only with br_netfilter.
        (_BR0, "10.0.0.0/24", [_INPUT, _FORWARD], True, True, ["nft insert rule ip filter FORWARD ip saddr"]),
        (_BR0, "10.0.0.0/24", [_INPUT, _FORWARD], True, False, []),
        # A rule that may be for it.
        (_ETH1, "10.0.0.0/24", [_rule_for("169.254.169.254")], True, True, []),
        (_ETH1, "10.0.0.0/24", [_rule_for('"eth1"')], True, True, []),
        (_ETH1, "10.0.0.0/24", [], False, True, ["ip route add 10.0.0.0/24 dev eth1"]),
        (_ETH1, "10.0.0.0/24", [], None, True, []),
        (_ETH1, "2001:db8::/64", [], False, True, []),
        (NamespaceListener("n"), "10.0.0.0/24", [_INPUT, _FORWARD], False, True, []),
    ],
)  # fmt: skip
def test_what_may_stand_in_the_way_is_a_warning_with_the_rule_that_helps(
    listener: Listener,
    cidr: str,
    chains: list[DroppingChain],
    *,
    own_way: bool | None,
    bridged: bool,
    hints: list[str],
) -> None:
    network = Network(NetworkId("blue"), listener, subnets=(Subnet(ip_network(cidr)),))
    found = list(
        find_obstacles([network], chains, lambda *_: own_way, bridged_are_forwarded=bridged)
    )
    assert all(one.warning for one in found)
    assert len(found) == len(hints)
    for one, hint in zip(found, hints, strict=True):
        assert hint in one.hint


@pytest.mark.parametrize("cidr", ["10.0.0.0/24", "10.0.0.0/31", "10.0.0.0/32"])
def test_one_address_of_the_hosts_own_makes_no_other_way(cidr: str) -> None:
    network = Network(NetworkId("blue"), _ETH1, subnets=(Subnet(ip_network(cidr)),))
    first = IPv4Address("10.0.0.1" if cidr.endswith("24") else "10.0.0.0")
    found = find_obstacles([network], (), lambda one, _: one == first, bridged_are_forwarded=False)
    assert list(found) == []


@pytest.mark.parametrize(
    ("policy", "family", "hook", "drops"),
    [
        ("drop", "ip", "input", True),
        ("accept", "ip", "input", False),
        ("drop", "ip6", "input", False),
        ("drop", "ip", "output", False),
    ],
)
def test_chains_that_drop_are_found_with_the_rules_of_their_table(
    policy: str, family: str, hook: str, *, drops: bool
) -> None:
    place = {"family": family, "table": "filter"}
    chain = {**place, "name": "INPUT", "type": "filter", "hook": hook, "prio": 0, "policy": policy}
    rule = {**place, "chain": "other", "expr": [{"match": {"right": "169.254.169.254"}}]}
    entries = [{"metainfo": {}}, {"table": place}, {"chain": chain}, {"rule": rule}]
    ruleset = json.dumps({"nftables": [*entries, {"chain": {**place, "name": "other"}}]})

    found = parse_dropping_chains(ruleset)

    assert [one.name for one in found] == (["ip filter INPUT"] if drops else [])
    assert all("169.254.169.254" in one.rules for one in found)


def test_bridged_packets_pass_ip_s_chains_only_where_the_kernel_says_so(tmp_path: Path) -> None:
    setting = tmp_path / "bridge-nf-call-iptables"
    assert not passes_forward_chain(setting)
    for text, passes in (("0\n", False), ("1\n", True)):
        setting.write_text(text)
        assert passes_forward_chain(setting) is passes
