"""When readiness believes that guests get documents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest
from structlog.testing import capture_logs

from imdsproxy.app import companion
from imdsproxy.app.companion import DocumentProbe
from imdsproxy.core.compiled import compiled_path
from imdsproxy.core.model import Instance
from imdsproxy.core.wire import PROBE_INSTANCE, PROBE_PATH
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.serving.store import DiskFiles, PasswordStore

_GOOD = (200, Instance(PROBE_INSTANCE, "probe", "probe").ec2_id.encode())
_BUSY = (503, b"")


class _Haproxy:
    full: Problem | None = None

    def __init__(self, answers: Iterable[tuple[int | None, bytes]]) -> None:
        self.answers = list(answers)

    async def fetch(self, path: str, deadline_s: float) -> tuple[int | None, bytes]:
        assert (path, deadline_s) == (PROBE_PATH, 3.0)
        return self.answers.pop(0)


def _probe(directory: Path, *answers: tuple[int | None, bytes]) -> DocumentProbe:
    files = DiskFiles(directory, PasswordStore(directory / "passwords"), None)
    return DocumentProbe(cast("Haproxy", _Haproxy(answers)), files, lambda: None)


async def test_a_full_haproxy_changes_nothing(tmp_path: Path) -> None:
    for before in (_GOOD, _BUSY):
        probe = _probe(tmp_path, before, *[(None, b"")] * 3)
        await probe.ask()
        problem = probe.problem
        probe.haproxy.full = Problem("haproxy.maxconn", "full")
        with capture_logs() as logs:
            for _ in range(3):
                await probe.ask()
        assert probe.problem == problem
        assert logs == []


async def test_documents_are_not_believed_in_before_one_was_answered(tmp_path: Path) -> None:
    probe = _probe(tmp_path, _GOOD)
    assert "no document has been asked for" in str(probe.problem)
    await probe.ask()
    assert str(probe.problem) == "None"
    assert (tmp_path / compiled_path(PROBE_INSTANCE)).exists()


@pytest.mark.parametrize("bad", [_BUSY, (None, b""), (200, b"ok"), (200, b"i-another")])
async def test_one_failure_is_forgiven_after_good_answers_and_the_second_is_a_problem(
    tmp_path: Path, bad: tuple[int | None, bytes]
) -> None:
    probe = _probe(tmp_path, _GOOD, bad, _GOOD, bad, bad, bad, _GOOD)
    problems = []
    with capture_logs() as logs:
        for _ in range(7):
            await probe.ask()
            problems.append(probe.problem is not None)
    assert problems == [False, False, False, False, True, True, False]
    assert [one["event"] for one in logs] == ["no documents", "documents are answered again"]


async def test_a_first_failure_is_a_problem_at_once_and_names_the_closed_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companion, "find_closed", lambda _account, _path: Path("/root"))
    probe = _probe(tmp_path, _BUSY)
    await probe.ask()
    assert "cannot enter /root" in str(probe.problem)


async def test_a_record_that_cannot_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = _probe(tmp_path)

    def refuse(*_: object) -> None:
        raise HostRefused("no space left on device")

    monkeypatch.setattr(DiskFiles, "apply", refuse)
    await probe.ask()
    assert "no space left on device" in str(probe.problem)


async def test_where_no_document_server_is_needed_nothing_is_asked(tmp_path: Path) -> None:
    probe = _probe(tmp_path)
    probe = DocumentProbe(probe.haproxy, probe.files, probe.account, needed=False)
    await probe.run()
    await probe.ask()
    assert probe.problem is None
