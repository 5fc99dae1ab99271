"""Sources of records that the settings enable, and what they report together."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import TYPE_CHECKING, Annotated

from imdsproxy.config.schema import Settings
from imdsproxy.errors import Problem
from imdsproxy.fleet.guests import FLEET
from imdsproxy.host.clock import Clock
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model.inventory import Inventory, Report
from imdsproxy.model.observation import SourceName
from imdsproxy.reconcile.part import By, Gauge, Part
from imdsproxy.reconcile.progress import Backoff, Progress
from imdsproxy.sources.api import Source
from imdsproxy.sources.libvirt.source import LibvirtClient, LibvirtSource
from imdsproxy.sources.neutron.client import NeutronClient
from imdsproxy.sources.neutron.source import NeutronSource
from imdsproxy.sources.neutron_namespaces.source import NeutronNamespacesSource
from imdsproxy.sources.ovn.source import OvnSource
from imdsproxy.sources.sqlite.source import SqliteSource

if TYPE_CHECKING:
    from imdsproxy.controller.fleet import FleetHost
    from imdsproxy.controller.fleet_passwords import FleetPasswords
    from imdsproxy.sources.fleet.source import FleetSource


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source of records.

    Attributes:
        in_sync: The source has reported all its records.
        stale_s: Seconds since the source stopped answering, 0 while it answers; its last records stay in force.
        problems: Every record that the source refuses now.
    """

    name: SourceName
    in_sync: bool
    networks: int = 0
    instances: int = 0
    stale_s: float = 0.0
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Sources(Part):
    """Enabled sources, and the inventory of their records.

    Attributes:
        look_up: Source to query for addresses that were not reported.
        fleet: Source whose hub learns which records are in force.
    """

    all: tuple[Source, ...]
    writable: SqliteSource | None
    look_up: NeutronSource | None
    ovn: OvnSource | None
    fleet: "FleetSource | None"
    inventory: Inventory

    async def report(self) -> Mapping[str, object]:
        inventory = self.inventory
        return {
            "networks": len(inventory.networks) + len(inventory.contradictory),
            "instances": len(inventory.instances),
            "addresses": inventory.address_count,
            "sources": tuple(self._report(*report) for report in inventory.reports.items()),
            "conflicts": inventory.conflicts(),
        }

    def _report(self, name: str, report: Report) -> SourceReport:
        source = next(each for each in self.all if each.name == name)
        ports = [port for port in self.inventory.stranded() if port.source == name]
        problems = (*report.problems, *map(source.explain_stranded, ports))
        # Other sources are in sync only while they can be read.
        stale_s = next((one.stale_s for one in (self.look_up, self.fleet) if one is source), 0.0)
        networks, instances = len(report.networks), len(report.instances)
        return SourceReport(name, report.in_sync, networks, instances, stale_s, problems)

    def instances(self) -> Gauge:
        """Known instances."""
        return len(self.inventory.instances)

    def addresses(self) -> Gauge:
        """Guests' addresses that HAProxy knows."""
        return self.inventory.address_count

    def conflicts(self) -> Gauge:
        """Ids and addresses that several records claim; their guests get 503."""
        return self.inventory.conflict_count

    def source_in_sync(self) -> Annotated[By, "gauge", "source"]:
        """1 while the source has reported all its records."""
        return {name: report.in_sync for name, report in self.inventory.reports.items()}

    def source_records(self) -> Annotated[By, "gauge", "source", "kind"]:
        """Records in force from the source, by kind: network or instance."""
        return {
            (name, kind): len(records)
            for name, report in self.inventory.reports.items()
            for kind, records in (("network", report.networks), ("instance", report.instances))
        }

    def source_refused_records(self) -> Annotated[By, "gauge", "source"]:
        """Current problems of the source: refused records, and reasons why the source cannot be read."""
        return {name: len(report.problems) for name, report in self.inventory.reports.items()}


def build_sources(
    settings: Settings,
    clock: Clock,
    begin: Callable[[], Awaitable[object]],
    progress: Progress,
    drop_others: Callable[[Collection[NamespaceRef]], Awaitable[None]],
    *,
    ovn: OvnSource | None,
) -> Sources:
    """Return the sources that the settings enable, without a fleet (see `add_fleet`).

    Args:
        begin: Wait until sources may start work that is not urgent.
        drop_others: Keep requests from leaving these routers, before they are reported.
    """
    state, wanted = settings.paths.state_dir, settings.sources
    sqlite: SqliteSource | None = None
    neutron: NeutronSource | None = None
    found: list[Source] = []
    if wanted.sqlite.enabled:
        sqlite = SqliteSource(
            settings.store_path, now=lambda: clock.now().timestamp(), progress=progress
        )
        found.append(sqlite)
    if wanted.file.enabled:
        # Import late: with its YAML parser this source takes a sixteenth of a start, and it is off by default.
        from imdsproxy.sources.file.source import FileSource

        # If a restart finds a broken record file, guests keep their documents.
        kept = state / "last-good.sqlite"
        found.append(FileSource(wanted.file.directory, kept, progress=progress))
    if wanted.neutron.enabled:
        neutron = NeutronSource(
            NeutronClient(wanted.neutron),
            state / "neutron.sqlite",
            wanted.neutron,
            clock=clock,
            random=SystemRandom().random,
            begin=begin,
        )
        found.append(neutron)
    if wanted.libvirt.enabled:
        found.append(LibvirtSource(LibvirtClient(wanted.libvirt.uri), wanted.libvirt))
    if ovn is not None:
        found.append(ovn)
    if wanted.neutron_namespaces.enabled:
        directory = NamespaceDirectory(settings.paths.netns_dir)
        found.append(NeutronNamespacesSource(wanted.neutron_namespaces, directory, drop_others))
    names = [source.name for source in found] + [FLEET] * wanted.fleet.enabled
    return Sources(tuple(found), sqlite, neutron, ovn, None, Inventory(names))


def add_fleet(
    sources: Sources,
    settings: Settings,
    clock: Clock,
    host: "FleetHost",
    passwords: "FleetPasswords",
) -> Sources:
    """Return the sources, and after them the one that follows a fleet's hubs."""
    # Import late: most hosts do not need TLS and its libraries.
    from imdsproxy.sources.fleet.client import HostFiles, HubClient, renew_apart
    from imdsproxy.sources.fleet.source import FleetSource

    state, wanted = settings.paths.state_dir, settings.sources.fleet
    files = HostFiles.configured(wanted, state)

    def hubs() -> tuple[str, ...]:
        return wanted.hubs or files.read_hubs()

    async def renew() -> float | None:
        # If the certificate file is configured, another PKI made it and renews it.
        if wanted.certificate_file is None and files.certificate.exists():
            return await renew_apart(files, hubs(), wanted.timeout_s)
        return None

    fleet = FleetSource(
        HubClient(files, wanted.timeout_s),
        hubs,
        state / "fleet.sqlite",
        serve_s=wanted.serve_without_hubs_s,
        clock=clock,
        random=SystemRandom().random,
        backoff=Backoff(min(0.5, wanted.retry_s), wanted.retry_s),
        take_passwords=passwords.take,
        take_policies=host.take_policies,
        confirm=host.confirm,
        answer=host.answer,
        renew=renew,
    )
    return replace(sources, all=(*sources.all, fleet), fleet=fleet)
