"""`--file` with many records: what is said meanwhile, and how much at the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from imdsproxy.admin.records import RecordService, Written
from imdsproxy.cli import output
from imdsproxy.cli.admin_client import AdminClient
from imdsproxy.cli.main import main
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.timing import Step
from imdsproxy.errors import Problem, RequestRefused
from support.admin_server import AdminServer, admin_server


@dataclass(slots=True)
class _Slow(RecordService):
    """Takes its time for each step before it stores anything."""

    steps: tuple[Step, ...] = ()

    async def put_records(
        self, networks: Sequence[Network], instances: Collection[Instance], *, create: bool = False
    ) -> Written:
        for step in self.steps:
            self.records.progress.note(step.what, step.done, step.of)
            await asyncio.sleep(0.3)
            self.records.progress.end(step.what)
        return await super(_Slow, self).put_records(networks, instances, create=create)


def _slow_down(server: AdminServer, steps: tuple[Step, ...]) -> None:
    fast = server.services.records
    server.services.records = _Slow(
        fast.inventory, fast.records, fast.listeners, fast.store, fast.unapplied, steps=steps
    )


_STEPS = (Step("storing instances", 1000, 2000), Step("compiling instances", 2000, 2000))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    with admin_server(tmp_path) as served:
        yield served


def _write(path: Path, count: int, *, bad: bool = False) -> str:
    records = [{"id": f"web-{number}", "name": "" if bad else "web"} for number in range(count)]
    path.write_text(json.dumps({"instances": records}))
    return str(path)


def _add(server: AdminServer, file: str, *more: str) -> int:
    return main(["--socket", str(server.socket), "instance", "add", "--file", file, *more])


def test_what_takes_long_is_told_line_by_line(
    server: AdminServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output, "_LINE_EVERY_S", 0.0)
    monkeypatch.setattr("imdsproxy.cli.admin_client._LOOK_EVERY_S", 0.05)
    _slow_down(server, _STEPS)
    assert _add(server, _write(tmp_path / "many.json", 2000)) == 0
    shown = capsys.readouterr()
    assert shown.out == "done: 0 networks, 2000 instances added\n"
    for line in (
        f"checking {tmp_path}/many.json: 500 of 2,000",
        "sending records: 2,000 of 2,000",
        "storing instances: 1,000 of 2,000",
        "compiling instances: 2,000 of 2,000",
    ):
        assert line in shown.err.splitlines()


def test_a_program_that_reads_json_is_told_the_end_only(
    server: AdminServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output, "_LINE_EVERY_S", 0.0)
    assert _add(server, _write(tmp_path / "many.json", 2000), "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["instances"] == 2000
    assert not shown.err


def test_work_may_take_longer_than_any_single_answer(server: AdminServer) -> None:
    _slow_down(server, _STEPS * 4)
    client = AdminClient(server.socket, timeout_s=1)
    seen: list[object] = []
    line = b'{"instance": {"id": "web", "name": "web"}}\n'
    answer = client.post_records([line], {}, seen.extend)
    assert isinstance(answer, dict)
    assert answer["instances"] == 1
    assert {"what": "storing instances", "done": 1000, "of": 2000} in seen


def test_records_that_come_by_line_are_stored_all_or_none(server: AdminServer) -> None:
    lines = [b'{"instance": {"id": "web", "name": "web"}}\n', b'{"instance": {"id": "-"}}\n']
    with pytest.raises(RequestRefused) as caught:
        server.client.post_records(lines, {}, print)
    fields = [problem.field for problem in caught.value.problems]
    assert sorted(fields) == ["instances[1].id", "instances[1].name"]
    with pytest.raises(RequestRefused, match="neither a network nor an instance"):
        server.client.post_records([b"[]\n"], {}, print)
    with pytest.raises(RequestRefused) as caught:
        server.client.post_records(lines[:1] * 2, {}, print)
    assert [problem.field for problem in caught.value.problems] == ["instances[1].id"]
    assert not server.instances


def test_of_many_reasons_some_are_printed_and_the_rest_counted(
    server: AdminServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.unapplied += [Problem("x", f"namespace n{number} is missing") for number in range(9485)]
    assert _add(server, _write(tmp_path / "one.json", 1)) != 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  namespace n0 is missing"
    assert lines[21:] == ["  and 9,465 more: imdsproxy status"]


def test_of_many_problems_some_are_printed_and_the_rest_counted(
    server: AdminServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _add(server, _write(tmp_path / "bad.json", 100, bad=True)) != 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[21] == "  and 80 more: --json has all"
    assert len(lines) <= 23
