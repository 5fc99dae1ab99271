"""The store at a start: records are not parsed again, and user-data stays where it is."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from imdsproxy.core.compiled import compile_instance
from imdsproxy.core.model import Instance, InstanceId, NetworkId, Port, StoredBytes
from imdsproxy.errors import SourceUnavailable
from imdsproxy.sources.sqlite import store as sqlite_store
from imdsproxy.sources.sqlite.store import Store

if TYPE_CHECKING:
    from pathlib import Path

_WEB = Instance(
    InstanceId("web"),
    "web",
    "web",
    ports=(Port(NetworkId("blue")),),
    user_data=b"#cloud-config\n" * 1000,
    created_at=1_700_000_000,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "store.sqlite"
    with closing(Store(path)) as store:
        store.put([], [_WEB])
    return path


def test_a_start_parses_no_record_that_is_as_it_was_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sqlite_store, "parse_instance")
    with closing(Store(path)) as store:
        assert store.load().instances == {"web": _WEB}


@pytest.mark.parametrize(
    "change",
    [
        """UPDATE instances SET record = replace(record, '"name":"web"', '"name":"mail"')""",
        "UPDATE packed SET stamp = x'00'",
        "DELETE FROM packed",
        "DROP TABLE packed",
    ],
)
def test_what_another_program_changed_is_read_from_the_record(path: Path, change: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    expected = replace(_WEB, name="mail") if "mail" in change else _WEB
    for _ in ("read anew", "as it was packed then"):
        with closing(Store(path)) as store:
            assert store.load().instances == {"web": expected}


def test_user_data_stays_in_the_store_until_it_is_needed(path: Path) -> None:
    with closing(Store(path)) as store:
        web = store.load().instances[InstanceId("web")]
        assert isinstance(web.user_data, StoredBytes)
        assert compile_instance(web, {}) == compile_instance(_WEB, {})
        changed = replace(_WEB, user_data=b"short")
        assert store.put([], [changed]).instances == {"web": changed}
    with pytest.raises(SourceUnavailable, match="closed"):
        compile_instance(web, {})
