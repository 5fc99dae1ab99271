"""Heartbeat that shows Neutron a live metadata agent on this chassis; `openstack network agent list` shows the result.

The server counts an agent as alive if Chassis_Private repeats the configuration's number. Each agent waits for a random
time, so that not all agents write at once. Source: `register_metadata_agent` and `SbGlobalUpdateEvent` in
neutron/agent/ovn/metadata/agent.py.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.host.ovsdb import Table, Transaction
from imdsproxy.reconcile.progress import Backoff
from imdsproxy.sources.ovn.source import OvnSource

_NAMESPACE: Final = uuid.UUID("d34bf9f6-da32-4871-9af8-15a4626b41ab")
_ID: Final = "neutron:ovn-metadata-id"
_SB_CFG: Final = "neutron:ovn-metadata-sb-cfg"
_BRIDGE: Final = "neutron:ovn-bridge"

_LONGEST_DELAY_S: Final = 10.0
"""Maximum delay, as in Neutron's agent, which takes a third of the server's default `agent_down_time` up to this."""

_FIRST_AGAIN_S: Final = 1.0
_LONGEST_AGAIN_S: Final = 30.0
_HINT: Final = (
    "`openstack network agent list` shows this host's agent as down meanwhile; it is tried again"
)
_log: Final = structlog.get_logger()


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
        problems: Reasons why the server does not see the agent.
        changed: Set to check at once.
    """

    source: OvnSource
    random: Callable[[], float]
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    problems: tuple[Problem, ...] = ()
    _due: float | None = None

    async def run(self) -> None:
        """Repeat the number after each change, until cancelled."""
        backoff = Backoff(_FIRST_AGAIN_S, _LONGEST_AGAIN_S)
        while True:
            self.changed.clear()
            try:
                pause = await self._beat()
                self.problems = ()
                backoff.succeed()
            except SourceUnavailable as error:
                self.problems = (Problem("ovn.heartbeat", error.message, error.hint or _HINT),)
                _log.warning("heartbeat not written", error=error.message)
                pause = backoff.fail()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), pause)

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
