from __future__ import annotations

import asyncio
import sys
import threading
from unittest.mock import MagicMock

import pytest

from imdsproxy.core.timing import Backoff
from imdsproxy.errors import SourceUnavailable
from imdsproxy.sources.libvirt.source import LibvirtClient, LibvirtEvents, LibvirtSource
from imdsproxy.sources.settings import LibvirtSourceSettings
from support.libvirt_backing import FakeLibvirt, domain_xml, uuid_of
from support.source_runs import running

NEVER = LibvirtSourceSettings(reread_s=3600)
NETWORK = "<network><name>n1</name><uuid>u</uuid><bridge name='br1'/></network>"


def _source(client: LibvirtClient, settings: LibvirtSourceSettings = NEVER) -> LibvirtSource:
    return LibvirtSource(client, settings, backoff=Backoff(0.001, 0.002))


def a_domain(mac: str = "52:54:00:00:00:05", name: str = "a") -> str:
    return domain_xml(name, [("network=n1", mac)])


async def test_after_a_connection_is_made_anew_only_what_changed_meanwhile_is_reported() -> None:
    libvirt = FakeLibvirt()
    libvirt.network_xml["n1"] = NETWORK
    libvirt.xml = {uuid_of("a"): a_domain(), uuid_of("b"): a_domain("52:54:00:00:00:06", "b")}
    async with running(_source(libvirt)) as heard:
        libvirt.lose("gone")
        await heard.until(lambda each: not each.last.in_sync)
        assert set(heard.inventory.instances) == {uuid_of("a"), uuid_of("b")}
        async with asyncio.timeout(30):
            while libvirt.connections < 5:
                await asyncio.sleep(0.001)
        libvirt.xml[uuid_of("c")] = a_domain("52:54:00:00:00:07", "c")
        del libvirt.xml[uuid_of("b")]
        libvirt.failure = None
        await heard.until(lambda each: each.last.in_sync)
        # A failure that goes on is reported once.
        assert [each.full for each in heard.observations] == [True, False, False]
        assert set(heard.last.instances) == {uuid_of("c")}
        assert set(heard.last.instances_removed) == {uuid_of("b")}
        assert not heard.last.problems
        assert libvirt.open
    assert not libvirt.open


async def test_without_libvirts_module_the_hint_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    async with running(_source(LibvirtClient("qemu:///system"))) as heard:
        (problem,) = heard.last.problems
        assert not heard.last.in_sync
        assert "Python module" in problem.reason
        assert "apt install python3-libvirt" in problem.hint


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """libvirt's module, whose connections are one."""
    made = MagicMock(libvirtError=type("LibvirtError", (Exception,), {}))
    made.virEventRunDefaultImpl.side_effect = threading.Event().wait
    monkeypatch.setitem(sys.modules, "libvirt", made)
    return made


async def test_a_connection_whose_end_cannot_be_watched_is_closed(library: MagicMock) -> None:
    connection = library.openReadOnly.return_value
    connection.registerCloseCallback.side_effect = library.libvirtError("not supported")
    client = LibvirtClient("test:///default")
    with pytest.raises(SourceUnavailable, match="not supported"):
        await client.connect(LibvirtEvents())
    await client.close()
    connection.close.assert_called_once()


async def test_a_connection_that_comes_too_late_is_closed_and_none_is_made_meanwhile(
    library: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, connection = threading.Event(), MagicMock()

    def open_late(_uri: str) -> MagicMock:
        answers.wait()
        return connection

    library.openReadOnly.side_effect = open_late
    monkeypatch.setattr("imdsproxy.sources.libvirt.source._CLOSE_S", 0.01)
    client = LibvirtClient("test:///default", connect_s=0.1)
    try:
        for _ in range(3):
            with pytest.raises(SourceUnavailable, match="does not answer"):
                await client.connect(LibvirtEvents())
            await client.close()
        names = [each.name for each in threading.enumerate()]
        # The call that hangs, and the closing that waits for it.
        assert names.count("imdsproxy-libvirt") == 2
        connection.close.assert_not_called()
    finally:
        answers.set()
    async with asyncio.timeout(20):
        while not connection.close.called:
            await asyncio.sleep(0.001)
