"""Guests' MACs on this host: filters, addresses that are known by MAC, mismatches and forged claims."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.documents.resolver import Resolver
from imdsproxy.network.anti_spoofing.claims import ForgedClaims
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.reconcile.part import By, Gauge, Part

_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class MacsReport:
    """Guests' MACs and the filters that check them.

    Attributes:
        refused: Networks that should have a MAC filter and cannot: guests with a MAC in their records get no answer.
        pairs: Addresses that a MAC filter lets through with one MAC, or with any.
        learned: Addresses under which guests are known by their MAC alone.
        mismatches: Requests from an instance's address with another MAC since the controller started, by network; the
            twenty networks with most.
        forged_claims: Packets of ARP and ND that claim a pair's address for another MAC since the network's filter was
            created, by network; the twenty networks with most. They harm no guest.
        claimed: Addresses claimed in the last ten minutes, and the MACs that claimed them; the first twenty.
    """

    mac_filters: int = 0
    refused: int = 0
    pairs: int = 0
    learned: int = 0
    mismatches: Mapping[str, int] = field(default_factory=dict)
    forged_claims: Mapping[str, int] = field(default_factory=dict)
    claimed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Macs(Part):
    """Report of the parts that check and learn guests' MACs."""

    filters: MacFilters
    claims: ForgedClaims
    records: RecordLoop
    resolver: Resolver

    async def refresh(self) -> None:
        await self.claims.refresh()

    async def report(self) -> Mapping[str, object]:
        await self.refresh()
        macs = MacsReport(
            mac_filters=len(self.filters.plan.filters),
            refused=len(self.filters.refused),
            pairs=self.filters.pair_count,
            learned=self._count_learned(),
            mismatches=dict(self.resolver.mismatched.most_common(_SHOWN)),
            forged_claims=dict((+Counter(self.claims.counts)).most_common(_SHOWN)),
            claimed=self.claims.lines()[:_SHOWN],
        )
        return {"macs": macs}

    def _count_learned(self) -> int:
        return sum(entry.mac is not None for entry in self.records.learned.values())

    def mac_mismatches(self) -> Annotated[By, "counter", "network"]:
        """Requests refused with 403 because the records have another MAC for the address, by network as above."""
        mismatched = self.resolver.mismatched.items()
        return {str(network): count for network, count in mismatched}

    def forged_claims(self) -> Annotated[By, "counter", "network"]:
        """Packets of ARP and ND that claim an address whose record has another MAC, by network as above."""
        return self.claims.counts

    def learned_addresses(self) -> Gauge:
        """Addresses under which guests are known only because the neighbour table has their MAC there."""
        return self._count_learned()

    def pairs(self) -> Gauge:
        """Addresses that the MAC filter lets through to HAProxy's maps with one MAC only, or with any."""
        return self.filters.pair_count

    def mac_filters(self) -> Annotated[By, "gauge", "state"]:
        """Networks with a MAC filter: open, or refused if the kernel should check MACs and cannot."""
        return {"open": len(self.filters.plan.filters), "refused": len(self.filters.refused)}
