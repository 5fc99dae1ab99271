from __future__ import annotations

import json
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import pytest

from imdsproxy.anti_spoofing.host_rules import (
    DroppingChain,
    parse_dropping_chains,
    passes_forward_chain,
)
from imdsproxy.cli.checks.guests import check_paths
from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
    Subnet,
)

_INPUT = DroppingChain("inet", "filter", "input", "input")
_FORWARD = DroppingChain("ip", "filter", "FORWARD", "forward")


def _network(listener: Listener, cidr: str = "10.0.0.0/24") -> Network:
    return Network(NetworkId("blue"), listener, subnets=(Subnet(ip_network(cidr)),))


def _texts(
    network: Network,
    *chains: DroppingChain,
    own_way: bool | None = True,
    bridged_are_forwarded: bool = True,
) -> str:
    found = check_paths(
        [network], chains, lambda *_: own_way, bridged_are_forwarded=bridged_are_forwarded
    )
    assert all(one.ok for one in found)
    return "\n".join(f"{one.text}; {one.hint}" for one in found if one.warning)


def test_a_host_that_lets_nothing_in_is_told_the_rule_for_an_interface() -> None:
    told = _texts(_network(InterfaceListener("eth1")), _INPUT, _FORWARD)
    assert 'nft insert rule inet filter input iifname "eth1" ip daddr 169.254.169.254' in told
    assert "FORWARD" not in told


def test_a_bridge_passes_a_host_s_input_by_and_its_forwarding_only_with_br_netfilter() -> None:
    bridge = _network(BridgeListener("br0"))
    assert "nft insert rule ip filter FORWARD ip saddr" in _texts(bridge, _INPUT, _FORWARD)
    assert "input" not in _texts(bridge, _INPUT, _FORWARD)
    assert _texts(bridge, _INPUT, _FORWARD, bridged_are_forwarded=False) == ""


@pytest.mark.parametrize("word", ["169.254.169.254", '"eth1"'])
def test_a_chain_with_a_rule_that_may_be_for_it_is_left_in_peace(word: str) -> None:
    chain = DroppingChain("inet", "filter", "input", "input", f"… {word} …")
    assert _texts(_network(InterfaceListener("eth1")), chain) == ""


def test_a_host_whose_way_back_is_by_another_device_is_told_so() -> None:
    told = _texts(_network(InterfaceListener("eth1")), own_way=False)
    assert "ip route add 10.0.0.0/24 dev eth1" in told
    assert _texts(_network(InterfaceListener("eth1")), own_way=None) == ""
    assert _texts(_network(InterfaceListener("eth1"), "2001:db8::/64"), own_way=False) == ""


@pytest.mark.parametrize("cidr", ["10.0.0.0/24", "10.0.0.0/31", "10.0.0.0/32"])
def test_one_address_of_the_hosts_own_makes_no_other_way(cidr: str) -> None:
    network = _network(InterfaceListener("eth1"), cidr)
    first = IPv4Address("10.0.0.1" if cidr.endswith("24") else "10.0.0.0")
    (finding,) = check_paths(
        [network], (), lambda address, _: address == first, bridged_are_forwarded=False
    )
    assert not finding.warning


def test_a_namespace_is_somebody_elses_business() -> None:
    assert _texts(_network(NamespaceListener("n")), _INPUT, _FORWARD, own_way=False) == ""


def _ruleset(policy: str, family: str = "ip", hook: str = "input") -> str:
    place = {"family": family, "table": "filter"}
    chain = {**place, "name": "INPUT", "type": "filter", "hook": hook, "prio": 0, "policy": policy}
    rule = {**place, "chain": "other", "expr": [{"match": {"right": "169.254.169.254"}}]}
    entries = [{"metainfo": {}}, {"table": place}, {"chain": chain}, {"rule": rule}]
    return json.dumps({"nftables": [*entries, {"chain": {**place, "name": "other"}}]})


def test_chains_that_drop_are_found_with_the_rules_of_their_table() -> None:
    (chain,) = parse_dropping_chains(_ruleset("drop"))
    assert str(chain) == "ip filter INPUT"
    assert "169.254.169.254" in chain.rules


@pytest.mark.parametrize(
    ("policy", "family", "hook"),
    [("accept", "ip", "input"), ("drop", "ip6", "input"), ("drop", "ip", "output")],
)
def test_others_are_not(policy: str, family: str, hook: str) -> None:
    assert parse_dropping_chains(_ruleset(policy, family, hook)) == ()


def test_bridged_packets_pass_ip_s_chains_only_where_the_kernel_says_so(tmp_path: Path) -> None:
    setting = tmp_path / "bridge-nf-call-iptables"
    assert not passes_forward_chain(setting)
    setting.write_text("0\n")
    assert not passes_forward_chain(setting)
    setting.write_text("1\n")
    assert passes_forward_chain(setting)
