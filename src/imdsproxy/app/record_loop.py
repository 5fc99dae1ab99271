"""From observations to records in force: compile, write, tell HAProxy, acknowledge.

One task does all of it. Between compiled instances others may work, and the inventory change; what is planned of it
is planned at once. Observations that come while it works are taken together in the next round.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Final, TypeVar

import structlog

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.anti_spoofing.plan import plan_pairs
from imdsproxy.app.compiler import COMPILER, Compiling, RecordCompiler
from imdsproxy.app.rule_sets import RuleSets
from imdsproxy.app.tickets import Tickets, report_failure
from imdsproxy.app.token_keys import TokenKeys
from imdsproxy.core.fleet.policies import FLEET
from imdsproxy.core.haproxy.maps import PackedMap
from imdsproxy.core.identity import Learned
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId, MacAddress, NetworkId
from imdsproxy.core.nova import NovaRouting
from imdsproxy.core.observation import AddressKey, Affected, Conflict, Expired, Observation
from imdsproxy.core.path_rules import PathRules
from imdsproxy.core.plan import RecordPlanner, parse_record_key, record_key
from imdsproxy.core.policy import PolicyBook
from imdsproxy.core.timing import Backoff, Durations, Progress
from imdsproxy.core.wire import MAP_CONFLICT, MapRecord, parse_map_value
from imdsproxy.dataplane.records import RecordApplier
from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.host.clock import Clock
from imdsproxy.host.process import release_memory

_RETRY_LAST_S = 5.0

_AT_ONCE: Final = 100
"""Instances or addresses that are looked at before the loop may answer others: some milliseconds."""

_MANY: Final = 20_000
"""Addresses of which a list is not worth its memory: all are looked at instead."""

_WORTH_SHOWING: Final = 2_000
"""So many addresses take a second where records have to be compiled."""

_Item = TypeVar("_Item")


@dataclass(slots=True)
class _Work(Affected):
    """What is still to be done; merged from round to round until it is."""

    everything: bool = False

    def add(self, other: Affected, *, everything: bool = False) -> None:
        self.networks |= other.networks
        self.instances |= other.instances
        self.addresses |= other.addresses
        self.everything |= everything


@dataclass(slots=True)
class _RoundPlan:
    """What a round is to bring into force, by address."""

    wanted: dict[str, str | None] = field(default_factory=dict)
    pairs: dict[AddressKey, MacAddress | None] = field(default_factory=dict)
    withheld: frozenset[AddressKey] = frozenset()
    sets: dict[str, PathRules] = field(default_factory=dict)
    armed: frozenset[NetworkId] = frozenset()


@dataclass(slots=True)
class RecordLoop:
    """Keeps compiled records and HAProxy's maps equal to the inventory.

    Args:
        on_networks: Called with networks that came, changed or went.
        on_applied: Called with addresses whose records are in force now; `None` stands for all of them.
        on_gone: Called with instances that no source has any more.
        on_here: Called with instances that changed or came, of sources whose ids may stand for another instance later.
        save: Called before records are planned that need what these two noted; may raise `HostRefused`.
        routing: Where requests go whose documents Nova has, as of now; `resync` after it changed.
        policies: What settings and operators say of guests, as of now; `resync` after it changed.
        sets: Who has HAProxy know path rules.
        keys: Who has it know keys of tokens.

    Attributes:
        failure: Why the last round could not be brought into force.
        withheld: Addresses that the last round kept from HAProxy, because their MACs are not checked yet.
        rounds: Rounds that put observations in force, by the time from the first observation to the acknowledgement.
        progress: Where long rounds say how far they are.
        looked: How many instances and addresses were looked at; it grows as long as a round goes on.
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
    failure: Problem | None = None
    withheld: frozenset[AddressKey] = frozenset()
    in_sync: asyncio.Event = field(default_factory=asyncio.Event)
    rounds: Durations = field(default_factory=Durations)
    progress: Progress = field(default_factory=Progress)
    looked: int = 0
    _since: float | None = None
    _work: _Work = field(default_factory=_Work)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _swept: bool = False

    def observe(self, observation: Observation) -> int:
        """Take in what a source saw; the ticket says when it is in force."""
        expired = self.inventory.has_expired
        affected = self.inventory.observe(observation)
        if self.inventory.has_expired != expired:
            # Also what HAProxy knows from before a restart.
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
            self._wake.set()
        return ticket

    def _report(self, observation: Observation, affected: Affected) -> None:
        self.on_gone(affected.gone)
        # Ids of Neutron's stand for one instance for ever, and of a fleet's instances hubs raise the epoch.
        if not observation.defers and observation.source != FLEET:
            self.on_here(affected.instances - affected.gone)

    def learn(self, key: AddressKey, learned: Learned) -> int:
        """Have HAProxy know an address that no record claims."""
        self.learned[key] = learned
        return self.touch(key)

    def forget(self, key: AddressKey) -> int:
        """Its source reports otherwise now, or its report is too old."""
        self.learned.pop(key, None)
        return self.touch(key)

    def resync(self) -> int:
        """Compare everything again, as after HAProxy came back."""
        self._work.everything = True
        self._wake.set()
        return self.tickets.take()

    def wake(self) -> int:
        """Begin a round, as after keys of instances changed."""
        self._wake.set()
        return self.tickets.take()

    def touch(self, key: AddressKey) -> int:
        """Look at the address again; the ticket says when its record is in force."""
        self._work.addresses.add(key)
        self._wake.set()
        return self.tickets.take()

    def addresses_of(self, instance: InstanceId) -> frozenset[AddressKey]:
        """Every address that an instance is known by, those that were learned too."""
        learned = {key for key, entry in self.learned.items() if entry.instance == instance}
        return self.inventory.addresses_of(instance) | learned

    def touch_networks(self, networks: Collection[NetworkId]) -> None:
        """Look at every address in these networks again."""
        of_instances = (
            key
            for network in networks
            for instance in self.inventory.instances_in(network)
            for key in self.inventory.addresses_of(instance)
        )
        for key in [key for key in chain(of_instances, self.learned) if key[0] in networks]:
            self.touch(key)

    async def reuse_maps(self) -> bool:
        """Have a HAProxy that is yet to start read the maps of the last run, where they would be made just so again.

        Whether that is done. All records are compared later, as after HAProxy was adopted.
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
        """Leave to the next start what spares it work."""
        self.compiler.index.close()
        # A round that is under way has its work no longer in `_work`, and its changes not yet in the maps.
        settled = self.inventory.in_sync and self._swept and self.tickets.done == self.tickets.given
        failures = self.failure or self.compiler.failures
        # Of addresses that lookups have found, and of hop limits that are not there yet, no record is made at a start.
        others = self.learned or self.withheld or self.hop_limits.in_use
        if settled and not (failures or others):
            made_of = self._made_of()
            if made_of is not None:
                self.applier.save_copies(made_of)

    def _made_of(self) -> bytes | None:
        # Records of Nova's guests have signatures, which are not to lie on a disk.
        records = None if self.routing().sets else self.inventory.digest()
        if records is None:
            return None
        others = repr((self.compiler.region(), self.policies()))
        return b" ".join((COMPILER, records, others.encode()))

    async def compile_all(self) -> Mapping[str, str]:
        """Compile every instance and give the whole map, for a HAProxy that is yet to start."""
        whole = self.inventory.in_sync
        if whole:
            # All of it is looked at here. What comes meanwhile is looked at in the first round.
            self._work = _Work()
        compiling = Compiling(self._everybody())
        sets: dict[str, PathRules] = {}
        packed, values, last = PackedMap(), dict[str, str](), ""
        async for keys in self._every_part(compiling):
            self.mac_filters.preload(plan_pairs(self.inventory, keys, self.learned))
            planned = self._planner().plan_records(keys)
            sets.update(planned.sets)
            self.hop_limits.restrict(planned.values)
            values.update((key, value) for key, value in planned.values.items() if value)
            # A network's addresses come together, and networks in the order of their keys.
            last, before = record_key(keys[-1]).rpartition("/")[0] + "/", last
            if last != before and not self.learned:
                done = [key for key in values if not key.startswith(last)]
                packed.extend(sorted((key, values.pop(key)) for key in done))
        self.mac_filters.preload({})
        self.sets.preload(sets)
        self.keys.preload()
        packed.extend(sorted(values.items()))
        if whole:
            # They went while no controller ran.
            self.on_gone(compiling.lost)
            self._remove_all(compiling.unneeded)
            self._swept = True
        self.compiler.index.close()
        return packed

    def _everybody(self) -> set[InstanceId]:
        # On disk there may be others, from an earlier controller.
        others = self.compiler.files.instances() if self.inventory.in_sync else ()
        return {*self.inventory.instances, *others}

    def _unowned(self, keys: Iterable[AddressKey]) -> Iterator[AddressKey]:
        """What a look at every address that anybody has would miss."""
        return (key for key in keys if self.inventory.owner(key) is None)

    async def _every_part(
        self, compiling: Compiling, keys: Iterable[AddressKey] = ()
    ) -> AsyncIterator[list[AddressKey]]:
        """Every address that anybody has, then `keys`, some at a time; who has them is compiled then."""
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
        """Some at a time; between two the loop answers others."""
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
        """Work until cancelled; what fails is kept and tried again, ever more slowly."""
        backoff = Backoff(0.2, _RETRY_LAST_S)
        while True:
            await self._wake.wait()
            self._wake.clear()
            work, self._work = self._work, _Work()
            ticket = self.tickets.given
            since, self._since = self._since, None
            try:
                await self._round(work)
            except DataplaneError as error:
                self._work.add(work, everything=work.everything)
                self._since = since
                self.failure, delay = report_failure(
                    "records", "records not applied", error, backoff
                )
                # New work may be just what helps, so it does not wait for the old.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
                self._wake.set()
                continue
            backoff.succeed()
            self.failure = None
            if since is not None:
                self.rounds.add(self.clock.monotonic() - since)
            await self.tickets.close(ticket)
            if work.everything and self.inventory.address_count > _MANY:
                # What lists and plans of all addresses took.
                work = _Work()
                release_memory()
            if self.compiler.failures:
                asyncio.get_running_loop().call_later(_RETRY_LAST_S, self._retry_failed)

    def _retry_failed(self) -> None:
        self._work.instances |= self.compiler.failures.keys()
        self._wake.set()

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
            # A router's record says what those may read that are behind it, and no instance has a port in a router.
            keys |= {key for key, _ in learned if key[0] in work.networks}
            # An address behind a router stands and falls with the one in its network.
            keys |= {key for key, entry in learned if entry.via in keys}
            self._drop_learned(compiling)
            parts = self._parts(keys)
        # Nothing is swept before the sources have reported everything once.
        sweeping = full and (self.inventory.in_sync or self._swept)
        plan = await self._plan_round(parts, full=full)
        if sweeping:
            await self._plan_sweep(plan)
        if full and self.inventory.has_expired:
            await self._plan_expired(plan)
        await self.sets.ensure(plan.sets, sweep=sweeping)
        await self.keys.ensure(self.applier)
        # The present owner of an address is not let through any more when it becomes another's.
        await self.mac_filters.withdraw(plan.pairs, self._staying(plan))
        await self.applier.apply(plan.wanted)
        await self.mac_filters.grant(plan.pairs)
        if sweeping or self._swept:
            await self.keys.sweep(self.applier, token_keys)
        self.withheld = plan.withheld
        if self.withheld:
            self.on_networks(frozenset(network for network, _ in self.withheld))
        # Only now can no request reach the document server for these any more.
        self._remove_all(compiling.unneeded)
        if self.inventory.in_sync:
            self._swept = True
        if full:
            self.compiler.index.close()
        self.hop_limits.commit(plan.armed, complete=self._swept)
        self.on_applied(None if full else keys)

    def _staying(self, plan: _RoundPlan) -> frozenset[AddressKey]:
        """Addresses whose record in force is of the instance that is to have them."""

        def instance_of(value: str | None) -> InstanceId | None:
            record = None if value is None else parse_map_value(value)
            return None if record is None else record.instance

        staying = set[AddressKey]()
        for key in (key for key, mac in plan.pairs.items() if mac is not None):
            name = record_key(key)
            value = self.applier.state.lookup(name)
            before = instance_of(value)
            # A full round plans no record that is in force already.
            if before is not None and before == instance_of(plan.wanted.get(name, value)):
                staying.add(key)
        return frozenset(staying)

    def _is_of_fleet(self, instance: InstanceId) -> bool:
        return FLEET in self.inventory.sources_of_instance(instance)

    async def _plan_round(
        self, parts: AsyncIterator[list[AddressKey]], *, full: bool
    ) -> _RoundPlan:
        """What these addresses are to have; of a full round only what they do not have, which is little or all."""
        plan = _RoundPlan(armed=self.hop_limits.restrict({}))
        async for part in parts:
            planned = self._planner().plan_records(part)
            wanted = planned.values
            pairs = plan_pairs(self.inventory, part, self.learned)
            withheld = self.mac_filters.withheld(pairs)
            wanted.update(dict.fromkeys(record_key(key) for key in withheld))
            # A rule that any part counts on is one that is needed.
            plan.armed |= self.hop_limits.restrict(wanted)
            plan.sets.update(planned.sets)
            plan.withheld |= withheld
            plan.wanted.update(self.applier.state.differing(wanted) if full else wanted)
            plan.pairs.update(self.mac_filters.differing(pairs) if full else pairs)
        return plan

    async def _plan_sweep(self, plan: _RoundPlan) -> None:
        """Add what is in force and has no owner any more; what `plan` has nothing of is as it should be."""

        def is_gone(key: AddressKey | None) -> bool:
            return key is None or (key not in self.learned and self.inventory.owner(key) is None)

        async for keys in self._parts(self.mac_filters.keys()):
            plan.pairs.update(dict.fromkeys(key for key in keys if is_gone(key)))
        state = self.applier.state
        async for names in self._parts(chain(state.base, state.overlay)):
            gone = (one for one in names if is_gone(parse_record_key(one)))
            plan.wanted.update(state.differing(dict.fromkeys(gone)))

    async def _plan_expired(self, plan: _RoundPlan) -> None:
        """Withhold addresses that HAProxy knows and nothing here any more: learned before a restart."""
        async for part in self._parts(tuple(self.applier.state.effective().items())):
            plan.wanted.update(
                (name, MAP_CONFLICT) for name, value in part if self._is_expired(value)
            )

    def _is_expired(self, value: str) -> bool:
        record = parse_map_value(value)
        return record is not None and self.inventory.expired(record.instance) is not None

    def keep_of_last_run(self, values: Mapping[str, str]) -> dict[str, str]:
        """Records of the last run that are served on, although their sources are not in sync yet."""
        return {key: value for key, value in values.items() if not self._is_expired(value)}

    async def _compile_rest(self, compiling: Compiling) -> None:
        rest = tuple(compiling.left)
        async for part in self._parts(rest, "compiling instances", len(rest)):
            self.compiler.compile(part, compiling, starting=not self._swept)

    def _drop_learned(self, compiling: Compiling) -> list[AddressKey]:
        """Know no addresses of instances that no source has any more; which those were."""
        lost = [key for key, entry in self.learned.items() if entry.instance in compiling.lost]
        for key in lost:
            del self.learned[key]
        return lost

    def planned(self, key: AddressKey) -> MapRecord | Conflict | Expired | None:
        """What the data plane is to know of an address now."""
        record = self._planner().plan_record(key)
        if not isinstance(record, MapRecord) or not record.policy:
            return record
        return replace(record, policy=self.hop_limits.effective(key[0], record.policy))

    def _planner(self) -> RecordPlanner:
        revisions, policies = self.compiler.revisions, self.policies()
        return RecordPlanner(self.inventory, revisions, self.learned, self.routing(), policies)

    def _remove_all(self, instances: Iterable[InstanceId]) -> None:
        for instance in instances:
            # One that came back meanwhile is looked at in the next round.
            if instance not in self._work.instances:
                self.compiler.remove(instance)
