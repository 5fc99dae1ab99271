"""Keeper of our tables in the namespaces of Neutron's routers (`network.listeners.rules`)."""

import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nftables import INET, Batch, NetfilterSocket, ensure_table
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model.wire import REDIRECTED_PORT
from imdsproxy.network.anti_spoofing.kernel import KernelTables, TableGone
from imdsproxy.network.endpoints import Endpoint
from imdsproxy.network.listeners import rules
from imdsproxy.sources.neutron_namespaces.records import router_of

_log: Final = structlog.get_logger()


class _RouterTables(KernelTables):
    family = INET
    family_name = "inet"
    hint = "nf_tables with family inet and NAT is needed; guests behind this router get no answer until then"


@dataclass(slots=True)
class Routers:
    """Both tables of each router.

    Args:
        directory: Directory of the namespaces.
        prefix: Prefix of the tables' names.
        enabled: Whether a source reports routers, so that tables of an earlier process may stay.

    Attributes:
        problems: Tables that the kernel refuses, by namespace.
    """

    directory: NamespaceDirectory
    prefix: str
    enabled: bool
    problems: dict[str, Problem] = field(default_factory=dict)
    _known: frozenset[NamespaceRef] = frozenset()
    _dropping: frozenset[NamespaceRef] = frozenset()
    _redirected: frozenset[NamespaceRef] = frozenset()

    @property
    def tables(self) -> tuple[str, str]:
        """Names of the two tables: the dropping, then the redirecting one."""
        return f"{self.prefix}-drop", f"{self.prefix}-redirect"

    async def drop_others(self, routers: Collection[NamespaceRef]) -> None:
        """Add the dropping table to new namespaces, so that no request leaves them."""
        come = frozenset(routers)
        self._dropping -= come
        self._redirected -= come
        self._known |= come
        await self._close_known()

    async def withdraw(self, endpoints: Iterable[Endpoint]) -> None:
        """Stop redirecting where HAProxy is about to stop listening.

        Raises:
            HostRefused: The kernel refuses.
        """
        gone = self._redirected - _places(endpoints)
        self._redirected -= gone
        await self._remove([(ref.name, self.tables[1]) for ref in gone if self._is_there(ref)])

    async def redirect(self, endpoints: Iterable[Endpoint]) -> None:
        """Redirect requests where HAProxy listens now."""
        places, self.problems = _places(endpoints), {}
        self._known |= places
        await self._close_known()
        missing = places - self._redirected
        self._redirected |= await self._ensure(missing, self.tables[1], rules.fill_redirect)

    async def lost(self, table: str | None) -> None:
        """Recreate our tables after a table of this name (`None`: any) was removed, perhaps by us."""
        if table in (None, *self.tables):
            dropping, redirected = self._dropping, self._redirected
            await self._ensure(filter(self._is_there, dropping), self.tables[0], rules.fill_drop)
            await self._ensure(
                filter(self._is_there, redirected), self.tables[1], rules.fill_redirect
            )

    async def close_all(self) -> None:
        """Remove all our tables, also those of an earlier process.

        Raises:
            HostRefused: The kernel refuses.
        """
        self._known = self._dropping = self._redirected = frozenset()
        names = [name for name in self.directory.names() if router_of(name) is not None]
        # Remove the redirecting table first.
        for table in reversed(self.tables):
            await self._remove([(name, table) for name in names])

    async def _close_known(self) -> None:
        self._known = frozenset(filter(self._is_there, self._known))
        self._dropping &= self._known
        missing = self._known - self._dropping
        self._dropping |= await self._ensure(missing, self.tables[0], rules.fill_drop)

    def _is_there(self, ref: NamespaceRef) -> bool:
        return self.directory.identity(ref.name) == ref

    async def _remove(self, places: Collection[tuple[str, str]]) -> None:
        if places:
            with contextlib.closing(NamespaceThread(self.directory)) as thread:
                await _RouterTables(thread).close(places)

    async def _ensure(
        self, routers: Iterable[NamespaceRef], table: str, fill: Callable[[Batch], None]
    ) -> frozenset[NamespaceRef]:
        """Create a table in these namespaces. Return the namespaces that have the table."""
        wanted = tuple(routers)
        if not wanted:
            return frozenset()
        comment = f"imdsproxy {rules.ROUTER_FORMAT}"

        def ensure() -> None:
            with NetfilterSocket() as channel:
                ensure_table(channel, Batch(table, INET), comment, fill)

        # Use a separate thread: with many namespaces an observation blocks the host's thread for seconds.
        with contextlib.closing(NamespaceThread(self.directory)) as thread:
            action = f"make table {table}"
            results = await _RouterTables(thread).attempt(
                {ref: (ref, action, ensure) for ref in wanted}
            )
        for ref, error in results.items():
            if isinstance(error, DataplaneError) and not isinstance(error, TableGone):
                self.problems[ref.name] = Problem("host", error.message, error.hint)
                _log.error("router not redirected", namespace=ref.name, reason=error.message)
        return frozenset(ref for ref, error in results.items() if error is None)


def _places(endpoints: Iterable[Endpoint]) -> frozenset[NamespaceRef]:
    return frozenset(
        one.namespace
        for one in endpoints
        if one.port == REDIRECTED_PORT and one.namespace is not None
    )
