"""The source `libvirt`: domains and networks of one libvirt daemon, told by its events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, assert_never

from imdsproxy.core.observation import Observation
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.sources.libvirt_api import (
    ConnectionLost,
    DomainChanged,
    LibvirtClient,
    NetworksChanged,
    News,
)
from imdsproxy.sources.libvirt_known import Changes, LibvirtKnown, Selection

if TYPE_CHECKING:
    from imdsproxy.core.model import InstanceId
    from imdsproxy.sources.api import Origin, Publish

__all__ = ["LibvirtPace", "LibvirtSource"]


@dataclass(frozen=True, slots=True)
class LibvirtPace:
    """How often, in seconds.

    Attributes:
        reread_s: Networks are read again though nobody told of a change: of a static host that is added to a
            running network (`virsh net-update`) libvirt tells nothing.
        first_retry_s: After which a lost connection is made anew; each further wait is twice as long.
        last_retry_s: The longest of them.
    """

    reread_s: float = 30.0
    first_retry_s: float = 0.5
    last_retry_s: float = 30.0


class LibvirtSource:
    """Domains as instances, networks as networks.

    While libvirt does not answer the source is out of sync, and what it told stays: guests go on running without
    libvirtd, and ask for their documents.

    Args:
        client: Libvirt; connected here, again and again.
        selection: What of all that libvirt has is told.
        pace: How often.
        name: The source's name.
    """

    def __init__(
        self,
        client: LibvirtClient,
        *,
        selection: Selection | None = None,
        pace: LibvirtPace | None = None,
        name: str = "libvirt",
    ) -> None:
        self._client = client
        self._selection = selection or Selection()
        self._pace = pace or LibvirtPace()
        self._name = name
        self._known: LibvirtKnown | None = None

    @property
    def name(self) -> str:
        """The source's name."""
        return self._name

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:  # noqa: ARG002 - the interface
        """The domain that the port is of."""
        return None if self._known is None else self._known.origin_of_port(instance)

    async def run(self, publish: Publish) -> None:
        """Report until cancelled."""
        known = LibvirtKnown(self._selection)
        self._known = known
        teller = _Teller(self._name, known, publish)
        wait_s = self._pace.first_retry_s
        while True:
            try:
                heard = _Heard()
                await self._client.connect(heard.tell)
                teller.tell(await _read_all(self._client, known), in_sync=True)
                wait_s = self._pace.first_retry_s
                await self._follow(heard, known, teller)
            except SourceUnavailable as error:
                teller.tell(None, in_sync=False, failure=_failure(error))
            finally:
                await self._client.close()
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, self._pace.last_retry_s)

    async def _follow(self, heard: _Heard, known: LibvirtKnown, teller: _Teller) -> None:
        """Tell what happens, until the connection is lost (`SourceUnavailable`)."""
        while True:
            # Whatever happens to a domain, its network's static hosts may have changed just before.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.anything.wait(), self._pace.reread_s)
            changed = heard.take()
            domains = {uuid: await self._client.domain(uuid) for uuid in changed}
            teller.tell(known.update(domains, await self._client.networks()), in_sync=True)


async def _read_all(client: LibvirtClient, known: LibvirtKnown) -> Changes:
    return known.update(await client.domains(), await client.networks(), everything=True)


def _failure(error: SourceUnavailable) -> Problem:
    return Problem("libvirt", error.message, error.hint)


@dataclass(slots=True)
class _Heard:
    """What was told since it was last asked; many events of one domain are one."""

    anything: asyncio.Event = field(default_factory=asyncio.Event)
    _domains: dict[str, None] = field(default_factory=dict)
    _lost: ConnectionLost | None = None

    def tell(self, news: News) -> None:
        match news:
            case DomainChanged(uuid):
                self._domains[uuid] = None
            case NetworksChanged():
                pass  # they are read again anyway
            case ConnectionLost():
                self._lost = news
            case _:
                assert_never(news)
        self.anything.set()

    def take(self) -> Iterable[str]:
        """The domains that changed.

        Raises:
            SourceUnavailable: The connection is lost.
        """
        if self._lost is not None:
            raise SourceUnavailable(self._lost.reason)
        self.anything.clear()
        changed, self._domains = self._domains, {}
        return changed


_NOTHING: Final = Changes({}, {})


class _Teller:
    """Publishes what differs from what was published."""

    def __init__(self, name: str, known: LibvirtKnown, publish: Publish) -> None:
        self._name = name
        self._known = known
        self._publish = publish
        self._told: object = None
        self._complete = False

    def tell(
        self, changes: Changes | None, *, in_sync: bool, failure: Problem | None = None
    ) -> None:
        changes = changes or _NOTHING
        problems = (*(() if failure is None else (failure,)), *self._known.problems)
        now = (in_sync, problems, self._known.implied)
        full = in_sync and not self._complete
        if not (full or changes.networks or changes.instances) and now == self._told:
            return
        self._told = now
        self._complete = self._complete or full
        networks = self._known.networks if full else changes.networks
        instances = self._known.instances if full else changes.instances
        self._publish(
            Observation(
                self._name,
                full=full,
                networks={key: value for key, value in networks.items() if value},
                instances={key: value for key, value in instances.items() if value},
                networks_removed=[key for key, value in networks.items() if not value],
                instances_removed=[key for key, value in instances.items() if not value],
                in_sync=in_sync,
                problems=problems,
                implied_networks=self._known.implied,
                defers=True,
            )
        )
