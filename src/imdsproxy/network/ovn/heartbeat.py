"""Heartbeat that shows Neutron a live metadata agent on this chassis; `openstack network agent list` shows the result.

The server counts an agent as alive if Chassis_Private repeats the configuration's number. Each agent waits for a random
time, so that not all agents write at once. Source: `register_metadata_agent` and `SbGlobalUpdateEvent` in
neutron/agent/ovn/metadata/agent.py.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.host.ovsdb import Table, Transaction
from imdsproxy.reconcile.reconciler import Reconciler
from imdsproxy.sources.ovn.source import OvnSource

_NAMESPACE: Final = uuid.UUID("d34bf9f6-da32-4871-9af8-15a4626b41ab")
_ID: Final = "neutron:ovn-metadata-id"
_SB_CFG: Final = "neutron:ovn-metadata-sb-cfg"
_BRIDGE: Final = "neutron:ovn-bridge"

_LONGEST_DELAY_S: Final = 10.0
"""Maximum delay, as in Neutron's agent, which takes a third of the server's default `agent_down_time` up to this."""

_HINT: Final = (
    "`openstack network agent list` shows this host's agent as down meanwhile; it is tried again"
)


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
    """Registers the agent and repeats the configuration's number.

    Args:
        source: Source with the Southbound database.
        random: Returns numbers from 0 to 1.

    Attributes:
        beats: Writes the number; its `wake` checks at once.
    """

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
        """Reasons why the server does not see the agent."""
        why = self.beats.failure
        return () if why is None else (replace(why, hint=why.hint or _HINT),)

    async def run(self) -> None:
        """Repeat the number after each change, until cancelled."""
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
