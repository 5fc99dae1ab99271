"""Loop that brings listeners into force: observe the host, plan, act on the host, reload HAProxy.

Every round observes the host before it decides. A listener that cannot be bound is reported, and never prevents another
listener from coming into force.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import structlog

from imdsproxy.errors import ConfigRejected, HostRefused, Problem, ReloadFailed
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.config import render_config
from imdsproxy.haproxy.rules.model import DataplaneSpec
from imdsproxy.haproxy.unix_listener.listener import UnixListener, bound_path
from imdsproxy.host.clock import Clock
from imdsproxy.host.process import descriptor_limit
from imdsproxy.host.servers import try_tcp_listen
from imdsproxy.host.state import Effect
from imdsproxy.model.entities import Network, NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.anti_spoofing.plan import MacFilterPlan
from imdsproxy.network.endpoints import (
    compute_maxconn,
    find_degraded,
    networks_of,
    owners_of,
    plan_binds,
    plan_links,
)
from imdsproxy.network.listeners.apply import apply_links, haproxy_name
from imdsproxy.network.listeners.host import KeptNetworks, SystemHost
from imdsproxy.network.listeners.plan import ListenerPlan, plan_redirects
from imdsproxy.network.listeners.watch import HostWatch
from imdsproxy.network.planned import Endpoint, Foreign, NotServed, NotServedCode
from imdsproxy.reconcile.part import By, Gauge, Part, Times
from imdsproxy.reconcile.progress import Durations
from imdsproxy.reconcile.reconciler import Reconciler, Tickets

_RECHECK_S = 1.0
"""Seconds until refused operations are tried again without an event."""

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The last plan: its operations, its reasons, and its failures (which are retried)."""

    at: float
    operations: int
    reasons: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    took_s: float = 0.0


@dataclass(slots=True)
class ListenerRequests:
    """Requests for rounds of the listeners; parts that are made before the loop need them."""

    host: SystemHost
    tickets: Tickets = field(default_factory=Tickets)
    reasons: set[str] = field(default_factory=set)
    rounds: Reconciler = field(
        default_factory=partial(Reconciler, "listeners", "listeners not applied", 0.2, 5.0)
    )

    def touch(self, reason: str, networks: Iterable[NetworkId] | None = None) -> int:
        """Observe the host again. Return a ticket that closes once the result is in force.

        Args:
            networks: Networks whose listeners to observe; `None` for the whole host.
        """
        self.host.touch(networks)
        self.reasons.add(reason)
        self.rounds.wake()
        return self.tickets.take()


@dataclass(slots=True)
class ListenerLoop(Part):
    """Keeps HAProxy's binds equal to the listeners that the networks want and the host allows.

    Attributes:
        settings: Returns HAProxy's configuration from the settings, without binds; `maxconn` 0 to compute it.
        on_trust: Called with networks whose rule for trusting guests has changed.
        audits_per_s: Returns the number of networks to compare with the kernel each second without an event.
        serves_routers: Whether a source reports routers, so that their tables of an earlier process may stay.
    """

    inventory: Inventory
    requests: ListenerRequests
    haproxy: Haproxy
    clock: Clock
    settings: Callable[[], DataplaneSpec]
    audits_per_s: Callable[[], float]
    mac_filters: MacFilters
    hop_limits: HopLimits
    serves_routers: bool
    kept: KeptNetworks
    unix: UnixListener
    on_trust: Callable[[frozenset[NetworkId]], object] = lambda _: None
    host: SystemHost = field(init=False)
    tickets: Tickets = field(init=False)
    last_plan: ListenerPlan = field(default_factory=ListenerPlan)
    working: bool = False
    taken: tuple[Problem, ...] = ()
    rounds: int = 0
    durations: Durations = field(default_factory=Durations)
    watch: HostWatch = field(init=False)
    _listening: MacFilterPlan = field(default_factory=MacFilterPlan)
    _undirected: tuple[Problem, ...] = ()
    _degraded: frozenset[NotServed] = frozenset()
    _released: frozenset[NetworkId] = frozenset()

    def __post_init__(self) -> None:
        self.host, self.tickets = self.requests.host, self.requests.tickets
        self.watch = HostWatch(self.host, self.touch, self.audits_per_s)

    def touch(self, reason: str, networks: Iterable[NetworkId] | None = None) -> int:
        return self.requests.touch(reason, networks)

    @property
    def failure(self) -> Problem | None:
        return self.requests.rounds.failure

    def problems(self) -> tuple[Problem | None, ...]:
        return (self.failure, *self.last_plan.problems)

    async def report(self) -> Mapping[str, object]:
        plan = self.last_plan
        failed = tuple(map(str, plan.problems))
        return {
            "serving": self.serving,
            "last_plan": PlanReport(plan.at, plan.operations, plan.reasons, failed, plan.seconds),
            "foreign": _list_idle(plan.foreign),
        }

    def networks_serving(self) -> Gauge:
        """Networks that are served as configured."""
        return self.serving

    def networks_not_served(self) -> Annotated[By, "gauge", "code"]:
        """Configured networks that are not served now, by the code of the reason."""
        degraded = {(one.network, one.code.value) for one in self.degraded()}
        return Counter(code for _, code in degraded)

    def foreign_listeners(self) -> Annotated[By, "gauge", "effect"]:
        """Sockets of other programs at networks' addresses and port, by effect.

        The effects are `blocks` (HAProxy cannot listen), `shares` (both answer guests) and `yields` (HAProxy alone
        answers guests). `status` and the log name the programs.
        """
        foreign = self.last_plan.foreign
        return {
            effect.value: len({one.socket for one in foreign if one.effect is effect})
            for effect in Effect
        }

    def plan_seconds(self) -> Times:
        """Time to apply a plan."""
        return self.durations

    def plan_operations(self) -> Annotated[By, "counter", "result"]:
        """Operations of plans by result: ok or failed (failed operations are retried)."""
        return self.host.operations

    async def release_networks(self, networks: Iterable[NetworkId]) -> None:
        """Stop listening in these networks for as long as this controller runs: another process listens there.

        Their records stay in force: open connections still get answers. Returns once the change is in force.
        """
        self._released |= frozenset(networks)
        await self.tickets.wait(self.touch("released", self._released))

    def degraded(self) -> tuple[NotServed, ...]:
        known, last = self.inventory, self.last_plan
        return find_degraded(
            known.networks, known.contradictory, last.endpoints, last.not_served, last.foreign
        )

    @property
    def serving(self) -> int:
        """Number of networks that imdsproxy alone serves, over every family that their guests use."""
        wrong = {one.network for one in self.degraded()}
        return len(networks_of(self.last_plan.endpoints) - wrong)

    def spec(self) -> DataplaneSpec:
        """Return the configuration for the endpoints of the last round, with the current settings.

        Raises:
            HostRefused: The limit on open files is too low for the endpoints.
        """
        settings = self.settings()
        links = haproxy_name(self.host.links)
        listening = self._listening
        binds = plan_binds((*listening.plain, *listening.verified), links)
        unverified = plan_binds(listening.unverified, links)
        maxconn = compute_maxconn(settings.limits.maxconn, binds + unverified, descriptor_limit())
        return replace(
            self._leave_out_taken(settings),
            binds=binds,
            unverified=unverified,
            limits=replace(settings.limits, maxconn=maxconn),
            unix=self.unix.bind,
        )

    def _leave_out_taken(self, wanted: DataplaneSpec) -> DataplaneSpec:
        """Return the settings without frontends whose address cannot be bound; set `taken` to the reasons."""
        exporter, issuer = wanted.exporter, wanted.issuer
        no_exporter = self._find_taken(
            "metrics.haproxy_listen", "HAProxy's exporter", "exporter", exporter
        )
        listen = None if issuer is None else issuer.listen
        no_issuer = self._find_taken("identity.listen", "the issuer's documents", "issuer", listen)
        self.taken = tuple(one for one in (no_exporter, no_issuer) if one is not None)
        return replace(
            wanted,
            exporter=None if no_exporter else exporter,
            issuer=None if no_issuer else issuer,
        )

    def _find_taken(
        self, setting: str, served: str, name: str, address: str | None
    ) -> Problem | None:
        """Return the reason why HAProxy cannot bind this address; `None` if it can, or need not.

        Args:
            served: Subject of the reason's sentence.
            name: Name of the bind in HAProxy's configuration.
        """
        # If no HAProxy of ours runs, the configuration proves nothing: another program may have the port.
        config = "" if self.haproxy.processes is None else self.haproxy.in_force()
        if address is None or f" bind {address} name {name} " in config:
            return None
        host, _, port = address.rpartition(":")
        refused = try_tcp_listen(host.strip("[]"), int(port))
        if refused is None:
            return None
        hint = "free the port, or choose another; guests are served meanwhile"
        return Problem(setting, f"{served} cannot be served: {refused}", hint)

    def render(self) -> str:
        """Render HAProxy's configuration as of now, without changing anything.

        Raises:
            HostRefused: The limit on open files is too low.
        """
        return render_config(self.spec())

    async def first_look(self) -> None:
        """Act on the host before the first round, which then finds the host ready.

        Raises:
            HostRefused: The host's own namespace cannot be observed.
        """
        if not self.serves_routers:
            await self.host.remove_tables()
        await self._settle(self._networks())

    async def first_round(self) -> None:
        """Start HAProxy, or update its configuration. Raises `DataplaneError`: HAProxy or the host refuses."""
        await self._round(("start",))

    async def run(self) -> None:
        await self.requests.rounds.run(self._next_round, after_s=self._patience_s())

    def _patience_s(self) -> float | None:
        return _RECHECK_S if self.last_plan.problems or self.last_plan.waiting else None

    async def _next_round(self) -> float | None:
        ticket = self.tickets.given
        reasons = tuple(sorted(self.requests.reasons))
        self.requests.reasons.clear()
        if not reasons:
            # No event, but time has passed.
            self.host.touch(one.network for one in self.last_plan.not_served)
        self.working = True
        try:
            await self._round(reasons or ("recheck",))
        finally:
            self.working = False
        await self.tickets.close(ticket)
        return self._patience_s()

    async def _round(self, reasons: tuple[str, ...]) -> None:
        began = self.clock.monotonic()
        networks = self._networks()
        operations = 0
        for attempt in range(3):
            if attempt < 2:  # noqa: PLR2004 - the third is the same without the unix listener
                plan = await self._settle(networks)
                operations += plan.operations
                await self.unix.choose()
            try:
                endpoints = await self._apply(plan.endpoints, reasons)
                break
            except (ConfigRejected, ReloadFailed) as error:
                if attempt == 0:
                    # An object may have gone between observation and load: observe everything again, once.
                    self.host.touch(None)
                elif attempt == 1 and not self.unix.disable_if_rejected(error):
                    raise
                elif attempt > 1:
                    self.unix.clear_rejection()
                    raise
        # Networks that lost a shared listener are not kept: the network that has the listener keeps it next round too.
        shared = {
            one.network for one in plan.not_served if one.code is NotServedCode.LISTENER_SHARED
        }
        self.kept.keep({key: one for key, one in networks.items() if key not in shared})
        own = () if self.unix.problem is None else (self.unix.problem,)
        no_tables = (self.mac_filters.refused, self.hop_limits.refused)
        refused = (
            *(some[network] for some in no_tables for network in sorted(some)),
            *self._undirected,
        )
        self.watch.expect(networks, {one.network for one in plan.not_served if one.code.silent})
        self.rounds += 1
        self.durations.add(self.clock.monotonic() - began)
        before, known = self.last_plan, self._degraded
        self.last_plan = replace(
            plan,
            at=self.clock.now().timestamp(),
            endpoints=endpoints,
            problems=(*plan.problems, *self.taken, *own, *refused),
            operations=operations,
            reasons=reasons,
            seconds=self.clock.monotonic() - began,
        )
        self._degraded = frozenset(self.degraded())
        self._log_new(before, known)

    async def _settle(self, networks: Mapping[NetworkId, Network]) -> ListenerPlan:
        return await self.host.settle(networks, self.kept.load(), sweep=self.inventory.in_sync)

    def _networks(self) -> dict[NetworkId, Network]:
        before = {} if self.inventory.in_sync else self.kept.load()
        known = {**before, **self.inventory.networks}
        return {name: one for name, one in known.items() if name not in self._released}

    async def _apply(
        self, endpoints: tuple[Endpoint, ...], reasons: tuple[str, ...]
    ) -> tuple[Endpoint, ...]:
        """Make HAProxy listen on the endpoints. Return those on which it listens now."""
        unsafe, changed = await self.hop_limits.open(endpoints)
        if changed:
            self.on_trust(changed)
        endpoints = tuple(one for one in endpoints if one.network not in unsafe)
        self._listening = await self.mac_filters.open(
            self._networks(), endpoints, self.host.seen, running=self.haproxy.processes is not None
        )
        await self.mac_filters.release(self._listening, sweep=self.inventory.in_sync)
        # The old worker no longer reads the links. The next worker needs all of its own.
        namespaces = str(self.host.thread.directory.path)
        apply_links(self.host.links, plan_links(self._listening.binds, namespaces))
        gone, come = plan_redirects(self._listening.binds, self.host.seen, self.host.naming)
        for problem in (await self.host.carry_out(gone)).values():
            raise HostRefused(problem.reason, hint=problem.hint)
        before = bound_path(self.haproxy.in_force())
        spec = self.spec()
        if self.unix.rebind:
            await self.haproxy.apply(replace(spec, unix=None), ", ".join(reasons))
        done = await self.haproxy.apply(spec, ", ".join(reasons))
        self._undirected = tuple((await self.host.carry_out(come)).values())
        changed = await self.mac_filters.settle(self._listening, sweep=self.inventory.in_sync)
        if changed:
            self.on_trust(changed)
        await self.hop_limits.sweep()
        await self.unix.settle(before)
        if done is not None and (last := self.haproxy.last_reload) is not None:
            structlog.get_logger().info(
                "configuration in force",
                reason=last.reason,
                result=done,
                networks=len(networks_of(endpoints)),
                took_ms=round(last.took_s * 1000),
            )
        return endpoints

    def _log_new(self, before: ListenerPlan, known: frozenset[NotServed]) -> None:
        log = structlog.get_logger()
        for left in sorted(self._degraded - known, key=lambda one: one.network):
            # Pending listeners resolve by themselves; foreign listeners have their own line.
            if left.code not in {NotServedCode.PENDING, NotServedCode.FOREIGN_LISTENER}:
                why = {"code": left.code.value, "reason": left.reason, "hint": left.hint}
                log.warning("listener not served", network=left.network, **why)
        for foreign in self.last_plan.foreign:
            if foreign not in before.foreign:
                owners = foreign.socket.owners
                log.warning(
                    "foreign listener",
                    network=foreign.network,
                    effect=foreign.effect.value,
                    pids=[owner.pid for owner in owners],
                    programs=[owner.command for owner in owners],
                )
        for one in self.last_plan.problems:
            if one not in before.problems:
                log.error("host refused", field=one.field, reason=one.reason, hint=one.hint)


def _list_idle(foreign: Iterable[Foreign]) -> tuple[str, ...]:
    found = dict.fromkeys(
        f"network {one.network}: {owners_of([one.socket])} listens on {one.socket.address} port {one.socket.port}"
        for one in foreign
        if one.effect is Effect.YIELDS
    )
    lines, more = list(found)[:_SHOWN], len(found) - _SHOWN
    return (*lines, f"and {more} more") if more > 0 else tuple(lines)
