"""Who a guest is, why, and what it gets: the answer to an operator's question."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from imdsproxy.anti_spoofing.plan import ANY_MAC, plan_pair
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.identity import (
    Ambiguous,
    Denial,
    Found,
    How,
    Identity,
    Mismatch,
    Unknown,
    checks_macs,
    deny,
    identify,
)
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import (
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NetworkId,
    Scope,
    Upstream,
)
from imdsproxy.core.observation import AddressKey, Claimant, SourceName
from imdsproxy.core.plan import policy_place, record_key
from imdsproxy.core.policy_report import Decided, PolicyInForce, decide_read, report_policy
from imdsproxy.core.wire import NovaRecord, hide_signatures
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import Problem, RuntimeUnavailable
from imdsproxy.listeners.binds import networks_of
from imdsproxy.listeners.loop import ListenerLoop
from imdsproxy.sources.api import (
    LookUpUnavailable,
    PortAmbiguous,
    PortFound,
    PortMissing,
)

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""As Neutron writes the ids that it makes."""


@dataclass(frozen=True, slots=True)
class PairReport:
    """An address and its MAC, in a network that checks them.

    Attributes:
        seen: The MAC that the neighbour table has.
        expected: The one that the records want; `*` for any, `None` where no instance has the address.
        granted: The one that the kernel lets through to HAProxy's quick answers.
        gate: The kernel looks at MACs there; without that, guests with a MAC in their records get no answer.
    """

    seen: MacAddress | None
    expected: MacAddress | None
    granted: MacAddress | None
    gate: bool


@dataclass(frozen=True, slots=True)
class CardReport:
    """A network card of the record.

    Attributes:
        seen: The MACs that the neighbour table has for its addresses: those of the guest's real network cards.
    """

    network: NetworkId
    mac: MacAddress
    seen: tuple[MacAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class PathDecision:
    """What the policy says to a GET; whether there is such a document is another question.

    Attributes:
        path: As it was asked for.
        without_token: Where the guest sends no session token.
        with_token: Where it sends a good one.
    """

    path: str
    without_token: Decided
    with_token: Decided


@dataclass(frozen=True, slots=True)
class Probe:
    """A GET as the guest sends it, without a session token, and the status of its answer."""

    path: str
    status: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Who a guest is, why, and what it gets.

    Attributes:
        verdict: `found`, `unknown`, `mismatch`, `conflict`, `no-network` or `left-out`.
        answer: The HTTP status a document of an enabled dialect has: 200, 403, 404 or 503; `None` where the
            request is sent to Nova, which decides.
        why: The steps that led there, one sentence each, in order.
        how: `address`, `eui64`, `neighbour` or `router` where an instance was found.
        installed: The value in HAProxy's map, as its worker has it; `None` when it has none or
            could not be asked.
        policy: What applies to the guest's requests, as name and value (dialects, endpoint, hold).
        pair: The address and its MAC; `None` where the network does not check them.
        cards: The record's network cards, where an instance was found.
        rules: What the guest may read and which scope sets it, where an instance was found.
        decision: Of the policy, where it was asked for by a path and an instance was found.
        probe: What a GET got, where one was asked for.
    """

    network: NetworkId
    address: IpAddress
    verdict: str
    answer: int | None
    why: tuple[str, ...] = ()
    instance: InstanceId | None = None
    instance_name: str | None = None
    source: SourceName | None = None
    how: str | None = None
    revision: str | None = None
    installed: str | None = None
    claimants: tuple[Claimant, ...] = ()
    policy: Mapping[str, str] = field(default_factory=dict)
    pair: PairReport | None = None
    cards: tuple[CardReport, ...] = ()
    rules: PolicyInForce | None = None
    decision: PathDecision | None = None
    probe: Probe | None = None


@dataclass(slots=True)
class Explainer:
    """Walks the same steps as a request would, and notes each."""

    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    haproxy: Haproxy
    lookup: Lookup
    documents_needed: bool
    documents_problem: Callable[[], Problem | None] = lambda: None

    async def explain(
        self, network: NetworkId, address: IpAddress, path: str | None = None
    ) -> Explanation:
        """Who has `address` in `network`, and why; never raises for an unknown one."""
        key = (network, address)
        if not self.inventory.knows(network) and self.lookup.source is None:
            why = (f"no source tells of network {network}",)
            return Explanation(network, address, "no-network", 404, why)
        found = await self._identity(key)
        if path is not None and found.rules is not None:
            found = replace(found, decision=self._decision(found.rules, path))
        report = self.listeners.report
        steps = [self._origin(network)]
        steps += [
            f"its listener is not as it should be: {one.reason}"
            for one in self.listeners.degraded()
            if one.network == network
        ]
        declared = network in self.inventory.networks
        if not (network in networks_of(report.endpoints) if declared else self._agents_served()):
            # No listener is there: the guest gets no answer, whatever it would be.
            found = replace(found, verdict="left-out", answer=503)
        pair_steps, pair = await self._pair(key)
        return replace(
            found,
            why=(*steps, *pair_steps, *found.why),
            pair=pair,
            cards=await self._cards(found.instance),
            installed=await self._installed(network, address),
        )

    def _origin(self, network: NetworkId) -> str:
        sources = self.inventory.sources_of_network(network)
        if sources:
            return f"network {network} comes from {', '.join(sources)}"
        unreported = (
            f"no source tells how {network} is reached: its guests come through the unix listener"
        )
        if self._agents_served():
            return unreported
        problem = self.listeners.unix.problem
        why = "off" if problem is None else f"left out: {problem.reason}"
        return f"{unreported}, which is {why}"

    def _agents_served(self) -> bool:
        return self.listeners.unix.serving

    async def _identity(self, key: AddressKey) -> Explanation:
        identity = await self.lookup.identify(key)
        unknown = self._known(key, identity)
        if self.lookup.source is None or not isinstance(identity, Unknown):
            return unknown
        declared = self.inventory.networks.get(key[0])
        # Of an id that no record has, only a request says whether it is a router's.
        scopes = (Scope.NETWORK, Scope.ROUTER) if declared is None else (declared.scope,)
        for scope in scopes:
            answer = await self.lookup.ask(key, scope)
            match answer:
                case PortFound():
                    return await self._found(key, scope, answer)
                case PortAmbiguous(count=count):
                    why = (
                        f"{count} ports of {self.lookup.source.name} have it there; whose guest asks is not "
                        "guessed"
                    )
                    return replace(unknown, why=(why, *unknown.why[1:]))
                case LookUpUnavailable(reason=reason):
                    why = f"nothing is known of it, and {self.lookup.source.name} cannot be asked: {reason}"
                    return replace(unknown, answer=Denial.UNAVAILABLE.status, why=(why,))
                case PortMissing() | None:
                    continue
                case _ as never:
                    assert_never(never)
        why = f"{self.lookup.source.name} was asked and has no port that may get metadata"
        if declared is None and not _UUID.fullmatch(key[0]):
            why += f"; it knows networks and routers by their ids, and {key[0]} is no UUID"
        return replace(unknown, why=(why, *unknown.why[1:]))

    async def _found(self, key: AddressKey, scope: Scope, found: PortFound) -> Explanation:
        if scope is Scope.NETWORK:
            return self._known(key, await self.lookup.identify(key))
        # Puts it in force, as a request would.
        await self.lookup.look(key, scope)
        identity = identify(self.inventory, found.network, key[1])
        known = self._known((found.network, key[1]), identity)
        if isinstance(identity, Found):
            rules = self._rules(key[0], identity)
            known = replace(
                known,
                how=How.ROUTER.value,
                answer=self._answer(identity.instance, key, rules),
                policy=self._policy(identity.instance, key),
                rules=rules,
            )
        behind = f"router {key[0]} leads to network {found.network}"
        return replace(known, network=key[0], why=(behind, *known.why))

    def _known(self, key: AddressKey, identity: Identity) -> Explanation:
        network, address = key
        if isinstance(identity, Found):
            instance = identity.instance
            known = f"instance {instance.id} has {address}, known by {identity.how.value}"
            rules = self._rules(network, identity)
            return Explanation(
                network,
                address,
                "found",
                self._answer(instance, key, rules),
                (known, *self._freshness(network, address), *self._no_documents(instance)),
                instance=instance.id,
                instance_name=instance.name,
                source=", ".join(self.inventory.sources_of_instance(instance.id)),
                how=identity.how.value,
                revision=self.records.compiler.revisions.get(instance.id),
                policy=self._policy(instance, key),
                rules=rules,
            )
        denial = deny(identity, in_sync=self.inventory.in_sync)
        match identity:
            case Ambiguous(claimants=claimants):
                why = ("more than one record claims the address, and none is preferred",)
                return Explanation(*key, denial.value, denial.status, why, claimants=claimants)
            case Mismatch(instance=instance, expected=expected):
                why = (f"instance {instance.id} has {address} with MAC {expected} only",)
                return Explanation(
                    *key, denial.value, denial.status, why, instance.id, instance.name
                )
            case Unknown(reason=reason):
                then = (
                    "requests are held for a while, then answered 404"
                    if denial is Denial.UNKNOWN
                    else "a source is not in sync: it may still come"
                )
                return Explanation(*key, "unknown", denial.status, (reason.value, then))
        assert_never(identity)

    async def _pair(self, key: AddressKey) -> tuple[tuple[str, ...], PairReport | None]:
        """What MACs have to do with it; nothing where the network does not check them."""
        if not checks_macs(self.inventory, key[0]):
            return (), None
        neighbour, refusal = await self.lookup.last_seen(key)
        seen = neighbour if refusal is None else refusal.mac
        wanted = plan_pair(self.inventory, key, self.records.learned)
        granted = self.lookup.mac_filters.granted(key)
        filtered = self.lookup.mac_filters.is_up(key[0])
        steps = [f"it was last seen with MAC {seen}" if seen else "no MAC was seen with it"]
        if refusal is not None and neighbour not in {None, refusal.mac}:
            age_s = self.lookup.clock.monotonic() - refusal.at
            steps.append(
                f"its request was refused {age_s:.0f} s ago; the neighbour table has MAC {neighbour}"
            )
        if granted == ANY_MAC:
            steps.append("the MAC filter lets it through with any MAC: no record has one")
        elif granted is not None:
            steps.append(f"the MAC filter lets it through with MAC {granted} only")
        elif filtered:
            steps.append("the MAC filter has no pair for it: each request goes to the resolver")
        if not filtered and not self.lookup.mac_filters.is_plain(key[0]):
            steps.append("there is no MAC filter: no guest with a MAC in its record is answered")
        return tuple(steps), PairReport(seen, wanted, granted, filtered)

    async def _cards(self, instance: InstanceId | None) -> tuple[CardReport, ...]:
        known = None if instance is None else self.inventory.instances.get(instance)
        cards = []
        for port in () if known is None else known.ports:
            if port.mac is None:
                continue
            met = [await self.lookup.neighbour((port.network, one)) for one in port.addresses]
            seen = tuple(dict.fromkeys(mac for mac in met if mac is not None))
            cards.append(CardReport(port.network, port.mac, seen))
        return tuple(cards)

    def _freshness(self, network: NetworkId, address: IpAddress) -> tuple[str, ...]:
        source = self.lookup.source
        confirmation = None if source is None else source.confirmation(network, address)
        if source is None or confirmation is None:
            return ()
        step = f"it is port {confirmation.port} of {source.name}, confirmed {confirmation.age_s:.0f} s ago"
        if confirmation.stale:
            step += f"; stale since, because {source.name} does not answer"
        return (step,)

    def _answer(self, instance: Instance, key: AddressKey, rules: PolicyInForce) -> int | None:
        """The status that a document has (`Explanation.answer`)."""
        if rules.endpoint_off:
            return 403
        if instance.upstream is Upstream.NOVA:
            return None if isinstance(self.records.planned(key), NovaRecord) else 503
        if not self.documents_needed or self.documents_problem() is not None:
            return 503
        return 200 if instance.dialects else 404

    def _no_documents(self, instance: Instance) -> tuple[str, ...]:
        problem = self.documents_problem() if instance.upstream is Upstream.EMBEDDED else None
        return () if problem is None else (f"no document is answered now: {problem.reason}",)

    def _policy(self, instance: Instance, key: AddressKey) -> dict[str, str]:
        if instance.upstream is Upstream.EMBEDDED:
            return {"dialects": ", ".join(sorted(instance.dialects)) or "none"}
        record = self.records.planned(key)
        if not isinstance(record, NovaRecord):
            return {"upstream": "nova", "endpoint set": "none: guests get 503"}
        return {"upstream": "nova", "endpoint set": record.endpoint_set, "project": record.project}

    def _rules(self, network: NetworkId, found: Found) -> PolicyInForce:
        """What is in force for a guest of the network, or of the router, that it asks by."""
        book, instance = self.records.policies(), found.instance
        project = found.port.project or instance.project
        return report_policy(
            book.fold(policy_place(self.inventory, network, project, instance)),
            book.override(instance.id),
            instance.created_at,
            self._now(),
        )

    def _decision(self, rules: PolicyInForce, path: str) -> PathDecision:
        now = self._now()
        without, given = (
            decide_read(rules.word, now, path, token=token, paths=rules.paths)
            for token in (False, True)
        )
        return PathDecision(path, without, given)

    def _now(self) -> int:
        return int(self.lookup.clock.now().timestamp())

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
