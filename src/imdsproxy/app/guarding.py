"""What guests may read, as of now: settings, what operators did, and the keys of session tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from imdsproxy.app.guards import GuardFile
from imdsproxy.app.token_keys import TokenKeys
from imdsproxy.config.schema import Settings
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.policy import PolicyBook

__all__ = ["Guarding", "GuardingChange"]


@dataclass(frozen=True, slots=True)
class GuardingChange:
    """What new settings mean: `records` have to be made anew, workers told other `keys`."""

    records: bool
    keys: bool


@dataclass(slots=True)
class Guarding:
    """Changed by `read`, and by what operators do."""

    keys: TokenKeys
    guards: GuardFile
    _said: PolicyBook = field(default_factory=PolicyBook)

    def read(self, settings: Settings) -> GuardingChange:
        """Take over settings, and the keys in the file that they name.

        Raises:
            SecretUnreadable: The keys cannot be used; everything stays as it was.
            HostRefused: The first key cannot be written.
        """
        keys = self.keys.read(settings.tokens.key_file)
        said = settings.policy.book()
        records, self._said = said != self._said, said
        return GuardingChange(records, keys)

    def for_nobody(self, inventory: Inventory) -> tuple[str, ...]:
        """Where settings speak of a network, project or instance that no source tells of, as settings name the place.

        A name that is mistyped does nothing at all, and what it was to protect stays open.
        """
        said = self._said
        projects: set[str | None] = set()
        if said.projects:
            for instance in inventory.instances.values():
                projects |= {instance.project, *(port.project for port in instance.ports)}
        return (
            *(
                f"policy.networks.{one}"
                for one in said.networks
                if not inventory.knows(NetworkId(one))
            ),
            *(f"policy.projects.{one}" for one in said.projects if one not in projects),
            *(
                f"policy.instances.{one}"
                for one in said.instances
                if not inventory.sources_of_instance(InstanceId(one))
            ),
        )

    def book(self) -> PolicyBook:
        """All that is said of guests beside their records."""
        return replace(self._said, guards=self.guards.guards)
