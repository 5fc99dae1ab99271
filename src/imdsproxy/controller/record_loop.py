"""Loop that puts observations in force: compile, write, update HAProxy, acknowledge.

One task does all of this. It yields between instances, so the inventory may change during a round. What the round plans
is computed without a pause. Observations that arrive during a round are handled together in the next one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Final, TypeVar

import structlog

from imdsproxy.controller.compiler import COMPILER, Compiling, RecordCompiler
from imdsproxy.controller.record_plan import RecordPlanner, parse_record_key, record_key
from imdsproxy.controller.rule_sets import RuleSets
from imdsproxy.controller.subjects import Subjects
from imdsproxy.controller.token_keys import TokenKeys
from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.fleet.guests import FLEET
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.maps import PackedMap
from imdsproxy.host.clock import Clock
from imdsproxy.host.process import release_memory
from imdsproxy.model.entities import InstanceId, MacAddress, NetworkId
from imdsproxy.model.identity import Learned
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Affected, Conflict, Expired, Observation
from imdsproxy.model.path_rules import PathRules
from imdsproxy.model.policy import PolicyBook
from imdsproxy.model.subject import Subject
from imdsproxy.model.wire import MAP_CONFLICT, MapRecord, parse_map_value
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.anti_spoofing.plan import plan_pairs
from imdsproxy.nova.routing import NovaRouting
from imdsproxy.reconcile.part import Part, Times
from imdsproxy.reconcile.progress import Durations, Progress
from imdsproxy.reconcile.reconciler import Reconciler, Tickets

_RETRY_LAST_S = 5.0

_AT_ONCE: Final = 100
"""Instances or addresses processed before the loop yields to other tasks: some milliseconds."""

_MANY: Final = 20_000
"""Pending addresses from which a round looks at all addresses: a longer list would cost too much memory."""

_WORTH_SHOWING: Final = 2_000
"""Addresses from which a step reports progress: compiling so many records takes a second."""

_Item = TypeVar("_Item")


@dataclass(slots=True)
class _Work(Affected):
    """Pending work, merged from round to round until a round succeeds."""

    everything: bool = False

    def add(self, other: Affected, *, everything: bool = False) -> None:
        self.networks |= other.networks
        self.instances |= other.instances
        self.addresses |= other.addresses
        self.everything |= everything


@dataclass(slots=True)
class _RoundPlan:
    """Changes that a round brings into force, by address. Keys without an entry stay as they are."""

    wanted: dict[str, str | None] = field(default_factory=dict)
    pairs: dict[AddressKey, MacAddress | None] = field(default_factory=dict)
    withheld: frozenset[AddressKey] = frozenset()
    sets: dict[str, PathRules] = field(default_factory=dict)
    subjects: dict[str, Subject] = field(default_factory=dict)
    armed: frozenset[NetworkId] = frozenset()


@dataclass(slots=True)
class RecordLoop(Part):
    """Reconcile loop that keeps compiled records and HAProxy's maps equal to the inventory.

    Args:
        subjects: Subjects of identity tokens; `None` if this host gives no identity tokens.
        on_here: Callback for new or changed instances of sources that may give their ids to other instances later.
        save: Callback before a round plans records, to store the notes of `on_gone` and `on_here`; may raise
            `HostRefused`.
        routing: Current Nova routing of requests; call `resync` after a change.
        policies: Current policies of settings and operators; call `resync` after a change.

    Attributes:
        withheld: Addresses that the last round kept from HAProxy because their MACs are not checked yet.
        rounds: Durations of rounds with observations, from the first observation to the acknowledgement.
        looked: Number of instances and addresses processed; it grows as long as a round makes progress.
    """

    inventory: Inventory
    applier: RecordApplier
    compiler: RecordCompiler
    clock: Clock
    on_networks: Callable[[frozenset[NetworkId]], object]
    on_applied: Callable[[Iterable[AddressKey] | None], None]
    mac_filters: MacFilters
    hop_limits: HopLimits
    sets: RuleSets
    keys: TokenKeys
    routing: Callable[[], NovaRouting] = NovaRouting
    policies: Callable[[], PolicyBook] = PolicyBook
    on_gone: Callable[[Collection[InstanceId]], None] = lambda _: None
    on_here: Callable[[Collection[InstanceId]], None] = lambda _: None
    save: Callable[[], None] = lambda: None
    learned: dict[AddressKey, Learned] = field(default_factory=dict)
    tickets: Tickets = field(default_factory=Tickets)
    withheld: frozenset[AddressKey] = frozenset()
    in_sync: asyncio.Event = field(default_factory=asyncio.Event)
    rounds: Durations = field(default_factory=Durations)
    subjects: Subjects | None = None
    progress: Progress = field(default_factory=Progress)
    looked: int = 0
    _since: float | None = None
    _work: _Work = field(default_factory=_Work)
    _rounds: Reconciler = field(
        default_factory=partial(Reconciler, "records", "records not applied", 0.2, _RETRY_LAST_S)
    )
    _swept: bool = False

    @property
    def failure(self) -> Problem | None:
        return self._rounds.failure

    def problems(self) -> tuple[Problem | None, ...]:
        return (*self.compiler.failures.values(), self.failure)

    async def report(self) -> Mapping[str, object]:
        return {"progress": self.progress.steps}

    def convergence_seconds(self) -> Times:
        """Time from a source's observation until every worker of HAProxy has confirmed it."""
        return self.rounds

    def observe(self, observation: Observation) -> int:
        """Apply a source's observation; return the ticket that closes when its records are in force."""
        expired = self.inventory.has_expired
        affected = self.inventory.observe(observation)
        if self.inventory.has_expired != expired:
            # The round must also look at addresses that HAProxy knows from before a restart.
            self._work.everything = True
        self._report(observation, affected)
        if self._work.everything:
            if self._work.addresses:
                self._work.addresses -= affected.addresses
            affected.addresses = set(self._unowned(affected.addresses))
        self._work.add(affected)
        if len(self._work.addresses) > _MANY and not self._work.everything:
            self._work.everything = True
            self._work.addresses = set(self._unowned(self._work.addresses))
        if affected.networks or affected.in_sync:
            self.on_networks(frozenset(affected.networks))
        if self.inventory.in_sync:
            self.in_sync.set()
        else:
            self.in_sync.clear()
        if affected.in_sync:
            self.on_applied(None)
        if self._since is None:
            self._since = self.clock.monotonic()
        ticket = self.tickets.take()
        if not observation.more:
            self._rounds.wake()
        return ticket

    def _report(self, observation: Observation, affected: Affected) -> None:
        self.on_gone(affected.gone)
        # Neutron never reuses an instance's id, and for instances of a fleet the hubs raise the epoch.
        if not observation.defers and observation.source != FLEET:
            self.on_here(affected.instances - affected.gone)

    def learn(self, key: AddressKey, learned: Learned) -> int:
        """Give HAProxy a record for an address that no source's record claims."""
        self.learned[key] = learned
        return self.touch(key)

    def forget(self, key: AddressKey) -> int:
        """Drop a learned address: its source's report has changed or is too old."""
        self.learned.pop(key, None)
        return self.touch(key)

    def resync(self) -> int:
        """Start a full comparison, as after a restart of HAProxy."""
        self._work.everything = True
        self._rounds.wake()
        return self.tickets.take()

    def wake(self) -> int:
        """Start a round, as after a change of instances' keys."""
        self._rounds.wake()
        return self.tickets.take()

    def touch(self, key: AddressKey) -> int:
        """Plan the address again; return the ticket that closes when its record is in force."""
        self._work.addresses.add(key)
        self._rounds.wake()
        return self.tickets.take()

    def addresses_of(self, instance: InstanceId) -> frozenset[AddressKey]:
        """Return every address of an instance, with the learned ones."""
        learned = {key for key, entry in self.learned.items() if entry.instance == instance}
        return self.inventory.addresses_of(instance) | learned

    def touch_networks(self, networks: Collection[NetworkId]) -> None:
        of_instances = (
            key
            for network in networks
            for instance in self.inventory.instances_in(network)
            for key in self.inventory.addresses_of(instance)
        )
        for key in [key for key in chain(of_instances, self.learned) if key[0] in networks]:
            self.touch(key)

    async def reuse_maps(self) -> bool:
        """Let HAProxy start with the maps of the last run, if this run would make the same maps.

        Return whether that is the case. All records are compared later, as after HAProxy was adopted.
        """
        applier = self.applier
        in_sync = self.inventory.in_sync
        if not (in_sync and applier.restore_copies(self._made_of) and applier.load()):
            return False
        self.keys.preload()
        async for part in self._parts(key for key, _ in self.inventory.addresses()):
            self.mac_filters.preload(plan_pairs(self.inventory, part, self.learned))
        self.resync()
        structlog.get_logger().info(
            "records are those of the last run", records=len(applier.state.base)
        )
        return True

    def settle(self) -> None:
        """Store what saves the next start work: the index, and copies of the maps if all records are in force."""
        self.compiler.index.close()
        # A round under way has emptied `_work` already, but its changes are not in the maps yet.
        settled = self.inventory.in_sync and self._swept and self.tickets.done == self.tickets.given
        failures = self.failure or self.compiler.failures
        # A start makes no records for learned addresses, for withheld ones, or with hop limits whose rules are not
        # there yet.
        others = self.learned or self.withheld or self.hop_limits.in_use
        if settled and not (failures or others):
            made_of = self._made_of()
            if made_of is not None:
                self.applier.save_copies(made_of)

    def _made_of(self) -> bytes | None:
        # Records of Nova's guests contain signatures, which must not be stored on disk.
        records = None if self.routing().sets else self.inventory.digest()
        if records is None:
            return None
        others = repr((self.compiler.region(), self.policies(), self.subjects is not None))
        return b" ".join((COMPILER, records, others.encode()))

    async def compile_all(self) -> Mapping[str, str]:
        """Compile every instance and return the whole map, for a HAProxy that has not started yet."""
        whole = self.inventory.in_sync
        if whole:
            # This call handles all pending work. What arrives during it is handled in the first round.
            self._work = _Work()
        compiling = Compiling(self._everybody())
        sets: dict[str, PathRules] = {}
        subjects: dict[str, Subject] = {}
        packed, values, last = PackedMap(), dict[str, str](), ""
        async for keys in self._every_part(compiling):
            self.mac_filters.preload(plan_pairs(self.inventory, keys, self.learned))
            planned = self.planner().plan_records(keys)
            sets.update(planned.sets)
            subjects.update(planned.subjects)
            self.hop_limits.restrict(planned.values)
            values.update((key, value) for key, value in planned.values.items() if value)
            # Addresses are grouped by network, and networks are sorted by key.
            last, before = record_key(keys[-1]).rpartition("/")[0] + "/", last
            if last != before and not self.learned:
                done = [key for key in values if not key.startswith(last)]
                packed.extend(sorted((key, values.pop(key)) for key in done))
        self.mac_filters.preload({})
        self.sets.preload(sets)
        if self.subjects is not None:
            self.subjects.ensure(subjects)
        self.keys.preload()
        packed.extend(sorted(values.items()))
        if whole:
            self._remove_all(compiling)
            self._swept = True
        self.compiler.index.close()
        return packed

    def _everybody(self) -> set[InstanceId]:
        # The disk may hold records of other instances, from an earlier controller.
        others = self.compiler.files.instances() if self.inventory.in_sync else ()
        return {*self.inventory.instances, *others}

    def _unowned(self, keys: Iterable[AddressKey]) -> Iterator[AddressKey]:
        """Yield the addresses without an owner in the inventory; a pass over all owned addresses misses them."""
        return (key for key in keys if self.inventory.owner(key) is None)

    async def _every_part(
        self, compiling: Compiling, keys: Iterable[AddressKey] = ()
    ) -> AsyncIterator[list[AddressKey]]:
        """Yield every owned address, then `keys`, in batches; compile the owners of each batch."""
        count = self.inventory.address_count
        async for owned in self._parts(self.inventory.addresses(), "comparing records", count):
            owners = {owner for _, owner in owned if isinstance(owner, str)}
            self.compiler.compile(owners & compiling.left, compiling, starting=not self._swept)
            yield [key for key, _ in owned]
        await self._compile_rest(compiling)
        rest = chain(keys, self._drop_learned(compiling), tuple(self.learned))
        async for part in self._parts(rest):
            yield part

    async def _parts(
        self, items: Iterable[_Item], step: str = "", of: int = 0
    ) -> AsyncIterator[list[_Item]]:
        """Yield the items in batches; yield to other tasks between two batches."""
        rest, done = iter(items), 0
        while part := list(islice(rest, _AT_ONCE)):
            yield part
            done += len(part)
            self.looked += len(part)
            if step and of > _WORTH_SHOWING:
                self.progress.note(step, done, of)
            await asyncio.sleep(0)
        self.progress.end(step)

    async def run(self) -> None:
        """Run rounds until cancelled. Retry failed work with backoff."""
        await self._rounds.run(self._next_round)

    async def _next_round(self) -> None:
        work, self._work = self._work, _Work()
        ticket = self.tickets.given
        since, self._since = self._since, None
        try:
            await self._round(work)
        except DataplaneError:
            self._work.add(work, everything=work.everything)
            self._since = since
            raise
        if since is not None:
            self.rounds.add(self.clock.monotonic() - since)
        await self.tickets.close(ticket)
        if work.everything and self.inventory.address_count > _MANY:
            # Free the memory of the lists and plans of all addresses.
            del work
            release_memory()
        if self.compiler.failures:
            asyncio.get_running_loop().call_later(_RETRY_LAST_S, self._retry_failed)

    def _retry_failed(self) -> None:
        self._work.instances |= self.compiler.failures.keys()
        self._rounds.wake()

    async def _round(self, work: _Work) -> None:
        token_keys = self.keys.needed(self._is_of_fleet)
        self.save()
        full = work.everything or (self.inventory.in_sync and not self._swept)
        if full:
            work.everything = True
            compiling = Compiling(work.instances | self._everybody())
            keys = set(self._unowned(work.addresses))
            parts = self._every_part(compiling, keys)
        else:
            compiling = Compiling(set(work.instances), keys=set())
            await self._compile_rest(compiling)
            keys = work.addresses | (compiling.keys or set())
            learned = self.learned.items()
            keys |= {key for key, entry in learned if entry.instance in work.instances}
            # A router's record decides what the addresses behind it may read, and no instance has a port in a router.
            keys |= {key for key, _ in learned if key[0] in work.networks}
            # The record of an address behind a router depends on the address in its own network.
            keys |= {key for key, entry in learned if entry.via in keys}
            self._drop_learned(compiling)
            parts = self._parts(keys)
        # No record is swept before every source has sent a full report.
        sweeping = full and (self.inventory.in_sync or self._swept)
        plan = await self._plan_round(parts, full=full)
        if sweeping:
            await self._plan_sweep(plan)
        if full and self.inventory.has_expired:
            await self._plan_expired(plan)
        await self.sets.ensure(plan.sets, sweep=sweeping)
        replaced: set[str] = set()
        if self.subjects is not None:
            self.subjects.ensure(plan.subjects)
            before = map(self.applier.state.lookup, plan.wanted)
            replaced = self.subjects.replaced(before, plan.subjects)
        await self.keys.ensure(self.applier)
        # The old owner of an address loses its MAC pair before the map names the new owner.
        await self.mac_filters.withdraw(plan.pairs, self._staying(plan))
        await self.applier.apply(plan.wanted)
        await self.mac_filters.grant(plan.pairs)
        if sweeping or self._swept:
            await self.keys.sweep(self.applier, token_keys)
        if self.subjects is not None and (sweeping or self._swept):
            self.subjects.sweep(self.applier.state, None if sweeping else replaced)
        self.withheld = plan.withheld
        if self.withheld:
            self.on_networks(frozenset(network for network, _ in self.withheld))
        # Only now can no request for these instances reach the document server.
        self._remove_all(compiling)
        if self.inventory.in_sync:
            self._swept = True
        if full:
            self.compiler.index.close()
        self.hop_limits.commit(plan.armed, complete=self._swept)
        self.on_applied(None if full else keys)

    def _staying(self, plan: _RoundPlan) -> frozenset[AddressKey]:
        """Return the addresses whose record in force and planned record belong to the same instance."""

        def instance_of(value: str | None) -> InstanceId | None:
            record = None if value is None else parse_map_value(value)
            return None if record is None else record.instance

        staying = set[AddressKey]()
        for key in (key for key, mac in plan.pairs.items() if mac is not None):
            name = record_key(key)
            value = self.applier.state.lookup(name)
            before = instance_of(value)
            # A full round plans no record that is already in force.
            if before is not None and before == instance_of(plan.wanted.get(name, value)):
                staying.add(key)
        return frozenset(staying)

    def _is_of_fleet(self, instance: InstanceId) -> bool:
        return FLEET in self.inventory.sources_of_instance(instance)

    async def _plan_round(
        self, parts: AsyncIterator[list[AddressKey]], *, full: bool
    ) -> _RoundPlan:
        """Plan the addresses' records and MAC pairs. A full round keeps only the differences: few, or all."""
        plan = _RoundPlan(armed=self.hop_limits.restrict({}))
        async for part in parts:
            planned = self.planner().plan_records(part)
            wanted = planned.values
            pairs = plan_pairs(self.inventory, part, self.learned)
            withheld = self.mac_filters.withheld(pairs)
            wanted.update(dict.fromkeys(record_key(key) for key in withheld))
            # A hop-limit rule is needed if any batch relies on it.
            plan.armed |= self.hop_limits.restrict(wanted)
            plan.sets.update(planned.sets)
            plan.subjects.update(planned.subjects)
            plan.withheld |= withheld
            plan.wanted.update(self.applier.state.differing(wanted) if full else wanted)
            plan.pairs.update(self.mac_filters.differing(pairs) if full else pairs)
        return plan

    async def _plan_sweep(self, plan: _RoundPlan) -> None:
        """Plan the removal of records and MAC pairs in force whose addresses have no owner."""

        def is_gone(key: AddressKey | None) -> bool:
            return key is None or (key not in self.learned and self.inventory.owner(key) is None)

        async for keys in self._parts(self.mac_filters.keys()):
            plan.pairs.update(dict.fromkeys(key for key in keys if is_gone(key)))
        state = self.applier.state
        async for names in self._parts(chain(state.base, state.overlay)):
            gone = (one for one in names if is_gone(parse_record_key(one)))
            plan.wanted.update(state.differing(dict.fromkeys(gone)))

    async def _plan_expired(self, plan: _RoundPlan) -> None:
        """Withhold addresses that HAProxy's maps give to expired instances: they were learned before a restart."""
        async for part in self._parts(tuple(self.applier.state.effective().items())):
            plan.wanted.update(
                (name, MAP_CONFLICT) for name, value in part if self._is_expired(value)
            )

    def _is_expired(self, value: str) -> bool:
        record = parse_map_value(value)
        return record is not None and self.inventory.expired(record.instance) is not None

    def keep_of_last_run(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return the records of the last run that are served until the sources are in sync."""
        return {key: value for key, value in values.items() if not self._is_expired(value)}

    async def _compile_rest(self, compiling: Compiling) -> None:
        rest = tuple(compiling.left)
        async for part in self._parts(rest, "compiling instances", len(rest)):
            self.compiler.compile(part, compiling, starting=not self._swept)

    def _drop_learned(self, compiling: Compiling) -> list[AddressKey]:
        """Drop learned addresses of instances that no source reports; return these addresses."""
        lost = [key for key, entry in self.learned.items() if entry.instance in compiling.lost]
        for key in lost:
            del self.learned[key]
        return lost

    def planned(self, key: AddressKey) -> MapRecord | Conflict | Expired | None:
        """Return the record that HAProxy should have for an address now, or why there is none."""
        record = self.planner().plan_record(key)
        if not isinstance(record, MapRecord) or not record.policy:
            return record
        return replace(record, policy=self.hop_limits.effective(key[0], record.policy))

    def planner(self) -> RecordPlanner:
        return RecordPlanner(
            self.inventory,
            self.compiler.revisions,
            self.learned,
            self.routing(),
            self.policies(),
            identity=self.subjects is not None,
            region=self.compiler.region(),
        )

    def _remove_all(self, compiling: Compiling) -> None:
        if not self._swept:
            # A start finds instances that were removed while no controller ran.
            self.on_gone(compiling.lost - self._work.instances)
            self.save()
        for instance in compiling.unneeded:
            # An instance that came back during the round is handled in the next one.
            if instance not in self._work.instances:
                self.compiler.remove(instance)
