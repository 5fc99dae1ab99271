"""From observations to records in force: compile, write, tell HAProxy, acknowledge.

One task does all of it. Between compiled instances others may work, and the inventory change; what is planned of it
is planned at once. Observations that come while it works are taken together in the next round.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace

import structlog

from imdsproxy.admin.snapshot import Durations
from imdsproxy.app.keepers import (
    CompiledFiles,
    HopKeeper,
    NoHops,
    NoPairs,
    NoSets,
    PairKeeper,
    SetKeeper,
)
from imdsproxy.app.tickets import Tickets
from imdsproxy.core.compiled import compile_instance
from imdsproxy.core.documents.renamed import list_warnings, warn_of_names
from imdsproxy.core.identity import Learned
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId, NetworkId, Upstream
from imdsproxy.core.observation import AddressKey, Affected, Conflict, Observation
from imdsproxy.core.pairs import plan_pairs
from imdsproxy.core.plan import PlannedRecords, plan_record, plan_records, record_key
from imdsproxy.core.policy import PolicyBook
from imdsproxy.core.upstream import NovaRouting
from imdsproxy.core.wire import MapRecord
from imdsproxy.dataplane.records import RecordApplier
from imdsproxy.errors import DataplaneError, ImdsproxyError, Problem
from imdsproxy.host.clock import Clock

__all__ = ["RecordLoop"]

_RETRY_FIRST_S = 0.2
_RETRY_LAST_S = 5.0
_TOGETHER = 100


@dataclass(slots=True)
class _Work:
    """What is still to be done; merged from round to round until it is."""

    instances: set[InstanceId] = field(default_factory=set)
    addresses: set[AddressKey] = field(default_factory=set)
    networks: set[NetworkId] = field(default_factory=set)
    everything: bool = False

    def add(self, affected: Affected) -> None:
        self.networks |= affected.networks
        self.instances |= affected.instances
        self.addresses |= affected.addresses

    def merge(self, other: _Work) -> None:
        self.instances |= other.instances
        self.addresses |= other.addresses
        self.networks |= other.networks
        self.everything |= other.everything

    def __bool__(self) -> bool:
        return bool(self.instances or self.addresses or self.networks or self.everything)


async def _in_turns(instances: Iterable[InstanceId]) -> AsyncIterator[InstanceId]:
    """One after the other, letting others work in between: a hundred thousand take half a minute."""
    for number, instance in enumerate(tuple(instances)):
        if number and number % _TOGETHER == 0:
            await asyncio.sleep(0)
        yield instance


@dataclass(slots=True)
class RecordLoop:
    """Keeps compiled records and HAProxy's maps equal to the inventory.

    Args:
        on_networks: Told of networks that came, changed or went.
        on_applied: Told of addresses whose records are in force now; `None` stands for all of them.
        routing: Where requests go whose documents Nova has, as of now; `resync` after it changed.
        policies: What settings and operators say of guests, as of now; `resync` after it changed.
        pairs: Who lets addresses through by their MACs.
        hops: Who sees to hop limits.
        sets: Who has HAProxy know path rules.
        region: The region that the settings name, as of now; `resync` after it changed.

    Attributes:
        warnings: Of instances whose documents differ from their records.
        withheld: Addresses that the last round kept from HAProxy, because nobody looks at their MACs yet.
        rounds: Rounds that put observations in force, by the time from the first observation to the acknowledgement.
    """

    inventory: Inventory
    applier: RecordApplier
    files: CompiledFiles
    clock: Clock
    on_networks: Callable[[frozenset[NetworkId]], None]
    on_applied: Callable[[Iterable[AddressKey] | None], None]
    routing: Callable[[], NovaRouting] = NovaRouting
    policies: Callable[[], PolicyBook] = PolicyBook
    pairs: PairKeeper = field(default_factory=NoPairs)
    hops: HopKeeper = field(default_factory=NoHops)
    sets: SetKeeper = field(default_factory=NoSets)
    region: Callable[[], str | None] = lambda: None
    revisions: dict[InstanceId, str] = field(default_factory=dict)
    learned: dict[AddressKey, Learned] = field(default_factory=dict)
    tickets: Tickets = field(default_factory=Tickets)
    failures: dict[str, Problem] = field(default_factory=dict)
    warnings: dict[InstanceId, tuple[Problem, ...]] = field(default_factory=dict)
    withheld: frozenset[AddressKey] = frozenset()
    in_sync: asyncio.Event = field(default_factory=asyncio.Event)
    rounds: Durations = field(default_factory=Durations)
    _since: float | None = None
    _work: _Work = field(default_factory=_Work)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _swept: bool = False

    def observe(self, observation: Observation) -> int:
        """Take in what a source saw; the ticket says when it is in force."""
        affected = self.inventory.observe(observation)
        self._work.add(affected)
        if affected.networks or affected.in_sync:
            self.on_networks(affected.networks)
        if self.inventory.in_sync:
            self.in_sync.set()
        else:
            self.in_sync.clear()
        if affected.in_sync:
            self.on_applied(None)
        if self._since is None:
            self._since = self.clock.monotonic()
        ticket = self.tickets.take()
        self._wake.set()
        return ticket

    def learn(self, key: AddressKey, learned: Learned) -> int:
        """Have HAProxy know an address that no record claims."""
        self.learned[key] = learned
        return self.touch(key)

    def forget(self, key: AddressKey) -> int:
        """Who told of it says otherwise now, or its word is too old."""
        self.learned.pop(key, None)
        return self.touch(key)

    def resync(self) -> int:
        """Compare everything again, as after HAProxy came back."""
        self._work.everything = True
        self._wake.set()
        return self.tickets.take()

    def touch(self, key: AddressKey) -> int:
        """Look at the address again; the ticket says when its record is in force."""
        self._work.addresses.add(key)
        self._wake.set()
        return self.tickets.take()

    async def compile_all(self) -> dict[str, str]:
        """Compile every instance and give the whole map, for a HAProxy that is yet to start."""
        async for instance in _in_turns(self.inventory.instances):
            known = self.inventory.instances.get(instance)
            if known is not None and known.upstream is Upstream.EMBEDDED:
                self._compile(instance)
        keys = [*(key for key, _ in self.inventory.addresses()), *self.learned]
        pairs = plan_pairs(self.inventory, keys, self.learned)
        self.pairs.prime(pairs, complete=self.inventory.in_sync)
        planned = self._plan(keys)
        wanted = planned.values
        self.sets.prime(planned.sets)
        self.hops.hold(wanted)
        return {key: value for key, value in wanted.items() if value is not None}

    async def run(self) -> None:
        """Work until cancelled; what fails is kept and tried again, ever more slowly."""
        log = structlog.get_logger()
        delay = _RETRY_FIRST_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            work, self._work = self._work, _Work()
            ticket = self.tickets.given
            since, self._since = self._since, None
            try:
                await self._round(work)
            except DataplaneError as error:
                self._work.merge(work)
                self._since = since
                self.failures["records"] = Problem("records", error.message, error.hint)
                log.error(  # noqa: TRY400 - expected, and told in full
                    "records not applied", code=error.code, error=error.message, retry_in_s=delay
                )
                await self._wait_for_retry(delay)
                delay = min(delay * 2, _RETRY_LAST_S)
                continue
            delay = _RETRY_FIRST_S
            self.failures.pop("records", None)
            if since is not None:
                self.rounds.add(self.clock.monotonic() - since)
            await self.tickets.close(ticket)
            if any(name.startswith("instances.") for name in self.failures):
                self._retry_failed_later()

    async def _wait_for_retry(self, delay: float) -> None:
        # New work may be just what helps, so it does not wait for the old.
        try:
            async with asyncio.timeout(delay):
                await self._wake.wait()
        except TimeoutError:
            self._wake.set()

    def _retry_failed_later(self) -> None:
        def again() -> None:
            for name in list(self.failures):
                if name.startswith("instances."):
                    self._work.instances.add(InstanceId(name.removeprefix("instances.")))
            self._wake.set()

        asyncio.get_running_loop().call_later(_RETRY_LAST_S, again)

    async def _round(self, work: _Work) -> None:
        if work.everything or (self.inventory.in_sync and not self._swept):
            work = self._all_work(work)
        gone, keys = await self._compile_all_of(work.instances)
        keys |= work.addresses
        # A router's record says what those may read that are behind it, and no instance has a port in a router.
        keys |= {key for key in self.learned if key[0] in work.networks}
        # An address behind a router stands and falls with the one in its network.
        keys |= {key for key, entry in self.learned.items() if entry.via in keys}
        planned = self._plan(keys)
        wanted = planned.values
        pairs = plan_pairs(self.inventory, keys, self.learned)
        # Nothing is swept before the sources have told everything.
        sweeping = self.inventory.in_sync and (work.everything or not self._swept)
        await self.sets.have(planned.sets, sweep=sweeping)
        if sweeping:
            wanted = {**dict.fromkeys(self.applier.state.effective()), **wanted}
            pairs = {**dict.fromkeys(self.pairs.keys()), **pairs}
        withheld = self.pairs.withheld(pairs)
        wanted.update(dict.fromkeys(record_key(key) for key in withheld))
        armed = self.hops.hold(wanted)
        # Whoever has an address now is not let through any more when it becomes another's.
        await self.pairs.withdraw(pairs)
        await self.applier.apply(wanted)
        await self.pairs.grant(pairs)
        self.withheld = withheld
        if withheld:
            self.on_networks(frozenset(network for network, _ in withheld))
        # Only now can nobody be sent to the document server for these any more.
        for instance in gone:
            # One that came back meanwhile is looked at in the next round.
            if instance not in self._work.instances:
                self._remove(instance)
        if self.inventory.in_sync:
            self._swept = True
        self.hops.settled(armed, complete=self._swept)
        self.on_applied(None if work.everything else keys)

    async def _compile_all_of(
        self, instances: Iterable[InstanceId]
    ) -> tuple[list[InstanceId], set[AddressKey]]:
        """Compile what is to be; say whose records are not needed any more, and what has changed."""
        unneeded: list[InstanceId] = []
        lost: set[InstanceId] = set()
        keys: set[AddressKey] = set()
        async for instance in _in_turns(instances):
            known = self.inventory.instances.get(instance)
            if known is None:
                if not self.inventory.sources_of_instance(instance):
                    unneeded.append(instance)
                    lost.add(instance)
            elif known.upstream is Upstream.NOVA:
                if instance in self.revisions or not self._swept:
                    unneeded.append(instance)
            else:
                before = self.revisions.get(instance)
                self._compile(instance)
                if self.revisions.get(instance) != before:
                    keys |= self.inventory.addresses_of(instance)
        touched = set(instances)
        keys |= {key for key, entry in self.learned.items() if entry.instance in touched}
        for key in [key for key, entry in self.learned.items() if entry.instance in lost]:
            del self.learned[key]
        return unneeded, keys

    def _all_work(self, work: _Work) -> _Work:
        everything = _Work(everything=work.everything)
        everything.instances = set(self.inventory.instances) | work.instances
        everything.addresses = {key for key, _ in self.inventory.addresses()} | work.addresses
        everything.addresses |= set(self.learned)
        if self.inventory.in_sync:
            # Left over from an earlier controller.
            everything.instances |= set(self.files.instances())
        return everything

    def planned(self, key: AddressKey) -> MapRecord | Conflict | None:
        """What the data plane is to know of an address now."""
        record = plan_record(
            self.inventory,
            key,
            self.revisions,
            self.learned,
            self.routing(),
            policies=self.policies(),
        )
        if record is None or isinstance(record, Conflict) or not record.policy:
            return record
        return replace(record, policy=self.hops.word(key[0], record.policy))

    def _plan(self, keys: Iterable[AddressKey]) -> PlannedRecords:
        return plan_records(
            self.inventory,
            keys,
            self.revisions,
            self.learned,
            self.routing(),
            policies=self.policies(),
        )

    def _compile(self, instance: InstanceId) -> None:
        name = f"instances.{instance}"
        record = compile_instance(
            self.inventory.instances[instance], self.inventory.networks, self.region()
        )
        if self.revisions.get(instance) == record.revision and name not in self.failures:
            return
        try:
            self.files.apply(instance, record)
        except ImdsproxyError as error:
            # The record before stays on disk and in force; guests read on, the operator is told.
            self.failures[name] = Problem(name, error.message, error.hint)
            structlog.get_logger().error(
                "record not written", instance=instance, code=error.code, error=error.message
            )
            return
        self.failures.pop(name, None)
        self.revisions[instance] = record.revision
        before = self.warnings.pop(instance, ())
        if found := warn_of_names(self.inventory.instances[instance]):
            self.warnings[instance] = found
        # At a start `status` lists them, and a line for each would be too many.
        if found and found != before and self._swept:
            structlog.get_logger().warning(
                "guests see other names than the record has",
                instance=instance,
                warnings=list_warnings(found),
            )

    def _remove(self, instance: InstanceId) -> None:
        name = f"instances.{instance}"
        try:
            self.files.remove(instance)
        except ImdsproxyError as error:
            self.failures[name] = Problem(name, error.message, error.hint)
            return
        self.failures.pop(name, None)
        self.revisions.pop(instance, None)
        self.warnings.pop(instance, None)
