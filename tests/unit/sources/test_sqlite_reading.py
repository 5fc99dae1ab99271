"""The store as `imdsproxy check` reads it, and as it arrives on another host."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imdsproxy.app.policy_store import OverrideFile, read_overrides
from imdsproxy.core.model import InstanceId
from imdsproxy.core.policy import Policy, render_policy_word
from imdsproxy.errors import SourceUnavailable
from imdsproxy.sources.sqlite.store import Store, read_store
from support.record_builders import instance, network

_BORN = 1_795_000_000
_WEB = InstanceId("web")


def _fill(path: Path) -> Store:
    store = Store(path, now=lambda: _BORN)
    web = replace(instance("web", "10.0.0.5"), user_data=b"\xff\x00")
    store.put([network("n1")], [web, instance("mail", "10.0.0.6")])
    return store


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _told(path: Path) -> dict[str, tuple[bool, int | None]]:
    records = read_store(path)
    assert records.all_problems == ()
    assert [one.id for _, one in records.networks] == ["n1"]
    return {one.id: (one.user_data is not None, one.created_at) for _, one in records.instances}


_HELD = {"web": (True, _BORN), "mail": (False, _BORN)}


def test_it_is_read_while_another_process_has_it(tmp_path: Path) -> None:
    with closing(_fill(tmp_path / "store.sqlite")):
        assert _told(tmp_path / "store.sqlite") == _HELD


def test_one_that_is_not_open_is_read_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    _fill(path).close()
    before = sorted(tmp_path.iterdir()), path.read_bytes()
    assert _told(path) == _HELD
    assert (sorted(tmp_path.iterdir()), path.read_bytes()) == before


def test_none_is_empty_and_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    assert read_store(tmp_path / "none.sqlite").instances == ()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other.sqlite").write_bytes(b"hello" * 100)
    with pytest.raises(SourceUnavailable, match=r"other\.sqlite"):
        read_store(tmp_path / "other.sqlite")


def test_what_was_sealed_stays_so_where_the_store_and_the_state_are_copied_to(
    tmp_path: Path,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    _fill(here / "store.sqlite").close()
    guards = OverrideFile(here / "guards.json", _write)
    guards.revoke(_WEB)
    guards.reopen(_WEB, _BORN + 50)
    shutil.copytree(here, there)
    with closing(Store(there / "store.sqlite", now=lambda: _BORN + 10_000)) as store:
        (web,) = (one for one in store.load().instances.values() if one.id == _WEB)
        # A record that comes again, as by `instance set --file`, does not say when it was made.
        store.put([], [replace(instance("web", "10.0.0.5"), user_data=b"new")])
        again = store.load().instances[_WEB]
    assert (web.created_at, again.created_at) == (_BORN, _BORN)
    guard = read_overrides(there / "guards.json")[_WEB]
    word = render_policy_word(Policy(seal_user_data=True, boot_grace_s=60), guard, again.created_at)
    assert word.split(":")[1:3] == ["1", str(_BORN + 50 + 60)]
