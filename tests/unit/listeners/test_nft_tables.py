"""nft(8) is run when something changes, and its refusals are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.core.hoststate import BridgePort
from imdsproxy.core.model import MacAddress
from imdsproxy.errors import HostRefused
from imdsproxy.listeners.nft_scripts import Diversion
from imdsproxy.listeners.nft_tables import ArpGuard, Diverter

_WANTED = (Diversion("imds1", MacAddress("02:00:00:00:00:01"), (BridgePort("tap0", "tun"),)),)


def _program(directory: Path, *, status: int = 0) -> str:
    """An nft(8) that logs its input, and answers with `status`."""
    program = directory / "nft"
    program.write_text(
        f"#!/bin/sh\ncat >> {directory}/log\necho no such thing >&2\nexit {status}\n"
    )
    program.chmod(0o755)
    return str(program)


def _runs(directory: Path) -> int:
    return (directory / "log").read_text().count("delete table")


async def test_nft_is_run_only_when_something_changes(tmp_path: Path) -> None:
    table = Diverter("imds", _program(tmp_path))
    for wanted in (_WANTED, _WANTED, ()):
        await table.apply(wanted)
    assert _runs(tmp_path) == 2


async def test_a_refusal_is_an_error_and_the_change_is_tried_again(tmp_path: Path) -> None:
    table = Diverter("imds", _program(tmp_path, status=1))
    for _ in range(2):
        with pytest.raises(HostRefused, match=r"gateway.*no such thing"):
            await table.apply(_WANTED)
    assert _runs(tmp_path) == 2
    _program(tmp_path)
    await table.apply(_WANTED)
    assert table.applied == _WANTED


async def test_a_kernel_without_such_tables_has_none_to_remove(tmp_path: Path) -> None:
    table = ArpGuard("imds", _program(tmp_path, status=1))
    await table.apply(frozenset())
    assert table.applied == frozenset()


async def test_nft_is_missed_only_where_a_table_is_wanted(tmp_path: Path) -> None:
    table = ArpGuard("imds", str(tmp_path / "none"))
    await table.apply(frozenset())
    with pytest.raises(HostRefused, match="no nft"):
        await table.apply(frozenset({"a"}))
