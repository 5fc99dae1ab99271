from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping

import pytest

from imdsproxy.core.timing import Backoff
from imdsproxy.errors import SourceUnavailable
from imdsproxy.sources.libvirt.client import LibvirtClient, LibvirtEvents, SystemLibvirt
from imdsproxy.sources.libvirt.records import NetworkXml
from imdsproxy.sources.libvirt.source import LibvirtSource
from imdsproxy.sources.settings import LibvirtSourceSettings
from support.libvirt_backing import domain_xml, uuid_of
from support.source_runs import running

NEVER = LibvirtSourceSettings(reread_s=3600)
NETWORK = "<network><name>n1</name><uuid>u</uuid><bridge name='br1'/></network>"


def _source(client: LibvirtClient, settings: LibvirtSourceSettings = NEVER) -> LibvirtSource:
    return LibvirtSource(client, settings, backoff=Backoff(0.001, 0.002))


class FakeLibvirt:
    def __init__(self, **domains: str) -> None:
        self.xml = {uuid_of(name): text for name, text in domains.items()}
        self.network = NetworkXml(NETWORK, active=True)
        self.failure: str | None = None
        self.connections = 0
        self.open = False
        self.read = 0
        self.events = LibvirtEvents()

    async def connect(self, events: LibvirtEvents) -> None:
        self.connections += 1
        self._check()
        self.open = True
        self.events = events

    async def domains(self) -> Mapping[str, str]:
        self._check()
        return dict(self.xml)

    async def domain(self, uuid: str) -> str | None:
        self._check()
        return self.xml.get(uuid)

    async def networks(self) -> tuple[NetworkXml, ...]:
        self._check()
        self.read += 1
        return (self.network,)

    async def close(self) -> None:
        self.open = False

    def lose(self, reason: str) -> None:
        self.failure = reason
        self.events.lose(reason)

    def _check(self) -> None:
        if self.failure is not None:
            raise SourceUnavailable(self.failure)


def a_domain(mac: str = "52:54:00:00:00:05", name: str = "a") -> str:
    return domain_xml(name, [("network=n1", mac)])


async def test_after_a_connection_is_made_anew_only_what_changed_meanwhile_is_reported() -> None:
    libvirt = FakeLibvirt(a=a_domain(), b=a_domain("52:54:00:00:00:06", "b"))
    async with running(_source(libvirt)) as heard:
        libvirt.lose("gone")
        await heard.until(lambda each: not each.last.in_sync)
        assert set(heard.inventory.instances) == {uuid_of("a"), uuid_of("b")}
        libvirt.xml[uuid_of("c")] = a_domain("52:54:00:00:00:07", "c")
        del libvirt.xml[uuid_of("b")]
        libvirt.failure = None
        await heard.until(lambda each: each.last.in_sync)
        assert [each.full for each in heard.observations] == [True, False, False]
        assert set(heard.last.instances) == {uuid_of("c")}
        assert set(heard.last.instances_removed) == {uuid_of("b")}
        assert not heard.last.problems
        assert libvirt.open
    assert not libvirt.open


async def test_a_failure_that_goes_on_is_reported_once() -> None:
    libvirt = FakeLibvirt()
    libvirt.failure = "no such file"
    async with running(_source(libvirt)) as heard:
        async with asyncio.timeout(30):
            while libvirt.connections < 5:
                await asyncio.sleep(0.001)
        assert len(heard.observations) == 1
        assert not heard.last.in_sync
        libvirt.failure = None
        await heard.until(lambda each: each.last.in_sync)
        assert heard.last.full


async def test_without_libvirts_module_the_hint_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    async with running(_source(SystemLibvirt("qemu:///system"))) as heard:
        (problem,) = heard.last.problems
        assert not heard.last.in_sync
        assert "Python module" in problem.reason
        assert "apt install python3-libvirt" in problem.hint
