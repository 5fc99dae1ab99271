"""Paths of the data plane's files and sockets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imdsproxy.config.schema import Settings
from imdsproxy.haproxy.rules.model import Paths


@dataclass(frozen=True, slots=True)
class _Below:
    name: str
    state: bool = False

    def __get__(self, layout: Layout, owner: type[Layout]) -> Path:
        return (layout.state if self.state else layout.runtime) / self.name


@dataclass(frozen=True, slots=True)
class Layout:
    """All paths of the data plane below one runtime and one state directory.

    The worker is locked into `jail`, which holds only the sockets to which it connects.
    """

    runtime: Path
    state: Path
    documents_workers: int = 2
    chroot: bool = True

    config = _Below("haproxy.cfg")
    """HAProxy's configuration, read by the master at each start and reload."""

    candidate = _Below("haproxy.cfg.candidate")
    """Configuration that is being checked."""

    rejected = _Below("haproxy.cfg.rejected")
    """Last configuration that HAProxy refused."""

    last_good = _Below("haproxy.cfg.last-good")
    """Last configuration with which a worker started."""

    environment = _Below("haproxy.env")
    """Variable part of HAProxy's command line, for HAProxy's unit."""

    pid_file = _Below("haproxy.pid")
    """Pid of a master that we started ourselves."""

    haproxy_log = _Below("haproxy.log")
    """Output of a master that we started ourselves."""

    documents_log = _Below("documents.log")
    """Output of a document server that we started ourselves."""

    documents_pid = _Below("documents.pid")
    """Pid file of the document server: its parent's pid, then its workers'."""

    master_socket = _Below("master.sock")
    """HAProxy's master CLI."""

    probe_socket = _Below("probe.sock")
    """Socket on which the worker itself answers liveness probes."""

    base_map = _Below("base.map")
    """Records."""

    overlay_map = _Below("overlay.map")
    """Changes since the base was written."""

    empty_map = _Below("empty.map")
    """Replacement for the records in the check of a candidate, which does not check their content."""

    networks = _Below("networks.json")
    """Networks in the configuration in force."""

    unavailable = _Below("unavailable.http")
    """Answer for guests in place of HAProxy's 502, 503 and 504."""

    jail = _Below("jail")
    """Root directory of the worker."""

    resolver_socket = _Below("jail/resolver.sock")
    """Socket of the resolver, in the controller."""

    audit_socket = _Below("jail/audit.sock")
    """Socket in the controller to which HAProxy sends the lines of the audit log."""

    audit_last_socket = _Below("jail/audit-last.sock")
    """Datagram socket for audit lines of workers that are being replaced."""

    found_socket = _Below("found.sock")
    """Socket to which the resolver sends requests of identified guests, mode 600."""

    token_keys_map = _Below("token-keys.map")
    """Keys of session tokens, for HAProxy's look-ups; readable by root only."""

    short_map = _Below("short.map")
    """Empty file: a new worker starts without the short documents that it caches itself."""

    path_rules_map = _Below("path-rules.map")
    """Sets of path rules to which records refer."""

    silence = _Below("silence.http")
    """Empty file: HAProxy's own answer if an endpoint behind a loopback hop does not answer."""

    @property
    def documents_sockets(self) -> tuple[Path, ...]:
        return tuple(
            self.jail / f"documents-{index}.sock" for index in range(self.documents_workers)
        )

    namespace_links = _Below("netns")
    """Symbolic links by name and inode, through which HAProxy opens namespaces."""

    managed_journal = _Below("managed.json")
    """Devices to which we have added the metadata addresses."""

    mac_filters_journal = _Below("mac-filters.json")
    """Namespaces and names of our MAC filter tables, by network."""

    hops_journal = _Below("hops.json")
    """Namespaces with our hop-limit rule, by network."""

    records = _Below("documents", state=True)
    """Compiled records, one file for each instance."""

    token_keys = _Below("token-keys", state=True)
    """Keys of session tokens, unless settings name another file."""

    kept_maps = _Below("maps", state=True)
    """Maps as of the last stop, with a digest of their inputs."""

    compiled_index = _Below("compiled.sqlite", state=True)
    """Inputs of compiled records."""

    token_counts = _Below("token-counts.sqlite", state=True)
    """Counts of reads without session tokens."""

    overrides = _Below("overrides.json", state=True)
    """Operators' overrides of instances."""

    identity_socket = _Below("jail/identity.sock")
    """Socket of the process that gives identity tokens."""

    identity_pid = _Below("identity.pid")
    """Pid file of the process that gives identity tokens."""

    identity_log = _Below("identity.log")
    """Output of a process for identity tokens that we started ourselves."""

    identity_map = _Below("identity.map")
    """Empty file: a new worker starts without the identity tokens that it keeps itself."""

    cached_keys = _Below("identity-keys.json")
    """Keys of the identity tokens that HAProxy and the process for guests may keep."""

    signer_socket = _Below("signer.sock")
    """Socket of the signer of identity tokens."""

    signer_pid = _Below("signer.pid")
    """Pid file of the signer."""

    signer_log = _Below("signer.log")
    """Output of a signer that we started ourselves."""

    identity_files = _Below("identity")
    """Copies of the host's files for its fleet, for the process that gives identity tokens."""

    subjects = _Below("subjects")
    """Subjects of identity tokens, one file for each."""

    signing_keys = _Below("identity/keys", state=True)
    """Keys of the signer; its account alone can read them."""

    public_documents = _Below("identity/public", state=True)
    """Documents of the issuer, unless settings name another directory."""

    passwords = _Below("passwords", state=True)
    """Passwords that guests posted."""

    @classmethod
    def of(cls, settings: Settings) -> Layout:
        workers = settings.documents.workers if settings.documents.enabled else 0
        paths = settings.paths
        return cls(paths.runtime_dir, paths.state_dir, workers, settings.haproxy.chroot)

    def haproxy_paths(self) -> Paths:
        """Return the paths as HAProxy's configuration needs them, by their names here."""
        inside = (lambda path: f"/{path.name}") if self.chroot else str
        named = {
            name: inside(path) if path.parent == self.jail else str(path)
            for name in vars(Layout)
            if isinstance(path := getattr(self, name), Path)
        }
        return Paths(named, tuple(map(inside, self.documents_sockets)), self.chroot)
