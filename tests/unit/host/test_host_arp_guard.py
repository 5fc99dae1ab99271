from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.core.model import BridgeListener, InterfaceListener, Network, NetworkId
from imdsproxy.errors import HostRefused
from imdsproxy.listeners.nft_scripts import answering_devices, render_arp_guard
from imdsproxy.listeners.nft_tables import ArpGuard


def _program(directory: Path, *, status: int = 0) -> Path:
    """Notes what it is told, and answers with `status`."""
    program = directory / "nft"
    program.write_text(
        f"#!/bin/sh\ncat >> {directory}/log\necho no such thing >&2\nexit {status}\n"
    )
    program.chmod(0o755)
    return program


def test_only_devices_of_interface_listeners_answer() -> None:
    networks = [
        Network(NetworkId("a"), InterfaceListener("virbr0")),
        Network(NetworkId("b"), BridgeListener("br1")),
    ]
    assert answering_devices(networks) == {"virbr0"}
    assert answering_devices([]) == frozenset()


def test_the_rule_replaces_the_one_before_in_one_transaction() -> None:
    script = render_arp_guard("imds", frozenset({"virbr1", "virbr0"}))
    assert script.splitlines()[:2] == ["table arp imds", "delete table arp imds"]
    assert 'iifname != { "virbr0", "virbr1" }' in script
    assert "169.254.169.254 drop" in script


def test_without_devices_there_is_no_rule() -> None:
    assert render_arp_guard("imds", frozenset()) == "table arp imds\ndelete table arp imds\n"


async def test_what_is_in_force_is_not_said_again(tmp_path: Path) -> None:
    guard = ArpGuard("imds", str(_program(tmp_path)))
    await guard.apply(frozenset({"a"}))
    said = (tmp_path / "log").read_text()
    await guard.apply(frozenset({"a"}))
    assert (tmp_path / "log").read_text() == said
    await guard.apply(frozenset())
    assert (tmp_path / "log").read_text() != said


async def test_a_refusal_is_told_and_tried_again(tmp_path: Path) -> None:
    guard = ArpGuard("imds", str(_program(tmp_path, status=1)))
    with pytest.raises(HostRefused, match="no such thing"):
        await guard.apply(frozenset({"a"}))
    _program(tmp_path)
    await guard.apply(frozenset({"a"}))
    assert guard.applied == frozenset({"a"})


async def test_where_there_can_be_no_rule_none_is_missed(tmp_path: Path) -> None:
    guard = ArpGuard("imds", str(_program(tmp_path, status=1)))
    await guard.apply(frozenset())
    assert guard.applied == frozenset()


async def test_without_the_program_only_a_rule_that_is_needed_is_missed(tmp_path: Path) -> None:
    guard = ArpGuard("imds", str(tmp_path / "none"))
    await guard.apply(frozenset())
    with pytest.raises(HostRefused, match="no nft"):
        await guard.apply(frozenset({"a"}))
