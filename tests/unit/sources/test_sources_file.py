"""The file source on a real directory, watched."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest

from imdsproxy.host.inotify import Place, Watch
from imdsproxy.sources.file import source as file_source
from imdsproxy.sources.file.source import FileSource
from support.patience import patience
from support.source_runs import Heard, running


def record(name: str, text: str = "", **more: object) -> dict[str, object]:
    return {"id": name, "name": name, "user_data": text, **more}


def write(path: Path, *records: object) -> None:
    """As careful writers do: beside, then renamed."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps({"instances": records}))
    beside.rename(path)


def overwrite(path: Path, *records: object) -> None:
    """As shells do: cut to nothing, then filled in several writes."""
    text = json.dumps({"instances": records}, indent=1)
    with path.open("w") as stream:
        for begin in range(0, len(text), 50):
            stream.write(text[begin : begin + 50])
            stream.flush()


def data_of(heard: Heard) -> dict[str, object]:
    return {key: each.user_data for key, each in heard.inventory.instances.items()}


def has(name: str, text: str, heard: Heard) -> bool:
    return data_of(heard) == {name: text.encode()}


def source_of(directory: Path) -> FileSource:
    return FileSource(directory, directory.parents[1] / "last-good.sqlite")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "records"
    path.mkdir(parents=True)
    return path


async def test_a_file_overwritten_in_place_a_hundred_times_never_loses_its_records(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half a second by default: on a busy machine the one who writes may be held up for longer.
    monkeypatch.setattr("imdsproxy.sources.file.source._EMPTY_S", 30.0)
    path = directory / "x.json"
    write(path, record("a", "0"), *(record(f"i{n}") for n in range(50)))
    async with running(source_of(directory)) as heard:
        for turn in range(100):
            overwrite(path, record("a", str(turn)), *(record(f"i{n}") for n in range(50)))
            await asyncio.sleep(0)
        await heard.until(lambda each: data_of(each).get("a") == b"99")
        assert not any(each.instances_removed for each in heard.observations)


async def test_a_change_is_reported_within_a_tenth_of_a_second(directory: Path) -> None:
    took = []
    async with running(source_of(directory)) as heard:
        for turn in range(9):
            text = str(turn)
            begin = time.monotonic()
            write(directory / "x.json", record("a", text))
            await heard.until(partial(has, "a", text))
            took.append(time.monotonic() - begin)
    assert sorted(took)[len(took) // 2] < 0.1 * patience(), took


async def test_a_payload_in_another_directory_is_watched(directory: Path, tmp_path: Path) -> None:
    payload = tmp_path / "later" / "still" / "web.sh"
    write(directory / "x.json", {"id": "a", "name": "a", "user_data_file": str(payload)})
    async with running(source_of(directory)) as heard:
        assert "there is no file" in heard.last.problems[0].reason
        payload.parent.mkdir(parents=True)
        payload.write_bytes(b"one")
        await heard.until(lambda each: data_of(each) == {"a": b"one"})
        assert not heard.last.problems
        await asyncio.to_thread(payload.with_suffix(".new").write_bytes, b"two")
        await asyncio.to_thread(payload.with_suffix(".new").rename, payload)
        await heard.until(lambda each: data_of(each) == {"a": b"two"})
        await asyncio.to_thread(payload.unlink)
        await heard.until(lambda each: each.last.problems)
        assert data_of(heard) == {"a": b"two"}


async def test_a_directory_that_comes_late_or_goes_and_is_made_again_is_followed(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "not" / "yet"
    async with running(source_of(directory)) as heard:
        (first,) = heard.observations
        assert (first.full, first.in_sync) == (False, False)
        assert "cannot be listed" in first.problems[0].reason
        for text in ("1", "2"):
            before = data_of(heard)
            await heard.until(lambda each: not each.last.in_sync)
            # What was in force stays.
            assert data_of(heard) == before
            await asyncio.to_thread(directory.mkdir, parents=True)
            write(directory / "x.json", record("a", text))
            await heard.until(partial(has, "a", text))
            assert heard.last.in_sync
            assert not heard.last.problems
            write(directory / "x.json", record("a", f"{text}.1"))
            await heard.until(partial(has, "a", f"{text}.1"))
            shutil.rmtree(directory)
        assert [each.full for each in heard.observations].count(True) == 1


async def test_a_memory_that_cannot_be_kept_is_reported(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write(directory / "x.json", record("a", "1"))
    source = FileSource(directory, tmp_path / "file" / "last-good.sqlite")
    async with running(source) as heard:
        await heard.until(lambda each: each.last.problems)
        assert heard.last.problems[0].field == "last-good"
        assert data_of(heard) == {"a": b"1"}


async def test_a_directory_replaced_by_another_is_followed(directory: Path) -> None:
    other = directory.with_name("other")
    other.mkdir()
    write(directory / "x.json", record("a", "1"))
    write(other / "x.json", record("a", "2"))
    async with running(source_of(directory)) as heard:
        await asyncio.to_thread(directory.rename, directory.with_name("old"))
        await asyncio.to_thread(other.rename, directory)
        await heard.until(lambda each: data_of(each) == {"a": b"2"})
        write(directory / "x.json", record("a", "3"))
        await heard.until(lambda each: data_of(each) == {"a": b"3"})


async def test_files_behind_a_symbolic_link_are_read_again_when_it_or_they_change(
    directory: Path,
) -> None:
    # How Kubernetes updates a mounted ConfigMap: one link to a directory, replaced as a whole.
    for version in ("1", "2"):
        (directory / f"..{version}").mkdir()
        write(directory / f"..{version}" / "x.json", record("a", version))
    (directory / "..data").symlink_to("..1")
    (directory / "x.json").symlink_to("..data/x.json")
    async with running(source_of(directory)) as heard:
        assert data_of(heard) == {"a": b"1"}
        (directory / "..data.new").symlink_to("..2")
        await asyncio.to_thread((directory / "..data.new").rename, directory / "..data")
        await heard.until(lambda each: data_of(each) == {"a": b"2"})
        write(directory / "..2" / "x.json", record("a", "3"))
        await heard.until(lambda each: data_of(each) == {"a": b"3"})


async def test_without_inotify_the_directory_is_looked_at_from_time_to_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Watch, _places: object) -> None:
        raise OSError("no inotify instances left")

    watch = Watch.__init__
    monkeypatch.setattr(Watch, "__init__", refuse)
    monkeypatch.setattr(file_source, "_UNWATCHED_S", 0.05)
    async with running(source_of(directory)) as heard:
        assert "inotify" in heard.last.problems[0].hint
        assert heard.last.in_sync
        write(directory / "x.json", record("a", "1"))
        await heard.until(lambda each: data_of(each) == {"a": b"1"})
        monkeypatch.setattr(Watch, "__init__", watch)
        await heard.until(lambda each: not each.last.problems)


async def test_an_idle_source_uses_next_to_no_time(directory: Path) -> None:
    for number in range(200):
        write(directory / f"{number}.json", record(f"i{number}"))
    async with running(source_of(directory)) as heard:
        used, begin = time.process_time(), time.monotonic()
        await asyncio.sleep(1.0)  # what is measured is that nothing happens for a while
        used, passed = time.process_time() - used, time.monotonic() - begin
        assert used / passed < 0.05
        assert len(heard.observations) == 1


async def test_a_change_just_before_watching_begins_is_seen(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Watch.__init__

    def late(self: Watch, places: Iterable[Place]) -> None:
        write(directory / "x.json", record("a", "1"))
        begin(self, places)

    monkeypatch.setattr(Watch, "__init__", late)
    async with running(source_of(directory)) as heard:
        await heard.until(lambda each: data_of(each) == {"a": b"1"})


async def test_a_cancelled_source_leaves_no_inotify_behind(directory: Path) -> None:
    def count() -> int:
        links = map(os.path.realpath, Path("/proc/self/fd").iterdir())
        return sum("inotify" in str(link) for link in links)

    before = count()
    async with running(source_of(directory)):
        assert count() > before
    async with asyncio.timeout(30):
        while count() > before:
            await asyncio.sleep(0.01)
