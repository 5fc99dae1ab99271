"""Brings the host to what the networks' listeners need: observe, plan, act, and again."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from imdsproxy.core.hoststate import ObservedHost, merge_observed
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InterfaceListener, NamespaceListener, Network, NetworkId
from imdsproxy.core.records import Refused, parse_network, render_record
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.nft_scripts import answering_devices, plan_diversions
from imdsproxy.listeners.plan import (
    ListenerPlan,
    OpFailure,
    PlanMemo,
    explain_pending,
    plan_listeners,
    without_removed,
)

_HOST_ROUNDS = 4
"""Namespace, link, address: each is planned when the one before it has been seen."""


@dataclass(slots=True)
class HostSettler:
    """The host's side of the listener loop.

    Attributes:
        pids: HAProxy's master and workers.
        seen: The host as of the last round.
        known: The same, `None` when all of it has to be looked at again.
        operations: Ops so far, by `ok` and `failed`.
    """

    host: SystemHost
    inventory: Inventory
    kept: KeptNetworks
    pids: Callable[[], tuple[int, ...]]
    seen: ObservedHost = field(default_factory=ObservedHost)
    known: ObservedHost | None = None
    operations: Counter[str] = field(default_factory=Counter)
    _memo: PlanMemo = field(default_factory=dict)
    _networks: Mapping[NetworkId, Network] = field(default_factory=dict)
    _dirty: set[NetworkId] = field(default_factory=set)

    def touch(self, networks: Iterable[NetworkId] | None) -> None:
        """Look at these networks' places again in the next round; `None` for the whole host."""
        if networks is None:
            self.known = None
        else:
            self._dirty.update(networks)

    async def settle(
        self, networks: Mapping[NetworkId, Network]
    ) -> tuple[ListenerPlan, tuple[Problem, ...], int]:
        """Observe and act until there is nothing more to do on the host.

        Returns:
            What to bind, what the host refused, and how many ops there were.

        Raises:
            HostRefused: The host's own namespace cannot be looked at, or our journal cannot be read.
        """
        # First of all: from the moment that an address is there, the host answers for it. A look changes nothing.
        devices = answering_devices(networks.values())
        guarding = _problems_of(self.host.apply_arp_guard(devices))
        problems, self.seen = await asyncio.gather(guarding, self._observe(networks))
        failures: tuple[OpFailure, ...] = ()
        operations = 0
        for _ in range(_HOST_ROUNDS):
            plan = plan_listeners(
                networks,
                self.seen,
                self.host.naming,
                sweep=self.inventory.in_sync,
                managed=self.host.managed(),
                memo=self._memo,
                first=self.kept.load(),
            )
            if not plan.ops or failures:
                break
            operations += len(plan.ops)
            self._dirty.update(one.network for one in plan.left_out)
            failures = await self.host.apply(plan.ops)
            if not failures and self.known is self.seen:
                # The place of a network that is gone is not looked at again.
                self.known = without_removed(self.seen, plan.ops)
            self.operations["failed"] += len(failures)
            self.operations["ok"] += len(plan.ops) - len(failures)
            self.seen = await self._observe(networks)
        problems += tuple(Problem("host", one.reason, one.hint) for one in failures)
        diversions = plan_diversions(networks, self.seen, self.host.naming)
        problems += await _problems_of(self.host.apply_diversions(diversions))
        return explain_pending(plan, failures), problems, operations

    async def _observe(self, networks: Mapping[NetworkId, Network]) -> ObservedHost:
        """Look at all of the host, or at what may have changed and lay it over what was known."""
        dirty, self._dirty = self._dirty, set()
        known = self.known
        if known is None:
            # In place while we look: who asks for all of it meanwhile takes it away again.
            known = self.known = ObservedHost()
            seen = await self.host.observe(networks.values(), self.pids(), everything=True)
        elif dirty:
            some = {by[one] for by in (networks, self._networks) for one in dirty if one in by}
            if any(not isinstance(one.listener, NamespaceListener) for one in some):
                # The host's own namespace is looked at as a whole.
                some |= {n for n in networks.values() if isinstance(n.listener, InterfaceListener)}
            seen = merge_observed(known, await self.host.observe(some, self.pids()))
        else:
            return known
        if self.known is known:
            self.known = seen
        self._networks = dict(networks)
        return seen

    async def look_at(self, networks: Iterable[Network]) -> ObservedHost:
        """The host as the last round saw it, but for the places of these networks, which are looked at now."""
        return merge_observed(self.seen, await self.host.observe(networks, self.pids()))


async def _problems_of(work: Coroutine[object, object, None]) -> tuple[Problem, ...]:
    try:
        await work
    except HostRefused as error:
        return (Problem("host", error.message, error.hint),)
    return ()


@dataclass(slots=True)
class KeptNetworks:
    """The file, and what it held when this process first asked."""

    path: Path
    write: Callable[[Path, bytes], None]
    _networks: Mapping[NetworkId, Network] | None = None
    _written: Mapping[NetworkId, Network] = field(default_factory=dict)

    def beside(
        self, known: Mapping[NetworkId, Network], *, in_sync: bool
    ) -> dict[NetworkId, Network]:
        """The networks to listen for: those of the sources, and until all are in sync, also those that were kept."""
        if in_sync:
            return dict(known)
        return {**self.load(), **known}

    def keep(self, networks: Mapping[NetworkId, Network]) -> None:
        """Note what HAProxy is configured for now.

        Only the next process needs it, so a failure is only logged.
        """
        self._networks = dict(networks)
        if networks == self._written:
            return
        text = json.dumps([render_record(networks[one]) for one in sorted(networks)])
        try:
            self.write(self.path, text.encode())
        except HostRefused as error:
            structlog.get_logger().warning(
                "networks not kept", code=error.code, error=error.message, hint=error.hint
            )
            return
        self._written = self._networks

    def load(self) -> Mapping[NetworkId, Network]:
        """The networks that HAProxy is configured for."""
        if self._networks is None:
            self._networks = _read(self.path)
        return self._networks


def _read(path: Path) -> dict[NetworkId, Network]:
    try:
        records = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        structlog.get_logger().warning("kept networks not read", path=str(path), error=str(error))
        return {}
    parsed = [parse_network(one) for one in records] if isinstance(records, list) else []
    return {one.id: one for one in parsed if not isinstance(one, Refused)}
