"""What the source `fleet` reads: a hub with genuine streams, whose etcd is in memory."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.model.entities import Instance, InstanceId, Network
from imdsproxy.reconcile.progress import Backoff
from imdsproxy.sources.fleet.client import HubClient
from imdsproxy.sources.fleet.known import LeavingNetworks
from imdsproxy.sources.fleet.source import FleetSource
from support.fleet_hub import HOST, FleetHub
from support.source_runs import WholeRecords


def fleet_source(path: Path, *hubs: FleetHub) -> FleetSource:
    """A source that follows hubs without TLS, and does not wait long for one."""
    return source_of(path, *(hub.url for hub in hubs))


def source_of(path: Path, *urls: str) -> FleetSource:
    """As `fleet_source`, of hubs by their URLs."""

    def hubs() -> tuple[str, ...]:
        if not urls:
            raise SourceUnavailable("no hub is named")
        return urls

    return FleetSource(
        HubClient(None, 10.0),
        hubs,
        path,
        random=lambda: 0.0,
        backoff=Backoff(0.02, 0.2),
        # On a busy machine it takes longer than a host waits for it.
        fetch_s=10.0,
        leaving=LeavingNetworks(0),
    )


class FleetBacking(WholeRecords):
    """Records that are placed on the host; it has nothing on disk when a source begins."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._hub = FleetHub()
        self._sources = 0

    def close(self) -> None:
        self._hub.close()

    def source(self) -> FleetSource:
        self._sources += 1
        return fleet_source(self._directory / f"{self._sources}.sqlite", self._hub)

    async def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
    ) -> tuple[Problem, ...]:
        self._hub.put(networks, instances)
        return ()

    async def remove_network(self, network_id: str) -> None:
        self._hub.remove_network(network_id)

    async def remove_instance(self, instance_id: str) -> None:
        self._hub.remove_instance(instance_id)

    async def spoil(self, instance_id: str) -> str:
        value = {"hosts": [HOST], "record": {"id": instance_id, "name": 7}, "user_data": None}
        key = layout.instance_key(InstanceId(instance_id))
        self._hub.write({key: json.dumps(value).encode()})
        return "instances"

    async def claim_twice(self, victim: Instance, thief_id: str) -> tuple[Problem, ...]:
        return await self.put([], [replace(victim, id=InstanceId(thief_id))])
