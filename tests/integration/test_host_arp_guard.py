"""Who answers ARP for the metadata address on a host with several devices."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.listeners.host import NftTable
from imdsproxy.listeners.nft_scripts import render_arp_guard

_HOST = "imdst-arp-host"
_GUESTS = ("imdst-arp-a", "imdst-arp-b")

_KNOCK = "exec 3<>/dev/tcp/169.254.169.254/9"

pytestmark = pytest.mark.root


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def host() -> Iterator[None]:
    """A host with a device to each of two guests; only the first carries the metadata address."""
    for name in (_HOST, *_GUESTS):
        _run("ip", "netns", "add", name)
    try:
        for number, guest in enumerate(_GUESTS):
            device = f"tap{number}"
            _run("ip", "-n", _HOST, "link", "add", device, "type", "veth",
                 "peer", "name", "eth0", "netns", guest)  # fmt: skip
            _run("ip", "-n", _HOST, "link", "set", device, "up")
            _run("ip", "-n", _HOST, "addr", "add", f"10.0.{number}.1/24", "dev", device)
            _run("ip", "-n", guest, "link", "set", "eth0", "up")
            _run("ip", "-n", guest, "addr", "add", f"10.0.{number}.5/24", "dev", "eth0")
            _run("ip", "-n", guest, "route", "add", "169.254.169.254", "dev", "eth0")
        _run("ip", "-n", _HOST, "addr", "add", "169.254.169.254/32", "dev", "tap0")
        yield
    finally:
        for name in (_HOST, *_GUESTS):
            _run("ip", "netns", "del", name)


def _is_answered(guest: str) -> bool:
    """Whether the guest learns a MAC for the metadata address."""
    _run("ip", "-n", guest, "neigh", "flush", "dev", "eth0")
    subprocess.run(
        ["timeout", "1.5", "ip", "netns", "exec", guest, "bash", "-c", _KNOCK],  # noqa: S607 - Debian's
        capture_output=True,
        check=False,
    )
    return "lladdr" in _run("ip", "-n", guest, "neigh", "show", "169.254.169.254")


def _guard(directory: Path, *devices: str) -> None:
    """Guard as a fresh process would."""
    program = directory / "nft"
    program.write_text(f'#!/bin/sh\nexec ip netns exec {_HOST} nft "$@"\n')
    program.chmod(0o755)
    table = NftTable("", "", str(program))
    asyncio.run(table.apply(render_arp_guard("imdst", frozenset(devices)), empty=not devices))


@pytest.mark.usefixtures("host")
def test_only_the_device_of_an_interface_listener_answers(tmp_path: Path) -> None:
    assert [_is_answered(guest) for guest in _GUESTS] == [True, True]
    _guard(tmp_path, "tap0")
    assert [_is_answered(guest) for guest in _GUESTS] == [True, False]
    # A fresh process that needs no rule takes away what an earlier one left.
    _guard(tmp_path)
    assert [_is_answered(guest) for guest in _GUESTS] == [True, True]
    assert _run("ip", "netns", "exec", _HOST, "nft", "list", "tables") == ""
