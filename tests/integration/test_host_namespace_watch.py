from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.errors import HostRefused
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.listeners.namespace_watch import (
    NamespaceCame,
    NamespaceChange,
    NamespaceWatch,
    NamespaceWent,
)
from support.hostlab import HostLab, create_namespace
from support.patience import patience

pytestmark = pytest.mark.root


async def _next(watch: NamespaceWatch, *names: str, within_s: float = 1.0) -> NamespaceChange:
    """The next change of these names (others on this host come and go too)."""
    async with asyncio.timeout(within_s * patience()):
        async for change in watch:
            if change.ref.name in names:
                return change
    raise AssertionError("the watch ended")


async def test_a_namespace_that_comes_late_is_told_of_when_it_can_be_entered(
    lab: HostLab,
) -> None:
    thread = NamespaceThread(NamespaceDirectory())
    async with NamespaceWatch(thread.directory) as watch:
        name = await asyncio.to_thread(lab.namespace, "blue")
        change = await _next(watch, name)
        assert isinstance(change, NamespaceCame)
        assert await thread.inside(name, lambda ref: ref) == change.ref
    thread.close()


async def test_a_namespace_made_again_under_its_name_goes_and_comes(lab: HostLab) -> None:
    name = lab.namespace("blue")
    # Held, so that its inode is not used again at once.
    held = NamespaceDirectory().open(name)
    assert held is not None
    async with NamespaceWatch(NamespaceDirectory()) as watch:

        def again() -> None:
            lab.delete_namespace(name)
            lab.namespace("blue")

        await asyncio.to_thread(again)
        assert await _next(watch, name) == NamespaceWent(held.ref)
        came = await _next(watch, name)
        assert isinstance(came, NamespaceCame)
        assert came.ref.inode != held.ref.inode
        assert watch.current[name] == came.ref
    held.close()


async def test_a_name_that_was_removed_and_leads_to_the_same_inode_again_is_told_of_too(
    lab: HostLab,
) -> None:
    # The kernel uses the inode of a namespace again once that has ended. Here it is the same one.
    name = lab.namespace("blue")
    inside = lab.serve(name, "127.0.0.1")
    async with NamespaceWatch(NamespaceDirectory()) as watch:
        ref = watch.current[name]
        # The loop sees nothing meanwhile, and all of it afterwards.
        lab.delete_namespace(name)
        place = NamespaceDirectory().path / name
        place.touch()
        lab.run("/usr/bin/mount", "--bind", f"/proc/{inside.pid}/ns/net", str(place))
        assert await _next(watch, name) == NamespaceWent(ref)
        assert await _next(watch, name) == NamespaceCame(ref)


async def test_a_hundred_at_once_are_all_told_of_within_a_second(lab: HostLab) -> None:
    thread = NamespaceThread(NamespaceDirectory())
    names = {lab.own_namespace(str(number)) for number in range(100)}
    async with NamespaceWatch(thread.directory) as watch:
        made = [await create_namespace(thread, name) for name in sorted(names)]
        came: set[NamespaceRef] = set()
        async with asyncio.timeout(1 * patience()):
            while len(came) < len(made):
                came.add((await _next(watch, *names)).ref)
    assert came == set(made)
    thread.close()


async def test_a_directory_that_comes_late_and_goes_and_comes_again_is_followed(
    tmp_path: Path,
) -> None:
    place = tmp_path / "deep" / "netns"
    thread = NamespaceThread(NamespaceDirectory(place))
    async with NamespaceWatch(thread.directory) as watch:
        assert watch.current == {}
        for _ in range(2):
            ref = await create_namespace(thread, "blue")
            assert await _next(watch, "blue") == NamespaceCame(ref)
            thread.directory.delete("blue")
            assert await _next(watch, "blue") == NamespaceWent(ref)
            subprocess.run(("/usr/bin/umount", str(place)), check=True)  # noqa: ASYNC221 - short
            place.rmdir()
            place.parent.rmdir()
    thread.close()


async def test_a_namespace_unmounted_from_a_name_that_stays_has_gone(lab: HostLab) -> None:
    name = lab.namespace("blue")
    async with NamespaceWatch(NamespaceDirectory()) as watch:
        ref = watch.current[name]
        await asyncio.to_thread(lab.run, "/usr/bin/umount", f"/run/netns/{name}")
        assert await _next(watch, name) == NamespaceWent(ref)
        assert (NamespaceDirectory().path / name).exists()


async def test_a_namespace_mounted_upon_a_name_that_was_empty_has_come(lab: HostLab) -> None:
    name = lab.namespace("blue")
    await asyncio.to_thread(lab.run, "/usr/bin/umount", f"/run/netns/{name}")
    async with NamespaceWatch(NamespaceDirectory()) as watch:
        assert name not in watch.current
        mount = ("/usr/bin/mount", "--bind", "/proc/self/ns/net", f"/run/netns/{name}")
        await asyncio.to_thread(lab.run, "/usr/bin/unshare", "--net", *mount)
        assert isinstance(await _next(watch, name), NamespaceCame)


async def test_a_watch_that_cannot_look_says_so_instead_of_falling_silent(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = NamespaceDirectory()

    def refuse(name: str) -> NamespaceRef | None:
        raise HostRefused(f"cannot look at namespace {name}")

    async with NamespaceWatch(directory) as watch:
        monkeypatch.setattr(directory, "identity", refuse)
        name = await asyncio.to_thread(lab.namespace, "blue")
        with pytest.raises(HostRefused, match="cannot look at"):
            await _next(watch, name)


async def test_events_that_were_lost_are_made_up_for_by_a_look_at_the_directory(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with NamespaceWatch(NamespaceDirectory()) as watch:
        # inotify says IN_Q_OVERFLOW with no watch and no name, in place of everything it dropped.
        monkeypatch.setattr(watch._inotify, "read", lambda: iter([(-1, 0x4000, "")]))
        name = await asyncio.to_thread(lab.namespace, "blue")
        assert isinstance(await _next(watch, name), NamespaceCame)
