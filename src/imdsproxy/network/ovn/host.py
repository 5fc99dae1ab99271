"""Work for OVN on this host, besides reporting its ports."""

from collections.abc import Coroutine
from dataclasses import InitVar, dataclass, field
from random import SystemRandom

from imdsproxy.errors import Problem
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.network.names import Naming
from imdsproxy.network.ovn.heartbeat import OvnHeartbeat
from imdsproxy.network.ovn.provision import Provisioner
from imdsproxy.sources.ovn.source import OvnSource


@dataclass(slots=True)
class OvnHost:
    """Provisioner and heartbeat of one source.

    Args:
        source: Source with the databases.
        thread: Thread that enters namespaces.
        naming: Names and marks of our own objects.
    """

    source: OvnSource
    thread: InitVar[NamespaceThread]
    naming: InitVar[Naming]
    provisioner: Provisioner = field(init=False)
    heartbeat: OvnHeartbeat = field(init=False)

    def __post_init__(self, thread: NamespaceThread, naming: Naming) -> None:
        self.provisioner = Provisioner(self.source, thread, naming)
        self.heartbeat = OvnHeartbeat(self.source, SystemRandom().random)
        self.source.on_change = self._changed

    def work(self) -> tuple[Coroutine[object, object, None], ...]:
        """Return the coroutines to run as long as the controller runs."""
        return self.provisioner.run(), self.heartbeat.run()

    def problems(self) -> tuple[Problem, ...]:
        """Return the problems of provisioner and heartbeat."""
        return (*self.provisioner.problems.values(), *self.heartbeat.problems)

    def _changed(self) -> None:
        self.provisioner.changed.set()
        self.heartbeat.changed.set()
