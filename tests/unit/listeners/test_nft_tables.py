"""nft(8) is run when something changes, and its refusals are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.listeners.host import NftTable


def _table(directory: Path, *, status: int = 0) -> NftTable:
    """A table whose nft(8) logs its input, and answers with `status`."""
    program = directory / "nft"
    program.write_text(
        f"#!/bin/sh\ncat >> {directory}/log\necho no such thing >&2\nexit {status}\n"
    )
    program.chmod(0o755)
    return NftTable("cannot redirect", "until then", str(program))


async def test_nft_is_run_only_when_something_changes(tmp_path: Path) -> None:
    table = _table(tmp_path)
    for script, empty in (("a ", False), ("a ", False), ("b ", True)):
        await table.apply(script, empty=empty)
    assert (tmp_path / "log").read_text() == "a b "


async def test_a_refusal_is_an_error_and_the_change_is_tried_again(tmp_path: Path) -> None:
    table = _table(tmp_path, status=1)
    for _ in range(2):
        with pytest.raises(HostRefused, match=r"cannot redirect.*no such thing"):
            await table.apply("a ", empty=False)
    _table(tmp_path)
    await table.apply("a ", empty=False)
    await table.apply("a ", empty=False)
    assert (tmp_path / "log").read_text() == "a a a "


async def test_a_kernel_without_such_tables_has_none_to_remove(tmp_path: Path) -> None:
    await _table(tmp_path, status=1).apply("a ", empty=True)


async def test_nft_is_missed_only_where_a_table_is_wanted(tmp_path: Path) -> None:
    table = NftTable("cannot redirect", "until then", str(tmp_path / "none"))
    await table.apply("a ", empty=True)
    with pytest.raises(HostRefused, match="no nft"):
        await table.apply("a ", empty=False)
