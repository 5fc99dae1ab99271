"""Checks of the host's requirements for running imdsproxy."""

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Final

from imdsproxy.errors import ConfigError, DataplaneError, HaproxyMissing, HostRefused, spell_count
from imdsproxy.haproxy.launch import read_program
from imdsproxy.host.account import find_account, find_closed, group_name, user_name
from imdsproxy.host.servers import open_tcp_socket
from imdsproxy.tools.checks import Finding, Subject, found, refused

_ACCOUNTS: Final = [
    f"{section}.{name}"
    for section in ("haproxy", "documents", "admin")
    for name in ("user", "group")
]
_UNIX_ACCOUNTS: Final = [
    f"unix_listener.{name}" for name in ("user", "group", "proxy_user", "proxy_group")
]
_CAPABILITIES: Final = {
    "CAP_CHOWN": (0, "to give sockets to their groups"),
    "CAP_SETGID": (6, "to run HAProxy unprivileged"),
    "CAP_SETUID": (7, "to run HAProxy unprivileged"),
    "CAP_NET_BIND_SERVICE": (10, "to listen on port 80"),
    "CAP_NET_ADMIN": (12, "to make links and addresses"),
    "CAP_SYS_CHROOT": (18, "to lock HAProxy's worker in"),
    "CAP_SYS_ADMIN": (21, "to enter network namespaces"),
}
_STICKY: Final = 0o1000
_JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")


def check_settings(on: Subject) -> list[Finding]:
    """Check the settings files; report empty files, which `run` refuses or replaces by the defaults."""
    if isinstance(on.loaded, ConfigError):
        return refused(on.loaded)
    files = on.loaded.files
    findings = [found("settings", files=", ".join(map(str, files)) or "no settings file: defaults")]
    for path in files:
        if path in on.loaded.empty:
            name = "settings-blank" if path in on.loaded.blank else "settings-empty"
            findings.append(found(name, path=path))
    return findings


def check_accounts(on: Subject) -> list[Finding]:
    """Check that the settings' accounts exist. A number is an id and needs no account."""
    findings: list[Finding] = []
    for setting in _ACCOUNTS + (_UNIX_ACCOUNTS if on.settings.unix_listener.enabled else []):
        account = attrgetter(setting)(on.settings)
        kind, find = ("group", group_name) if setting.endswith("group") else ("user", user_name)
        try:
            if account and not account.isdecimal():
                find(account)
        except HostRefused:
            findings.append(found("account-missing", setting=setting, kind=kind, account=account))
    return findings or [found("accounts")]


def check_haproxy(on: Subject) -> list[Finding]:
    try:
        program = asyncio.run(read_program(on.settings.haproxy.binary))
    except HaproxyMissing as error:
        return refused(error)
    findings = [found("haproxy", version=program.version)]
    if on.settings.metrics.haproxy_listen is not None and "PROMEX" not in program.features:
        findings.append(found("promex-missing"))
    return findings


def check_privileges(_on: Subject, status: Path = Path("/proc/self/status")) -> list[Finding]:
    """Report capabilities that `run` needs and this process lacks, from its `status` file (proc_pid_status(5))."""
    lines = dict(line.partition(":\t")[::2] for line in status.read_text("utf-8").splitlines())
    effective = int(lines.get("CapEff", "0"), 16)
    missing = [
        found("capability-missing", name=name, why=why)
        for name, (bit, why) in _CAPABILITIES.items()
        if not effective >> bit & 1
    ]
    return missing or [found("privileges")]


def check_namespaces(on: Subject, own: Path = Path("/proc/self/ns/net")) -> list[Finding]:
    """Check that the kernel has network namespaces, and that the path for named namespaces is a directory."""
    directory = on.settings.paths.netns_dir
    if not own.exists():
        return [found("namespaces-missing")]
    if directory.exists() and not directory.is_dir():
        return [found("netns-dir", path=directory)]
    named = list(directory.iterdir()) if directory.is_dir() else []
    return [found("namespaces", number=spell_count(len(named), "named namespace"))]


def check_directories(
    on: Subject, access: Callable[[Path, int], bool] = os.access
) -> list[Finding]:
    """Check that each directory can be created or written, and that other accounts cannot write to it."""
    paths, listener = on.settings.paths, on.settings.unix_listener
    wanted = {"paths.runtime_dir": paths.runtime_dir, "paths.state_dir": paths.state_dir}
    if listener.enabled:
        wanted["unix_listener.path"] = listener.path.parent
    findings: list[Finding] = []
    for setting, path in wanted.items():
        there = next(one for one in (path, *path.parents) if one.exists() or one == one.parent)
        mode = there.stat().st_mode
        if not stat.S_ISDIR(mode):
            findings.append(found("directory-none", setting=setting, path=there))
        elif not access(there, os.W_OK | os.X_OK):
            findings.append(found("directory-closed", setting=setting, path=there))
        elif there == path and mode & stat.S_IWOTH and not mode & _STICKY:
            findings.append(found("directory-open", setting=setting, path=there))
    return findings or [found("directories")]


def check_readers(on: Subject) -> list[Finding]:
    """Check that HAProxy and the document server can enter their directories, by trying as their accounts."""
    documents, haproxy, layout = on.settings.documents, on.settings.haproxy, on.layout
    findings: list[Finding] = []
    for setting, path, reader, section, reads in (
        ("paths.state_dir", layout.records, "documents", documents, documents.enabled),
        # A worker in a chroot reads nothing above its root directory.
        ("paths.runtime_dir", layout.jail, "haproxy", haproxy, not haproxy.chroot),
    ):
        try:
            account = find_account(section.user, section.group) if reads else None
        except HostRefused:
            # `check_accounts` reports missing accounts.
            continue
        closed = find_closed(account, path) if account else None
        if closed is not None:
            values = {"setting": setting, "reader": reader, "user": section.user, "path": closed}
            findings.append(found("directory-unread", **values))
    return findings


def check_ports(on: Subject) -> list[Finding]:
    """Check that the metrics endpoints can be bound, unless a daemon runs."""
    if on.daemon is not None:
        return []
    findings: list[Finding] = []
    for setting in ("metrics.listen", "metrics.haproxy_listen"):
        endpoint = attrgetter(setting)(on.settings)
        # A HAProxy that outlives its controller keeps its endpoint bound.
        if endpoint is None or (setting == "metrics.haproxy_listen" and _haproxy_runs(on)):
            continue
        try:
            open_tcp_socket(endpoint.host, endpoint.port).close()
        except DataplaneError as error:
            reason = getattr(error.__cause__, "strerror", None) or error.message
            findings.append(found("port-taken", setting=setting, endpoint=endpoint, reason=reason))
    return findings or [found("ports")]


def _haproxy_runs(on: Subject) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(on.layout.master_socket)) == 0


def check_audit(on: Subject, journal: Path = _JOURNAL_SOCKET) -> list[Finding]:
    """Check the audit log's destination, if enabled. Problems are warnings: guests are served without a log."""
    audit = on.settings.audit
    if not audit.one_in:
        return []
    if audit.destination != "journal":
        return [_try_log(Path(audit.destination))]
    return [found("audit-journal" if journal.is_socket() else "audit-no-journal", journal=journal)]


def _try_log(path: Path) -> Finding:
    parent = path.parent
    try:
        directory = parent.stat()
    except OSError as error:
        return found("audit-no-parent", path=path, parent=parent, reason=error.strerror)
    place = parent
    if not stat.S_ISDIR(directory.st_mode):
        name = "audit-odd-parent"
    elif directory.st_uid != 0 or directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        name = "audit-open-parent"
    elif not os.access(parent, os.X_OK):
        name = "audit-closed"
    elif path.is_symlink():
        name = "audit-link"
    elif path.exists() and not path.is_file():
        name = "audit-no-file"
    else:
        place = path if path.exists() else parent
        name = "audit" if os.access(place, os.W_OK) else "audit-closed"
    return found(name, path=path, parent=parent, place=place)
