"""Networks that leave a host with their last instance: for a while their guests still get an answer, 404. Pure.

Without the delay, the listener is removed at once, and open connections get no answer at all.
"""

from dataclasses import dataclass, field, replace

from imdsproxy.model.entities import NetworkId
from imdsproxy.model.observation import Observation


@dataclass(slots=True)
class LeavingNetworks:
    """Delays the removal of networks.

    Args:
        stay_s: Delay in seconds.
    """

    stay_s: float
    _until: dict[NetworkId, float] = field(default_factory=dict)

    def delay(self, changes: Observation, now: float) -> Observation:
        """Return the changes without removed networks; `due` returns those later.

        If a network is added or changed, all leaving networks are removed at once: it may take over a listener.
        """
        gone = dict.fromkeys(changes.networks_removed, now + self.stay_s)
        if not changes.networks and self.stay_s:
            self._until |= gone
            return replace(changes, networks_removed=())
        gone |= self._until
        self._until.clear()
        removed = tuple(one for one in gone if one not in changes.networks)
        return replace(changes, networks_removed=removed)

    def due(self, now: float) -> Observation:
        """Return the networks whose delay is over, as removed."""
        over = tuple(one for one, until in self._until.items() if until <= now)
        for one in over:
            del self._until[one]
        return Observation(networks_removed=over)
