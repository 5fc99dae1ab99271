"""What a host must have before imdsproxy runs on it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from imdsproxy.cli.checks import Finding, Subject, count, refused, warn, wrong
from imdsproxy.config.section import Endpoint
from imdsproxy.dataplane.launch import read_program
from imdsproxy.errors import ConfigError, HaproxyMissing, HostRefused, PrivilegeMissing
from imdsproxy.host.account import find_account, find_closed, group_name, user_name

_ACCOUNTS: Final = (
    *("haproxy.user", "haproxy.group", "documents.user", "documents.group", "admin.user", "admin.group"),
    *(f"unix_listener.{name}" for name in ("user", "group", "proxy_user", "proxy_group")),
)  # fmt: skip
_CAPABILITIES: Final = {
    "CAP_CHOWN": (0, "to give sockets to their groups"),
    "CAP_SETGID": (6, "to run HAProxy unprivileged"),
    "CAP_SETUID": (7, "to run HAProxy unprivileged"),
    "CAP_NET_BIND_SERVICE": (10, "to listen on port 80"),
    "CAP_NET_ADMIN": (12, "to make links and addresses"),
    "CAP_SYS_CHROOT": (18, "to lock HAProxy's worker in"),
    "CAP_SYS_ADMIN": (21, "to enter network namespaces"),
}
_WRITABLE_BY_ALL: Final = 0o002
_STICKY: Final = 0o1000
_JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


def check_settings(on: Subject) -> list[Finding]:
    """The files; one that holds nothing is refused at a start, or the defaults are taken instead."""
    if isinstance(on.loaded, ConfigError):
        return refused(on.loaded)
    files, blank = on.loaded.files, on.loaded.blank
    return [
        Finding(", ".join(map(str, files)) or "no file: all defaults"),
        *(
            Finding(
                f"{path} holds no settings",
                "it was emptied, most likely: restore it, write `{}`, or remove it",
                ConfigError.exit_status if path in blank else 0,
                warning=path not in blank,
            )
            for path in files
            if path in on.loaded.empty
        ),
    ]


def check_accounts(on: Subject) -> list[Finding]:
    """The accounts of the settings. A number is an id, for which there need be no account."""
    found: list[Finding] = []
    for setting in _ACCOUNTS:
        section, name = setting.split(".")
        account = getattr(getattr(on.settings, section), name)
        if section == "unix_listener" and not on.settings.unix_listener.enabled:
            continue
        kind, find = ("group", group_name) if name.endswith("group") else ("user", user_name)
        try:
            if account and not account.isdecimal():
                find(account)
        except HostRefused:
            text = f"{setting}: this host has no {kind} {account}"
            found.append(wrong(text, "create it, or change the setting", ConfigError))
    return found or [Finding("all accounts exist")]


def check_haproxy(on: Subject) -> list[Finding]:
    """Its version and features."""
    try:
        program = asyncio.run(read_program(on.settings.haproxy.binary))
    except HaproxyMissing as error:
        return refused(error)
    found = [Finding(f"HAProxy {program.version} with network namespaces")]
    if on.settings.metrics.haproxy_listen is not None and "PROMEX" not in program.features:
        text = "HAProxy was built without its Prometheus exporter (USE_PROMEX)"
        found.append(wrong(text, "metrics.haproxy_listen: null does without", HaproxyMissing))
    return found


def check_privileges(_on: Subject, status: Path = Path("/proc/self/status")) -> list[Finding]:
    """Every capability that `run` needs and this process has not, by its `status` (proc_pid_status(5))."""
    lines = dict(line.partition(":\t")[::2] for line in status.read_text("utf-8").splitlines())
    effective = int(lines.get("CapEff", "0"), 16)
    missing = [
        wrong(f"{name} is missing, {why}", "run as root", PrivilegeMissing)
        for name, (bit, why) in _CAPABILITIES.items()
        if not effective >> bit & 1
    ]
    return missing or [Finding("all that is needed")]


def check_namespaces(on: Subject, own: Path = Path("/proc/self/ns/net")) -> list[Finding]:
    """That the kernel has network namespaces, and where named ones are."""
    directory = on.settings.paths.netns_dir
    if not own.exists():
        text = "the kernel has no network namespaces (CONFIG_NET_NS)"
        return [wrong(text, "another kernel", HostRefused)]
    if directory.exists() and not directory.is_dir():
        text = f"{directory} is no directory"
        return [wrong(text, "paths.netns_dir: /run/netns", HostRefused)]
    named = list(directory.iterdir()) if directory.is_dir() else []
    return [Finding(count(len(named), "named namespace"))]


def check_directories(
    on: Subject, access: Callable[[Path, int], bool] = os.access
) -> list[Finding]:
    """That each can be made or written to, and that other accounts cannot write there."""
    paths, listener = on.settings.paths, on.settings.unix_listener
    wanted = {"paths.runtime_dir": paths.runtime_dir, "paths.state_dir": paths.state_dir}
    if listener.enabled:
        wanted["unix_listener.path"] = listener.path.parent
    found = [
        wrong(f"{setting}: {text}", hint, HostRefused)
        for setting, path in wanted.items()
        for text, hint in _directory_faults(path, access)
    ]
    return found or [Finding("can be used")]


def _directory_faults(path: Path, access: Callable[[Path, int], bool]) -> Iterator[tuple[str, str]]:
    there = next(one for one in (path, *path.parents) if one.exists() or one == one.parent)
    if not there.is_dir():
        yield f"{there} is no directory", "move it away"
    elif not access(there, os.W_OK | os.X_OK):
        yield f"{there} cannot be written to", "run as root, or mount it writable"
    elif there == path and there.stat().st_mode & (_WRITABLE_BY_ALL | _STICKY) == _WRITABLE_BY_ALL:
        yield f"every account can write to {path}", f"chmod o-w {path}"


def check_readers(on: Subject) -> list[Finding]:
    """Whether the accounts that will read can enter the directories, tried as these accounts."""
    documents, haproxy, layout = on.settings.documents, on.settings.haproxy, on.layout
    found: list[Finding] = []
    for setting, path, name, section, reads in (
        ("paths.state_dir", layout.records, "documents", documents, documents.enabled),
        # Locked in, its worker reads nothing above its root directory.
        ("paths.runtime_dir", layout.jail, "haproxy", haproxy, not haproxy.chroot),
    ):
        try:
            account = find_account(section.user, section.group) if reads else None
        except HostRefused:
            # The accounts have a finding of their own.
            continue
        closed = None if account is None else find_closed(account, path)
        if closed is not None:
            text = f"{setting}: {name}.user ({section.user}) cannot enter {closed}: guests would get 503"
            hint = f"have it enter (chmod o+x {closed}, or setfacl), or move {setting}"
            found.append(wrong(text, hint, HostRefused))
    return found


def check_ports(on: Subject) -> list[Finding]:
    """That each endpoint can be bound, where no daemon has it already."""
    if on.daemon is not None:
        return []
    found: list[Finding] = []
    for name in ("listen", "haproxy_listen"):
        endpoint = getattr(on.settings.metrics, name)
        reason = None if endpoint is None else _bind_refused(endpoint)
        if reason is not None:
            text = f"metrics.{name}: {endpoint}: {reason}"
            hint = "free it (`ss -ltnp` names who has it), or change the setting"
            found.append(wrong(text, hint, HostRefused))
    return found or [Finding("are free")]


def _bind_refused(endpoint: Endpoint) -> str | None:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((endpoint.host, endpoint.port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def check_audit(on: Subject, journal: Path = _JOURNAL_SOCKET) -> list[Finding]:
    """Nothing where there is no log. All that is wrong is a warning: guests are served without a log, too."""
    destination = on.settings.audit.destination
    if not on.settings.audit.one_in:
        return []
    if destination != "journal":
        place, fault = destination, _audit_fault(Path(destination))
    else:
        hint = "start systemd-journald, or name a file in audit.destination"
        place = "the journal"
        fault = None if journal.is_socket() else (f"{journal} is not there", hint)
    if fault is None:
        return [Finding(f"lines go to {place}")]
    return [warn(f"audit.destination: {destination}: {fault[0]}", fault[1])]


def _audit_fault(path: Path) -> tuple[str, str] | None:
    """What is wrong, and what would be right."""
    try:
        directory = path.parent.stat()
    except OSError as error:
        return f"{path.parent}: {error.strerror}", f"install -d -m 0750 {path.parent}"
    if not stat.S_ISDIR(directory.st_mode):
        return f"{path.parent} is no directory", "name a file in a directory"
    if directory.st_uid != 0 or directory.st_mode & _OTHERS:
        return (
            f"others than root may put a file of theirs into {path.parent}",
            f"chown root {path.parent}; chmod go-w {path.parent}",
        )
    if path.is_symlink():
        return "it is a link, and links are not followed", "name the file itself"
    if path.exists() and not path.is_file():
        return "it is no file", "name a file"
    place = path if path.exists() else path.parent
    return (
        None if os.access(place, os.W_OK) else (f"{place} cannot be written", "name another file")
    )
