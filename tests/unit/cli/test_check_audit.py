from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from imdsproxy.cli.checks.host import check_audit
from imdsproxy.config.policy import AuditSettings


def _into(path: Path | str) -> AuditSettings:
    return AuditSettings(mode="all", destination=os.fspath(path))


def _link(directory: Path) -> Path:
    (directory / "link").symlink_to(directory / "elsewhere")
    return directory / "link"


def _fifo(directory: Path) -> Path:
    os.mkfifo(directory / "fifo")
    return directory / "fifo"


def _open_to_all(directory: Path) -> Path:
    (directory / "open").mkdir()
    (directory / "open").chmod(0o777)
    return directory / "open" / "audit.log"


_WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no directory": (lambda directory: directory / "nowhere" / "audit.log", "No such file"),
    "a link": (_link, "links are not followed"),
    "no file": (_fifo, "it is no file"),
    "a directory": (lambda directory: directory, "it is no file"),
    "not only root's": (_open_to_all, "others than root may put a file of theirs"),
}


def test_nothing_is_said_where_there_is_no_audit_log() -> None:
    assert check_audit(AuditSettings()) == []


@pytest.mark.root
def test_a_file_that_can_be_written_is_fine(tmp_path: Path) -> None:
    for _ in range(2):
        (found,) = check_audit(_into(tmp_path / "audit.log"))
        assert not found.warning
        (tmp_path / "audit.log").touch()


@pytest.mark.root
@pytest.mark.parametrize("what", _WRONG)
def test_a_place_that_cannot_be_written_is_warned_of_with_what_helps(
    tmp_path: Path, what: str
) -> None:
    make, words = _WRONG[what]
    (found,) = check_audit(_into(make(tmp_path)))
    assert found.warning
    assert found.ok
    assert words in found.text
    assert found.hint


def test_a_journal_that_is_not_there_is_warned_of(tmp_path: Path) -> None:
    journal = tmp_path / "socket"
    (found,) = check_audit(_into("journal"), journal)
    assert found.warning
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(os.fspath(journal))
        (found,) = check_audit(_into("journal"), journal)
    assert not found.warning
