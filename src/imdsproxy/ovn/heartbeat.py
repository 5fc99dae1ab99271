"""Shows Neutron that this chassis's metadata agent is alive: `openstack network agent list` looks at Chassis_Private.

The server counts an agent as alive that repeats the configuration's number (neutron/agent/ovn/metadata/agent.py,
`register_metadata_agent` and `SbGlobalUpdateEvent`). All agents would write at once: each waits for a random time.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.ovsdb import Table, Transaction
from imdsproxy.sources.ovn.source import OvnSource

_NAMESPACE: Final = uuid.UUID("d34bf9f6-da32-4871-9af8-15a4626b41ab")
_ID: Final = "neutron:ovn-metadata-id"
_SB_CFG: Final = "neutron:ovn-metadata-sb-cfg"
_BRIDGE: Final = "neutron:ovn-bridge"

_LONGEST_DELAY_S: Final = 10.0
"""As Neutron's agent has it: a third of the server's default `agent_down_time`, and at most this."""

_AGAIN_S: Final = 5.0
_log: Final = structlog.get_logger()


def agent_id(chassis: str) -> str:
    """The agent's id in Neutron, the same as that of Neutron's own agent on this chassis."""
    try:
        namespace = uuid.UUID(chassis)
    except ValueError:
        namespace = uuid.uuid5(_NAMESPACE, chassis)
    return str(uuid.uuid5(namespace, "metadata_agent"))


def plan_registration(chassis: str, bridge: str, present: Mapping[str, str]) -> dict[str, str]:
    """What of the agent's registration is missing; an id that is there stays, as Neutron's agent leaves it."""
    wanted = {_ID: present.get(_ID) or agent_id(chassis), _BRIDGE: bridge}
    return {key: value for key, value in wanted.items() if present.get(key) != value}


@dataclass(slots=True)
class OvnHeartbeat:
    """Registers the agent and repeats the configuration's number.

    Args:
        source: The Southbound database.
        random: From 0 to 1.
    """

    source: OvnSource
    random: Callable[[], float]
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _begun: bool = False

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            try:
                await self._beat()
            except SourceUnavailable as error:
                _log.warning("heartbeat not written", error=error.message)
                await asyncio.sleep(_AGAIN_S)
                self.changed.set()

    async def _beat(self) -> None:
        view, local = self.source.view, self.source.local
        if view is None or view.private is None or local is None:
            return
        missing = plan_registration(local.name, local.bridge, view.private)
        if missing:
            await self.source.change_southbound(partial(_write, missing))
        if view.nb_cfg is None or view.private.get(_SB_CFG) == str(view.nb_cfg):
            return
        if self._begun:
            await asyncio.sleep(self.random() * _LONGEST_DELAY_S)
        self._begun = True
        latest = self.source.view
        if latest is not None and latest.nb_cfg is not None:
            number = {_SB_CFG: str(latest.nb_cfg)}
            await self.source.change_southbound(partial(_write, number))


def _write(
    values: Mapping[str, str], tables: Mapping[str, Table], _transaction: Transaction
) -> None:
    for row in tables["Chassis_Private"].rows.values():
        for key, value in values.items():
            row.setkey("external_ids", key, value)
