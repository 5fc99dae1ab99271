"""Operations behind the routes of a hub's API, and their results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from imdsproxy.api.answers import Readiness, Written
from imdsproxy.errors import EtcdUnavailable, NotFound
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    Journal,
    Suspicion,
    host_key,
    operator_key,
    parse_journal,
)
from imdsproxy.fleet.restores import read_suspicion
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.host.clock import Clock
from imdsproxy.hub.api.verdict import judge_fleet
from imdsproxy.hub.hosts.in_force import COMING, InForce, Peers, Reported
from imdsproxy.hub.hosts.issuer import explain_unsigned
from imdsproxy.hub.hosts.sealed import Passwords
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.pki.authority import Authority
from imdsproxy.hub.replica import SILENT_S
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_members import START_MEMBERS, spell_outage
from imdsproxy.hub.store.etcd_messages import Compacted, MemberSilent, MemberStatus, prefix_end
from imdsproxy.hub.store.imports import Import
from imdsproxy.hub.store.restores import Restores
from imdsproxy.hub.store.state import FleetState
from imdsproxy.hub.store.upkeep import list_hubs
from imdsproxy.hub.store.writes import Done, Writes
from imdsproxy.reconcile.progress import Step

if TYPE_CHECKING:
    from imdsproxy.hub.hosts.sealed import TokenKeyRing

_NEARLY_FULL: Final = 0.7
_ANSWER_S: Final = 600.0
"""Seconds for which a finished import waits for its client; the client asks every second."""

WITHHELD: Final = "it is not in force there: an operator of all projects sees why"


@dataclass(frozen=True, slots=True)
class FleetWritten(Written):
    """Result of a change of a fleet's records.

    Attributes:
        hosts: Hosts on which the change must be in force.
    """

    revision: int = 0
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Importing:
    """Large import that runs in the background, by its name."""

    importing: str
    progress: list[Step]


@dataclass(frozen=True, slots=True)
class Moved(FleetWritten):
    """Result of one step of a move.

    Attributes:
        serving: Current hosts of the instance; `hosts` also has the hosts that it left.
    """

    serving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetHost:
    """Host of the fleet.

    Attributes:
        state: `invited`, `enrolled`, `revoked`, or `unreadable` if another program wrote its value.
        failed: Items that are not in force on the host, with reasons.
    """

    host: str
    state: str
    hub: str | None
    acknowledged: int | None
    instances: int
    failed: dict[str, str]


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """Status of a fleet at one moment, as this hub sees it.

    Attributes:
        incarnation: Number that rises each time an operator accepts a restored backup.
        suspect: Reason to suspect that etcd was restored from a backup.
        writes_stopped: Hubs write nothing because of the suspicion. A single host's claim does not stop writes.
        hubs: All hubs, each with its URL, whether it answers this hub, and the start of its absence (Unix time).
        behind: Names of enrolled hosts with failed items.
        absent: Names of enrolled hosts that are not connected.
        renewing: Names of enrolled hosts whose certificates predate the last change of the fleet's CAs.
        authority_ends: Expiry of the signing CA's certificate (Unix time); other certificates expire no later.
        regained: Memberships, revocations and overrides that etcd had lost and hubs put back, by owner.
        problems: Reasons by subject. An etcd key: another program wrote or deleted its value. `host NAME`: the host
            had other items than its own, or presents an invalid certificate. `loop NAME`: a part of the hub failed and
            was restarted. `hub NAME`: this hub serves no host. `hub NAME, signer`: this hub signs no identity token.
            `etcd`: the quorum is lost.
        token_keys: Reason why the newest keys of session tokens cannot be read; the older keys stay in force.
        imports: Unfinished imports with the number of stored records and of all records; empty while etcd is away.
        etcd: Members of etcd: `url`, `leads`, size and quota of the database in bytes, and `problems` in words.
        readiness: Whether changes are possible, and reasons for a degraded state; `fleet status --check` uses it.
    """

    fleet: str
    incarnation: int
    revision: int
    suspect: str | None
    writes_stopped: bool
    hubs: list[dict[str, Any]]
    networks: int
    instances: int
    hosts: int
    connected: int
    behind: list[str]
    absent: list[str]
    renewing: list[str]
    authority_ends: float | None
    regained: dict[str, str]
    problems: dict[str, str]
    token_keys: str | None
    imports: list[dict[str, Any]]
    etcd: list[dict[str, Any]]
    readiness: Readiness = field(default_factory=lambda: Readiness(ready=True))


@dataclass(slots=True)
class Operations:
    """Parts of a hub that its API uses.

    Args:
        token_keys: Session token keys, if this hub has certificates and so an envelope.
    """

    etcd: Etcd
    state: FleetState
    streams: Streams
    writes: Writes
    in_force: InForce
    restores: Restores
    clock: Clock
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    token_keys: TokenKeyRing | None = None
    authority: Authority | None = None
    hub_problems: Callable[[], Mapping[str, str]] = dict
    unready: Callable[[], str | None] = lambda: None
    unsigned: Callable[[], str | None] = lambda: None
    imports: dict[str, tuple[Import, asyncio.Task[FleetWritten]]] = field(default_factory=dict)

    def begin(self, one: Import) -> str:
        """Start an import unless it runs already; return its name."""

        async def run() -> FleetWritten:
            done = await one.run()
            counts = {"networks": len(one.networks), "instances": len(one.instances)}
            return await self.confirm(done, None, **counts)

        known, loop = self.imports.get(one.name), asyncio.get_running_loop()
        if known is None or known[1].done():
            task = loop.create_task(run())
            self.imports[one.name] = one, task
            task.add_done_callback(
                lambda done: loop.call_later(_ANSWER_S, self.forget, one.name, done)
            )
        return one.name

    def forget(self, name: str, task: asyncio.Task[FleetWritten]) -> None:
        """Drop a finished import, unless the same records are imported again."""
        if name in self.imports and self.imports[name][1] is task:
            del self.imports[name]

    def progress(self, scope: str | None) -> list[Step]:
        """Return the progress of imports; with a scope, of the imports that operators of this project started."""
        imports = (one for one, _ in self.imports.values())
        return [
            step
            for one in imports
            if scope in {None, one.terms.scope}
            for step in one.progress.steps
        ]

    @property
    def passwords(self) -> Passwords:
        return Passwords(self.writes)

    @property
    def peers(self) -> Peers:
        return self.in_force.peers

    def refuse_unknown(self, host: HostId) -> None:
        if self.state.stored(host_key(host)) is None:
            raise no_such_host(host)

    def holder_of(self, name: str) -> str | None:
        """Return a description of the hub or operator that has a name; `None` if hosts may use the name."""
        places = (f"{prefix}{name}" for prefix in (layout.HUBS, layout.KNOWN_HUBS))
        if name == self.peers.name or any(self.state.stored(one) is not None for one in places):
            return "a hub"
        if self.state.value(operator_key(name)) is not None:
            return "a hub or operator that was revoked"
        return self.restores.journal.names.get(name)

    async def confirm(
        self, done: Done, items: Collection[ItemKey] | None, **counts: int
    ) -> FleetWritten:
        """Wait until a change is in force on its hosts; return the result with the pending hosts.

        Args:
            items: Changed items; failures of other items do not count.
        """
        pending = await self.in_force.wait(done.hosts, done.revision, items)
        return self.written(done, pending, **counts)

    def written(
        self, done: Done, pending: Mapping[HostId, str] | None = None, **counts: int
    ) -> FleetWritten:
        """Return the answer to a change; operators of one project get no error texts of hosts (`Caller.reported`)."""
        reasons = {
            host: why if done.scope is None or why in COMING else WITHHELD
            for host, why in (pending or {}).items()
        }
        return FleetWritten(
            counts.get("networks", 0),
            counts.get("instances", 0),
            applied=not pending,
            pending=tuple(f"host {host}: {why}" for host, why in reasons.items()),
            revision=done.revision,
            hosts=tuple(sorted(done.hosts)),
        )

    async def report_hosts(self) -> list[FleetHost]:
        return self._hosts(await self.in_force.report_all())

    def _hosts(self, reported: Reported) -> list[FleetHost]:
        found = []
        for key in sorted(self.state.keys(layout.HOSTS)):
            host = HostId(key.removeprefix(layout.HOSTS))
            stored = self.state.host(host)
            if stored is not None and codec.is_id(host):
                known = reported.get(host, {})
                found.append(
                    FleetHost(
                        host,
                        stored.state.value,
                        known.get("hub"),
                        known.get("acknowledged"),
                        len(self.state.instances_on(host)),
                        dict(known.get("failed", {})),
                    )
                )
        return found

    async def report(self) -> FleetStatus:
        (reported, answering), (imports, damaged), members, alive = await asyncio.gather(
            self.in_force.ask_hubs(),
            self._imports(),
            self.etcd.status(),
            self.peers.ask_alive(),
        )
        unsigned = self._list_unsigned(alive)
        clocks = {
            name: f"its clock is {ahead_s:+.0f} s from that of {self.peers.name}: set the clocks by NTP"
            for name, ahead_s in self.peers.compare_clocks(alive).items()
        }
        state = self.state
        enrolled = [one for one in self._hosts(reported) if one.state == HostState.ENROLLED]
        suspicion, urls = read_suspicion(state.value), self.peers.urls()
        unready = self.unready()
        status = FleetStatus(
            fleet=state.meta.fleet,
            incarnation=state.meta.incarnation,
            revision=state.revision,
            suspect=None if suspicion is None else _spell(suspicion),
            writes_stopped=suspicion is not None and suspicion.refuses,
            hubs=list_hubs(state, self.peers.name, urls, frozenset(answering)),
            networks=state.count_records(layout.NETWORKS),
            instances=state.count_records(layout.INSTANCES),
            hosts=len(enrolled),
            connected=sum(1 for one in enrolled if one.hub is not None),
            behind=[one.host for one in enrolled if one.failed],
            absent=[one.host for one in enrolled if one.hub is None],
            renewing=self._renewing(),
            authority_ends=None
            if self.authority is None
            else self.authority.certificate.not_valid_after_utc.timestamp(),
            regained={} if suspicion is None else dict(suspicion.regained),
            problems={
                **self._own_problems(),
                **{codec.plain(key): why for key, why in (state.problems | damaged).items()},
                **{f"host {host}": why for host, why in self.streams.refused().items()},
                **{f"host {host}": why for host, why in self.streams.differing().items()},
                **self.hub_problems(),
                **{f"hub {name}, signer": why for name, why in unsigned.items()},
                **{f"hub {name}": why for name, why in clocks.items()},
                **({} if unready is None else {f"hub {self.peers.name}": unready}),
                **({} if (lost := _lost_quorum(members)) is None else {"etcd": lost}),
            },
            token_keys=self.state.unread_keys(),
            imports=[{"done": one.done, "of": one.of, "at": one.at} for one in imports],
            etcd=[_member(one) for one in members],
        )
        age_s = self.streams.age_s()
        reasons = [] if unready is None else [unready]
        reasons += [f"this hub has no answer of etcd for {age_s:.0f} s"] if age_s > SILENT_S else []
        return replace(status, readiness=judge_fleet(status, members, reasons))

    def _list_unsigned(self, alive: Mapping[str, Any]) -> dict[str, str]:
        """Return why hubs sign no identity token, by hub: this hub, and the others that have answered."""
        unsigned = [name for name, answer in alive.items() if answer.get("unsigned") is True]
        reasons = dict.fromkeys(unsigned, explain_unsigned("its /readyz has the reason"))
        if (why := self.unsigned()) is not None:
            reasons[self.peers.name] = why
        return dict(sorted(reasons.items()))

    def _own_problems(self) -> dict[str, str]:
        found, name = {}, self.peers.name
        if (problem := self.restores.journal.problem) is not None:
            found["journal"] = f"hub {name} cannot write it: {problem}"
        for key, why in self.restores.journal.unreadable.items():
            found[f"journal of hub {name}, {key}"] = f"not readable: {why}"
        if HostId(name) in self.state.enrolled():
            found[f"hub {name}"] = (
                "a host has its name, too: revoke the host, and enrol it under another name"
            )
        return found

    def _renewing(self) -> list[str]:
        if self.authority is None:
            return []
        known, found = {"", self.authority.trusted_digest}, []
        for host in self.state.enrolled():
            stored = self.state.host(host)
            if stored is not None and stored.trusts not in known:
                found.append(str(host))
        return found

    async def _imports(self) -> tuple[list[Journal], dict[str, str]]:
        found, damaged = list[Journal](), dict[str, str]()
        try:
            journals = await self.etcd.read(layout.IMPORTS, prefix_end(layout.IMPORTS))
        except (EtcdUnavailable, Compacted):
            # The report has the members' problems as well.
            return found, damaged
        for one in journals.kvs:
            try:
                journal = parse_journal(one.value)
            except codec.Unreadable as error:
                damaged[one.key] = f"revision {one.mod_revision} is not readable: {error}"
            else:
                found += [journal] if journal.done < journal.of else []
        return found, damaged


def _lost_quorum(members: Collection[MemberStatus | MemberSilent]) -> str | None:
    """Return the reason for a lost quorum: members answer, but none knows a leader; otherwise `None`."""
    answering = [one for one in members if isinstance(one, MemberStatus) or one.leaderless]
    if not answering or any(isinstance(one, MemberStatus) and one.leader for one in answering):
        return None
    return f"{spell_outage(len(answering), len(members))}; {START_MEMBERS}"


def _member(member: MemberStatus | MemberSilent) -> dict[str, Any]:
    match member:
        case MemberSilent(url, reason):
            return {"url": url, "problems": [f"does not answer: {reason}"]}
        case MemberStatus():
            problems = list(member.problems)
            if member.quota and member.db_size > _NEARLY_FULL * member.quota:
                share = f"{member.db_size / member.quota:.0%}"
                problems.append(f"its database has {share} of its quota: compact and defragment it")
            return {
                "url": member.url,
                "leads": member.leader == member.id,
                "bytes": member.db_size,
                "quota_bytes": member.quota,
                "problems": problems,
            }


def no_such_host(host: HostId) -> NotFound:
    """Return the error for a host that does not exist or that the caller may not know."""
    return NotFound(f"the fleet has no host {host}", hint="imdsproxy fleet hosts")


def _spell(suspicion: Suspicion) -> str:
    if suspicion.refuses:
        return f"{suspicion.why} (nothing is written)"
    (host,) = suspicion.hosts
    return f"{suspicion.why} (host {host} alone claims that: changes go on)"
