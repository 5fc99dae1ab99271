from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.errors import HostRefused
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from support.hostlab import HostLab, create_namespace

pytestmark = pytest.mark.root


@pytest.fixture
def thread() -> Iterator[NamespaceThread]:
    made = NamespaceThread(NamespaceDirectory())
    yield made
    made.close()


def _inode(path: str) -> int:
    return Path(path).stat().st_ino


@pytest.mark.parametrize("half_made", [False, True])
async def test_a_namespace_is_made_as_by_ip_netns_even_of_what_a_killed_maker_left(
    lab: HostLab, thread: NamespaceThread, *, half_made: bool
) -> None:
    name, directory = lab.own_namespace("blue"), thread.directory
    if half_made:
        await thread.run(directory.prepare)
        (directory.path / name).touch()
        assert directory.identity(name) is None
        assert name in directory.names()
        assert name not in directory.namespaces()

    ref = await create_namespace(thread, name)

    assert directory.identity(name) == ref
    assert name in lab.ip("netns", "list")
    inode = lab.ip("netns", "exec", name, "/usr/bin/stat", "-Lc", "%i", "/proc/self/ns/net")
    assert inode == f"{ref.inode}\n"
    assert directory.delete(name)
    assert name not in lab.ip("netns", "list")
    assert directory.identity(name) is None
    assert not directory.delete(name)


async def test_work_inside_sees_the_namespace_and_the_thread_comes_home_even_when_it_fails(
    lab: HostLab, thread: NamespaceThread
) -> None:
    name = lab.namespace("blue")
    outside = _inode("/proc/self/ns/net")

    def look(name: str | None) -> tuple[NamespaceRef | None, int]:
        with thread.inside(name) as ref:
            return ref, _inode("/proc/thread-self/ns/net")

    def fail() -> None:
        with thread.inside(name) as ref:
            raise ValueError(ref)

    ref, inode = await thread.run(lambda: look(name))
    assert ref == NamespaceRef(name, inode)
    assert inode != outside
    with pytest.raises(ValueError, match=name):
        await thread.run(fail)
    assert await thread.run(lambda: look(None)) == (None, outside)
    assert _inode("/proc/self/ns/net") == outside


async def test_a_directory_of_ones_own_is_made_shared_so_that_others_see_its_namespaces(
    tmp_path: Path,
) -> None:
    place = tmp_path / "netns"
    thread = NamespaceThread(NamespaceDirectory(place))
    try:
        await create_namespace(thread, "first")
        # Somebody in a mount namespace of his own, as every unit with a private /tmp is.
        other = subprocess.Popen(  # noqa: ASYNC220 - it ends when its input does
            ("/usr/bin/unshare", "--mount", "--propagation", "slave", "/bin/cat"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"up\n")
        other.stdin.flush()
        await asyncio.to_thread(other.stdout.readline)

        second = await create_namespace(thread, "second")

        assert _inode(f"/proc/{other.pid}/root{place}/second") == second.inode
        other.communicate()
    finally:
        for name in ("first", "second"):
            thread.directory.delete(name)
        thread.close()
        subprocess.run(("/usr/bin/umount", str(place)), check=True)  # noqa: ASYNC221 - short


@pytest.mark.parametrize("name", ["../../proc/1/ns/net", "/proc/1/ns/net", "..", "", "a\0b"])
def test_a_name_that_leads_out_of_the_directory_is_refused(name: str) -> None:
    directory = NamespaceDirectory()
    for work in (directory.identity, directory.open, directory.delete):
        with pytest.raises(HostRefused, match="not the name"):
            work(name)


async def test_who_looks_at_many_namespaces_does_not_hold_up_the_end() -> None:
    thread = NamespaceThread(NamespaceDirectory())
    ending = threading.Event()

    def look() -> None:
        assert ending.wait(30)
        with thread.inside(None):
            pass

    looking = asyncio.create_task(thread.run(look))
    closing = asyncio.create_task(asyncio.to_thread(thread.close))
    async with asyncio.timeout(30):
        while not thread._closed:
            await asyncio.sleep(0.01)
    ending.set()
    with pytest.raises(HostRefused, match="ending"):
        await looking
    await closing
    # Twice is no error.
    thread.close()
