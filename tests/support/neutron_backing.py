"""The Neutron in memory as what a source reads: the suite's records, written as ports, on a clock that runs fast.

What the one in memory answers is what a genuine one does: `tests/contract/test_neutron_client.py` asks both.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import Problem
from imdsproxy.host.clock import Clock
from imdsproxy.model.entities import Instance, Network, Upstream
from imdsproxy.sources.neutron.source import NeutronSource
from support.fake_neutron import FakeNeutron, neutron_port
from support.source_runs import WholeRecords

_PROJECT: Final = "blue"
_TIMES: Final = 20


class _FastClock(Clock):
    def monotonic(self) -> float:
        return time.monotonic() * _TIMES

    def now(self) -> datetime:
        return datetime.now(UTC)


class NeutronBacking(WholeRecords):
    """Ports that are listed every second of a fast clock."""

    def __init__(self, directory: Path) -> None:
        self._neutron = FakeNeutron()
        self._kept = directory / "neutron.sqlite"

    def source(self) -> NeutronSource:
        return NeutronSource(
            self._neutron,
            self._kept,
            NeutronSourceSettings(list_every_s=1.0, refresh_s=1.0, page_size=2),
            clock=_FastClock(),
            random=lambda: 0.0,
            sleep=lambda seconds: asyncio.sleep(seconds / _TIMES),
        )

    def seen(self, instance: Instance) -> Instance:
        return Instance(
            id=instance.id,
            name=instance.id,
            hostname=instance.id,
            project=_PROJECT,
            ports=instance.ports,
            upstream=Upstream.NOVA,
        )

    async def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
    ) -> tuple[Problem, ...]:
        del networks
        for each in instances:
            (port,) = each.ports
            self._neutron.put(
                neutron_port(
                    f"port-{each.id}",
                    port.network,
                    *map(str, port.addresses),
                    device=each.id,
                    project=_PROJECT,
                    mac=port.mac,
                )
            )
        return ()

    async def remove_instance(self, instance_id: str) -> None:
        self._neutron.remove(f"port-{instance_id}")

    async def spoil(self, instance_id: str) -> str:
        name = f"port-{instance_id}"
        port = next(iter(self._neutron.ports_by_id.values()))
        port = self._neutron.ports_by_id.get(name, replace(port, id=name, addresses=(), mac=None))
        self._neutron.put(replace(port, device=f"{instance_id}|"))
        return "ports"
