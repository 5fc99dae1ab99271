"""What operators did about instances: in the file before it counts, and read again or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from imdsproxy.app.policy_store import PolicyStore, TokenKeys, read_overrides
from imdsproxy.config.schema import Settings
from imdsproxy.core.model import InstanceId
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import HostRefused
from support.full_disk import full_disk

_WEB = InstanceId("web")


def _open(directory: Path) -> PolicyStore:
    store = PolicyStore(TokenKeys(Layout(directory, directory)))
    store.open(Settings())
    return store


def test_what_cannot_be_written_has_not_happened(tmp_path: Path) -> None:
    assert _open(tmp_path).revoke(_WEB) == OperatorOverride(1, 0)
    file = _open(tmp_path)
    with full_disk(), pytest.raises(HostRefused, match="No space"):
        file.revoke(_WEB)
    with full_disk(), pytest.raises(HostRefused, match="No space"):
        file.reopen(_WEB, 1)
    assert file.overrides == _open(tmp_path).overrides == {_WEB: OperatorOverride(1, 0)}


def test_what_operators_did_is_known_where_the_state_is_copied_to(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    store = _open(here)
    store.revoke(_WEB)
    store.reopen(_WEB, 1_700_000_000)
    shutil.copytree(here, there)
    assert _open(there).overrides == {_WEB: OperatorOverride(1, 1_700_000_000)}


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


@pytest.mark.parametrize("error", [IsADirectoryError, PermissionError])
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def refuse(_: Path) -> bytes:
        raise error(1, "no")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(HostRefused, match=r"^cannot read .*guards\.json: no$") as refused:
        read_overrides(tmp_path / "guards.json")
    assert refused.value.exit_status == 71
