"""Where the data plane's files and sockets are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imdsproxy.core.haproxy.model import Paths


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path of the data plane below one runtime directory.

    The worker is locked into `jail`, which holds nothing but the sockets it connects to.
    """

    runtime: Path
    state: Path
    documents_workers: int = 2
    chroot: bool = True

    @property
    def config(self) -> Path:
        """HAProxy's configuration: what its master reads at each start and reload."""
        return self.runtime / "haproxy.cfg"

    @property
    def candidate(self) -> Path:
        """A configuration that is still to be checked."""
        return self.runtime / "haproxy.cfg.candidate"

    @property
    def rejected(self) -> Path:
        """The last configuration that HAProxy refused."""
        return self.runtime / "haproxy.cfg.rejected"

    @property
    def last_good(self) -> Path:
        """The last configuration with which a worker came up."""
        return self.runtime / "haproxy.cfg.last-good"

    @property
    def environment(self) -> Path:
        """What HAProxy's unit puts on its command line beside what never changes."""
        return self.runtime / "haproxy.env"

    @property
    def pid_file(self) -> Path:
        """The pid of a master that we started ourselves."""
        return self.runtime / "haproxy.pid"

    @property
    def haproxy_log(self) -> Path:
        """What a master that we started ourselves says."""
        return self.runtime / "haproxy.log"

    @property
    def documents_log(self) -> Path:
        """What a document server that we started ourselves says."""
        return self.runtime / "documents.log"

    @property
    def documents_pid(self) -> Path:
        """The document server's own file: its parent's pid, then its workers'."""
        return self.runtime / "documents.pid"

    @property
    def master_socket(self) -> Path:
        """HAProxy's master CLI."""
        return self.runtime / "master.sock"

    @property
    def probe_socket(self) -> Path:
        """Answered by the worker itself: is it alive?"""
        return self.runtime / "probe.sock"

    @property
    def base_map(self) -> Path:
        """The records."""
        return self.runtime / "base.map"

    @property
    def overlay_map(self) -> Path:
        """What has changed since the base was written."""
        return self.runtime / "overlay.map"

    @property
    def empty_map(self) -> Path:
        """Stands in for the records when a candidate is checked: their content is not its business."""
        return self.runtime / "empty.map"

    @property
    def networks(self) -> Path:
        """The networks that the configuration in force was made for."""
        return self.runtime / "networks.json"

    @property
    def unavailable(self) -> Path:
        """The answer that guests get instead of HAProxy's 502, 503 and 504."""
        return self.runtime / "unavailable.http"

    @property
    def jail(self) -> Path:
        """The worker's root directory."""
        return self.runtime / "jail"

    @property
    def resolver_socket(self) -> Path:
        """The resolver, in the controller."""
        return self.jail / "resolver.sock"

    @property
    def audit_socket(self) -> Path:
        """Where HAProxy sends the lines of the audit log, in the controller."""
        return self.jail / "audit.sock"

    @property
    def audit_last_socket(self) -> Path:
        """The same for datagrams, of workers that are being replaced."""
        return self.jail / "audit-last.sock"

    @property
    def found_socket(self) -> Path:
        """Where the resolver hands in requests of guests that it has found, mode 600."""
        return self.runtime / "found.sock"

    @property
    def token_keys_map(self) -> Path:
        """The keys of session tokens, as HAProxy looks them up; root's alone."""
        return self.runtime / "token-keys.map"

    @property
    def short_map(self) -> Path:
        """An empty file: a worker begins without the short documents that it keeps by itself."""
        return self.runtime / "short.map"

    @property
    def path_rules_map(self) -> Path:
        """The sets of path rules that records refer to."""
        return self.runtime / "path-rules.map"

    @property
    def silence(self) -> Path:
        """An empty file: what HAProxy answers itself when an endpoint behind a hop gives no answer."""
        return self.runtime / "silence.http"

    @property
    def documents_sockets(self) -> tuple[Path, ...]:
        """One socket a worker of the document server."""
        return tuple(
            self.jail / f"documents-{index}.sock" for index in range(self.documents_workers)
        )

    @property
    def namespace_links(self) -> Path:
        """Symbolic links by name and inode, through which HAProxy opens namespaces."""
        return self.runtime / "netns"

    @property
    def managed_journal(self) -> Path:
        """Devices that we have put the metadata addresses on."""
        return self.runtime / "managed.json"

    @property
    def gates_journal(self) -> Path:
        """Where we have put tables that look at MACs."""
        return self.runtime / "gates.json"

    @property
    def hops_journal(self) -> Path:
        """Where we have put the rule for hop limits."""
        return self.runtime / "hops.json"

    @property
    def records(self) -> Path:
        """Compiled records, one file an instance."""
        return self.state / "documents"

    @property
    def token_keys(self) -> Path:
        """The keys of session tokens, where settings name no other file."""
        return self.state / "token-keys"

    @property
    def guards(self) -> Path:
        """What operators did about single instances."""
        return self.state / "guards.json"

    @property
    def passwords(self) -> Path:
        """What guests posted."""
        return self.state / "passwords"

    def haproxy_paths(self, *, checking: bool = False) -> Paths:
        """The paths as the configuration names them; `checking` puts an empty map in the records' place."""
        inside = (lambda path: f"/{path.name}") if self.chroot else str
        return Paths(
            base_map=str(self.empty_map if checking else self.base_map),
            overlay_map=str(self.overlay_map),
            unavailable=str(self.unavailable),
            probe=str(self.probe_socket),
            jail=str(self.jail) if self.chroot else None,
            documents=tuple(inside(path) for path in self.documents_sockets),
            resolver=inside(self.resolver_socket),
            token_keys=str(self.token_keys_map),
            short=str(self.short_map),
            path_rules=str(self.path_rules_map),
            found=str(self.found_socket),
            silence=str(self.silence),
            audit=inside(self.audit_socket),
            audit_last=inside(self.audit_last_socket),
            hops=str(self.jail),
            hops_inside="" if self.chroot else str(self.jail),
        )
