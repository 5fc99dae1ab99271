"""What a hub does about restores, with a journal that nothing has opened: it keeps its values in memory."""

from pathlib import Path

from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.journal import Journal
from imdsproxy.hub.store.restores import Restores
from imdsproxy.hub.store.state import FleetState


def restores_of(etcd: Etcd, state: FleetState, clock: Clock, name: str = "hub-1") -> Restores:
    return Restores(etcd, state, name, Journal(Path("journal.sqlite")), clock)
