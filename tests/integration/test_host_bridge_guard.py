"""What `check` sees of a bridge whose guests may use any MAC."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from imdsproxy.anti_spoofing.host_rules import observe_bridge, read_rules, try_mac_filter
from support.hostlab import HostLab
from support.lab import within
from support.world import World

pytestmark = pytest.mark.root


def test_this_kernel_can_check_macs() -> None:
    assert try_mac_filter() == ""


def test_flags_of_ports_are_seen(lab: HostLab) -> None:
    bridge = lab.bridge("b")
    for number, name in enumerate("xyz"):
        lab.guest(name, bridge, f"10.0.0.{number + 5}/24")
    names = {name: lab.link_name(f"{name}o") for name in "xyz"}
    lab.run("/usr/sbin/bridge", "link", "set", "dev", names["x"], "learning", "off")
    lab.run("/usr/sbin/bridge", "link", "set", "dev", names["y"], "locked", "on")
    assert observe_bridge(bridge, "", lab.naming) == {
        names["x"]: "learning off",
        names["y"]: "locked",
        names["z"]: "",
    }
    rules = f'table bridge x {{ iifname "{names["z"]}" ether saddr != 02:00:00:00:00:01 drop }}'
    found = observe_bridge(bridge, rules, lab.naming)
    assert found is not None
    assert found[names["z"]] == "a rule"


def test_what_is_no_bridge_has_no_ports(lab: HostLab) -> None:
    assert observe_bridge(lab.device("d"), "", lab.naming) is None
    assert observe_bridge("none", "", lab.naming) is None


def test_rules_are_read_where_there_is_somebody_to_list_them() -> None:
    assert read_rules((("echo", "table"), ("no-such-program",))) == "table"


def _check(world: World) -> list[dict[str, Any]]:
    daemon = world.daemon
    done = subprocess.run(
        (
            *within(world.lab.host),
            *daemon.program,
            "--config",
            str(daemon.config),
            "check",
            "--json",
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return [one for one in findings if one["area"] == "macs"]


def test_check_warns_of_each_bridge_until_there_is_a_rule(world: World) -> None:
    kernel, blue, grey = _check(world)
    assert (kernel["ok"], kernel["warning"]) == (True, False)
    for finding in (blue, grey):
        assert finding["warning"], finding
        assert "anti-spoofing" in finding["hint"]
    assert "bridge blue" in blue["text"]
    # The cable of the listener itself is nobody's port.
    assert world.lab.prefix not in blue["text"]
    port = blue["text"].split("guests on ")[1].split()[0]
    rule = f'add rule bridge guests from iifname "{port}" ether saddr != {world.red.mac} drop'
    for words in (
        "add table bridge guests",
        "add chain bridge guests from { type filter hook prerouting priority -300; }",
        rule,
    ):
        subprocess.run((*within(world.lab.host), "nft", words), check=True)
    try:
        _, blue, grey = _check(world)
        assert (blue["warning"], grey["warning"]) == (False, True)
        assert f"{port} (a rule)" in blue["text"]
    finally:
        subprocess.run((*within(world.lab.host), "nft", "delete table bridge guests"), check=True)
