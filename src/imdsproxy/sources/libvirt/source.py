"""The source `libvirt`: domains and networks of one libvirt daemon, by its events.

Only this module imports libvirt's own Python module, when the source connects. That module is written in C, installed
by the distribution (Debian: python3-libvirt) or built against the installed library (`pip install imdsproxy[libvirt]`).
"""

import asyncio
import contextlib
import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

from imdsproxy.config.sources import LibvirtSourceSettings
from imdsproxy.errors import NotFound, Problem, SourceUnavailable, optional_library
from imdsproxy.host.process import start_thread
from imdsproxy.model.observation import Observation, StrandedPort
from imdsproxy.model.records import Refused
from imdsproxy.reconcile.reconciler import Reconciler
from imdsproxy.sources.api import Publish, Reports
from imdsproxy.sources.libvirt.records import LibvirtKnown
from imdsproxy.sources.libvirt.xml import (
    Domain,
    LibvirtNetwork,
    parse_domain,
    parse_libvirt_network,
)

_T = TypeVar("_T")
_Library: TypeAlias = Any
_Connection: TypeAlias = Any

_CLOSE_S: Final = 2.0
_KEEPALIVE_S: Final = 5
_KEEPALIVE_MISSED: Final = 3


@dataclass(slots=True)
class LibvirtEvents:
    """Events since the last `take`; events of the same domain are merged. For the event loop's thread only.

    Attributes:
        lost: Reason why the connection is lost; `None` while it works.
    """

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    lost: str | None = None
    _domains: dict[str, None] = field(default_factory=dict)

    def change(self, domain: str = "") -> None:
        """Note that a domain, by UUID, or a network (empty) was defined, started, stopped, undefined or changed."""
        if domain:
            self._domains[domain] = None
        self.arrived.set()

    def lose(self, reason: str) -> None:
        self.lost = reason
        self.arrived.set()

    def take(self) -> Iterable[str]:
        """Return the UUIDs of changed domains, and forget them. Raises `SourceUnavailable`: the connection is lost."""
        if self.lost is not None:
            raise SourceUnavailable(self.lost)
        self.arrived.clear()
        changed, self._domains = self._domains, {}
        return changed


def import_library() -> _Library:
    """Import the module `libvirt`. Raises `LibraryMissing`: the module is not installed, or not for this Python."""
    with optional_library(
        "libvirt's Python module",
        "apt install python3-libvirt, or pip install 'imdsproxy[libvirt]'",
    ):
        return importlib.import_module("libvirt")


@cache
def run_events(library: _Library) -> None:
    """Run libvirt's event loop, one per process, from before the first connection until the process ends."""
    library.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            library.virEventRunDefaultImpl()

    threading.Thread(target=run, name="imdsproxy-libvirt-events", daemon=True).start()


@dataclass(slots=True)
class LibvirtClient:
    """Read-only connections to the daemon at `uri`, one at a time.

    A read-only connection suffices for events and for XML without passwords, and cannot change or stop a guest.

    Calls block, and each runs in its own daemon thread. A pool is unsuitable: a call to a libvirtd that hangs never
    returns, and Python would wait for the pool's threads when it exits. Every method except `close` may raise
    `SourceUnavailable`.

    `connect_s`: seconds after which a daemon that accepts a connection but does not answer counts as hung.
    """

    uri: str
    connect_s: float = 10.0
    # The lock is held during a call, so that calls run one after another.
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _closing: asyncio.Future[None] | None = None
    _library: _Library = None
    _connection: _Connection = None
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    async def connect(self, events: LibvirtEvents) -> None:
        if self._closing is not None and not self._closing.done():
            raise SourceUnavailable(f"{self.uri} does not answer")
        loop = asyncio.get_running_loop()

        def note(event: Callable[[str], None], about: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event, about)

        opening = self._call(
            lambda: self._open(partial(note, events.change), partial(note, events.lose))
        )
        try:
            await asyncio.wait_for(opening, self.connect_s)
        except TimeoutError as error:
            raise SourceUnavailable(
                f"{self.uri} does not answer within {self.connect_s:g} s"
            ) from error

    async def domains(self) -> Mapping[str, Domain | Refused]:
        """Return all domains by UUID; for active domains, the live configuration."""

        def read() -> dict[str, Domain | Refused]:
            found = self._connection.listAllDomains()
            domains = ((each.UUIDString(), self._read(each, parse_domain)) for each in found)
            return {uuid: domain for uuid, domain in domains if domain is not None}

        return await self._call(read)

    async def domain(self, uuid: str) -> Domain | Refused | None:
        """Return the domain with this UUID; `None` if there is none."""

        def read() -> Domain | Refused | None:
            found = self._present(lambda: self._connection.lookupByUUIDString(uuid))
            return None if found is None else self._read(found, parse_domain)

        return await self._call(read)

    async def networks(self) -> tuple[LibvirtNetwork | Refused, ...]:
        def read() -> tuple[LibvirtNetwork | Refused, ...]:
            networks = (
                self._read(each, partial(parse_libvirt_network, active=bool(each.isActive())))
                for each in self._connection.listAllNetworks()
            )
            return tuple(network for network in networks if network is not None)

        return await self._call(read)

    async def close(self) -> None:
        """Disconnect and stop events. While a daemon hangs, no new connection is made.

        Never raises, and may be called twice.
        """
        if self._closing is None or self._closing.done():
            self._closing = self._in_thread(self._close)
        await asyncio.wait((self._closing,), timeout=_CLOSE_S)

    async def _call(self, work: Callable[[], _T]) -> _T:
        try:
            return await self._in_thread(work)
        except Exception as error:
            # The class of libvirt's exception is known only once the module is imported.
            if self._library is None or not isinstance(error, self._library.libvirtError):
                raise
            hint = f"`virsh -r -c {self.uri} list` makes the same request; sources.libvirt.uri has the address"
            connected = self._connection is not None
            raise SourceUnavailable(
                f"{self.uri}: {error}", hint="" if connected else hint
            ) from error

    def _in_thread(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        def in_turn() -> _T:
            with self._turn:
                return work()

        return start_thread(in_turn, "imdsproxy-libvirt")

    # In the thread

    def _open(self, change: Callable[[str], None], lose: Callable[[str], None]) -> None:
        library = import_library()
        self._library = library
        # libvirt's default handler writes every error to standard error.
        library.registerErrorHandler(lambda *_: None, None)
        run_events(library)
        self._connection = connection = library.openReadOnly(self.uri)
        self._undo.callback(connection.close)
        connection.registerCloseCallback(
            lambda _connection, reason, _opaque: lose(_why(library, reason)), None
        )
        self._undo.callback(connection.unregisterCloseCallback)
        for event in (
            library.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            library.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
            library.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            library.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
        ):
            number = connection.domainEventRegisterAny(
                None, event, lambda _connection, domain, *_: change(domain.UUIDString()), None
            )
            self._undo.callback(connection.domainEventDeregisterAny, number)
        number = connection.networkEventRegisterAny(
            None, library.VIR_NETWORK_EVENT_ID_LIFECYCLE, lambda *_: change(""), None
        )
        self._undo.callback(connection.networkEventDeregisterAny, number)
        # With keepalive, calls to a daemon that hangs end with an error.
        connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_MISSED)

    def _close(self) -> None:
        if self._connection is None:
            return
        self._connection = None
        # Each callback references the connection: a remaining callback would keep the connection open. If the daemon is
        # gone, the calls that need the daemon fail; the others succeed.
        with contextlib.suppress(self._library.libvirtError):
            self._undo.close()

    def _read(self, described: Any, parse: Callable[[str], _T]) -> _T | None:
        """Parse the XML of a domain or network; `None` if libvirt removed it meanwhile."""
        text = self._present(lambda: str(described.XMLDesc(0)))
        return None if text is None else parse(text)

    def _present(self, ask: Callable[[], _T]) -> _T | None:
        """Return the answer, or `None` if libvirt removed the domain or network meanwhile."""
        try:
            return ask()
        except self._library.libvirtError as error:
            gone = (self._library.VIR_ERR_NO_DOMAIN, self._library.VIR_ERR_NO_NETWORK)
            if error.get_error_code() in gone:
                return None
            raise


@dataclass(slots=True)
class LibvirtSource:
    """Source of libvirt's domains as instances, and its networks.

    While libvirt does not answer, the source is out of sync, and its reported records stay: guests keep running without
    libvirtd, and read their documents.
    """

    name: ClassVar = "libvirt"
    client: LibvirtClient
    settings: LibvirtSourceSettings
    connections: Reconciler = field(
        default_factory=partial(Reconciler, "libvirt", "", 0.5, 30.0, retried=SourceUnavailable)
    )
    _known: LibvirtKnown = field(init=False)
    _reports: Reports = field(default_factory=partial(Reports, name, defers=True))

    def __post_init__(self) -> None:
        selected, marked_only = self.settings.networks, self.settings.domains == "marked"
        networks = None if selected is None else frozenset(selected)
        self._known = LibvirtKnown(networks, marked_only=marked_only)

    def explain_stranded(self, port: StrandedPort) -> Problem:
        place = self._known.place_of(port.instance)
        return port.problem(field="instance.ports" if place else "", file=place)

    async def run(self, publish: Publish) -> None:
        await self.connections.attempt(partial(self._connect, publish))

    async def _connect(self, publish: Publish) -> None:
        try:
            await self._follow(publish)
        except SourceUnavailable as error:
            failure = Problem("libvirt", error.message, error.hint)
            self._report(publish, Observation(), failure)
            raise
        finally:
            await self.client.close()

    async def _follow(self, publish: Publish) -> None:
        """Report all records and then changes, until the connection is lost (`SourceUnavailable`)."""
        events = LibvirtEvents()
        await self.client.connect(events)
        domains: Mapping[str, Domain | Refused | None] = await self.client.domains()
        everything = True
        while True:
            # With any event of a domain, its network's static hosts may have changed just before.
            networks = await self.client.networks()
            self._report(publish, self._known.update(domains, networks, everything=everything))
            self.connections.succeed()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(events.arrived.wait(), self.settings.reread_s)
            domains = {uuid: await self.client.domain(uuid) for uuid in events.take()}
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


def read_domain(uri: str, name: str) -> tuple[Domain, Mapping[str, LibvirtNetwork]]:
    """Return a domain by its name or UUID, and all networks by name. Blocks.

    Raises `SourceUnavailable`: the daemon, or libvirt's Python module, cannot be used; `NotFound`: there is no such
    domain.
    """

    async def read() -> tuple[Mapping[str, Domain | Refused], Mapping[str, LibvirtNetwork]]:
        client = LibvirtClient(uri)
        try:
            await client.connect(LibvirtEvents())
            networks = await client.networks()
            named = {each.name: each for each in networks if isinstance(each, LibvirtNetwork)}
            return await client.domains(), named
        finally:
            await client.close()

    domains, networks = asyncio.run(read())
    for domain in domains.values():
        if isinstance(domain, Domain) and name in (domain.name, domain.uuid):
            return domain, networks
    hint = f"`virsh -r -c {uri} list --all --name` lists all"
    raise NotFound(f"libvirt has no domain {name}", hint=hint)


def _why(library: _Library, reason: int) -> str:
    words = {
        library.VIR_CONNECT_CLOSE_REASON_EOF: "libvirt closed the connection",
        library.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "libvirt does not answer any more",
        library.VIR_CONNECT_CLOSE_REASON_ERROR: "the connection to libvirt failed",
    }
    return words.get(reason, "the connection to libvirt is closed")
