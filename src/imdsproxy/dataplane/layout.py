"""Where the data plane's files and sockets are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imdsproxy.config.schema import Settings
from imdsproxy.core.haproxy.model import Paths


@dataclass(frozen=True, slots=True)
class _Below:
    """A path below the runtime directory, or below the state directory."""

    name: str
    state: bool = False

    def __get__(self, layout: Layout, owner: type[Layout]) -> Path:
        return (layout.state if self.state else layout.runtime) / self.name


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path of the data plane below one runtime directory.

    The worker is locked into `jail`, which holds nothing but the sockets it connects to.
    """

    runtime: Path
    state: Path
    documents_workers: int = 2
    chroot: bool = True

    config = _Below("haproxy.cfg")
    """HAProxy's configuration: what its master reads at each start and reload."""

    candidate = _Below("haproxy.cfg.candidate")
    """A configuration that is still to be checked."""

    rejected = _Below("haproxy.cfg.rejected")
    """The last configuration that HAProxy refused."""

    last_good = _Below("haproxy.cfg.last-good")
    """The last configuration with which a worker came up."""

    environment = _Below("haproxy.env")
    """What HAProxy's unit puts on its command line beside what never changes."""

    pid_file = _Below("haproxy.pid")
    """The pid of a master that we started ourselves."""

    haproxy_log = _Below("haproxy.log")
    """The output of a master that we started ourselves."""

    documents_log = _Below("documents.log")
    """The output of a document server that we started ourselves."""

    documents_pid = _Below("documents.pid")
    """The document server's own file: its parent's pid, then its workers'."""

    master_socket = _Below("master.sock")
    """HAProxy's master CLI."""

    probe_socket = _Below("probe.sock")
    """Answered by the worker itself: is it alive?"""

    base_map = _Below("base.map")
    """The records."""

    overlay_map = _Below("overlay.map")
    """What has changed since the base was written."""

    empty_map = _Below("empty.map")
    """Stands in for the records when a candidate is checked: their content is not checked."""

    networks = _Below("networks.json")
    """The networks that the configuration in force was made for."""

    unavailable = _Below("unavailable.http")
    """The answer that guests get instead of HAProxy's 502, 503 and 504."""

    jail = _Below("jail")
    """The worker's root directory."""

    resolver_socket = _Below("jail/resolver.sock")
    """The resolver, in the controller."""

    audit_socket = _Below("jail/audit.sock")
    """Where HAProxy sends the lines of the audit log, in the controller."""

    audit_last_socket = _Below("jail/audit-last.sock")
    """The same for datagrams, of workers that are being replaced."""

    found_socket = _Below("found.sock")
    """Where the resolver hands in requests of guests that it has found, mode 600."""

    token_keys_map = _Below("token-keys.map")
    """The keys of session tokens, as HAProxy looks them up; root's alone."""

    short_map = _Below("short.map")
    """An empty file: a worker begins without the short documents that it keeps by itself."""

    path_rules_map = _Below("path-rules.map")
    """The sets of path rules that records refer to."""

    silence = _Below("silence.http")
    """An empty file: what HAProxy answers itself when an endpoint behind a hop gives no answer."""

    @property
    def documents_sockets(self) -> tuple[Path, ...]:
        """One socket a worker of the document server."""
        return tuple(
            self.jail / f"documents-{index}.sock" for index in range(self.documents_workers)
        )

    namespace_links = _Below("netns")
    """Symbolic links by name and inode, through which HAProxy opens namespaces."""

    managed_journal = _Below("managed.json")
    """Devices that we have put the metadata addresses on."""

    gates_journal = _Below("gates.json")
    """Where we have put tables that look at MACs."""

    hops_journal = _Below("hops.json")
    """Where we have put the rule for hop limits."""

    records = _Below("documents", state=True)
    """Compiled records, one file an instance."""

    token_keys = _Below("token-keys", state=True)
    """The keys of session tokens, where settings name no other file."""

    kept_maps = _Below("maps", state=True)
    """The maps as of the last stop, and what they were made of."""

    compiled_index = _Below("compiled.sqlite", state=True)
    """What compiled records were made of."""

    token_counts = _Below("token-counts.sqlite", state=True)
    """What was counted of reads without session tokens."""

    guards = _Below("guards.json", state=True)
    """What operators did about single instances."""

    passwords = _Below("passwords", state=True)
    """What guests posted."""

    @classmethod
    def of(cls, settings: Settings) -> Layout:
        """Where everything is, by the settings."""
        workers = settings.documents.workers if settings.documents.enabled else 0
        paths = settings.paths
        return cls(paths.runtime_dir, paths.state_dir, workers, settings.haproxy.chroot)

    def haproxy_paths(self) -> Paths:
        """The paths as the configuration has them, by their names here."""
        inside = (lambda path: f"/{path.name}") if self.chroot else str
        named = {
            name: inside(path) if path.parent == self.jail else str(path)
            for name in vars(Layout)
            if isinstance(path := getattr(self, name), Path)
        }
        return Paths(named, tuple(map(inside, self.documents_sockets)), self.chroot)
