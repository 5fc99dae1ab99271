"""A controller in memory, for tests of the admin API and the command line."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from imdsproxy.admin.operations import (
    DocumentAnswer,
    Explanation,
    GuardChange,
    InstanceReport,
    KeyRotation,
    NetworkReport,
    PathDecision,
    Probe,
    WatchReport,
    Written,
)
from imdsproxy.admin.reports import (
    AuditReport,
    DocumentsReport,
    HaproxyReport,
    LeftOut,
    PlanReport,
    Readiness,
    ReloadReport,
    SourceReport,
    StatusReport,
    UnixListenerReport,
)
from imdsproxy.config.change import SettingChange, SettingsReload
from imdsproxy.core.haproxy.watching import Watched
from imdsproxy.core.model import InstanceId, NetworkId, Upstream
from imdsproxy.core.naming import find_id
from imdsproxy.core.observation import Claimant, Conflict, ConflictKind
from imdsproxy.core.policy import Guard, PolicyBook, PolicyPlace
from imdsproxy.core.policy_decides import decide_read
from imdsproxy.core.policy_told import tell_policy
from imdsproxy.core.progress import Step
from imdsproxy.core.token_report import TokenReport
from imdsproxy.errors import (
    AlreadyExists,
    ImdsproxyError,
    NotFound,
    Problem,
    SourceRefused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from imdsproxy.core.model import Instance, IpAddress, Network


@dataclass
class FakeOperations:
    """Keeps records, knows who has which address, and fails with `failure` while that is set."""

    networks: dict[NetworkId, Network] = field(default_factory=dict)
    instances: dict[InstanceId, Instance] = field(default_factory=dict)
    left_out: dict[NetworkId, LeftOut] = field(default_factory=dict)
    documents: dict[str, DocumentAnswer] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    written: Written | None = None
    under_way: tuple[Step, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    unix_listener: UnixListenerReport | None = None
    policy_for_nobody: tuple[str, ...] = ()
    audit: AuditReport | None = None
    file_problems: tuple[Problem, ...] = (
        Problem(
            "instances[3].ports[0].mac",
            "52:54:00 is not acceptable",
            hint="six octets",
            file="/etc/imdsproxy/records/web.yaml",
            line=41,
        ),
    )
    guards: dict[InstanceId, Guard] = field(default_factory=dict)
    policies: PolicyBook = field(default_factory=PolicyBook)
    rotations: int = 0
    failure: ImdsproxyError | None = None
    crash: Exception | None = None
    reloads: int = 0
    dropped_allowed: bool | None = None
    watched: list[Watched] = field(default_factory=list)
    missed: bool = False
    shared_keys: str | None = None
    tokens_told: TokenReport = field(default_factory=lambda: TokenReport(0.0, (), (), 0))
    pending: tuple[str, ...] = ()
    stopped: list[bool] = field(default_factory=list)
    on_stop: Callable[[], None] = lambda: None

    passwords: dict[InstanceId, bytes] = field(default_factory=dict)

    def network_id(self, text: str) -> NetworkId:
        return find_id(NetworkId(text), self.networks)

    def instance_id(self, text: str) -> InstanceId:
        return find_id(InstanceId(text), self.instances)

    async def read_password(self, instance: InstanceId) -> bytes | None:
        await self.get_instance(instance)
        return self.passwords.get(instance)

    async def clear_password(self, instance: InstanceId) -> bool:
        await self.get_instance(instance)
        return self.passwords.pop(instance, None) is not None

    def _check(self) -> None:
        if self.crash is not None:
            raise self.crash
        if self.failure is not None:
            raise self.failure

    async def status(self) -> StatusReport:
        self._check()
        reasons = tuple(f"network {name} is left out" for name in self.left_out)
        return StatusReport(
            version="1.2.3",
            controller=4711,
            started_at=1_760_000_000.0,
            uptime_s=93_784.0,
            readiness=Readiness(not reasons, reasons),
            networks=len(self.networks),
            serving=len(self.networks) - len(self.left_out),
            instances=len(self.instances),
            addresses=sum(
                len(port.addresses) for one in self.instances.values() for port in one.ports
            ),
            left_out=tuple(self.left_out.values()),
            sources=(
                SourceReport(
                    "sqlite",
                    in_sync=True,
                    networks=len(self.networks),
                    instances=len(self.instances),
                ),
                SourceReport(
                    "file",
                    in_sync=False,
                    stale_s=12.0,
                    problems=self.file_problems,
                ),
            ),
            conflicts=self.conflicts,
            unix_listener=self.unix_listener,
            policy_for_nobody=self.policy_for_nobody,
            audit=self.audit,
            progress=self.progress(),
            haproxy=HaproxyReport(
                version="3.0.11",
                master=100,
                worker=102,
                old_workers=(101,),
                reloads=7,
                last_reload=ReloadReport(
                    7, 1_760_093_000.0, "network-added", ok=True, took_s=0.045
                ),
            ),
            documents=DocumentsReport((200, 201, 202)),
            last_plan=PlanReport(1_760_093_780.0, 3, ("instance web-1 changed",), took_s=0.002),
        )

    async def list_networks(self) -> Sequence[NetworkReport]:
        self._check()
        return [await self.get_network(name) for name in sorted(self.networks)]

    async def get_network(self, network: NetworkId) -> NetworkReport:
        self._check()
        if network not in self.networks:
            raise NotFound(f"there is no network {network}", hint="`imdsproxy network list`")
        inside = sum(
            any(port.network == network for port in one.ports) for one in self.instances.values()
        )
        return NetworkReport(self.networks[network], "sqlite", inside, self.left_out.get(network))

    async def put_network(self, network: Network, *, create: bool = False) -> Written:
        self._check()
        if create and network.id in self.networks:
            raise AlreadyExists(f"there is a network {network.id}", hint="`network set` changes it")
        self.networks[network.id] = network
        pending = self.left_out.get(network.id)
        return Written(
            networks=1,
            applied=pending is None,
            pending=() if pending is None else (pending.reason,),
        )

    async def remove_network(self, network: NetworkId) -> Written:
        report = await self.get_network(network)
        if report.instances:
            raise SourceRefused(
                f"network {network} is in use",
                hint="remove the instances first",
                problems=[
                    Problem(f"instances.{one.id}", f"has a port in {network}")
                    for one in self.instances.values()
                    if any(port.network == network for port in one.ports)
                ],
            )
        del self.networks[network]
        return Written(networks=1)

    async def list_instances(self, network: NetworkId | None = None) -> Sequence[InstanceReport]:
        self._check()
        return [
            await self.get_instance(name)
            for name, one in sorted(self.instances.items())
            if network is None or any(port.network == network for port in one.ports)
        ]

    async def get_instance(self, instance: InstanceId) -> InstanceReport:
        self._check()
        if instance not in self.instances:
            raise NotFound(f"there is no instance {instance}", hint="`imdsproxy instance list`")
        return InstanceReport(self.instances[instance], "sqlite", "0f3a9c", self.conflicts)

    async def put_instance(self, instance: Instance, *, create: bool = False) -> Written:
        self._check()
        if create and instance.id in self.instances:
            raise AlreadyExists(
                f"there is an instance {instance.id}", hint="`instance set` changes it"
            )
        problems = [
            Problem(f"ports[{index}].network", f"there is no network {port.network}")
            for index, port in enumerate(instance.ports)
            if port.network not in self.networks
        ]
        if problems:
            raise SourceRefused(f"instance {instance.id} is refused", problems=problems)
        self.instances[instance.id] = instance
        return Written(instances=1)

    async def remove_instance(self, instance: InstanceId) -> Written:
        await self.get_instance(instance)
        del self.instances[instance]
        return Written(instances=1)

    def progress(self) -> tuple[Step, ...]:
        return self.under_way

    async def put_records(
        self, networks: Sequence[Network], instances: Collection[Instance], *, create: bool = False
    ) -> Written:
        self._check()
        for step in self.steps:
            self.under_way = (step,)
            await asyncio.sleep(0.3)
        taken = [one.id for one in networks if one.id in self.networks]
        if create and taken:
            raise AlreadyExists(f"there is a network {taken[0]}")
        self.networks.update({one.id: one for one in networks})
        self.instances.update({one.id: one for one in instances})
        return self.written or Written(len(networks), len(instances))

    async def revoke_tokens(self, instance: InstanceId) -> GuardChange:
        guard = await self._guard(instance)
        return self._keep(instance, replace(guard, epoch=guard.epoch + 1))

    async def reopen_instance(self, instance: InstanceId) -> GuardChange:
        return self._keep(instance, replace(await self._guard(instance), reopened_at=1_760_093_000))

    async def _guard(self, instance: InstanceId) -> Guard:
        self._check()
        if instance not in self.guards:
            await self.get_instance(instance)
        return self.guards.get(instance, Guard())

    def _keep(self, instance: InstanceId, guard: Guard) -> GuardChange:
        self.guards[instance] = guard
        return GuardChange(
            instance,
            guard.epoch,
            guard.reopened_at or None,
            applied=not self.pending,
            pending=self.pending,
            shared=self.shared_keys,
        )

    async def rotate_token_keys(self) -> KeyRotation:
        self._check()
        self.rotations += 1
        return KeyRotation(
            "0f3a9c11",
            min(3, 1 + self.rotations),
            "/var/lib/imdsproxy/token-keys",
            applied=not self.pending,
            pending=self.pending,
        )

    def _holder(self, network: NetworkId, address: IpAddress) -> Instance | None:
        for one in self.instances.values():
            if any(port.network == network and address in port.addresses for port in one.ports):
                return one
        return None

    async def explain_instance(
        self, instance: InstanceId, path: str | None = None, *, probe: bool = False
    ) -> Sequence[Explanation]:
        ports = (await self.get_instance(instance)).instance.ports
        keys = [(port.network, address) for port in ports for address in port.addresses]
        return [await self.explain(*key, path, probe=probe) for key in keys]

    async def explain(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str | None = None,
        *,
        probe: bool = False,
    ) -> Explanation:
        self._check()
        explained = self._explain(network, address, path)
        if not probe:
            return explained
        asked = path or "/latest/meta-data/"
        return replace(
            explained, probe=Probe(asked, (await self.get(network, address, asked)).status)
        )

    def _explain(self, network: NetworkId, address: IpAddress, path: str | None) -> Explanation:
        if self.conflicts:
            return Explanation(
                network,
                address,
                "conflict",
                503,
                why=("two records claim the address",),
                claimants=self.conflicts[0].claimants,
            )
        holder = self._holder(network, address)
        if holder is None:
            return Explanation(
                network, address, "unknown", 404, why=("no port of the network has the address",)
            )
        rules = tell_policy(
            self.policies.fold(PolicyPlace(network, holder.project, holder.id)),
            self.guards.get(holder.id, Guard()),
            holder.created_at,
            1_760_093_784,
        )
        decided = [
            decide_read(rules.word, 1_760_093_784, path or "/", token=token)
            for token in (False, True)
        ]
        return Explanation(
            network,
            address,
            "found",
            None if holder.upstream is Upstream.NOVA else 200,
            why=("the address is one of the port's addresses",),
            instance=holder.id,
            instance_name=holder.name,
            source="sqlite",
            how="address",
            revision="0f3a9c",
            installed=f"{holder.id}|0f3a9c",
            policy={"dialects": "ec2, nocloud, openstack"},
            rules=rules,
            decision=None if path is None else PathDecision(path, *decided),
        )

    async def get(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str,
        headers: Sequence[tuple[str, str]] = (),
    ) -> DocumentAnswer:
        self._check()
        del headers
        if self._holder(network, address) is None or path not in self.documents:
            return DocumentAnswer(404, (("content-type", "text/plain"),), b"")
        return self.documents[path]

    async def watch(
        self,
        cursor: int | None,
        *,
        network: NetworkId | None = None,
        instance: InstanceId | None = None,
    ) -> WatchReport:
        self._check()
        found = tuple(
            one
            for one in self.watched
            if one.number > (cursor or 0)
            and network in (None, one.network)
            and instance in (None, one.instance)
        )
        last = max((one.number for one in self.watched), default=0)
        return WatchReport(last, () if cursor is None else found, missed=self.missed)

    async def token_report(self) -> TokenReport:
        self._check()
        return self.tokens_told

    async def render(self) -> str:
        self._check()
        return "global\n  maxconn 200\n"

    async def reload(self, *, allow_dropped: bool = False) -> SettingsReload:
        self._check()
        self.dropped_allowed = allow_dropped
        self.reloads += 1
        return SettingsReload(
            changes=(
                SettingChange("resolver.hold_s", 5.0, 2.0, "live"),
                SettingChange("admin.mode", "0660", "0600", "restart"),
            ),
            restart_needed=("admin.mode",),
            pending=self.pending,
        )

    async def stop(self, *, data_plane: bool) -> None:
        self._check()
        self.stopped.append(data_plane)
        self.on_stop()


CONFLICT = Conflict(
    ConflictKind.ADDRESS, "blue/10.0.0.5", (Claimant("file", "web-1"), Claimant("sqlite", "web-2"))
)
