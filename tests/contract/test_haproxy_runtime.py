"""What the master socket answers: the real HAProxy, and the fake that unit tests use instead."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imdsproxy.errors import CommandRefused, RuntimeUnavailable
from imdsproxy.haproxy.master import MasterClient, WorkerEnded
from imdsproxy.haproxy.rules.maps import GENERATION_KEY, render_map
from imdsproxy.haproxy.rules.model import DataplaneSpec, Limits
from imdsproxy.host.servers import open_unix_socket
from support.fake_haproxy import FakeHaproxy
from support.haproxy_alone import paths_below, run_haproxy


@dataclass(frozen=True)
class Subject:
    master: MasterClient
    map: str


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.root)])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    spec = DataplaneSpec((), paths_below(tmp_path), Limits(maxconn=50))
    path, master = tmp_path / "base.map", tmp_path / "master.sock"
    path.write_text(render_map({"n/1": "a|1", "n/2": "b|1"}, "5"))
    made = Subject(MasterClient(master, deadline_s=5), str(path))
    if request.param == "fake":
        fake = FakeHaproxy(master, (path,))
        await fake.start()
        yield made
        await fake.close()
        return
    with run_haproxy(spec, tmp_path, arguments=("-W", "-S", str(master))):
        async with asyncio.timeout(30):
            while not await _is_up(made.master):
                await asyncio.sleep(0.01)
        yield made


async def _is_up(master: MasterClient) -> bool:
    try:
        return (await master.read_processes()).worker is not None
    except RuntimeUnavailable:
        return False


async def _worker(subject: Subject) -> int:
    worker = (await subject.master.read_processes()).worker
    assert worker is not None
    return worker


async def _read(subject: Subject, *keys: str) -> list[str | None]:
    worker = await _worker(subject)
    return [await subject.master.read_entry(worker, subject.map, key) for key in keys]


async def test_entries_are_read_changed_added_and_removed(subject: Subject) -> None:
    worker = await _worker(subject)
    assert await _read(subject, "n/1", GENERATION_KEY, "n/9") == ["a|1", "5", None]
    await subject.master.send_upsert(worker, subject.map, "n/1", "c|2")
    await subject.master.send_upsert(worker, subject.map, "n/3", "d|1")
    for _ in ("what is there", "nothing"):
        await subject.master.send_removal(worker, subject.map, "n/2")
    assert await _read(subject, "n/1", "n/2", "n/3") == ["c|2", None, "d|1"]


async def test_many_additions_go_in_pieces_and_a_swap_replaces_everything(subject: Subject) -> None:
    worker = await _worker(subject)
    entries = [(f"many/{number}", f"i{number}|{'0' * 16}") for number in range(1500)]
    await subject.master.send_additions(worker, subject.map, entries)
    assert await _read(subject, "many/0", "many/1499") == [entries[0][1], entries[-1][1]]
    swapped = [(GENERATION_KEY, "6"), *entries[::-1]]
    await subject.master.send_swap(worker, subject.map, swapped)
    assert await _read(subject, GENERATION_KEY, "many/0", "n/1") == ["6", entries[0][1], None]
    await subject.master.send_swap(worker, subject.map, [])
    assert await _read(subject, "many/0") == [None]


async def test_a_worker_that_is_gone_is_told_apart(subject: Subject) -> None:
    with pytest.raises(WorkerEnded):
        await subject.master.send_upsert(999_999, subject.map, "n/1", "x|1")


async def test_an_unknown_command_is_refused(subject: Subject) -> None:
    worker = await _worker(subject)
    with pytest.raises(CommandRefused):
        await subject.master._expect_silence(worker, "frobnicate")


@pytest.mark.parametrize("command", ["show map; show info", "show map\nshow info"])
async def test_a_second_command_cannot_be_smuggled_in(subject: Subject, command: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        await subject.master.send(1, command)


async def test_after_a_reload_another_worker_accepts(subject: Subject) -> None:
    before = await _worker(subject)
    assert await subject.master.send_reload() is None
    after = await subject.master.read_processes()
    assert after.worker not in (None, before)
    assert after.reloads == 1


async def test_nobody_at_the_socket_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="cannot be reached"):
        await MasterClient(tmp_path / "none.sock").read_processes()


async def test_silence_is_unavailable_after_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with open_unix_socket(path, mode=0o600), pytest.raises(RuntimeUnavailable, match="no answer"):
        await MasterClient(path, deadline_s=0.05).read_processes()
