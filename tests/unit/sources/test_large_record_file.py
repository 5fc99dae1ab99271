"""Files that are read by a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
import tracemalloc
import urllib.request
from typing import TYPE_CHECKING, Final

import pytest

from imdsproxy.admin.health import HealthServer
from imdsproxy.app.heartbeat import Heartbeat
from imdsproxy.config.strict_yaml import Undecodable, decode_yaml
from imdsproxy.core.records import LineOf, Records, Refused, parse_records
from imdsproxy.core.timing import Progress
from imdsproxy.errors import Problem
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.sources.file import contents as file_contents
from imdsproxy.sources.file.contents import read_contents
from imdsproxy.sources.file.directory import Directory
from imdsproxy.sources.file.record_file import decode_records
from imdsproxy.sources.file.source import FileSource
from support.patience import patience
from support.source_runs import DEADLINE_S, Heard

if TYPE_CHECKING:
    from pathlib import Path

    from imdsproxy.core.model import Instance, Network
    from imdsproxy.core.records import Path as PathInFile

_COUNT = 3_000

_SLOW_PYTHON: Final = """#!/bin/sh
# Gives up after 60 s: a loop that waits for it never opens the gate.
for _ in $(seq 600); do
    [ -e {gate} ] && exec {python} "$@"
    sleep 0.1
done
exit 1
"""
_STUCK_S: Final = 3


@pytest.fixture
def large(tmp_path: Path) -> Path:
    instances: list[dict[str, object]] = [
        {"id": f"vm{number}", "name": "vm", "user_data": "x" * 400} for number in range(_COUNT)
    ]
    instances += [{"id": "bad", "name": ""}, {"name": "nameless"}]
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"instances": instances}, indent=1))
    assert path.stat().st_size > 1024 * 1024
    return path


def test_a_large_file_is_read_by_another_process_and_just_the_same(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(file_contents, "_APART", sys.maxsize)
        here = read_contents(large, Progress())
    assert len(here.instances) == _COUNT + 1
    assert here.nameless["instances"]
    monkeypatch.delattr(file_contents, "decode_records")
    assert read_contents(large, Progress()) == here


def test_a_reader_that_dies_is_a_problem_of_the_file(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (problem,) = read_contents(large, Progress()).problems
    assert problem.reason == "the process that read it ended with status 1"
    assert problem.file == str(large)


_NETWORK = "{id: n, name: n, listener: {bridge: br0}}"
_DOCUMENTS = {
    "plain": f"networks: [{_NETWORK}]\ninstances:\n- {{id: a, name: a}}\n\n- id: b\n  name: b\n  tags: {{x: y}}\n",
    "an anchor used in another item": "instances:\n- {id: a, name: a, tags: &t {x: y}}\n- {id: b, name: b, tags: *t}\n",
    "a merge": "base: &b {name: a}\ninstances:\n- {<<: *b, id: a}\n",
    "a merge from an item": "instances:\n- &b {id: a, name: a}\n- {<<: *b, id: b}\n",
    "an item that is an alias": "instances:\n- &b {id: a, name: a}\n- *b\n",
    "a key twice": "instances:\n- id: a\n  name: a\n  id: b\n- {id: c, name: c}\n",
    "a list twice": "instances: [{id: a, name: a}]\nnetworks: []\ninstances: [{id: b, name: b}]\n",
    "a list with an anchor": "instances: &l [{id: a, name: a}, {id: b, name: b, tags: *l}]\n",
    "a list with a tag": "instances: !odd [{id: a, name: a}]\n",
    "a root with an anchor": "&r\ninstances: [{id: a, name: a}, *r]\n",
    "an item with a tag": "instances:\n- {id: a, name: a}\n- !odd {id: b, name: b}\n",
    "bad records": "instances:\n- 7\n- {id: a, nam: a}\n- [x]\n- ~\n- {name: nameless}\n- {id: b, name: b}\n",
    "no list": "instances: {id: a}\n",
    "null": "instances:\nnetworks: ~\n",
    "an unknown list": "instances: [{id: a, name: a}]\nservers: []\n",
    "a list": "- {id: a, name: a}\n",
    "empty": "",
    "two documents": "instances: [{id: a, name: a}]\n---\ninstances: []\n",
    "bad at its end": "instances:\n- {id: a, name: a}\n- {id: b\n",
    "deep": "instances:\n- {id: a, name: a}\n- " + "[" * 500 + "]" * 500,
    "aliases of aliases": "instances:\n- &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"- &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
}


def _decode_as_one_tree(data: bytes) -> tuple[Records, LineOf]:
    decoded = decode_yaml(data.decode())
    if isinstance(decoded, Undecodable):
        problem = Problem("file", decoded.reason, decoded.hint, "x.yaml", decoded.line)
        return Records(problems=(problem,)), lambda _path: None
    line_of, faults = decoded.line_of, decoded.faults
    return parse_records(decoded.value, file="x.yaml", line_of=line_of, faults=faults), line_of


@pytest.mark.parametrize("name", _DOCUMENTS)
def test_records_taken_one_by_one_are_those_of_the_whole_document(name: str) -> None:
    data = _DOCUMENTS[name].encode()
    whole, line_of = _decode_as_one_tree(data)
    wanted: list[object] = [
        record if isinstance(record, Refused) else (record, line_of(place))
        for place, record in whole.found
    ]
    found: list[object] = []

    def take(
        place: PathInFile, record: Network | Instance | Refused, line: LineOf, _share: float
    ) -> None:
        found.append(record if isinstance(record, Refused) else (record, line(place)))

    rest, line_of = decode_records(data, file="x.yaml", take=take)
    assert rest.problems == whole.problems
    assert decode_records(data, file="x.yaml")[0] == whole
    if whole.problems:
        return
    for place, record in rest.found:
        take(place, record, line_of, 1)
    assert sorted(map(repr, found)) == sorted(map(repr, wanted))


def test_only_a_little_of_a_large_yaml_file_is_kept_at_a_time() -> None:
    data = b"instances:\n" + b"- {id: a, name: a, tags: {some: tag}}\n" * 3_000
    shares: list[float] = []
    tracemalloc.start()
    try:
        rest, _ = decode_records(
            data, file="x.yaml", take=lambda _place, _record, _line, share: shares.append(share)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not rest.instances
    assert len(shares) == 3_000
    assert shares == sorted(shares)
    assert shares[-1] > 0.99
    # The whole tree takes 100 times the text.
    assert peak < 10 * len(data)


class _Seen(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, what: str, done: int, of: int) -> None:
        super().note(what, done, of)
        self.seen += [f"{step.what} {step.done} {step.of}" for step in self.steps]


def test_progress_is_shown_while_a_large_file_is_read(large: Path) -> None:
    progress = _Seen()
    read_contents(large, progress)
    assert progress.seen[0] == f"reading {large}, percent 0 100"
    assert progress.seen[-1] == f"reading {large}, percent 100 100"
    assert progress.steps == ()


def test_progress_is_shown_while_many_records_are_compared(large: Path) -> None:
    progress = _Seen()
    Directory(large.parent, clock=time.monotonic, progress=progress).read()
    compared = [one for one in progress.seen if one.startswith("comparing the addresses")]
    assert len(compared) >= _COUNT // 1000
    assert len(set(compared)) == len(compared)
    assert progress.steps == ()


@pytest.mark.slow
async def test_livez_is_answered_while_a_large_file_is_read(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, slow = tmp_path / "gate", tmp_path / "python"
    slow.write_text(_SLOW_PYTHON.format(gate=gate, python=sys.executable))
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    progress = Progress()
    source = FileSource(large.parent, progress=progress)
    heard = Heard(source)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/livez"
    heartbeat = Heartbeat(
        ServiceNotifier(), {"WATCHDOG_USEC": str(_STUCK_S * 1_000_000)}, time.monotonic
    )

    def livez() -> int:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return int(reply.status)

    with HealthServer(listener, alive=heartbeat.alive):
        tasks = [
            asyncio.create_task(heartbeat.run()),
            asyncio.create_task(source.run(heard.publish)),
        ]
        try:
            async with asyncio.timeout(DEADLINE_S * patience()):
                while not progress.steps:
                    await asyncio.sleep(0.01)
            begun = time.monotonic()
            while time.monotonic() < begun + 1.5 * _STUCK_S:
                assert await asyncio.to_thread(livez) == 200
                await asyncio.sleep(0.05)
            assert progress.steps
            gate.touch()
            await heard.until(lambda each: each.inventory.in_sync)
        finally:
            gate.touch()
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
    assert len(heard.inventory.instances) == _COUNT
    assert progress.steps == ()


def test_a_large_yaml_file_is_decoded_without_its_whole_tree() -> None:
    listed = "".join(f"- {{id: i{number}, name: i{number}}}\n" for number in range(2_000))
    data = f"networks:\n- {{id: red, listener: {{namespace: red}}}}\ninstances:\n{listed}".encode()
    steps: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        records, _ = decode_records(
            data, file="many.yaml", note=lambda done, of: steps.append((done, of))
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [one.id for _, one in records.instances] == [f"i{number}" for number in range(2_000)]
    assert [one.id for _, one in records.networks] == ["red"]
    # Its tree takes 9 kB a record.
    assert peak < 2_000 * 3_000
    assert [done for done, _ in steps] == [500, 1_000, 1_500, 2_000]
    assert all(1_500 < of < 2_500 for _, of in steps)
