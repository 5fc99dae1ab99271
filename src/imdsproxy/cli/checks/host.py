"""What a host must have before imdsproxy runs on it. Nothing is changed by looking."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from imdsproxy.cli.checks.finding import Area, Finding
from imdsproxy.config.load import Loaded
from imdsproxy.config.policy import AuditSettings
from imdsproxy.config.section import Endpoint
from imdsproxy.dataplane.launch import HaproxyProgram
from imdsproxy.errors import ConfigError, HaproxyMissing, HostRefused, PrivilegeMissing

_SETTINGS: Final = Area("settings")
_HAPROXY: Final = Area("haproxy")
_PRIVILEGES: Final = Area("privileges")
_NAMESPACES: Final = Area("namespaces")
_DIRECTORIES: Final = Area("directories")
_PORTS: Final = Area("ports")
_AUDIT: Final = Area("audit")

_CAPABILITIES: Final[Mapping[str, tuple[int, str]]] = {
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
JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


def check_empty(loaded: Loaded) -> list[Finding]:
    """Settings files that hold nothing; a start takes the defaults instead, or is refused."""
    return [
        Finding(
            "settings",
            f"{path} holds no settings",
            "it was emptied, most likely: restore it, write `{}`, or remove it",
            ConfigError.exit_status if path in loaded.blank else 0,
            warning=path not in loaded.blank,
        )
        for path in loaded.files
        if path in loaded.empty
    ]


def check_haproxy(
    program: HaproxyProgram | HaproxyMissing, *, exporter_wanted: bool
) -> list[Finding]:
    """Its version and features."""
    if isinstance(program, HaproxyMissing):
        return _HAPROXY.of(program)
    found = [_HAPROXY.ok(f"HAProxy {program.version} with network namespaces")]
    if exporter_wanted and "PROMEX" not in program.features:
        found.append(
            _HAPROXY.wrong(
                "HAProxy was built without its Prometheus exporter (USE_PROMEX)",
                "metrics.haproxy_listen: null does without",
                HaproxyMissing,
            )
        )
    return found


def check_accounts(
    wanted: Iterable[tuple[str, str]], exists: Callable[[str, str], bool]
) -> list[Finding]:
    """The accounts of the settings.

    Args:
        wanted: Setting and name of each, as `("haproxy.user", "haproxy")`.
        exists: Whether the host has an account; given `user` or `group`, and the name.
    """
    missing = [
        _SETTINGS.wrong(
            f"{setting}: this host has no {_kind(setting)} {name}",
            "create it, or change the setting",
            ConfigError,
        )
        for setting, name in wanted
        if not exists(_kind(setting), name)
    ]
    return missing or [_SETTINGS.ok("all accounts exist")]


def _kind(setting: str) -> str:
    return "group" if setting.endswith("group") else "user"


def read_capabilities(status: str) -> int:
    """The effective capabilities out of the text of `/proc/PID/status`."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def check_privileges(effective: int) -> list[Finding]:
    """Every capability that `run` needs and this process has not."""
    missing = [
        _PRIVILEGES.wrong(f"{name} is missing, {why}", "run as root", PrivilegeMissing)
        for name, (bit, why) in _CAPABILITIES.items()
        if not effective >> bit & 1
    ]
    return missing or [_PRIVILEGES.ok("all that is needed")]


def check_namespaces(directory: Path, own: Path = Path("/proc/self/ns/net")) -> list[Finding]:
    """That the kernel has network namespaces, and where named ones are."""
    if not own.exists():
        return [
            _NAMESPACES.wrong(
                "the kernel has no network namespaces (CONFIG_NET_NS)",
                "another kernel",
                HostRefused,
            )
        ]
    if directory.exists() and not directory.is_dir():
        return [
            _NAMESPACES.wrong(
                f"{directory} is no directory", "paths.netns_dir: /run/netns", HostRefused
            )
        ]
    count = len(list(directory.iterdir())) if directory.is_dir() else 0
    return [_NAMESPACES.ok(f"{count} named namespace{'' if count == 1 else 's'}")]


def check_directories(
    wanted: Mapping[str, Path], writable: Callable[[Path], bool]
) -> list[Finding]:
    """That each can be made or written to, and that other accounts cannot write there.

    Args:
        wanted: Path by setting.
        writable: Whether this process may make files in a directory.
    """
    found = [fault for name, path in wanted.items() for fault in _directory(name, path, writable)]
    return found or [_DIRECTORIES.ok("can be used")]


def _directory(setting: str, path: Path, writable: Callable[[Path], bool]) -> Iterator[Finding]:
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield _DIRECTORIES.wrong(f"{setting}: {there} is no directory", "move it away", HostRefused)
    elif not writable(there):
        yield _DIRECTORIES.wrong(
            f"{setting}: {there} cannot be written to",
            "run as root, or mount it writable",
            HostRefused,
        )
    elif there == path and there.stat().st_mode & (_WRITABLE_BY_ALL | _STICKY) == _WRITABLE_BY_ALL:
        yield _DIRECTORIES.wrong(
            f"{setting}: every account can write to {path}", f"chmod o-w {path}", HostRefused
        )


def check_reader(setting: str, account: str, closed: Path | None) -> list[Finding]:
    """That an account can enter a directory, and all above it.

    Args:
        setting: Where the directory comes from.
        account: Who has to.
        closed: The first directory on the way that the account cannot enter.
    """
    if closed is None:
        return []
    return [
        _DIRECTORIES.wrong(
            f"{setting}: {account} cannot enter {closed}: guests would get 503",
            f"have it enter (chmod o+x {closed}, or setfacl), or move {setting}",
            HostRefused,
        )
    ]


def check_ports(
    wanted: Mapping[str, Endpoint | None], refused: Callable[[Endpoint], str | None]
) -> list[Finding]:
    """That each endpoint can be bound.

    Args:
        wanted: Endpoint by setting.
        refused: Tries; the operating system's words, or `None` when it went well.
    """
    found = []
    for setting, endpoint in wanted.items():
        reason = None if endpoint is None else refused(endpoint)
        if reason is not None:
            hint = "free it (`ss -ltnp` names who has it), or change the setting"
            found.append(_PORTS.wrong(f"{setting}: {endpoint}: {reason}", hint, HostRefused))
    return found or [_PORTS.ok("are free")]


def check_audit(settings: AuditSettings, journal: Path = JOURNAL_SOCKET) -> list[Finding]:
    """Nothing where there is none. All that is wrong is a warning: guests are served without a log, too.

    Args:
        settings: Of the section `audit`.
        journal: The socket of systemd's journal.
    """
    if not settings.one_in:
        return []
    setting = f"audit.destination: {settings.destination}"
    if settings.destination == "journal":
        if journal.is_socket():
            return [_AUDIT.ok("lines go to the journal")]
        hint = "start systemd-journald, or name a file in audit.destination"
        return [_AUDIT.warn(f"{setting}: {journal} is not there", hint)]
    path = Path(settings.destination)
    wrong = _audit_fault(path)
    if wrong is None:
        return [_AUDIT.ok(f"lines go to {path}")]
    reason, hint = wrong
    return [_AUDIT.warn(f"{setting}: {reason}", hint)]


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
    writable = os.access(place, os.W_OK)
    return None if writable else (f"{place} cannot be written", "name another file")
