"""What operators did about instances: in the file before it counts, and read again or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imdsproxy.app.policy_store import OverrideFile
from imdsproxy.core.model import InstanceId
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.errors import HostRefused

_WEB, _MAIL = InstanceId("web"), InstanceId("mail")


@dataclass
class Disk:
    """Writes files, or has no room for them; notes what guards counted when it was asked to."""

    full: bool = False
    file: OverrideFile | None = None
    counted: list[Mapping[str, OperatorOverride]] = field(default_factory=list)

    def write(self, path: Path, data: bytes) -> None:
        if self.file is not None:
            self.counted.append(self.file.overrides)
        if self.full:
            raise HostRefused("the disk is full")
        path.write_bytes(data)


def _open(directory: Path, disk: Disk | None = None) -> OverrideFile:
    disk = disk or Disk()
    disk.file = OverrideFile(directory / "guards.json", disk.write)
    disk.file.load()
    return disk.file


def test_without_a_file_nothing_was_done(tmp_path: Path) -> None:
    assert _open(tmp_path).overrides == {}
    assert list(tmp_path.iterdir()) == []


def test_each_revocation_is_one_epoch_more_and_leaves_the_rest(tmp_path: Path) -> None:
    file = _open(tmp_path)
    assert file.reopen(_WEB, 1_795_000_000) == OperatorOverride(0, 1_795_000_000)
    assert file.revoke(_WEB) == OperatorOverride(1, 1_795_000_000)
    assert file.revoke(_WEB) == OperatorOverride(2, 1_795_000_000)
    assert file.revoke(_MAIL) == OperatorOverride(1, 0)
    assert file.reopen(_WEB, 1_795_000_900) == OperatorOverride(2, 1_795_000_900)
    assert file.overrides == {
        _WEB: OperatorOverride(2, 1_795_000_900),
        _MAIL: OperatorOverride(1, 0),
    }
    assert _open(tmp_path).overrides == file.overrides


def test_it_is_on_disk_before_it_counts(tmp_path: Path) -> None:
    disk = Disk()
    file = _open(tmp_path, disk)
    file.revoke(_WEB)
    file.revoke(_WEB)
    assert disk.counted == [{}, {_WEB: OperatorOverride(1, 0)}]


def test_what_cannot_be_written_has_not_happened(tmp_path: Path) -> None:
    disk = Disk()
    file = _open(tmp_path, disk)
    file.revoke(_WEB)
    disk.full = True
    with pytest.raises(HostRefused, match="full"):
        file.revoke(_WEB)
    with pytest.raises(HostRefused, match="full"):
        file.reopen(_WEB, 1)
    assert file.overrides == {_WEB: OperatorOverride(1, 0)}
    assert _open(tmp_path).overrides == {_WEB: OperatorOverride(1, 0)}


def _text(instances: object, version: object = 1) -> bytes:
    return json.dumps({"format": version, "instances": instances}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 1}',
        _text({}, 2),
        _text([]),
        _text({"web": 1}),
        _text({"web": [1]}),
        _text({"web": [1, 2, 3]}),
        _text({"web": ["1", 0]}),
        _text({"web": [True, 0]}),
        _text({"web": [1.5, 0]}),
        _text({"web": [-1, 0]}),
        _text({"web": [1, None]}),
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_refused_by_name_with_what_helps(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "guards.json"
    path.write_bytes(data)
    with pytest.raises(HostRefused) as refused:
        _open(tmp_path)
    assert refused.value.message.startswith(f"{path} is damaged: ")
    assert "together with the token keys" in refused.value.hint
    assert refused.value.exit_status == 71


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "guards.json").mkdir()
    with pytest.raises(HostRefused, match=r"cannot read .*guards\.json"):
        _open(tmp_path)
