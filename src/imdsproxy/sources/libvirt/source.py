"""The source `libvirt`: domains and networks of one libvirt daemon, by its events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Final

from imdsproxy.core.model import InstanceId
from imdsproxy.core.observation import Observation
from imdsproxy.core.records import Refused
from imdsproxy.core.timing import Backoff
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.sources.api import Origin, Publish, Reports
from imdsproxy.sources.libvirt.client import LibvirtClient, LibvirtEvents
from imdsproxy.sources.libvirt.records import LibvirtKnown, Selection
from imdsproxy.sources.libvirt.xml import Domain
from imdsproxy.sources.settings import LibvirtSourceSettings


class LibvirtSource:
    """Domains as instances, networks as networks.

    While libvirt does not answer, the source is out of sync, and what it reported stays: guests go on running without
    libvirtd, and read their documents.

    Args:
        client: Libvirt; connected here, again and again.
        settings: Which domains and networks are reported, and how often networks are read again without an event.
        backoff: Pauses before a lost connection is made anew.
    """

    name: Final = "libvirt"

    def __init__(
        self,
        client: LibvirtClient,
        settings: LibvirtSourceSettings,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self._client = client
        self._reread_s = settings.reread_s
        self._backoff = backoff or Backoff(first_s=0.5, longest_s=30.0)
        networks = None if settings.networks is None else frozenset(settings.networks)
        self._known = LibvirtKnown(Selection(networks, settings.domains == "marked"))
        self._reports = Reports(self.name, defers=True)

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:  # noqa: ARG002 - the interface
        """The domain that the port is of."""
        place = self._known.place_of(instance)
        return None if place is None else Origin("instance.ports", place)

    async def run(self, publish: Publish) -> None:
        """Report until cancelled."""
        while True:
            try:
                await self._follow(publish)
            except SourceUnavailable as error:
                failure = Problem("libvirt", error.message, error.hint)
                self._report(publish, Observation(), failure)
            finally:
                await self._client.close()
            await asyncio.sleep(self._backoff.fail())

    async def _follow(self, publish: Publish) -> None:
        """Report everything and then changes, until the connection is lost (`SourceUnavailable`)."""
        events = LibvirtEvents()
        await self._client.connect(events)
        domains: Mapping[str, Domain | Refused | None] = await self._client.domains()
        everything = True
        while True:
            # Whatever happened to a domain, its network's static hosts may have changed just before.
            networks = await self._client.networks()
            self._report(publish, self._known.update(domains, networks, everything=everything))
            self._backoff.succeed()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(events.arrived.wait(), self._reread_s)
            domains = {uuid: await self._client.domain(uuid) for uuid in events.take()}
            everything = False

    def _report(
        self, publish: Publish, changes: Observation, failure: Problem | None = None
    ) -> None:
        observation = self._reports.next(
            changes,
            lambda: self._known.records,
            in_sync=failure is None,
            problems=(*(() if failure is None else (failure,)), *self._known.problems),
            implied=self._known.implied,
        )
        if observation is not None:
            publish(observation)
