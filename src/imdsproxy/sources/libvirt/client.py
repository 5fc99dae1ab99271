"""A client of a libvirt daemon by libvirt's own Python module: the only module that imports it.

It is C, installed by the distribution (Debian: python3-libvirt) or built against the library that is there
(`pip install imdsproxy[libvirt]`), and imported only when the source connects.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from imdsproxy.core.records import Refused
from imdsproxy.errors import NotFound, SourceUnavailable, optional_library
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
    """Events since they were last taken; many of one domain are one. For the event loop's thread only.

    Attributes:
        arrived: There are some.
        lost: Why no more events arrive on this connection, if so.
    """

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    lost: str | None = None
    _domains: dict[str, None] = field(default_factory=dict)

    def change(self, domain: str = "") -> None:
        """The domain of that UUID, or without one a network, was defined, started, stopped, undefined or changed."""
        if domain:
            self._domains[domain] = None
        self.arrived.set()

    def lose(self, reason: str) -> None:
        """The connection is lost."""
        self.lost = reason
        self.arrived.set()

    def take(self) -> Iterable[str]:
        """The domains that changed.

        Raises:
            SourceUnavailable: The connection is lost.
        """
        if self.lost is not None:
            raise SourceUnavailable(self.lost)
        self.arrived.clear()
        changed, self._domains = self._domains, {}
        return changed


class LibvirtClient(Protocol):
    """One connection to a libvirt daemon. Every method may raise `SourceUnavailable`."""

    async def connect(self, events: LibvirtEvents) -> None:
        """Connect; from then on events are noted in `events`."""

    async def domains(self) -> Mapping[str, Domain | Refused]:
        """Every domain by its UUID: as it runs where it is active."""

    async def domain(self, uuid: str) -> Domain | Refused | None:
        """A domain; `None` when there is no such."""

    async def networks(self) -> tuple[LibvirtNetwork | Refused, ...]:
        """Every network."""

    async def close(self) -> None:
        """Disconnect; no more events. Never raises, and can be called twice."""


def import_library() -> _Library:
    """The module `libvirt`.

    Raises:
        LibraryMissing: It is not installed, or not for this Python.
    """
    with optional_library(
        "libvirt's Python module",
        "apt install python3-libvirt, or pip install 'imdsproxy[libvirt]'",
    ):
        return importlib.import_module("libvirt")


class CallThread:
    """Runs blocking calls one after the other, off the event loop's thread.

    It is a daemon thread, not one of a pool: a call to a libvirtd that hangs never returns, and Python would wait for
    a pool's threads at its end.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._jobs = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="imdsproxy-libvirt", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still runs, or hangs in a call."""
        return self._thread.is_alive()

    def call(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """The result of `work`, or what it raises; begun in the order of the calls."""
        done: concurrent.futures.Future[_T] = concurrent.futures.Future()
        # From here on cancelling does not take it back.
        done.set_running_or_notify_cancel()
        self._jobs.put((done, work))
        return asyncio.wrap_future(done)

    def end(self) -> None:
        """End after the calls so far; does not wait."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            done, work = job
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001 - the caller gets it
                done.set_exception(error)


@cache
def run_events(library: _Library) -> None:
    """Run libvirt's event loop, of which a process has one: from before the first connection to the process's end."""
    library.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            library.virEventRunDefaultImpl()

    threading.Thread(target=run, name="imdsproxy-libvirt-events", daemon=True).start()


class SystemLibvirt:
    """Connections to the daemon at `uri`, one at a time, read-only.

    Read-only is enough for the XML without passwords and for events, and cannot change or stop a guest.

    Args:
        uri: As `virsh -c` takes it.
        connect_s: Seconds after which a daemon that accepts a connection and does not answer counts as hung.
    """

    def __init__(self, uri: str, *, connect_s: float = 10.0) -> None:
        self._uri = uri
        self._connect_s = connect_s
        self._thread: CallThread | None = None
        self._library: _Library = None
        self._connection: _Connection = None
        self._undo = contextlib.ExitStack()

    async def connect(self, events: LibvirtEvents) -> None:
        """Connect; see `LibvirtClient`."""
        if self._thread is not None and self._thread.alive:
            raise SourceUnavailable(f"{self._uri} does not answer")
        self._thread = CallThread()
        loop = asyncio.get_running_loop()

        def note(event: Callable[[str], None], about: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event, about)

        opening = self._call(
            lambda: self._open(partial(note, events.change), partial(note, events.lose))
        )
        try:
            await asyncio.wait_for(opening, self._connect_s)
        except TimeoutError as error:
            raise SourceUnavailable(
                f"{self._uri} does not answer within {self._connect_s:g} s"
            ) from error

    async def domains(self) -> Mapping[str, Domain | Refused]:
        """Every domain by its UUID."""

        def read() -> dict[str, Domain | Refused]:
            found = self._connection.listAllDomains()
            texts = ((each.UUIDString(), self._xml(each)) for each in found)
            return {uuid: parse_domain(text) for uuid, text in texts if text is not None}

        return await self._call(read)

    async def domain(self, uuid: str) -> Domain | Refused | None:
        """A domain; `None` when there is no such."""

        def read() -> Domain | Refused | None:
            found = self._present(lambda: self._connection.lookupByUUIDString(uuid))
            text = None if found is None else self._xml(found)
            return None if text is None else parse_domain(text)

        return await self._call(read)

    async def networks(self) -> tuple[LibvirtNetwork | Refused, ...]:
        """Every network."""

        def read() -> tuple[LibvirtNetwork | Refused, ...]:
            found = self._connection.listAllNetworks()
            texts = ((self._xml(each), bool(each.isActive())) for each in found)
            return tuple(
                parse_libvirt_network(text, active=active)
                for text, active in texts
                if text is not None
            )

        return await self._call(read)

    async def close(self) -> None:
        """Disconnect. A daemon that hangs keeps its thread, and no new connection is made until that is over."""
        thread = self._thread
        if thread is None:
            return
        closing = thread.call(self._close)
        thread.end()
        done, _pending = await asyncio.wait((closing,), timeout=_CLOSE_S)
        if done:
            self._thread = None

    async def _call(self, work: Callable[[], _T]) -> _T:
        if self._thread is None:
            raise SourceUnavailable(f"{self._uri} is not connected")
        try:
            return await self._thread.call(work)
        except Exception as error:
            # Its exception's class is known only where the module is.
            if self._library is None or not isinstance(error, self._library.libvirtError):
                raise
            hint = f"`virsh -r -c {self._uri} list` asks the same; sources.libvirt.uri says where"
            connected = self._connection is not None
            raise SourceUnavailable(
                f"{self._uri}: {error}", hint="" if connected else hint
            ) from error

    # In the thread

    def _open(self, change: Callable[[str], None], lose: Callable[[str], None]) -> None:
        library = import_library()
        self._library = library
        # Without one of ours it writes every error to standard error.
        library.registerErrorHandler(lambda *_: None, None)
        run_events(library)
        self._connection = connection = library.openReadOnly(self._uri)
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
                None,
                event,
                lambda _connection, domain, *_: change(domain.UUIDString()),
                None,
            )
            self._undo.callback(connection.domainEventDeregisterAny, number)
        number = connection.networkEventRegisterAny(
            None,
            library.VIR_NETWORK_EVENT_ID_LIFECYCLE,
            lambda *_: change(""),
            None,
        )
        self._undo.callback(connection.networkEventDeregisterAny, number)
        # So that calls to a daemon that hangs end with an error.
        connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_MISSED)

    def _close(self) -> None:
        if self._connection is None:
            return
        self._connection = None
        # Each callback references the connection: with one left it would never be closed. Where the daemon is gone,
        # what only it could do fails; the rest is done.
        with contextlib.suppress(self._library.libvirtError):
            self._undo.close()

    def _xml(self, described: Any) -> str | None:  # noqa: ANN401 - libvirt has no types
        return self._present(lambda: str(described.XMLDesc(0)))

    def _present(self, ask: Callable[[], _T]) -> _T | None:
        """The answer, or `None` where the domain or network went meanwhile."""
        try:
            return ask()
        except self._library.libvirtError as error:
            gone = (self._library.VIR_ERR_NO_DOMAIN, self._library.VIR_ERR_NO_NETWORK)
            if error.get_error_code() in gone:
                return None
            raise


def read_domain(uri: str, name: str) -> tuple[Domain, Mapping[str, LibvirtNetwork]]:
    """A domain by its name or UUID, and every network by its name; blocks.

    Raises:
        SourceUnavailable: The daemon, or libvirt's Python module, cannot be used.
        NotFound: There is no such domain.
    """

    async def read() -> tuple[Mapping[str, Domain | Refused], Mapping[str, LibvirtNetwork]]:
        client = SystemLibvirt(uri)
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
