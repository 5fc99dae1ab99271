"""The keys of session tokens: made where there are none, read, rotated, and told to every worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import cast

import pytest

from imdsproxy.app.policy_store import TokenKeys
from imdsproxy.core.tokens import TokenKey, parse_token_keys, render_key_map, render_token_keys
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.records import RecordApplier, write_table
from imdsproxy.errors import HostRefused, RuntimeUnavailable, SecretUnreadable
from imdsproxy.host.files import write_atomic
from support.full_disk import full_disk


@dataclass
class Rig:
    """Keys over a directory, with bytes that are known for random ones."""

    directory: Path
    numbers: count[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        layout = Layout(self.directory, self.directory)
        self.keys = TokenKeys(layout, lambda size: next(self.numbers).to_bytes(size, "big"))

    def put(self, path: Path, *keys: TokenKey) -> Path:
        write_atomic(path, render_token_keys(keys).encode(), mode=0o600)
        return path

    def on_disk(self) -> tuple[TokenKey, ...]:
        return parse_token_keys((self.directory / "token-keys").read_text())


def _key(number: int) -> TokenKey:
    return TokenKey(number.to_bytes(32, "big"))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_the_first_key_is_made_once_and_found_again(rig: Rig) -> None:
    assert rig.keys.read(None)
    assert rig.keys.keys == rig.on_disk() == (_key(1),)
    assert not rig.keys.read(None)
    again = Rig(rig.directory)
    assert again.keys.read(None)
    assert again.keys.keys == (_key(1),)


def test_a_file_that_settings_name_has_to_be_there(rig: Rig) -> None:
    with pytest.raises(SecretUnreadable):
        rig.keys.read(rig.directory / "shared")
    assert list(rig.directory.iterdir()) == []
    assert rig.keys.read(rig.put(rig.directory / "shared", _key(7), _key(8)))
    assert rig.keys.keys == (_key(7), _key(8))
    assert rig.keys.path == rig.directory / "shared"


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (b"", 0o600),
        (b"nonsense\n", 0o600),
        (b"\xff\n", 0o600),
        (render_token_keys([_key(1)]).encode(), 0o644),
    ],
)
def test_what_cannot_be_used_leaves_what_is_in_force(rig: Rig, data: bytes, mode: int) -> None:
    rig.keys.read(None)
    path = rig.directory / "token-keys"
    path.write_bytes(data)
    path.chmod(mode)
    with pytest.raises(SecretUnreadable) as refused:
        rig.keys.read(None)
    assert "nonsense" not in str(refused.value)
    with pytest.raises(SecretUnreadable):
        rig.keys.rotate()
    assert rig.keys.keys == (_key(1),)
    assert path.read_bytes() == data


def test_rotation_puts_a_fresh_key_first_and_keeps_the_two_that_the_file_has(rig: Rig) -> None:
    rig.keys.read(None)
    rig.put(rig.directory / "token-keys", _key(9), _key(1))
    for number, kept in ((2, (9, 1)), (3, (2, 9))):
        assert rig.keys.rotate() == _key(number)
        assert rig.keys.keys == rig.on_disk() == (_key(number), *map(_key, kept))


def test_rotation_that_cannot_be_written_changes_nothing(rig: Rig) -> None:
    rig.keys.read(None)
    with full_disk(), pytest.raises(HostRefused):
        rig.keys.rotate()
    assert rig.keys.keys == rig.on_disk() == (_key(1),)


def test_no_key_is_in_what_python_prints_of_them(rig: Rig) -> None:
    rig.keys.read(None)
    assert _key(1).text not in repr(rig.keys)
    assert repr(_key(1).secret) not in repr(rig.keys)


@dataclass
class Workers:
    """Stands for `RecordApplier`: what workers were told, and how often they will not listen."""

    deaf: int = 0
    told: list[Mapping[str, str]] = field(default_factory=list)

    async def apply_table(self, path: Path, entries: Mapping[str, str], *, secret: bool) -> None:
        write_table(path, entries, secret=secret)
        if self.deaf:
            self.deaf -= 1
            raise RuntimeUnavailable("HAProxy does not answer", hint="wait")
        self.told.append(entries)


@contextlib.asynccontextmanager
async def _running(rig: Rig, workers: Workers) -> AsyncIterator[None]:
    task = asyncio.create_task(rig.keys.run(cast("RecordApplier", workers)))
    try:
        async with asyncio.timeout(30):
            yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_workers_are_told_at_the_start_and_of_each_change(rig: Rig) -> None:
    rig.keys.read(None)
    workers = Workers()
    async with _running(rig, workers):
        await rig.keys.confirmed()
        rig.keys.rotate()
        rig.keys.send()
        await rig.keys.confirmed()
        # Nothing has changed.
        rig.keys.read(None)
        await rig.keys.confirmed()
        rig.keys.read(rig.put(rig.directory / "shared", _key(7)))
        await rig.keys.confirmed()
    wanted = [(_key(1),), (_key(2), _key(1)), (_key(7),)]
    assert workers.told == [render_key_map(keys) for keys in wanted]
    map_file = rig.directory / "token-keys.map"
    assert _key(7).text in map_file.read_text()
    for path in (map_file, rig.directory / "token-keys"):
        assert path.stat().st_mode & 0o777 == 0o600


async def _failure(rig: Rig) -> str:
    while rig.keys.failure is None:
        await asyncio.sleep(0.01)
    return rig.keys.failure.reason


async def test_workers_that_do_not_listen_are_told_again_and_it_is_said_meanwhile(rig: Rig) -> None:
    rig.keys.read(None)
    workers = Workers(deaf=2)
    async with _running(rig, workers):
        assert await _failure(rig) == "HAProxy does not answer"
        rig.keys.rotate()
        rig.keys.send()
        await rig.keys.confirmed()
    assert rig.keys.failure is None
    assert workers.told == [render_key_map([_key(2), _key(1)])]
