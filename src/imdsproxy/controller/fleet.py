"""View of this host for a fleet's hubs: the items in force, and the admin API's answers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpcore

from imdsproxy.controller.companion import DocumentProbe
from imdsproxy.controller.in_force import UNCONFIRMED, find_unserved, wait_confirmed
from imdsproxy.controller.policy_store import PolicyStore
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.watchdog import HaproxyWatchdog
from imdsproxy.fleet.guests import FleetPolicies
from imdsproxy.fleet.stream import Ask, ItemKey
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Conflict
from imdsproxy.network.listeners.loop import ListenerLoop

_MAY_ASK: Final = re.compile(
    r"GET /v1/(status|explain|documents|watch|networks(/[^/?]+)?"
    r"|instances(/[^/?]+(/(explain|identity|identity-check|password))?)?)(\?[^#]*)?"
    r"|DELETE /v1/instances/[^/?]+/password"
)
_MOST_OF_ANSWER: Final = 1024 * 1024
_TIMES: Final = dict.fromkeys(("connect", "read", "write", "pool"), 30.0)


@dataclass(frozen=True, slots=True)
class FleetHost:
    """This host, for its hub."""

    inventory: Inventory
    policy_store: PolicyStore
    records: RecordLoop
    listeners: ListenerLoop
    watchdog: HaproxyWatchdog
    probe: DocumentProbe
    admin_socket: Path

    def take_policies(self, fleet: FleetPolicies) -> int:
        """Replace the fleet's policies; return the ticket that closes when they are in force.

        Call this before publishing the records that belong to the policies (`PolicyStore.take_fleet`).
        """
        change, records = self.policy_store.take_fleet(fleet), self.records
        if change.rules:
            records.resync()
        for instance in change.overrides:
            for key in records.addresses_of(instance):
                records.touch(key)
        return records.wake() if change else records.tickets.given

    async def confirm(
        self, items: Collection[ItemKey], gone: Collection[ItemKey]
    ) -> Mapping[ItemKey, str]:
        """Wait until the source's changes are in force; return the items that are not, with reasons.

        Args:
            gone: Items that the fleet has removed; reports of other sources about them are no failure.
        """
        changed = map(_parts, (*items, *gone))
        networks = {NetworkId(name) for kind, name in changed if kind == "network"}
        confirmed = await wait_confirmed(self.records, self.listeners, changed=bool(networks))
        failures = (self.records.failure, self.watchdog.failure)
        reasons = [one.reason for one in failures if one is not None]
        if not confirmed:
            reasons.append(UNCONFIRMED)
        unserved = {}
        if networks and not reasons:
            not_served = await find_unserved(self.listeners, frozenset(networks))
            unserved = {one.network: f"{one.reason} ({one.code.value})" for one in not_served}
        found: dict[ItemKey, str] = dict.fromkeys(gone, "; ".join(reasons)) if reasons else {}
        for item in items:
            kind, name = _parts(item)
            own = list(reasons)
            if kind == "network":
                own += [unserved[NetworkId(name)]] if NetworkId(name) in unserved else []
            elif kind == "instance":
                own += self._reasons(InstanceId(name))
            if own:
                found[item] = "; ".join(dict.fromkeys(own))
        return found

    def _reasons(self, instance: InstanceId) -> list[str]:
        compiler = self.records.compiler
        failure = compiler.failures.get(instance)
        found = [] if failure is None else [failure.reason]
        documents = self.probe.failure
        if documents is not None and instance in compiler.revisions:
            found.append(documents.reason)
        return found + list(_contradictions(self.inventory, instance))

    async def answer(self, ask: Ask) -> tuple[int, Any]:
        """Return status and body of the admin API's answer to a request that hubs may make, else 403."""
        if not _MAY_ASK.fullmatch(f"{ask.method} {ask.path}"):
            return 403, {"message": f"hubs may not ask for {ask.method} {ask.path}"}
        socket = str(self.admin_socket)
        try:
            async with httpcore.AsyncConnectionPool(uds=socket) as pool:
                extensions = {"timeout": _TIMES}
                url = f"http://host{ask.path}"
                answer = await pool.request(ask.method, url, extensions=extensions)
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            return 503, {"message": f"the admin API does not answer: {error}"}
        if len(answer.content) > _MOST_OF_ANSWER:
            return 413, {"message": f"the answer is longer than {_MOST_OF_ANSWER} bytes"}
        try:
            return answer.status, json.loads(answer.content)
        except ValueError:
            return answer.status, answer.content.decode("utf-8", "replace")


def _contradictions(inventory: Inventory, instance: InstanceId) -> list[str]:
    """Return how other sources of this host contradict the instance's record."""
    if instance in inventory.contested_instances:
        sources = " and ".join(inventory.sources_of_instance(instance))
        return [f"{sources} describe it differently"]
    owners = map(inventory.owner, sorted(inventory.addresses_of(instance), key=str))
    return [str(one) for one in owners if isinstance(one, Conflict)]


def _parts(item: ItemKey) -> tuple[str, str]:
    kind, _, name = item.partition("/")
    return kind, name
