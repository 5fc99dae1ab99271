"""What the admin API asks of the controller, done."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, assert_never

from imdsproxy.admin.explain import Explainer
from imdsproxy.admin.instance_reports import InstanceReports
from imdsproxy.admin.operations import (
    DocumentAnswer,
    Explanation,
    GuardChange,
    InstanceReport,
    KeyRotation,
    NetworkReport,
    Probe,
    WatchReport,
    Written,
)
from imdsproxy.admin.records import Writes
from imdsproxy.admin.reports import (
    AuditReport,
    DocumentsReport,
    HaproxyReport,
    LeftOut,
    MacsReport,
    PlanReport,
    Readiness,
    ReloadReport,
    SourceReport,
    StatusReport,
    UnixListenerReport,
    list_degraded,
)
from imdsproxy.admin.tokens import GuardWrites
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.app.audit import Audit
from imdsproxy.app.guard import HaproxyGuard
from imdsproxy.app.limited import LimitWatch
from imdsproxy.app.listener_loop import ListenerLoop
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.nova_upstream import NovaUpstream
from imdsproxy.app.nova_watch import NovaWatch
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.app.token_report import TokenCounting
from imdsproxy.app.watching import Watching
from imdsproxy.config.change import SettingsReload
from imdsproxy.config.schema import Settings
from imdsproxy.core import endpoints
from imdsproxy.core.documents.renamed import list_warnings
from imdsproxy.core.haproxy.render import render_config
from imdsproxy.core.identity import Ambiguous, Found, Mismatch, Unknown
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import (
    Dialect,
    Instance,
    InstanceId,
    IpAddress,
    Network,
    NetworkId,
    Scope,
)
from imdsproxy.core.naming import find_id
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.progress import Step
from imdsproxy.core.token_report import TokenReport, open_trees
from imdsproxy.core.wire import HEADER_TOLD, MISMATCH_TEXT, MapRecord, render_map_value
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.errors import (
    NotFound,
    Problem,
)
from imdsproxy.host.clock import Clock
from imdsproxy.serving.forward import CollectedAnswer, Forwarder, FoundRequest
from imdsproxy.serving.passwords import PasswordStore
from imdsproxy.serving.resolver import Contested, Known, Mismatched, Missing
from imdsproxy.sources.api import Source

__all__ = ["ControllerOperations"]

_MISMATCHES_SHOWN = 20
_COMMON: Final[Mapping[Dialect, str]] = {
    Dialect.EC2: "/latest/meta-data/",
    Dialect.OPENSTACK: "/openstack/latest/meta_data.json",
    Dialect.NOCLOUD: "/nocloud/meta-data",
}


@dataclass(slots=True)
class ControllerOperations:
    """`imdsproxy.admin.operations.Operations` over the controller's parts."""

    version: str
    pid: int
    clock: Clock
    started_at: float
    started: float
    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    haproxy: Haproxy
    haproxy_version: str
    guard: HaproxyGuard
    lookup: Lookup
    mac_filters: MacFilters
    mismatched: Counter[NetworkId]
    explainer: Explainer
    nova: NovaUpstream
    nova_watch: NovaWatch
    limit_watch: LimitWatch
    forwarder: Forwarder
    sources: Sequence[Source]
    instance_reports: InstanceReports
    writes: Writes
    guard_writes: GuardWrites
    documents_pids: Callable[[], tuple[int, ...]]
    documents_problem: Callable[[], Problem | None]
    documents_restarts: Callable[[], int]
    documents_needed: bool
    passwords: PasswordStore
    watching: Watching
    audit: Audit
    counting: TokenCounting
    settings_problems: Callable[[], tuple[Problem, ...]]
    reload_settings: Callable[[bool], Awaitable[SettingsReload]]
    settings: Callable[[], Settings]
    end: Callable[[bool], None]

    # Reading

    def readiness(self) -> Readiness:
        """In sync, last plan applied, a probe through HAProxy answered, and all networks served; else why not."""
        reasons = [
            f"source {name} is not in sync"
            for name, in_sync in self.inventory.sources.items()
            if not in_sync
        ]
        if self.haproxy.processes is None:
            reasons.append("HAProxy does not run")
        elif not self.guard.answering:
            reasons.append("HAProxy does not answer a probe")
        reasons += [str(problem) for problem in self.own_problems()]
        degraded = list_degraded(map(_left_out, self.listeners.degraded()))
        degraded += [str(problem) for problem in self._unnoticed()]
        if self.settings().metrics.degraded == "not-ready":
            reasons += degraded
        return Readiness(ready=not reasons, reasons=tuple(reasons), degraded=tuple(degraded))

    async def status(self) -> StatusReport:
        """See `Operations.status`."""
        report = self.listeners.report
        await self.nova_watch.refresh()
        return StatusReport(
            version=self.version,
            controller=self.pid,
            started_at=self.started_at,
            uptime_s=self.clock.monotonic() - self.started,
            readiness=self.readiness(),
            networks=len(self.inventory.networks) + len(self.inventory.contradictory),
            serving=self.listeners.serving,
            instances=len(self.inventory.instances),
            addresses=self.inventory.address_count,
            left_out=tuple(map(_left_out, self.listeners.degraded())),
            sources=tuple(
                SourceReport(
                    name,
                    in_sync,
                    *self.inventory.record_counts(name),
                    problems=self._source_problems(name),
                )
                for name, in_sync in self.inventory.sources.items()
            ),
            conflicts=self.inventory.conflicts(),
            problems=self.own_problems() + self._unnoticed(),
            haproxy=self._haproxy(),
            documents=DocumentsReport(
                self.documents_pids(),
                "" if (problem := self.documents_problem()) is None else problem.reason,
                self.documents_needed,
            ),
            last_plan=PlanReport(
                at=report.at,
                operations=report.operations,
                reasons=report.reasons,
                failed=tuple(str(problem) for problem in report.problems),
                took_s=report.seconds,
            ),
            nova=self.nova_watch.endpoints,
            unix_listener=self.unix_listener(),
            macs=self.macs(),
            warnings=list_warnings(
                one for found in self.records.warnings.values() for one in found
            ),
            policy_for_nobody=self.guard_writes.guarding.for_nobody(self.inventory),
            busiest=await self.limit_watch.busiest(),
            audit=self._audit(),
            progress=self.progress(),
        )

    def _unnoticed(self) -> tuple[Problem, ...]:
        """What is wrong and no guest notices."""
        audit = () if (problem := self.audit.problem) is None else (problem,)
        return (*audit, *self.settings_problems())

    def _audit(self) -> AuditReport | None:
        settings, problem = self.audit.settings(), self.audit.problem
        if not settings.one_in:
            return None
        return AuditReport(
            mode=settings.mode,
            destination=settings.destination,
            written=self.audit.written,
            left_out=self.audit.left_out,
            problem="" if problem is None else problem.reason,
        )

    def macs(self) -> MacsReport:
        """What is made of guests' MACs."""
        return MacsReport(
            gates=len(self.mac_filters.plan.filters),
            refused=len(self.mac_filters.refused),
            pairs=self.mac_filters.pair_count,
            learned=sum(entry.mac is not None for entry in self.records.learned.values()),
            mismatches=dict(self.mismatched.most_common(_MISMATCHES_SHOWN)),
        )

    def _source_problems(self, name: str) -> tuple[Problem, ...]:
        """The records that a source refuses, and its ports in networks that nobody tells of."""
        found = list(self.inventory.problems_of(name))
        source = next(one for one in self.sources if one.name == name)
        for stranded in self.inventory.stranded():
            if stranded.source != name:
                continue
            origin = source.origin_of_port(stranded.instance, stranded.number)
            found.append(
                stranded.problem()
                if origin is None
                else stranded.problem(field=origin.field, file=origin.file, line=origin.line)
            )
        return tuple(found)

    def own_problems(self) -> tuple[Problem, ...]:
        """What is wrong and belongs to no source, network or instance."""
        found = list(self.unapplied())
        keys = self.guard_writes.guarding.keys
        found += [] if keys.failure is None else [keys.failure]
        if self.records.revisions and not self.documents_needed:
            found.append(_unserved(len(self.records.revisions)))
        found += self.nova.problems
        found += self.nova_watch.problems
        return tuple(found)

    def unapplied(self) -> tuple[Problem, ...]:
        """What keeps a change from guests."""
        parts = (self.listeners.failure, self.guard.failure, self.documents_problem())
        found = list(self.records.failures.values())
        found += [problem for problem in parts if problem is not None]
        return (*found, *self.listeners.report.problems)

    def unix_listener(self) -> UnixListenerReport | None:
        """The socket for Neutron's proxies; `None` where it is off."""
        unix = self.listeners.unix
        if unix is None or not unix.settings().enabled:
            return None
        bind = unix.bind
        return UnixListenerReport(
            path=str(unix.settings().path),
            serving=unix.serving,
            mode="" if bind is None else bind.mode,
            user=None if bind is None else bind.user,
            group=None if bind is None else bind.group,
            problem="" if unix.problem is None else unix.problem.reason,
            taken_over=unix.taken_over,
            taken_from=unix.taken_from,
        )

    def _haproxy(self) -> HaproxyReport:
        processes = self.haproxy.processes
        last = self.haproxy.last_reload
        return HaproxyReport(
            version=self.haproxy_version,
            master=None if processes is None else processes.master,
            worker=None if processes is None else processes.worker,
            old_workers=() if processes is None else processes.draining,
            reloads=0 if processes is None else processes.reloads,
            last_reload=None
            if last is None
            else ReloadReport(
                number=last.number,
                at=last.at,
                reason=last.reason,
                ok=last.result in {"started", "reloaded"},
                result=last.message,
                took_s=last.seconds,
            ),
            problem="" if self.guard.failure is None else self.guard.failure.reason,
        )

    async def list_networks(self) -> Sequence[NetworkReport]:
        """See `Operations.list_networks`."""
        degraded = self._degraded()
        networks = self.inventory.networks
        return [self._network(networks[one], degraded) for one in sorted(networks)]

    async def get_network(self, network: NetworkId) -> NetworkReport:
        """See `Operations.get_network`."""
        found = self.inventory.networks.get(network)
        if found is None:
            raise NotFound(f"there is no network {network}", hint="imdsproxy network list")
        return self._network(found, self._degraded())

    def _degraded(self) -> Mapping[NetworkId, LeftOut]:
        """Of each degraded network the first reason."""
        return {one.network: _left_out(one) for one in reversed(self.listeners.degraded())}

    def _network(self, network: Network, degraded: Mapping[NetworkId, LeftOut]) -> NetworkReport:
        return NetworkReport(
            network,
            ", ".join(self.inventory.sources_of_network(network.id)),
            len(self.inventory.instances_in(network.id)),
            degraded.get(network.id),
        )

    async def list_instances(self, network: NetworkId | None = None) -> Sequence[InstanceReport]:
        """See `Operations.list_instances`."""
        return self.instance_reports.all(network)

    async def get_instance(self, instance: InstanceId) -> InstanceReport:
        """See `Operations.get_instance`."""
        return self.instance_reports.get(instance)

    def progress(self) -> tuple[Step, ...]:
        """See `Operations.progress`."""
        return self.records.progress.steps

    # Writing

    async def put_network(self, network: Network, *, create: bool = False) -> Written:
        """See `Operations.put_network`."""
        return await self.writes.put_network(network, create=create)

    async def put_instance(self, instance: Instance, *, create: bool = False) -> Written:
        """See `Operations.put_instance`."""
        return await self.writes.put_instance(instance, create=create)

    async def put_records(
        self, networks: Sequence[Network], instances: Collection[Instance], *, create: bool = False
    ) -> Written:
        """See `Operations.put_records`."""
        return await self.writes.put_records(networks, instances, create=create)

    async def remove_network(self, network: NetworkId) -> Written:
        """See `Operations.remove_network`."""
        return await self.writes.remove_network(network)

    async def remove_instance(self, instance: InstanceId) -> Written:
        """See `Operations.remove_instance`."""
        return await self.writes.remove_instance(instance)

    async def revoke_tokens(self, instance: InstanceId) -> GuardChange:
        """See `Operations.revoke_tokens`."""
        return await self.guard_writes.revoke(instance)

    async def reopen_instance(self, instance: InstanceId) -> GuardChange:
        """See `Operations.reopen_instance`."""
        return await self.guard_writes.reopen(instance)

    async def rotate_token_keys(self) -> KeyRotation:
        """See `Operations.rotate_token_keys`."""
        return await self.guard_writes.rotate()

    async def read_password(self, instance: InstanceId) -> bytes | None:
        """See `Operations.read_password`."""
        self._refuse_unknown(instance)
        return await asyncio.to_thread(self.passwords.read, instance)

    async def clear_password(self, instance: InstanceId) -> bool:
        """See `Operations.clear_password`."""
        self._refuse_unknown(instance)
        return await asyncio.to_thread(self.passwords.remove, instance)

    def _refuse_unknown(self, instance: InstanceId) -> None:
        if not self.inventory.sources_of_instance(instance):
            raise NotFound(f"there is no instance {instance}", hint="imdsproxy instance list")

    # Asking about guests

    def network_id(self, text: str) -> NetworkId:
        """See `Operations.network_id`."""
        network = NetworkId(text)
        return (
            network if self.inventory.knows(network) else find_id(network, self.inventory.networks)
        )

    def instance_id(self, text: str) -> InstanceId:
        """See `Operations.instance_id`."""
        instance = InstanceId(text)
        if self.inventory.sources_of_instance(instance):
            return instance
        return find_id(instance, self.inventory.instances)

    async def explain(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str | None = None,
        *,
        probe: bool = False,
    ) -> Explanation:
        """See `Operations.explain`."""
        explained = await self.explainer.explain(network, address, path)
        if not probe or explained.verdict == "no-network":
            return explained
        asked = path or self._common_path(explained.instance)
        answer = await self.get(network, address, asked)
        return replace(explained, probe=Probe(asked, answer.status))

    def _common_path(self, instance: InstanceId | None) -> str:
        """A document that every instance has which has any."""
        record = None if instance is None else self.inventory.instances.get(instance)
        dialects = frozenset(Dialect) if record is None else record.dialects
        return next((path for dialect, path in _COMMON.items() if dialect in dialects), "/")

    async def explain_instance(
        self, instance: InstanceId, path: str | None = None, *, probe: bool = False
    ) -> Sequence[Explanation]:
        """See `Operations.explain_instance`."""
        self._refuse_unknown(instance)
        learned = self.records.learned.items()
        keys = self.inventory.addresses_of(instance)
        keys |= {key for key, entry in learned if entry.instance == instance}
        # Made of its MAC: what few guests ask from, where they have another one.
        chosen = {key for key in keys if not key[1].is_link_local} or keys
        ordered = sorted(chosen, key=lambda key: (key[0], key[1].version, int(key[1])))
        return [await self.explain(*key, path, probe=probe) for key in ordered]

    async def get(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str,
        headers: Sequence[tuple[str, str]] = (),
    ) -> DocumentAnswer:
        """See `Operations.get`."""
        if not self.inventory.knows(network) and self.lookup.source is None:
            raise NotFound(f"there is no network {network}", hint="imdsproxy network list")
        key = (network, address)
        identity = await self.lookup.identify(key)
        match identity:
            case Found():
                record = self.records.planned(key)
                if not isinstance(record, MapRecord):
                    return DocumentAnswer(503, (), b"")
                return await self._get_as_guest(key, render_map_value(record), path, headers)
            case Ambiguous():
                return DocumentAnswer(503, (("retry-after", "5"),), b"")
            case Mismatch():
                return DocumentAnswer(403, (), MISMATCH_TEXT.encode())
            case Unknown():
                return await self._get_of_unknown(key, path, headers)
            case _ as never:
                assert_never(never)

    async def _get_of_unknown(
        self, key: AddressKey, path: str, headers: Sequence[tuple[str, str]]
    ) -> DocumentAnswer:
        """Look it up, and put it in force, as a request of its would."""
        declared = key[0] in self.inventory.networks
        # Of an id that no record has, only a request says whether it is a router's.
        for scope in (None,) if declared else (Scope.NETWORK, Scope.ROUTER):
            match await self.lookup.look(key, scope):
                case Known(record=record):
                    return await self._get_as_guest(key, record, path, headers)
                case Contested():
                    return DocumentAnswer(503, (("retry-after", "5"),), b"")
                case Mismatched():
                    return DocumentAnswer(403, (), MISMATCH_TEXT.encode())
                case Missing(in_sync=False):
                    return DocumentAnswer(503, (), b"")
                case Missing():
                    continue
                case _ as never:
                    assert_never(never)
        return DocumentAnswer(404, (), b"")

    async def _get_as_guest(
        self, key: AddressKey, record: str, path: str, sent: Sequence[tuple[str, str]]
    ) -> DocumentAnswer:
        request = FoundRequest(
            record=record,
            network=key[0],
            address=str(key[1]),
            method="GET",
            target=path.encode("utf-8"),
            headers=tuple((name.lower().encode(), value.encode()) for name, value in sent),
            body=b"",
            by_operator=True,
        )
        answer = CollectedAnswer()
        await self.forwarder.forward(request, answer.take)
        headers = tuple(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in answer.headers
            if name != HEADER_TOLD.encode()
        )
        return DocumentAnswer(answer.status, headers, bytes(answer.body))

    async def watch(
        self,
        cursor: int | None,
        *,
        network: NetworkId | None = None,
        instance: InstanceId | None = None,
    ) -> WatchReport:
        """See `Operations.watch`."""
        return await self.watching.read(cursor, network=network, instance=instance)

    async def token_report(self) -> TokenReport:
        """See `Operations.token_report`."""
        await self.counting.refresh()
        report = self.counting.ledger.report(open_trees(self.inventory, self.records.policies()))
        return replace(report, one_in=self.counting.one_in())

    async def render(self) -> str:
        """See `Operations.render`."""
        return render_config(self.listeners.spec())

    async def reload(self, *, allow_dropped: bool = False) -> SettingsReload:
        """See `Operations.reload`."""
        return await self.reload_settings(allow_dropped)

    async def stop(self, *, data_plane: bool) -> None:
        """See `Operations.stop`."""
        self.end(data_plane)


def _unserved(count: int) -> Problem:
    return Problem(
        "documents.enabled",
        f"it is off, and {count} instances have documents of ours: their guests get 503",
        "switch it on, or give the records `upstream: nova`",
    )


def _left_out(one: endpoints.LeftOut) -> LeftOut:
    family = "" if one.family is None else f"IPv{one.family.value}: "
    return LeftOut(one.network, one.code.value, f"{family}{one.reason}", one.hint)
