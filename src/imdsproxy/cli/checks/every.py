"""All checks of one host, in the order in which they are shown."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.anti_spoofing.host_rules import (
    leads_by,
    observe_bridge,
    passes_forward_chain,
    read_dropping_chains,
    read_rules,
    try_mac_filter,
)
from imdsproxy.cli.admin_client import AdminClient
from imdsproxy.cli.checks import guests, host, openstack, tokens
from imdsproxy.cli.checks.finding import Area, Finding
from imdsproxy.cli.options import Invocation
from imdsproxy.cli.record_files import read_networks
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Endpoint
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.records.document import Records
from imdsproxy.dataplane.launch import read_program
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import (
    AdminUnavailable,
    ConfigError,
    HaproxyMissing,
    HostRefused,
    ImdsproxyError,
)
from imdsproxy.host.socket_file import find_socket_holder
from imdsproxy.nova.settings import NovaUrl
from imdsproxy.serving.account import find_account, find_closed
from imdsproxy.sources.sqlite.store import read_store

_ADMIN_TIMEOUT_S: Final = 5


@dataclass(slots=True)
class Subject:
    """What is checked: settings, and the daemon where one answers.

    Attributes:
        daemon: `None` where none runs, or it cannot be asked.
        found: What reading the settings and asking the daemon has shown.
        daemons: What the daemon reports.
    """

    settings: Settings
    layout: Layout
    daemon: AdminClient | None
    found: list[Finding]
    daemons: list[Finding]


def run_checks(run: Invocation) -> list[Finding]:
    """Everything that is found; a check that the host refuses is a finding too."""
    subject = _subject(run)
    findings = list(subject.found)
    for check in CHECKS:
        try:
            findings += check(subject)
        except HostRefused as error:
            findings += Area("host").of(error)
    return findings


def _subject(run: Invocation) -> Subject:
    area = Area("settings")
    found: list[Finding] = []
    try:
        loaded = run.load()
        settings = loaded.settings
        files = ", ".join(str(path) for path in loaded.files) or "no file: all defaults"
        found += [area.ok(files), *host.check_empty(loaded)]
    except ConfigError as error:
        # The rest is checked with the defaults: one run shows as much as can be shown.
        found += area.of(error)
        settings = Settings()
    layout = Layout(settings.paths.runtime_dir, settings.paths.state_dir)
    daemon = AdminClient(run.socket or settings.admin_socket, timeout_s=_ADMIN_TIMEOUT_S)
    try:
        status = daemon.get("/v1/status")
    except AdminUnavailable:
        return Subject(settings, layout, None, found, [])
    except ImdsproxyError as error:
        return Subject(settings, layout, None, found, Area("daemon").of(error))
    return Subject(settings, layout, daemon, found, guests.check_daemon(status))


def _accounts(on: Subject) -> list[Finding]:
    named = {
        "haproxy": ("user", "group"),
        "documents": ("user", "group"),
        "admin": ("user", "group"),
        "unix_listener": ("user", "group", "proxy_user", "proxy_group")
        if on.settings.unix_listener.enabled
        else (),
    }
    wanted = {
        f"{section}.{name}": getattr(getattr(on.settings, section), name)
        for section, names in named.items()
        for name in names
    }
    # A number is an id, for which there need be no account.
    return host.check_accounts(
        [(key, name) for key, name in wanted.items() if name and not name.isdecimal()], _exists
    )


def _exists(kind: str, name: str) -> bool:
    try:
        if kind == "user":
            pwd.getpwnam(name)
        else:
            grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _haproxy(on: Subject) -> list[Finding]:
    wanted = on.settings.metrics.haproxy_listen is not None
    try:
        program = asyncio.run(read_program(on.settings.haproxy.binary))
    except HaproxyMissing as error:
        return host.check_haproxy(error, exporter_wanted=wanted)
    return host.check_haproxy(program, exporter_wanted=wanted)


def _privileges(_on: Subject) -> list[Finding]:
    own = Path("/proc/self/status").read_text(encoding="utf-8")
    return host.check_privileges(host.read_capabilities(own))


def _namespaces(on: Subject) -> list[Finding]:
    return [*host.check_namespaces(on.settings.paths.netns_dir), *on.daemons]


def _macs(on: Subject) -> list[Finding]:
    if os.geteuid() != 0:
        return []
    found = [guests.check_kernel(try_mac_filter())]
    if on.daemon is None:
        return found
    networks = on.daemon.get("/v1/networks")
    devices = guests.checked_devices(one["record"] for one in networks)
    if devices:
        rules, naming = read_rules(), Naming(on.settings.host.name_prefix)
        seen = {device: observe_bridge(device, rules, naming) for device in devices}
        found += guests.check_bridges(seen)
    return found


def _paths(on: Subject) -> list[Finding]:
    if os.geteuid() != 0 or on.daemon is None:
        return []
    return guests.check_paths(
        read_networks(on.daemon),
        read_dropping_chains(),
        leads_by,
        bridged_are_forwarded=passes_forward_chain(),
    )


def _directories(on: Subject) -> list[Finding]:
    paths, listener = on.settings.paths, on.settings.unix_listener
    wanted = {"paths.runtime_dir": paths.runtime_dir, "paths.state_dir": paths.state_dir}
    if listener.enabled:
        wanted["unix_listener.path"] = listener.path.parent
    return host.check_directories(wanted, lambda path: os.access(path, os.W_OK | os.X_OK))


def _readers(on: Subject) -> list[Finding]:
    """Whether the accounts that will read can enter the directories, tried as these accounts."""
    documents, haproxy = on.settings.documents, on.settings.haproxy
    wanted: list[tuple[str, Path, tuple[str | None, str | None], str]] = []
    if documents.enabled:
        wanted.append(
            ("paths.state_dir", on.layout.records, (documents.user, documents.group), "documents")
        )
    if not haproxy.chroot:
        # Locked in, its worker reads nothing above its root directory.
        wanted.append(
            ("paths.runtime_dir", on.layout.jail, (haproxy.user, haproxy.group), "haproxy")
        )
    found: list[Finding] = []
    for setting, path, (user, group), name in wanted:
        try:
            account = find_account(user, group)
        except HostRefused:
            # The accounts have a finding of their own.
            continue
        closed = None if account is None else find_closed(account, path)
        found += host.check_reader(setting, f"{name}.user ({user})", closed)
    return found


def _records(on: Subject) -> list[Finding]:
    return guests.check_records(on.settings)


def _tokens(on: Subject) -> list[Finding]:
    book = on.settings.policy.book()
    return [
        *tokens.check_token_keys(on.settings, on.layout.token_keys),
        *tokens.check_guards(on.layout.guards),
        *tokens.check_trees(book),
        *tokens.check_path_rules(book),
        *tokens.check_hop_limits(book, unix_listener=on.settings.unix_listener.enabled),
    ]


def _open_records(on: Subject) -> list[Finding]:
    """Of the daemon's instances where it runs, else of those in record files and in the store."""
    if on.daemon is not None:
        report = on.daemon.get("/v1/token-report")
        trees = report["open_trees"]
        named = [(one["instance"], one["network"], one["tree"]) for one in trees]
        return tokens.check_instances_trees(named, report["open_tree_count"])
    sources, records, found = on.settings.sources, list[Records](), list[Finding]()
    if sources.file.enabled and sources.file.directory.is_dir():
        files = guests.read_record_files(sources.file.directory)
        records += [held for _, held in files if isinstance(held, Records)]
    if sources.sqlite.enabled:
        try:
            records.append(read_store(on.settings.store_path))
        except ImdsproxyError as error:
            found += Area("records").of(error)
    return found + tokens.check_records_trees(records, on.settings.policy.book())


def _openstack(on: Subject) -> list[Finding]:
    timeout_s = on.settings.nova.connect_timeout_s
    return [
        *openstack.check_secrets(on.settings),
        *openstack.check_certificates(on.settings),
        *openstack.check_clouds(on.settings),
        *openstack.check_endpoints(
            on.settings, lambda url, context, name: why_unreachable(url, context, name, timeout_s)
        ),
        *openstack.check_unix_listener(on.settings, find_socket_holder, on.layout.config),
    ]


def why_unreachable(
    url: NovaUrl, context: ssl.SSLContext | None, name: str, timeout_s: float
) -> str | None:
    """Why there is no connection; for https with all that a request would need."""
    try:
        with socket.create_connection((url.host, url.port), timeout_s) as plain:
            if context is not None:
                with context.wrap_socket(plain, server_hostname=name):
                    pass
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return getattr(error, "verify_message", "") or error.strerror or str(error)
    return None


def _audit(on: Subject) -> list[Finding]:
    return host.check_audit(on.settings.audit)


def _ports(on: Subject) -> list[Finding]:
    if on.daemon is not None:
        return []
    metrics = on.settings.metrics
    wanted = {"metrics.listen": metrics.listen, "metrics.haproxy_listen": metrics.haproxy_listen}
    return host.check_ports(wanted, _bind_refused)


def _bind_refused(endpoint: Endpoint) -> str | None:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((endpoint.host, endpoint.port))
        except OSError as error:
            return error.strerror or str(error)
    return None


_Check: TypeAlias = Callable[[Subject], list[Finding]]
CHECKS: Final[tuple[_Check, ...]] = (
    _accounts,
    _haproxy,
    _privileges,
    _namespaces,
    _macs,
    _paths,
    _directories,
    _readers,
    _records,
    _tokens,
    _open_records,
    _openstack,
    _audit,
    _ports,
)
