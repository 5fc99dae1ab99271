"""Which Nova an instance's requests go to, and with what they are signed."""

from __future__ import annotations

from dataclasses import dataclass, field

from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.signing import sign_instance
from imdsproxy.core.wire import NovaRecord

__all__ = ["EndpointSet", "NovaRouting", "changed_secrets"]


@dataclass(frozen=True, slots=True)
class EndpointSet:
    """Nova metadata APIs that know the same instances.

    Attributes:
        secret: What signs requests to them; never empty.
        next_secret: What is to replace it, while that goes on.
        networks: Networks and routers whose guests are sent here.
        projects: Projects whose instances are sent here.
    """

    name: str
    secret: bytes = field(repr=False)
    next_secret: bytes | None = field(default=None, repr=False)
    networks: frozenset[str] = frozenset()
    projects: frozenset[str] = frozenset()

    def sign(self, instance: InstanceId) -> tuple[str, ...]:
        """One signature, two while the secret is being replaced."""
        secrets = (self.secret,) if self.next_secret is None else (self.secret, self.next_secret)
        return tuple(sign_instance(secret, instance) for secret in secrets)


@dataclass(frozen=True, slots=True)
class NovaRouting:
    """All endpoint sets; the network's set wins over the project's, and `default` takes the rest."""

    sets: tuple[EndpointSet, ...] = ()
    default: str = "default"

    def choose(self, network: NetworkId, project: str) -> EndpointSet | None:
        """Who is asked for a guest of this project in this network (or behind this router)."""
        for one in self.sets:
            if network in one.networks:
                return one
        for one in self.sets:
            if project in one.projects:
                return one
        return next((one for one in self.sets if one.name == self.default), None)

    def record(self, network: NetworkId, instance: InstanceId, project: str) -> NovaRecord | None:
        """What the data plane must know to ask Nova; `None` where there is no Nova to ask."""
        chosen = self.choose(network, project)
        if chosen is None:
            return None
        return NovaRecord(chosen.name, instance, project, chosen.sign(instance))


def changed_secrets(before: NovaRouting, after: NovaRouting) -> tuple[str, ...]:
    """The settings, by their paths, whose files hold another secret than before."""
    known = {one.name: one for one in before.sets}
    return tuple(
        f"nova.endpoint_sets.{one.name}.{setting}"
        for one in after.sets
        if (old := known.get(one.name)) is not None
        for setting, was, now in (
            ("secret_file", old.secret, one.secret),
            ("next_secret_file", old.next_secret, one.next_secret),
        )
        if was is not None and now is not None and was != now
    )
