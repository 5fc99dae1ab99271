"""OVN on this host, besides its networks: the agent's heartbeat, and the removal of our objects.

The heartbeat shows Neutron a live metadata agent on this chassis; `openstack network agent list` shows the result. The
server counts an agent as alive if Chassis_Private repeats the configuration's number. Each agent waits for a random
time, so that not all agents write at once. Source: `register_metadata_agent` and `SbGlobalUpdateEvent` in
neutron/agent/ovn/metadata/agent.py.
"""

import asyncio
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from random import SystemRandom
from typing import Final

from imdsproxy.errors import HostRefused, Problem, SourceUnavailable
from imdsproxy.host.ovsdb import Ovsdb, Table, Transaction
from imdsproxy.model.entities import NetworkId
from imdsproxy.network.listeners.apply import unplug_port
from imdsproxy.network.listeners.host import SystemHost
from imdsproxy.network.ovn.plan import is_listened, is_ours, network_of
from imdsproxy.network.planned import DetachOvn
from imdsproxy.reconcile.part import Part
from imdsproxy.reconcile.reconciler import Reconciler
from imdsproxy.sources.ovn.ports import NETWORK_KEY, namespace_of
from imdsproxy.sources.ovn.source import OPEN_VSWITCH, OvnSource, read_chassis

_TOGETHER_S: Final = 0.02
"""Seconds to wait for more changes. Meanwhile guests' records come into force, which must not wait for this work."""

_ANSWER_S: Final = 10.0
_NO_PORT: Final = "neutron-ovn-db-sync-util creates the port again"

_NAMESPACE: Final = uuid.UUID("d34bf9f6-da32-4871-9af8-15a4626b41ab")
_ID: Final = "neutron:ovn-metadata-id"
_SB_CFG: Final = "neutron:ovn-metadata-sb-cfg"
_BRIDGE: Final = "neutron:ovn-bridge"

_LONGEST_DELAY_S: Final = 10.0
"""Maximum delay, as in Neutron's agent, which takes a third of the server's default `agent_down_time` up to this."""

_HINT: Final = "`openstack network agent list` shows this host's agent as down meanwhile; imdsproxy tries again"


def agent_id(chassis: str) -> str:
    """Return the agent's id in Neutron, the same as for Neutron's own agent on this chassis."""
    try:
        namespace = uuid.UUID(chassis)
    except ValueError:
        namespace = uuid.uuid5(_NAMESPACE, chassis)
    return str(uuid.uuid5(namespace, "metadata_agent"))


def plan_registration(chassis: str, bridge: str, present: Mapping[str, str]) -> dict[str, str]:
    """Return the missing keys of the agent's registration; an existing id stays, as with Neutron's agent."""
    wanted = {_ID: present.get(_ID) or agent_id(chassis), _BRIDGE: bridge}
    return {key: value for key, value in wanted.items() if present.get(key) != value}


@dataclass(slots=True)
class OvnHeartbeat:
    """Registers the agent and repeats the configuration's number."""

    source: OvnSource
    random: Callable[[], float]
    beats: Reconciler = field(
        default_factory=partial(
            Reconciler,
            "ovn.heartbeat",
            "heartbeat not written",
            1.0,
            30.0,
            retried=SourceUnavailable,
        )
    )
    _due: float | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        why = self.beats.failure
        return () if why is None else (replace(why, hint=why.hint or _HINT),)

    async def run(self) -> None:
        await self.beats.run(self._beat, after_s=0.0)

    async def _beat(self) -> float | None:
        """Write the keys that are due. Return the seconds until the next ones; `None` to wait for a change."""
        view, local = self.source.view, self.source.local
        if view is None or view.private is None or local is None:
            return None
        missing = plan_registration(local.name, local.bridge, view.private)
        written = view.private.get(_SB_CFG)
        if view.nb_cfg is None or written == str(view.nb_cfg):
            self._due = None
        else:
            now = asyncio.get_running_loop().time()
            if self._due is None:
                # A row without a number is new: the server counts its agent as down, so do not wait.
                delay_s = 0.0 if written is None else self.random() * _LONGEST_DELAY_S
                self._due = now + delay_s
            if self._due <= now:
                missing[_SB_CFG] = str(view.nb_cfg)
        if missing:
            await self.source.change_southbound(partial(_write, missing))
        if _SB_CFG in missing:
            self._due = None
        return (
            None if self._due is None else max(0.0, self._due - asyncio.get_running_loop().time())
        )


def _write(
    values: Mapping[str, str], tables: Mapping[str, Table], _transaction: Transaction
) -> None:
    for row in tables["Chassis_Private"].rows.values():
        for key, value in values.items():
            row.setkey("external_ids", key, value)


@dataclass(slots=True)
class OvnHost(Part):
    """The agent of one source's networks: requests rounds of the listeners, and writes the heartbeat."""

    source: OvnSource
    host: SystemHost
    touch: Callable[[str, Collection[NetworkId]], object]
    heartbeat: OvnHeartbeat = field(init=False)

    def __post_init__(self) -> None:
        self.heartbeat = OvnHeartbeat(self.source, SystemRandom().random)

    def work(self) -> tuple[Coroutine[object, object, None], ...]:
        return self._notice(), self.heartbeat.run()

    async def _notice(self) -> None:
        """Request a round at each change of the needs that no round has planned with, until cancelled."""
        changed = self.source.changed
        while True:
            await changed.wait()
            await asyncio.sleep(_TOGETHER_S)
            changed.clear()
            # After `clear`: otherwise the heartbeat misses a change during the sleep.
            self.heartbeat.beats.wake()
            needs = self.host.ovn_needs()
            if needs is not None and needs.is_new(self.host.planned_needs):
                self.touch("OVN's networks changed", ())

    def problems(self) -> tuple[Problem, ...]:
        needs = self.host.ovn_needs()
        lacking = (
            Problem(
                "ovn.metadata_port",
                f"network {network} has no metadata port",
                _NO_PORT,
                record=network,
            )
            for network in (() if needs is None else needs.spared)
        )
        return (*lacking, *self.heartbeat.problems)


async def sweep_ovn(open_vswitch: str, host: SystemHost) -> None:
    """Remove our namespaces and their ports, after HAProxy has ended.

    Objects of an agent stay. A namespace in which another process listens stays too: that process serves the guests.

    Raises:
        DataplaneError: The host refuses.
        SourceUnavailable: Open vSwitch's database cannot be reached, or refuses. The namespaces are removed anyway.
    """
    seen = await host.observe((), host.ovn_places())
    of_ovn = {name: network for name in seen.namespaces if (network := network_of(name))}
    remove = [
        name
        for name, network in of_ovn.items()
        if is_ours(seen.namespaces[name], network, host.naming)
        and not is_listened(seen.namespaces[name])
    ]
    try:
        await _sweep_ports(open_vswitch, of_ovn.keys() - remove)
    finally:
        left = await host.apply(DetachOvn(of_ovn[name], host.naming) for name in remove)
    if left:
        problems = tuple(left.values())
        raise HostRefused("some objects of OVN's networks could not be removed", problems=problems)


async def _sweep_ports(open_vswitch: str, staying: Collection[str]) -> None:
    database = Ovsdb(open_vswitch, OPEN_VSWITCH, read_chassis)
    try:
        async with asyncio.timeout(_ANSWER_S), aclosing(database.follow()) as readings:
            async for reading in readings:
                if reading.view is not None and reading.lost is None:
                    await database.transact(partial(_remove_ports, staying))
                    return
    except TimeoutError as error:
        raise SourceUnavailable(
            f"no answer from {open_vswitch} within {_ANSWER_S:g} s",
            hint="the ports tap... of OVN's networks are still on the integration bridge: `ovs-vsctl del-port`",
        ) from error


def _remove_ports(
    staying: Collection[str], tables: Mapping[str, Table], _transaction: Transaction
) -> None:
    """Remove all our ports, except those of namespaces that stay; remove our mark from these."""
    bridges = {row.name: row for row in tables["Bridge"].rows.values()}
    ports = {row.name: row for row in tables["Port"].rows.values()}
    for interface in list(tables["Interface"].rows.values()):
        network = interface.external_ids.get(NETWORK_KEY)
        if network is None:
            continue
        if namespace_of(network) in staying:
            interface.delkey("external_ids", NETWORK_KEY)
        else:
            unplug_port(ports.get(interface.name), bridges)
