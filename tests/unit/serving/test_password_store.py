from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from imdsproxy.core.model import InstanceId
from imdsproxy.errors import HostRefused
from imdsproxy.serving.store import PasswordStore

VM = InstanceId("vm-1")


def test_a_kept_password_is_read_by_every_process(tmp_path: Path) -> None:
    assert PasswordStore(tmp_path).read(VM) is PasswordStore(tmp_path / "none").read(VM) is None
    assert PasswordStore(tmp_path).keep(VM, b"s\x00\xff")
    assert PasswordStore(tmp_path).read(VM) == b"s\x00\xff"
    assert stat.S_IMODE((tmp_path / VM).stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == [VM]


def test_of_many_at_once_exactly_one_is_kept(tmp_path: Path) -> None:
    kept: list[bytes] = []

    def post(password: bytes) -> None:
        if PasswordStore(tmp_path).keep(VM, password):
            kept.append(password)

    threads = [threading.Thread(target=post, args=(b"%d" % number * 900,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 1
    assert PasswordStore(tmp_path).read(VM) == kept[0]
    assert [path.name for path in tmp_path.iterdir()] == [VM]


def test_a_full_disk_keeps_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_keywords: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(HostRefused, match="No space") as refused:
            PasswordStore(tmp_path).keep(VM, b"one")
    assert "free some space" in refused.value.hint
    assert PasswordStore(tmp_path).read(VM) is None
    assert PasswordStore(tmp_path).keep(VM, b"one")


def test_a_removed_password_may_be_set_again(tmp_path: Path) -> None:
    store = PasswordStore(tmp_path)
    store.keep(VM, b"one")
    assert store.remove(VM)
    assert not store.remove(VM)
    assert store.keep(VM, b"two")
