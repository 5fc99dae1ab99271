"""Networks that leave a host with their last instance: for a while their guests get an answer, 404. Pure.

Without that, the way to the guests is removed at once, and connections that are open get no answer at all.
"""

from dataclasses import dataclass, field, replace

from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import Observation


@dataclass(slots=True)
class LeavingNetworks:
    """Delays the removal of networks.

    Args:
        stay_s: By how many seconds.
    """

    stay_s: float
    _until: dict[NetworkId, float] = field(default_factory=dict)

    def delay(self, changes: Observation, now: float) -> Observation:
        """Changes without the networks that are removed, which `due` has later.

        Where a network comes or changes, all that leave go at once: it may have the listener of one of them.
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
        """The networks whose time is over, as removed."""
        over = tuple(one for one, until in self._until.items() if until <= now)
        for one in over:
            del self._until[one]
        return Observation(networks_removed=over)
