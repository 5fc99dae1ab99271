"""A host's copy of its items: what is damaged is neither served nor a way round a limit, and what left is gone."""

from __future__ import annotations

import base64
import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.errors import SourceCorrupt
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import StoredPassword, render_password
from imdsproxy.model.tokens import TokenKey
from imdsproxy.model.tokens import instance_key as token_key_of
from imdsproxy.sources.fleet import source as source_module
from support.fleet_backing import fleet_source
from support.fleet_hub import ENVELOPE, HOST, FleetHub
from support.record_builders import instance, network
from support.source_runs import running, until

N1: Final = network("n1")
A: Final = replace(instance("a", "10.0.0.5", text="of a"), project="p")
B: Final = instance("b", "10.0.0.6")
_KEY: Final = TokenKey(b"k" * 32)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetHub]:
    """A hub that has placed both on the host, with all that can limit them."""
    monkeypatch.setattr(source_module, "_LOOK_EVERY_S", 0.05)
    made = FleetHub()
    made.put([N1], [A, B])
    made.have_token_keys(_KEY)
    limits = {
        f"{layout.POLICIES}{scope}": b"{}" for scope in ("fleet", f"host/{HOST}", "project/p")
    }
    made.write({**limits, f"{layout.OVERRIDES}a": b'{"epoch": 1, "reopened_at": 0}'})
    yield made
    made.close()


@pytest.fixture
async def kept(hub: FleetHub, tmp_path: Path) -> Path:
    """The copy of a host that has everything."""
    path = tmp_path / "fleet.sqlite"
    async with running(fleet_source(path, hub)) as heard:
        assert heard.last.in_sync
    return path


def _write(kept: Path, statement: str, *values: str | bytes) -> None:
    with contextlib.closing(sqlite3.connect(kept, isolation_level=None)) as connection:
        assert connection.execute(statement, values).rowcount == 1


async def test_user_data_that_is_damaged_on_disk_is_not_given_and_comes_again_from_a_hub(
    hub: FleetHub, kept: Path
) -> None:
    _write(kept, "UPDATE user_data SET data = ?", b"forged")
    source = fleet_source(kept)
    async with running(source) as heard:
        data = heard.inventory.instances[A.id].user_data
        assert data is not None
        with pytest.raises(SourceCorrupt, match="is damaged"):
            bytes(data)
        await heard.until(lambda each: "is damaged" in str(each.last.problems))
        source.hubs = lambda: (hub.url,)
        await heard.until(lambda each: not each.last.problems)
        assert bytes(data) == b"of a"


_VALUE: Final = """UPDATE items SET value = '{"tokens": 1}' WHERE key = ?"""
_EARLIER: Final = "UPDATE items SET revision = revision - 1 WHERE key = ?"
_NAME: Final = "UPDATE items SET key = 'override/z' WHERE key = ?"


@pytest.mark.parametrize(
    ("statement", "key", "left"),
    [
        (_VALUE, "instance/a", {"b"}),
        (_EARLIER, "instance/a", {"b"}),
        (_VALUE, "override/a", {"b"}),
        (_VALUE, "keys/a", {"b"}),
        (_VALUE, "policy/project/p", {"b"}),
        (_VALUE, "policy/fleet", set()),
        (_VALUE, f"policy/host/{HOST}", set()),
        (_NAME, "override/a", set()),
    ],
)
async def test_an_instance_is_not_taken_from_a_copy_that_is_damaged_in_its_record_or_in_what_limits_it(
    hub: FleetHub, kept: Path, statement: str, key: str, left: set[str]
) -> None:
    _write(kept, statement, key)
    source = fleet_source(kept)
    async with running(source) as heard:
        assert set(heard.inventory.instances) == left
        assert "its copy on disk is damaged" in str(heard.last.problems)
        source.hubs = lambda: (hub.url,)
        await heard.until(lambda each: each.last.in_sync and not each.last.problems)
        assert set(heard.inventory.instances) == {"a", "b"}
    # What was damaged is not there any more.
    async with running(fleet_source(kept)) as heard:
        assert set(heard.inventory.instances) == {"a", "b"}
        assert "damaged" not in str(heard.last.problems)


async def test_a_copy_whose_revision_is_damaged_is_not_used(hub: FleetHub, kept: Path) -> None:
    _write(kept, "UPDATE position SET revision = 1")
    async with running(fleet_source(kept, hub)) as heard:
        assert not heard.inventory.instances
        assert "move the file aside" in str(heard.last.problems)


def _holds(kept: Path, *secrets: bytes) -> list[bytes]:
    content = b"".join(path.read_bytes() for path in kept.parent.glob(f"{kept.name}*"))
    return [one for one in secrets if one in content]


async def test_the_files_hold_nothing_of_an_instance_that_left(hub: FleetHub, kept: Path) -> None:
    large, small = b"large-user-data." * 20_000, b"small-user-data"
    own = token_key_of(_KEY, "a").text.encode()
    source = fleet_source(kept, hub)
    async with running(source) as heard:
        for data in (large, small):
            hub.put([], [replace(A, user_data=data, hostname="name-of-a")])
            await heard.until(
                lambda each, data=data: each.inventory.instances[A.id].user_data == data  # type: ignore[misc]
            )
        password = base64.b64encode(b"posted-by-a")
        key = layout.password_key(A.id)
        sealed = ENVELOPE.seal(key, b"posted-by-a")
        hub.write({key: render_password(StoredPassword(sealed))})
        await until(lambda: source.known.passwords()[A.id] == b"posted-by-a")
        secrets = b"small-user-data", b"name-of-a", own, password
        await until(lambda: len(_holds(kept, *secrets)) == len(secrets))
        # What is cleared is gone, though the instance is there.
        hub.write({key: render_password(StoredPassword(None, "", 1))})
        await until(lambda: not _holds(kept, password))
        hub.remove_instance("a")
        await heard.until(lambda each: A.id not in each.inventory.instances)
        await until(lambda: not _holds(kept, b"large-user-data.", *secrets))
