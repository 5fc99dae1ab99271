"""The source `ovn`: ports bound to this host, by events of OVN's Southbound database."""

import asyncio
import contextlib
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

from imdsproxy.config.sources import OvnSourceSettings
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.host.ovsdb import Change, Conditions, Ovsdb, Row, Rows, Schema, Tls
from imdsproxy.model.observation import Observation, StrandedPort
from imdsproxy.sources.api import Publish, Reports
from imdsproxy.sources.ovn.ports import (
    NETWORK_KEY,
    BridgePort,
    LocalChassis,
    OvnKnown,
    PortBinding,
    SouthboundView,
)

_OPTIONAL_UUID: Final = {"key": "uuid", "min": 0, "max": 1}
_UUIDS: Final = {"key": "uuid", "min": 0, "max": "unlimited"}
_TEXTS: Final = {"key": "string", "min": 0, "max": "unlimited"}
_TEXT_MAP: Final = {"key": "string", "value": "string", "min": 0, "max": "unlimited"}

OPEN_VSWITCH: Final = Schema(
    "Open_vSwitch",
    {
        "Open_vSwitch": {"external_ids": _TEXT_MAP},
        "Bridge": {"name": "string", "datapath_type": "string", "ports": _UUIDS},
        "Port": {"name": "string", "interfaces": _UUIDS},
        "Interface": {"name": "string", "external_ids": _TEXT_MAP},
    },
)

_SOUTHBOUND: Final = Schema(
    "OVN_Southbound",
    {
        "Chassis": {"name": "string"},
        "Chassis_Private": {"name": "string", "external_ids": _TEXT_MAP},
        "SB_Global": {"nb_cfg": "integer"},
        "Port_Binding": {
            "logical_port": "string",
            "type": "string",
            "mac": _TEXTS,
            "chassis": _OPTIONAL_UUID,
            "additional_chassis": _UUIDS,
            "options": _TEXT_MAP,
            "external_ids": _TEXT_MAP,
        },
    },
)
_CLAIM_S: Final = 10.0
"""Seconds for which rows of ports may be late after this chassis's row came back: ovn-northd may still write them."""

_BRIDGE: Final = "br-int"
_NO_REMOTE: Final = (
    "Open vSwitch has no external_ids:ovn-remote, and sources.ovn.southbound is not set"
)
_NO_NAME: Final = "Open vSwitch has no external_ids:system-id: ovn-controller is not set up here"


@dataclass(slots=True)
class OvnSource:
    """Source of OVN's ports as instances, and their networks.

    While a database cannot be reached, the source is out of sync, and its reported records stay.

    Attributes:
        view: This host's rows in the Southbound database; `None` until they were read.
    """

    name: ClassVar = "ovn"
    settings: OvnSourceSettings
    local: LocalChassis | None = None
    known: OvnKnown = field(default_factory=OvnKnown)
    view: SouthboundView | None = None
    changes: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _vswitch: Ovsdb[LocalChassis] | None = None
    _southbound: Ovsdb[SouthboundView] | None = None
    _chassis_changed: float | None = None
    _keeps_absent: bool = False
    _due: float | None = None
    _rescheduled: asyncio.Event = field(default_factory=asyncio.Event)
    _reports: Reports = field(default_factory=partial(Reports, name, defers=True))
    _failures: dict[str, str | None] = field(default_factory=dict)
    _complete: bool = False

    def explain_stranded(self, port: StrandedPort) -> Problem:
        """Describe the problem by the table only. It never occurs while a port's network is published with the port."""
        return port.problem(field="Port_Binding", file=None)

    async def run(self, publish: Publish) -> None:
        following: asyncio.Task[None] | None = None
        at: tuple[str, str, frozenset[str]] | None = None
        self._vswitch = database = Ovsdb(self.settings.open_vswitch, OPEN_VSWITCH, read_chassis)
        async with asyncio.TaskGroup() as group, aclosing(database.follow()) as readings:
            group.create_task(self._watch_deadlines(publish))
            async for reading in readings:
                self._failures["open_vswitch"] = reading.lost
                if reading.view is not None:
                    self.local = reading.view
                    before, at = at, self._where(reading.view)
                    if at != before:
                        if following is not None:
                            following.cancel()
                        following = (
                            None if at is None else group.create_task(self._follow(publish, *at))
                        )
                self._report(publish, Observation())

    async def change_vswitch(self, change: Change) -> None:
        """Write to Open vSwitch's database. Raises `SourceUnavailable`: the database cannot be reached, or refuses."""
        if self._vswitch is None:
            raise SourceUnavailable("Open vSwitch's database was not read yet")
        await self._vswitch.transact(change)

    async def change_southbound(self, change: Change) -> None:
        """Write to the Southbound database. Raises `SourceUnavailable`: the database cannot be reached, or refuses."""
        if self._southbound is None:
            raise SourceUnavailable("the Southbound database was not read yet")
        await self._southbound.transact(change)

    def _where(self, local: LocalChassis) -> tuple[str, str, frozenset[str]] | None:
        """Return the Southbound database, this chassis's name there, and the names that ports may request."""
        remotes = self.settings.southbound or local.southbound
        self._failures["setup"] = (
            _NO_REMOTE if not remotes else _NO_NAME if not local.name else None
        )
        return (remotes, local.name, local.names) if remotes and local.name else None

    async def _follow(
        self, publish: Publish, remotes: str, name: str, names: frozenset[str]
    ) -> None:
        settings = self.settings
        tls = None
        if settings.private_key_file and settings.certificate_file and settings.ca_file:
            tls = Tls(settings.private_key_file, settings.certificate_file, settings.ca_file)
        database = Ovsdb(
            remotes,
            _SOUTHBOUND,
            partial(read_southbound, name, names),
            _conditions(name, names, None, ()),
            parse={"Port_Binding": parse_binding},
            probe_s=settings.probe_s,
            tls=tls,
        )
        self._southbound = database
        async with aclosing(database.follow()) as readings:
            try:
                async for reading in readings:
                    self._failures["southbound"] = reading.lost
                    self._take(publish, reading.view)
            finally:
                self._southbound = None

    def _take(self, publish: Publish, view: SouthboundView | None) -> None:
        before, changes = self.view, Observation()
        if view is not None and view != before:
            self.view, self._complete = view, True
            if view.chassis != before.chassis if before is not None else view.chassis is None:
                self._chassis_changed = asyncio.get_running_loop().time()
            changes = self._update(view)
        self._report(publish, changes)

    def _update(self, view: SouthboundView) -> Observation:
        loop, grace_s = asyncio.get_running_loop(), self.settings.grace_s
        absent_s = grace_s if view.chassis is None else min(_CLAIM_S, grace_s)
        since = None if self._chassis_changed is None else loop.time() - self._chassis_changed
        self._keeps_absent = since is not None and since < absent_s
        # While kept ports may be stale the source is out of sync: unknown guests get 503, not 404.
        self._failures["chassis"] = (
            "OVN has no row of this chassis: ports that were bound to it stay in force"
            if view.chassis is None and self._keeps_absent
            else None
        )
        keep_unclaimed = since is not None and since < grace_s
        ends = [end for end in (absent_s, grace_s) if since is not None and since < end]
        self._due = None
        if self._chassis_changed is not None and ends:
            self._due = self._chassis_changed + min(ends)
            self._rescheduled.set()
        return self.known.update(
            view, keep_absent=self._keeps_absent, keep_unclaimed=keep_unclaimed
        )

    async def _watch_deadlines(self, publish: Publish) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._due):
                    await self._rescheduled.wait()
            self._rescheduled.clear()
            is_due = self._due is not None and asyncio.get_running_loop().time() >= self._due
            if is_due and self.view is not None:
                self._report(publish, self._update(self.view))

    @property
    def settled(self) -> bool:
        """Whether each port of `known` has a current row: none is kept because its row may come back."""
        failing = any(reason is not None for reason in self._failures.values())
        there = self.view is not None and self.view.chassis is not None
        return there and not self._keeps_absent and not failing

    def _report(self, publish: Publish, changes: Observation) -> None:
        self.changes += 1
        lost = [reason for reason in self._failures.values() if reason is not None]
        observation = self._reports.next(
            changes,
            lambda: self.known.records,
            in_sync=self._complete and not lost,
            problems=(
                *(Problem("sources.ovn", reason) for reason in lost),
                *self.known.problems,
            ),
        )
        if observation is not None:
            publish(observation)
        self.changed.set()


def _conditions(
    name: str, names: frozenset[str], chassis: str | None, networks: tuple[str, ...]
) -> Conditions:
    """Return conditions for this chassis, its ports, and the metadata ports of their networks: no other rows."""
    ports: list[object] = [
        ["options", "includes", ["map", [["requested-chassis", one]]]] for one in sorted(names)
    ]
    if chassis is not None:
        uuid = ["uuid", chassis]
        ports += [["chassis", "includes", uuid], ["additional_chassis", "includes", uuid]]
    ports += [
        ["external_ids", "includes", ["map", [["neutron:device_id", f"ovnmeta-{network}"]]]]
        for network in networks
    ]
    own = [["name", "==", name]]
    return {
        "Chassis": own,
        "Chassis_Private": own,
        "Port_Binding": ports,
    }


def read_southbound(
    name: str, names: frozenset[str], tables: Rows
) -> tuple[SouthboundView, Conditions]:
    """Read the rows of interest and the next conditions; called in the connection's thread."""
    chassis = next((str(row.uuid) for row in tables["Chassis"]), None)
    bindings: tuple[PortBinding, ...] = tuple(tables["Port_Binding"])
    networks = {
        row.network for row in bindings if row.network is not None and not row.is_metadata_port
    }
    private = next((dict(row.external_ids) for row in tables["Chassis_Private"]), None)
    nb_cfg = next((int(row.nb_cfg) for row in tables["SB_Global"]), None)
    view = SouthboundView(chassis, names, bindings, private, nb_cfg)
    return view, _conditions(name, names, chassis, tuple(sorted(networks)))


def parse_binding(row: Row) -> PortBinding:
    """Parse a row of Port_Binding; called in the connection's thread."""
    options: Mapping[str, str] = row.options
    requested = options.get("requested-chassis", "")
    return PortBinding(
        port=row.logical_port,
        kind=row.type,
        macs=tuple(row.mac),
        chassis=str(row.chassis[0]) if row.chassis else "",
        additional=frozenset(str(each) for each in row.additional_chassis),
        requested=tuple(each for each in requested.split(",") if each),
        external_ids=dict(row.external_ids),
    )


def read_chassis(tables: Rows) -> tuple[LocalChassis, Conditions]:
    """Read this chassis; called in the connection's thread."""
    ids: Mapping[str, str] = next((dict(row.external_ids) for row in tables["Open_vSwitch"]), {})
    bridge = ids.get("ovn-bridge", _BRIDGE)
    bridges = {row.name: row for row in tables["Bridge"]}
    interfaces = {row.uuid: row for row in tables["Interface"]}
    ports = {row.uuid: row for row in tables["Port"]}
    plugged = {
        interface.name: BridgePort(
            name,
            interface.external_ids.get("iface-id", ""),
            interface.external_ids.get(NETWORK_KEY, ""),
        )
        for name, row in bridges.items()
        for port in row.ports
        for interface in (
            interfaces.get(each) for each in (ports[port].interfaces if port in ports else ())
        )
        if interface is not None
    }
    found = bridges.get(bridge)
    view = LocalChassis(
        name=ids.get("system-id", ""),
        hostname=ids.get("hostname", ""),
        southbound=ids.get("ovn-remote", ""),
        bridge=bridge,
        datapath=None if found is None else found.datapath_type,
        ports=plugged,
    )
    return view, {}
