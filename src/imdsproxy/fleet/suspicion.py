"""Suspicion that etcd was restored from a backup: claims of hubs and hosts, and the decision to stop writes. Pure.

A hub's claim stops writes. A single host may be compromised, so two hosts must agree. A host's claim counts only while
the host's membership lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from imdsproxy.fleet.layout import (
    SUSPECT,
    HostId,
    Json,
    Meta,
    Unreadable,
    View,
    decode,
    encode,
    is_id,
    is_number,
    plain,
)
from imdsproxy.fleet.members import HostState, StoredHost, host_key, parse_host

WITNESSES: Final = 2
"""Number of hosts that must agree before writes stop."""

MOST_CLAIMS: Final = 16
"""Maximum number of stored host claims: more than two have no effect."""

MOST_REGAINED: Final = 500
"""Maximum number of stored lines on restored values; the hubs' logs have all of them."""

MOST_AHEAD: Final = 1000
"""Maximum lead of a host's incarnation over the fleet's: more than any series of restores loses."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence that etcd was restored from a backup.

    Attributes:
        why: Data that etcd lacks.
        host: Host that claims this; `None` for a hub's own evidence.
        revision: Revision that the host has: etcd is older if it lacks the revision; 0 if `why` is enough.
        incarnation: Incarnation that the host has: etcd is older if it lacks the incarnation; 0 if `why` is enough.
        regained: Values that hubs restore in etcd, by their owner (`lasting.describe_regained`).
    """

    why: str
    host: HostId | None = None
    revision: int = 0
    incarnation: int = 0
    regained: Mapping[str, str] = field(default_factory=dict)

    def is_refuted(self, revision: int, meta: Meta | None) -> bool:
        """Return whether etcd has the host's data at this revision."""
        if meta is None or meta.incarnation < self.incarnation:
            return False
        return 0 < self.revision <= revision or self.incarnation > 0


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim of one host.

    Attributes:
        incarnation: Highest incarnation that the host has seen.
        revocations: Value of `StoredHost.revocations` at the time of the claim.
    """

    incarnation: int
    revocations: int = 0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """All claims that etcd was restored.

    Attributes:
        why: First evidence.
        hubs: Hubs that noticed a restore, each with the highest incarnation that the hub has seen.
        hosts: Claims of hosts.
        regained: Values that hubs restored in etcd, by their owner; only the first `MOST_REGAINED`.
    """

    why: str
    hubs: Mapping[str, int] = field(default_factory=dict)
    hosts: Mapping[HostId, Claim] = field(default_factory=dict)
    regained: Mapping[str, str] = field(default_factory=dict)

    @property
    def refuses(self) -> bool:
        """Whether all writes are refused."""
        return bool(self.hubs) or len(self.hosts) >= WITNESSES

    @property
    def incarnation(self) -> int:
        """The highest incarnation of all claims; 0 without one."""
        hosts = (claim.incarnation for claim in self.hosts.values())
        return max((*self.hubs.values(), *hosts), default=0)

    def add_hub(self, hub: str, incarnation: int) -> Suspicion:
        """Return the suspicion with a hub's claim."""
        highest = max(incarnation, self.hubs.get(hub, 0))
        return replace(self, hubs={**self.hubs, hub: highest})

    def add_host(self, host: HostId, claim: Claim) -> Suspicion:
        """Return the suspicion with a host's claim; of too many claims, those with the highest incarnations stay."""
        claims = sorted({**self.hosts, host: claim}.items(), key=lambda item: -item[1].incarnation)
        return replace(self, hosts=dict(sorted(claims[:MOST_CLAIMS])))

    def regain(self, regained: Mapping[str, str]) -> Suspicion:
        """Return the suspicion with more restored values."""
        everything = sorted({**self.regained, **regained}.items())
        return replace(self, regained=dict(everything[:MOST_REGAINED]))

    def of_members(self, member: Callable[[HostId], StoredHost | None]) -> Suspicion | None:
        """Return the suspicion without claims of hosts that are no longer members; `None` if no claim is left."""

        def counts(host: HostId, claim: Claim) -> bool:
            stored = member(host)
            return (
                stored is not None
                and stored.state is HostState.ENROLLED
                and stored.revocations == claim.revocations
            )

        hosts = {host: claim for host, claim in self.hosts.items() if counts(host, claim)}
        return replace(self, hosts=hosts) if self.hubs or hosts else None


def member_in(view: View, host: HostId) -> StoredHost | None:
    """Return a host from the view; `None` if it is absent or unreadable."""
    found = view(host_key(host))
    try:
        return None if found is None else parse_host(found[0])
    except Unreadable:
        return None


def read_suspicion(view: View) -> Suspicion | None:
    """Return the suspicion with its valid claims; `None` if there is none. Raises `Unreadable`."""
    found = view(SUSPECT)
    if found is None:
        return None
    return parse_suspicion(found[0]).of_members(lambda host: member_in(view, host))


def render_suspicion(suspicion: Suspicion) -> bytes:
    """Render the value of `SUSPECT`."""
    claims = {host: [one.incarnation, one.revocations] for host, one in suspicion.hosts.items()}
    why = plain(suspicion.why)
    shape = {"why": why, "hubs": dict(suspicion.hubs), "hosts": claims}
    return encode({**shape, "regained": dict(suspicion.regained)})


def parse_suspicion(value: bytes) -> Suspicion:
    """Parse the value of `SUSPECT`; raises `Unreadable`."""
    match decode(value):
        case {
            "why": str(why),
            "hubs": dict(hubs),
            "hosts": dict(hosts),
            "regained": dict(regained),
        } if all(is_id(name) and is_number(one) for name, one in hubs.items()) and all(
            isinstance(one, str) for one in regained.values()
        ):
            words = {plain(whose): plain(what) for whose, what in regained.items()}
            return Suspicion(plain(why), hubs, _parse_claims(hosts), words)
        case _:
            raise Unreadable("it does not say `why`, `hubs`, `hosts` and `regained`")


def _parse_claims(shape: Json) -> dict[HostId, Claim]:
    claims: dict[HostId, Claim] = {}
    for host, claim in shape.items():
        match claim:
            case [incarnation, revocations] if (
                is_id(host) and is_number(incarnation) and is_number(revocations)
            ):
                claims[HostId(host)] = Claim(incarnation, revocations)
            case _:
                raise Unreadable("the claim of a host is not two numbers")
    return claims
