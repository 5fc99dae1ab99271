"""Who a guest is, why, and what it gets: the answer to an operator's question."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from imdsproxy.admin.operations import Explanation
from imdsproxy.app.listener_loop import ListenerLoop
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.identity import Ambiguous, Found, Unknown
from imdsproxy.core.inventory import AddressKey, Inventory
from imdsproxy.core.model import Instance, IpAddress, NetworkId, Upstream
from imdsproxy.core.plan import networks_of, record_key
from imdsproxy.core.wire import NovaRecord, hide_signatures
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import RuntimeUnavailable

__all__ = ["Explainer"]


@dataclass(slots=True)
class Explainer:
    """Walks the same steps as a request would, and notes each."""

    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    haproxy: Haproxy
    lookup: Lookup

    async def explain(self, network: NetworkId, address: IpAddress) -> Explanation:
        """Who has `address` in `network`, and why; never raises for an unknown one."""
        if not self.inventory.knows(network):
            why = (f"no source tells of network {network}",)
            return Explanation(network, address, "no-network", 404, why)
        sources = ", ".join(self.inventory.sources_of_network(network))
        report = self.listeners.report
        steps = [f"network {network} comes from {sources}"]
        steps += [
            f"its listener is left out: {one.reason}"
            for one in report.left_out
            if one.network == network
        ]
        found = await self._identity(network, address)
        served = network in networks_of(report.endpoints)
        if not served:
            # Nobody listens there: the guest gets no answer, whatever it would be.
            found = replace(found, verdict="left-out", answer=503)
        return replace(
            found,
            why=(*steps, *found.why),
            installed=await self._installed(network, address),
        )

    async def _identity(self, network: NetworkId, address: IpAddress) -> Explanation:
        identity = await self.lookup.identify((network, address))
        match identity:
            case Found(instance=instance, how=how):
                return Explanation(
                    network,
                    address,
                    "found",
                    200,
                    (f"instance {instance.id} has {address}, known by {how.value}",),
                    instance=instance.id,
                    instance_name=instance.name,
                    source=", ".join(self.inventory.sources_of_instance(instance.id)),
                    how=how.value,
                    revision=self.records.revisions.get(instance.id),
                    policy=self._policy(instance, (network, address)),
                )
            case Ambiguous(claimants=claimants):
                why = ("more than one record claims the address, and none is preferred",)
                return Explanation(network, address, "conflict", 503, why, claimants=claimants)
            case Unknown(reason=reason):
                in_sync = self.inventory.in_sync
                then = (
                    "requests are held for a while, then answered 404"
                    if in_sync
                    else "a source is not in sync: it may still come"
                )
                answer = 404 if in_sync else 503
                return Explanation(network, address, "unknown", answer, (reason.value, then))
        assert_never(identity)

    def _policy(self, instance: Instance, key: AddressKey) -> dict[str, str]:
        if instance.upstream is Upstream.EMBEDDED:
            return {"dialects": ", ".join(sorted(instance.dialects)) or "none"}
        record = self.records.planned(key)
        if not isinstance(record, NovaRecord):
            return {"upstream": "nova", "endpoint set": "none: guests get 503"}
        return {"upstream": "nova", "endpoint set": record.endpoint_set, "project": record.project}

    async def _installed(self, network: NetworkId, address: IpAddress) -> str | None:
        """What the accepting worker's maps have for the address."""
        processes = self.haproxy.processes
        if processes is None or processes.worker is None:
            return None
        key = record_key((network, address))
        applier = self.records.applier
        try:
            for path in (applier.overlay_path, applier.base_path):
                value = await self.haproxy.master.read_entry(processes.worker, str(path), key)
                if value is not None:
                    return hide_signatures(value)
        except (WorkerEnded, RuntimeUnavailable):
            return None
        return None
