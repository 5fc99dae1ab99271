"""Forged claims: guests that claim an address for their MAC by ARP or ND, although its pair has another MAC.

They change nothing for the owner (`network.anti_spoofing.rules`). They are counted so that operators see them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.errors import DataplaneError
from imdsproxy.host.clock import Clock
from imdsproxy.model.entities import MacAddress, NetworkId
from imdsproxy.model.observation import AddressKey
from imdsproxy.network.anti_spoofing.kernel import Claims
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters

_FRESH_S: Final = 1.0
"""Seconds for which counters are not read again: a thousand networks take a tenth of a second."""


@dataclass(slots=True)
class ForgedClaims:
    """Counts of forged claims, read from the MAC filters when an operator or Prometheus asks."""

    filters: MacFilters
    clock: Clock
    by_network: Mapping[NetworkId, Claims] = field(default_factory=dict)
    _read_at: float | None = None

    async def refresh(self) -> None:
        """Read the counters, unless they were read a moment ago."""
        now = self.clock.monotonic()
        if self._read_at is not None and now - self._read_at < _FRESH_S:
            return
        self._read_at = now
        found: dict[NetworkId, Claims] = {}
        for network, claims in (await self.filters.read_claims(self.by_network)).items():
            if isinstance(claims, DataplaneError):
                structlog.get_logger().warning(
                    "forged claims not counted", network=network, reason=claims.message
                )
            else:
                found[network] = claims
        self.by_network = found

    @property
    def counts(self) -> Mapping[str, int]:
        return {str(name): claims.count for name, claims in self.by_network.items()}

    def claimants(self, key: AddressKey) -> tuple[MacAddress, ...]:
        """Return the MACs that claimed an address in the last ten minutes, except the MAC of its current pair."""
        claims = self.by_network.get(key[0])
        found = () if claims is None else claims.macs.get(key[1], ())
        return tuple(mac for mac in found if mac != self.filters.granted(key))

    def lines(self) -> tuple[str, ...]:
        keys = [
            (network, address)
            for network, claims in self.by_network.items()
            for address in claims.macs
        ]
        found = ((key, self.claimants(key)) for key in keys)
        return tuple(
            f"{address} in network {network} by {', '.join(macs)}"
            for (network, address), macs in found
            if macs
        )
