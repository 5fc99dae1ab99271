"""Who answers ARP for the metadata address on a host with several devices."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from imdsproxy.core.model import InterfaceListener, Network, NetworkId
from imdsproxy.listeners.apply import NftTable
from imdsproxy.listeners.nft_scripts import render_arp_guard
from support.hostlab import HostLab
from support.lab import within

_KNOCK = "exec 3<>/dev/tcp/169.254.169.254/9"

pytestmark = pytest.mark.root


@pytest.fixture
def guests(lab: HostLab) -> list[str]:
    """Behind a device each of one host; only the first device carries the metadata address."""
    host = lab.namespace("host")
    guests = [lab.namespace("a"), lab.namespace("b")]
    for number, guest in enumerate(guests):
        device = f"tap{number}"
        lab.ip("-n", host, "link", "add", device, "up", "type", "veth",
               "peer", "name", "eth0", "netns", guest)  # fmt: skip
        lab.address(host, f"10.0.{number}.1/24", device)
        lab.ip("-n", guest, "link", "set", "eth0", "up")
        lab.address(guest, f"10.0.{number}.5/24", "eth0")
        lab.ip("-n", guest, "route", "add", "169.254.169.254", "dev", "eth0")
    lab.address(host, "169.254.169.254/32", "tap0")
    return guests


def _is_answered(lab: HostLab, guest: str) -> bool:
    """Whether the guest learns a MAC for the metadata address."""
    lab.ip("-n", guest, "neigh", "flush", "dev", "eth0")
    knock = (*within(guest), "timeout", "1.5", "bash", "-c", _KNOCK)
    subprocess.run(knock, capture_output=True, check=False)
    return "lladdr" in lab.ip("-n", guest, "neigh", "show", "169.254.169.254")


def test_only_the_device_of_an_interface_listener_answers(
    lab: HostLab, guests: list[str], tmp_path: Path
) -> None:
    host = within(lab.name("host"))
    program = tmp_path / "nft"
    program.write_text(f'#!/bin/sh\nexec {" ".join(host)} nft "$@"\n')
    program.chmod(0o755)

    def guard(*devices: str) -> None:
        """As a fresh process does."""
        table = NftTable("", "", str(program))
        networks = [Network(NetworkId(one), InterfaceListener(one)) for one in devices]
        assert asyncio.run(table.apply(render_arp_guard("imdst", networks))) == ()

    assert [_is_answered(lab, guest) for guest in guests] == [True, True]
    guard("tap0")
    assert [_is_answered(lab, guest) for guest in guests] == [True, False]
    # A process that needs no rule removes what an earlier one left.
    guard()
    assert [_is_answered(lab, guest) for guest in guests] == [True, True]
    assert lab.run(*host, "nft", "list", "tables") == ""
