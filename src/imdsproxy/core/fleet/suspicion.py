"""Suspicion that etcd was restored from a backup: claims of hubs and hosts, and whether they stop writes. Pure.

A hub's claim stops writes. A single host may be captured, so it takes two hosts; and a host's claim counts only for as
long as that membership lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from imdsproxy.core.fleet.layout import (
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
from imdsproxy.core.fleet.members import HostState, StoredHost, host_key, parse_host

WITNESSES: Final = 2
"""Hosts that have to agree before writes stop."""

MOST_CLAIMS: Final = 16
"""Claims of hosts that are kept: more than two change nothing."""

MOST_REGAINED: Final = 500
"""Lines of what was put back into etcd; the logs of hubs have all of them."""

MOST_AHEAD: Final = 1000
"""Acceptances of which a host may know and the fleet not: more than any series of restores loses."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence that etcd was restored from a backup.

    Attributes:
        why: What etcd lacks.
        host: The host that claims that; `None` for a hub's own evidence.
        revision: The host has it, so etcd is older if it has not; 0 if `why` is enough.
        incarnation: The same, of the fleet's incarnation.
        regained: What is put back into etcd, by whose it is (`lasting.describe_regained`).
    """

    why: str
    host: HostId | None = None
    revision: int = 0
    incarnation: int = 0
    regained: Mapping[str, str] = field(default_factory=dict)

    def is_refuted(self, revision: int, meta: Meta | None) -> bool:
        """Whether etcd has, at this revision, what the host has."""
        if meta is None or meta.incarnation < self.incarnation:
            return False
        return 0 < self.revision <= revision or self.incarnation > 0


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim of one host.

    Attributes:
        incarnation: The highest that the host has seen.
        revocations: As `StoredHost.revocations` was at the time of the claim.
    """

    incarnation: int
    revocations: int = 0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """All claims that etcd was restored.

    Attributes:
        why: The first evidence.
        hubs: Hubs that noticed a restore, each with the highest incarnation that the hub has seen.
        hosts: Claims of hosts.
        regained: What hubs put back into etcd, by whose it is; the first of very many.
    """

    why: str
    hubs: Mapping[str, int] = field(default_factory=dict)
    hosts: Mapping[HostId, Claim] = field(default_factory=dict)
    regained: Mapping[str, str] = field(default_factory=dict)

    @property
    def refuses(self) -> bool:
        """Whether nothing may be written."""
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
        """Return the suspicion with a host's claim; of very many, those with the highest incarnations stay."""
        claims = sorted({**self.hosts, host: claim}.items(), key=lambda item: -item[1].incarnation)
        return replace(self, hosts=dict(sorted(claims[:MOST_CLAIMS])))

    def regain(self, regained: Mapping[str, str]) -> Suspicion:
        """Return the suspicion with what was put back, too."""
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
    """Return a host as the view has it; `None` for one that is absent or unreadable."""
    found = view(host_key(host))
    try:
        return None if found is None else parse_host(found[0])
    except Unreadable:
        return None


def read_suspicion(view: View) -> Suspicion | None:
    """Return the suspicion as it counts now; `None` if there is none. Raises `Unreadable`."""
    found = view(SUSPECT)
    if found is None:
        return None
    return parse_suspicion(found[0]).of_members(lambda host: member_in(view, host))


def render_suspicion(suspicion: Suspicion) -> bytes:
    """Return the value of `SUSPECT`."""
    claims = {host: [one.incarnation, one.revocations] for host, one in suspicion.hosts.items()}
    why = plain(suspicion.why)
    shape = {"why": why, "hubs": dict(suspicion.hubs), "hosts": claims}
    return encode({**shape, "regained": dict(suspicion.regained)})


def parse_suspicion(value: bytes) -> Suspicion:
    """Reverse `render_suspicion`; raises `Unreadable`."""
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
