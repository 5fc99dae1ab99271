"""Prometheus metrics of a hub, one method each (`api.exposition`), and the hub's readiness.

Each hub reports its own view: connected hosts add up over all hubs, while counts from etcd are the same on every hub.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from imdsproxy import __version__
from imdsproxy.api.answers import Readiness
from imdsproxy.api.exposition import Exposed
from imdsproxy.errors import ConfigError
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, HostState, Suspicion
from imdsproxy.fleet.restores import read_suspicion
from imdsproxy.fleet.stream import CONNECT_S
from imdsproxy.host.certificates import parse_certificate
from imdsproxy.hub.hosts.in_force import APPLIED_PATH
from imdsproxy.hub.replica import SILENT_S
from imdsproxy.hub.store.etcd_messages import MemberStatus
from imdsproxy.hub.store.upkeep import absent_hubs
from imdsproxy.reconcile.part import By, Count, Gauge

if TYPE_CHECKING:
    from imdsproxy.hub.hosts.in_force import Peers
    from imdsproxy.hub.parts import Hub
    from imdsproxy.hub.store.etcd_messages import MemberSilent

_LOOK_EVERY_S: Final = 10.0


@dataclass(eq=False)
class HubMetrics(Exposed, prefix="imdsproxy_hub_"):
    """Metrics of a hub, read at each scrape; values that cost a request are refreshed periodically."""

    hub: Hub
    peers: Peers
    started_at: float
    members: Collection[MemberStatus | MemberSilent] = ()
    silent: int = 0
    behind: int = 0
    ends: Mapping[str, float] = field(default_factory=dict)
    _revision: int = 0

    async def run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def refresh(self) -> None:
        """Ask the members of etcd and the other hubs once, and check certificates and hosts."""
        hub = self.hub
        self.ends = await asyncio.to_thread(self._read_ends)
        self.members = await hub.etcd.status()
        urls = self.peers.urls()
        answers = await self.peers.ask_all(APPLIED_PATH, {}, CONNECT_S, {"hosts": []})
        self.silent = len(urls.keys() - answers.keys())
        before, self._revision = self._revision, hub.state.revision
        lacking = (one.lacks(before) for one in hub.streams.hosts.values())
        self.behind = sum(why is not None for why in lacking)

    def _read_ends(self) -> Mapping[str, float]:
        files, found = self.hub.files, {}
        places = {"authority": files.ca_certificate, "hub": files.hub, "operator": files.operator}
        for name, path in places.items():
            try:
                certificate = parse_certificate(path.read_bytes(), str(path))
            except (OSError, ConfigError):
                # Some hubs lack the operator's certificate; without the others a hub does not start.
                continue
            found[name] = certificate.not_valid_after_utc.timestamp()
        return found

    def readiness(self) -> Readiness:
        """Return whether hosts and operators get the current records, with reasons if not."""
        replica = self.hub.replica
        if not replica.complete.is_set():
            return Readiness(ready=False, reasons=("etcd was not read yet",))
        if (why := self.hub.unready()) is not None:
            return Readiness(ready=False, reasons=(why,))
        if (why := self.hub.unsigned()) is not None:
            return Readiness(ready=False, reasons=(why,))
        if replica.failure is not None:
            reason = f"etcd is not followed: {replica.failure.reason}"
            return Readiness(ready=False, reasons=(reason,))
        if (age_s := self.hub.streams.age_s()) > SILENT_S:
            return Readiness(ready=False, reasons=(f"etcd is silent for {age_s:.0f} s",))
        return Readiness(ready=True)

    def _suspicion(self) -> Suspicion | None:
        return read_suspicion(self.hub.state.value)

    def _answering(self) -> list[MemberStatus]:
        return [one for one in self.members if isinstance(one, MemberStatus)]

    def build_info(self) -> Annotated[By, "gauge", "version"]:
        """Always 1; the label has the running version."""
        return {__version__: 1}

    def ready(self) -> Gauge:
        """1 while the hub follows etcd, serves current records, and can sign identity tokens if its settings give any;
        for a 0, the hub's /readyz has the reason.
        """
        return self.readiness().ready

    def start_time_seconds(self) -> Gauge:
        """Unix time of the hub's start."""
        return self.started_at

    def etcd_age_seconds(self) -> Gauge:
        """Seconds since the last change received from etcd; five or less while etcd answers."""
        return self.hub.streams.age_s()

    def etcd_revision(self) -> Gauge:
        """Revision of etcd that the hub has reached."""
        return self.hub.state.revision

    def etcd_member_up(self) -> Annotated[By, "gauge", "member"]:
        """1 while the member of etcd answers this hub."""
        return {one.url: isinstance(one, MemberStatus) for one in self.members}

    def etcd_member_problems(self) -> Annotated[By, "gauge", "member"]:
        """Number of problems that an answering member reports, such as the alarm NOSPACE or no leader;
        `imdsproxy fleet status` has the texts.
        """
        return {one.url: len(one.problems) for one in self._answering()}

    def etcd_database_bytes(self) -> Annotated[By, "gauge", "member"]:
        """Size of a member's database."""
        return {one.url: one.db_size for one in self._answering()}

    def etcd_quota_bytes(self) -> Annotated[By, "gauge", "member"]:
        """Maximum size of a member's database; at this size etcd refuses writes."""
        return {one.url: one.quota for one in self._answering() if one.quota}

    def placed_instances(self) -> Gauge:
        """Instances placed on hosts; an instance that moves counts on both. Equal on all hubs."""
        return self.hub.state.count_placed()

    def hosts(self) -> Annotated[By, "gauge", "state"]:
        """Hosts of the fleet by state: invited, enrolled, revoked, or unreadable if another program wrote the value.
        Equal on all hubs.
        """
        state = self.hub.state
        hosts = (
            state.host(HostId(one.removeprefix(layout.HOSTS))) for one in state.keys(layout.HOSTS)
        )
        states = Counter(one.state.value for one in hosts if one is not None)
        return {one.value: states[one.value] for one in HostState}

    def connected_hosts(self) -> Gauge:
        """Hosts connected to this hub."""
        return len(self.hub.streams.hosts)

    def behind_hosts(self) -> Gauge:
        """Connected hosts on which an item failed or a revision is unacknowledged for ten seconds."""
        return self.behind

    def host_differences(self) -> Count:
        """Number of times that a host's items differed and the hub sent the difference: a fault of imdsproxy, or of a
        disk or memory. The hub's log and `imdsproxy fleet status` name the host.
        """
        return self.hub.streams.differed

    def absent_hubs(self) -> Gauge:
        """Hubs that have ended and were not revoked; `imdsproxy fleet status` names them."""
        return len(absent_hubs(self.hub.state))

    def silent_hubs(self) -> Gauge:
        """Other hubs that follow etcd and do not answer this hub, which knows nothing about their hosts then."""
        return self.silent

    def restore_suspected(self) -> Gauge:
        """1 while hubs or hosts suspect that etcd was restored from a backup; `imdsproxy fleet status` has reasons."""
        return self._suspicion() is not None

    def writes_stopped(self) -> Gauge:
        """1 while hubs write nothing because of a suspected restore, until `imdsproxy fleet accept-restore`."""
        found = self._suspicion()
        return found is not None and found.refuses

    def refused_values(self) -> Gauge:
        """Keys of etcd that another program wrote or deleted; the earlier values stay in force. `imdsproxy fleet
        status` names the keys.
        """
        return len(self.hub.state.problems)

    def loop_failures(self) -> Annotated[By, "counter", "loop"]:
        """Number of unexpected failures of a part of the hub, which was restarted: a fault of imdsproxy. The hub's log
        has the failure; `imdsproxy fleet status` shows it for an hour.
        """
        return {name: one.failures for name, one in self.hub.loops.items() if one.failures}

    def token_keys_unreadable(self) -> Gauge:
        """1 while the newest session token keys in etcd cannot be read; the earlier keys stay in force."""
        return self.hub.state.unread_keys() is not None

    def identity_failing(self) -> Gauge:
        """1 while this hub can sign no identity token; `imdsproxy fleet status` has the reason. No series if the hub's
        settings give no tokens.
        """
        return None if self.hub.issuer is None else self.hub.unsigned() is not None

    def identity_tokens(self) -> Annotated[By, "counter", "outcome"]:
        """Identity tokens that hosts requested of this hub, by outcome: signed, or the reason of the refusal."""
        issuer = self.hub.issuer
        return None if issuer is None else issuer.answered

    def identity_answers(self) -> Count:
        """Answers to hosts that requested identity tokens; a request may be for several tokens."""
        issuer = self.hub.issuer
        return None if issuer is None else issuer.answers

    def identity_answer_seconds(self) -> Count:
        """Seconds that these answers took, with the proof of the guests' place."""
        issuer = self.hub.issuer
        return None if issuer is None else issuer.answered_s

    def certificate_end_seconds(self) -> Annotated[By, "gauge", "certificate"]:
        """Unix time at which a certificate in the hub's directory expires: authority, hub, and operator if present."""
        return self.ends
