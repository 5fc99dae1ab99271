"""Provisioner of namespaces and ports on the integration bridge for OVN's networks."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from imdsproxy.errors import (
    DataplaneError,
    ImdsproxyError,
    Problem,
    SourceUnavailable,
    refusing,
)
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.network.names import Naming
from imdsproxy.network.ovn.bridge_ports import write_ports
from imdsproxy.network.ovn.places import look_at_places, make_place, remove_place
from imdsproxy.network.ovn.plan import (
    MetadataPlace,
    OvnPlan,
    networks_without_port,
    plan_host,
    plan_places,
)
from imdsproxy.reconcile.progress import Backoff
from imdsproxy.sources.ovn.chassis import LocalChassis
from imdsproxy.sources.ovn.source import OvnSource

_LOOK_EVERY_S: Final = 10.0
"""Seconds between two full observations of the host: another program may have changed a namespace."""

_TOGETHER_S: Final = 0.02
"""Seconds to wait for more changes. Meanwhile guests' records come into force, which must not wait for this work."""

_LOOK_AGAIN_S: Final = 0.2
"""Seconds until the next check whether a process still listens in a namespace to remove."""

_LISTENED_S: Final = 10.0
"""Maximum seconds to wait for such a process: HAProxy closes its sockets in the namespace at its next reload."""

_FIRST_AGAIN_S: Final = 0.5
_LONGEST_AGAIN_S: Final = 30.0
_WRITTEN_S: Final = 10.0
_VSWITCH: Final = "ovn.open_vswitch"
_NO_BRIDGE: Final = "ovn-controller makes it; another name belongs in external_ids:ovn-bridge"
_NO_WRITE: Final = "look at ovsdb-server and its log; it is tried again"
_NO_PORT: Final = "neutron-ovn-db-sync-util makes it again"
_log: Final = structlog.get_logger()


@dataclass(slots=True)
class Provisioner:
    """Keeps this host equal to the plans of `network.ovn.plan`.

    Args:
        source: Source with the networks that have ports here, and Open vSwitch's database.
        thread: Thread that enters namespaces.
        naming: Marks for namespaces and addresses created here.

    Attributes:
        problems: Problems by network, namespace or database.
        changed: Set to check at once.
    """

    source: OvnSource
    thread: NamespaceThread
    naming: Naming
    problems: dict[str, Problem] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _whole: frozenset[MetadataPlace] = frozenset()
    _waits: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Compare and act until cancelled, at each change of the databases and every ten seconds."""
        clock = asyncio.get_running_loop().time
        backoff = Backoff(_FIRST_AGAIN_S, _LONGEST_AGAIN_S)
        due = clock()
        while True:
            self.changed.clear()
            if clock() >= due:
                self._whole, due = frozenset(), clock() + _LOOK_EVERY_S
            before, again = self.problems, due
            try:
                plan = await self.converge()
                again = clock() + _LOOK_AGAIN_S if plan.wait else due
            except ImdsproxyError as error:
                self.problems = {"": Problem("ovn", error.message, error.hint)}
            if self.problems:
                due = min(due, clock() + backoff.fail())
            else:
                backoff.succeed()
            for key, problem in self.problems.items():
                if problem != before.get(key):
                    _log.warning("network not provisioned", at=key, problem=str(problem))
            with contextlib.suppress(TimeoutError):
                pause_s = max(0.0, min(due, again) - clock())
                await asyncio.wait_for(self.changed.wait(), pause_s)
                await asyncio.sleep(_TOGETHER_S)

    async def converge(self) -> OvnPlan:
        """Observe, plan and act once. Return the plan.

        Raises:
            DataplaneError: The host cannot be observed.
        """
        local, known = self.source.local, self.source.known
        if local is None:
            return OvnPlan()
        places = plan_places(known, local)
        spared = networks_without_port(known)
        whole = self._whole & frozenset(places.values())
        skip = frozenset(place.namespace for place in whole)
        seen = await self.thread.run(lambda: look_at_places(self.thread, self.naming, skip=skip))
        now = asyncio.get_running_loop().time()
        plan = plan_host(
            places,
            seen,
            local,
            whole=whole,
            spared=spared,
            overdue={name for name, since in self._waits.items() if now - since > _LISTENED_S},
            sweep=self.source.settled,
        )
        self._waits = {name: self._waits.get(name, now) for name in plan.wait}
        if plan:
            _log.info(
                "networks provisioned",
                made=[place.network for place in plan.make],
                plugged=[place.network for place in plan.plug],
                removed=plan.remove,
            )
        problems: dict[str, Problem] = {
            network: Problem(
                "ovn.metadata_port", f"network {network} has none", _NO_PORT, record=network
            )
            for network in spared
        }
        problems |= await self.thread.run(lambda: self._make(plan.make))
        self._whole = frozenset(p for p in places.values() if p.network not in problems)
        problems |= await self._plug(
            local, [place for place in plan.plug if place.network not in problems], plan.unplug
        )
        problems |= await self.thread.run(lambda: self._remove(plan.remove))
        self.problems = problems
        return plan

    async def _plug(
        self, local: LocalChassis, places: Collection[MetadataPlace], unplug: Collection[str]
    ) -> dict[str, Problem]:
        problems: dict[str, Problem] = {}
        if places and local.datapath is None:
            reason = f"there is no bridge {local.bridge}"
            problems[local.bridge] = Problem(_VSWITCH, reason, _NO_BRIDGE)
            places = ()
        if places or unplug:
            try:
                async with asyncio.timeout(_WRITTEN_S):
                    await self.source.change_vswitch(partial(write_ports, places, unplug))
            except SourceUnavailable as error:
                problems[_VSWITCH] = Problem(_VSWITCH, error.message, error.hint or _NO_WRITE)
            except TimeoutError:
                reason = f"no answer within {_WRITTEN_S:g} s"
                problems[_VSWITCH] = Problem(_VSWITCH, reason, _NO_WRITE)
        return problems

    # In the namespaces' thread

    def _make(self, places: Collection[MetadataPlace]) -> dict[str, Problem]:
        each: dict[str, Callable[[], None]] = {
            p.network: partial(make_place, self.thread, self.naming, p) for p in places
        }
        return _try_each("make the namespace of network", each)

    def _remove(self, names: Collection[str]) -> dict[str, Problem]:
        each: dict[str, Callable[[], None]] = {
            name: partial(remove_place, self.thread, self.naming, name) for name in names
        }
        return _try_each("remove namespace", each)


def _try_each(what: str, works: Mapping[str, Callable[[], None]]) -> dict[str, Problem]:
    problems: dict[str, Problem] = {}
    for key, work in works.items():
        try:
            with refusing(f"{what} {key}"):
                work()
        except DataplaneError as error:
            problems[key] = Problem(f"ovn.{error.code}", error.message, error.hint)
    return problems
