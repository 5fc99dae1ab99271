"""What `check` finds of guests: records, MACs, paths, trees, rules and token keys."""

import json
from dataclasses import replace
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.model.entities import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
    Subnet,
)
from imdsproxy.model.tokens import TokenKey, render_token_keys
from imdsproxy.network.anti_spoofing import host_rules
from imdsproxy.network.anti_spoofing.host_rules import (
    DroppingChain,
    GuestBridge,
    GuestBridges,
    parse_dropping_chains,
    passes_forward_chain,
    rules_for,
)
from imdsproxy.tools.checks import Subject
from imdsproxy.tools.checks.guests import (
    check_daemon,
    check_hop_limits,
    check_macs,
    check_overrides,
    check_path_rules,
    check_records,
    check_token_keys,
    check_trees,
    find_obstacles,
)
from support.check_subject import subject, summarise

_NFT = """
table bridge guests { chain from { iifname "vnet0" ether saddr != 52:54:00:12:34:56 drop } }
table bridge other { chain x { iifname "vnet1" ip saddr 10.0.0.1 accept } }
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


def test_a_daemon_that_is_not_ready_is_wrong_with_its_reasons() -> None:
    readiness = {"ready": False, "reasons": ["a", "b"]}
    on = replace(subject(), status={"readiness": readiness, "controller": 7})
    assert summarise(check_daemon(on)) == [
        (71, False, "the daemon runs, but is not ready (pid 7): a; b")
    ]


def test_ports_are_looked_at_of_networks_that_check_macs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(host_rules, "try_mac_filter", lambda: "")
    monkeypatch.setattr(host_rules, "read_rules", lambda: "")

    def observe(listener: Listener, *_: object) -> GuestBridges:
        match listener:
            case BridgeListener(name) | InterfaceListener(name):
                return GuestBridges((GuestBridge(name, {f"{name}-port": ""}),))
            case NamespaceListener(name):
                return GuestBridges(missing="namespace missing" if name == "missing" else "")

    monkeypatch.setattr(host_rules, "observe_guests", observe)
    on = subject()
    vars(on)["networks"] = [
        Network(NetworkId("a"), BridgeListener("virbr0")),
        Network(NetworkId("b"), InterfaceListener("br1")),
        Network(NetworkId("c"), NamespaceListener("ns")),
        Network(NetworkId("d"), BridgeListener("br2"), mac_check=False),
        Network(NetworkId("e"), NamespaceListener("missing")),
    ]
    _, *found = check_macs(on)
    assert [one.warning for one in found] == [True, True, True, False]
    words = ("network e: namespace missing", "br1-port", "virbr0-port", "networks c: ")
    for word, one in zip(words, found, strict=True):
        assert word in one.text


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


def _on(**policy: object) -> Subject:
    return subject({"policy": policy})


_OPEN = {"tokens": "required"}
_LOCKED = {"openstack_tokens": "required", "nocloud_tokens": "required"}
_DENIED = {"/latest/user-data": "deny"}
_LOCKED_PATHS = {"/openstack/latest/user_data": "required", "/nocloud/user-data": "deny"}
_GIVE = "/openstack and /nocloud give the same"


@pytest.mark.parametrize(
    ("policy", "text", "hint"),
    [
        ({"host": _OPEN}, f"policy.host: EC2's tree requires a token, but {_GIVE} user-data without a token",
         "set openstack_tokens: required and nocloud_tokens: required ("),
        ({"host": {**_OPEN, "openstack_tokens": "required"}},
         "policy.host: EC2's tree requires a token, but /nocloud gives the same user-data without a token",
         "set nocloud_tokens: required ("),
        ({"projects": {"p": {"paths": _DENIED}}}, f"policy.projects.p: /latest/user-data is denied, but {_GIVE}",
         "set paths: {/openstack/latest/user_data: deny, /nocloud/user-data: deny} "),
        ({"host": {"paths": _LOCKED_PATHS}}, "policy.host: /nocloud/user-data is denied, but EC2's tree gives the same",
         "set paths: {/latest/user-data: deny} "),
    ],
)  # fmt: skip
def test_user_data_that_one_tree_keeps_and_another_gives_is_warned_of_with_what_closes_it(
    policy: dict[str, Any], text: str, hint: str
) -> None:
    (finding,) = check_trees(_on(**policy))
    assert (finding.ok, finding.warning, finding.text) == (True, True, text)
    assert finding.hint.startswith(hint)


def _host(**rules: object) -> dict[str, Any]:
    return {"host": rules}


@pytest.mark.parametrize(
    ("policy", "places"),
    [
        ({}, []),
        # What the host says holds in a network that says the rest.
        ({"host": _LOCKED, "networks": {"red": _OPEN}}, []),
        ({"host": _OPEN, "networks": {"red": _LOCKED}}, ["policy.host"]),
        ({"host": _OPEN, "networks": {"red": {"hop_limit": 1}}}, ["policy.host"]),
        ({"host": {**_OPEN, **_LOCKED}, "networks": {"red": {"nocloud_tokens": "optional"}}}, ["policy.networks.red"]),
        ({**_host(**_OPEN, seal_user_data=True), "projects": {"p": {"seal_user_data": False}}}, ["policy.projects.p"]),
        *(
            ({one: {"red": _OPEN, "green": {**_OPEN, **_LOCKED}, "blue": {"hop_limit": 1}}}, [f"policy.{one}.red"])
            for one in ("networks", "projects", "instances")
        ),
        (_host(paths={**_DENIED, **_LOCKED_PATHS}), []),
        (_host(paths={"/latest/user-data": "required", **_LOCKED_PATHS}), []),
        (_host(paths={"/latest/user-data": "required"}), ["policy.host"]),
        (_host(tokens="required", paths=_LOCKED_PATHS), []),
        (_host(tokens="required", paths={"/latest/user-data": "optional"}), []),
        (_host(**_OPEN, **_LOCKED, paths={"/nocloud": "optional"}), ["policy.host"]),
        (_host(**_OPEN, **_LOCKED, paths={"/nocloud": "allow"}), []),
        (_host(seal_user_data=True, paths=_DENIED), []),
        (_host(endpoint=False, paths=_DENIED), []),
        # Whole trees that are denied are turned off: nothing is meant to be kept by that.
        (_host(paths={"/nocloud": "deny", "/openstack": "deny"}), []),
        (_host(paths={"/": "deny", "/latest/meta-data": "allow"}), []),
    ],
)  # fmt: skip
def test_each_scope_that_leaves_a_tree_open_is_named_once(
    policy: dict[str, Any], places: list[str]
) -> None:
    assert [one.text.partition(":")[0] for one in check_trees(_on(**policy))] == places


_SERVED = (
    "/ /latest/meta-data/public-keys/0/openssh-key /latest/meta-data/block-device-mapping/ami "
    "/latest/dynamic/instance-identity/document /openstack/content/0000 /nocloud/network-config"
)
_NEVER = "/latest/meta-data/iam /latest/user-data/x /openstack/latest/user-data /nocloud/user_data /latest/api"


def test_a_rule_for_a_path_that_nothing_has_is_warned_of() -> None:
    served, never = (dict.fromkeys(paths.split(), "deny") for paths in (_SERVED, _NEVER))
    assert check_path_rules(_on(host={"paths": served})) == []
    found = check_path_rules(_on(networks={"red": {"paths": {**served, **never}}}))
    assert [one.text for one in found] == [
        f"policy.networks.red.paths: no document is ever served at {path} or below"
        for path in sorted(never)
    ]
    assert all(one.warning and one.hint for one in found)


def test_a_hop_limit_does_nothing_behind_the_unix_listener() -> None:
    networks = {"red": {"hop_limit": 64}, "blue": {"hop_limit": 1}}
    policy = {"host": {"hop_limit": 2}, "networks": networks}
    found = check_hop_limits(subject({"policy": policy, "unix_listener": {"enabled": True}}))
    assert [one.text.partition(" has no effect")[0] for one in found] == [
        "policy.host: hop_limit 2",
        "policy.networks.blue: hop_limit 1",
    ]
    assert all(one.warning and one.hint for one in found)
    assert check_hop_limits(_on(**policy)) == []
    assert check_hop_limits(subject({"unix_listener": {"enabled": True}})) == []


_TWO = render_token_keys([TokenKey(b"k" * 32), TokenKey(b"l" * 32)])


@pytest.mark.parametrize(
    ("content", "mode", "status", "warning", "text", "hint"),
    [
        (_TWO, 0o600, 0, False, "2 keys in ", ""),
        (_TWO, 0o640, 0, True, "a group can read ", "chmod 0600"),
        (_TWO, 0o644, 78, False, "tokens.key_file: ", "chmod o-rwx"),
        ("s3cret\n", 0o600, 78, False, "line 1", ""),
        (None, 0, 78, False, "tokens.key_file: cannot read", "create it"),
    ],
)
def test_a_file_of_keys_is_for_root_alone_and_never_shown(
    tmp_path: Path,
    content: str | None,
    mode: int,
    *,
    status: int,
    warning: bool,
    text: str,
    hint: str,
) -> None:
    named, default = tmp_path / "keys", subject({"paths": {"state_dir": str(tmp_path)}})
    subjects = [(named, subject({"tokens": {"key_file": str(named)}}))]
    if content is not None:
        subjects.append((default.layout.token_keys, default))
    for path, on in subjects:
        if content is not None:
            path.write_text(content)
            path.chmod(mode)
        (finding,) = check_token_keys(on)
        assert (finding.exit_status, finding.warning) == (status, warning)
        assert text in finding.text
        assert hint in finding.hint
        for secret in (TokenKey(b"k" * 32).text, "s3cret"):
            assert secret not in finding.text + finding.hint


def test_the_first_key_is_made_at_the_start(tmp_path: Path) -> None:
    on = subject({"paths": {"state_dir": str(tmp_path)}})
    (made,) = check_token_keys(on)
    assert (made.ok, made.text) == (
        True,
        f"the daemon will create the first key in {on.layout.token_keys}",
    )


def test_a_damaged_file_of_overrides_is_found_before_the_start(tmp_path: Path) -> None:
    on = subject({"paths": {"state_dir": str(tmp_path)}})
    path = on.layout.overrides
    assert check_overrides(on) == []
    path.write_text(
        '{"format": 3, "instances": {"web": [1, 0]}, "retired": [0, ""], "departed": {}}'
    )
    (fine,) = check_overrides(on)
    assert (fine.ok, fine.warning, "1 instance" in fine.text) == (True, False, True)
    path.write_text("{")
    (damaged,) = check_overrides(on)
    assert damaged.exit_status == 71
    assert f"{path} is damaged" in damaged.text
