"""What a host must have before imdsproxy runs on it, each question by itself, all of them asked.

Each question gives `Finding`s: what is fine, and what is not with who must act (as the exit status
of the error that `run` would end with). Nothing is changed by asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from imdsproxy.errors import (
    ConfigError,
    HaproxyMissing,
    HostRefused,
    ImdsproxyError,
    PrivilegeMissing,
    SourceRefused,
)

if TYPE_CHECKING:
    from imdsproxy.config.endpoint import Endpoint
    from imdsproxy.config.load import Loaded
    from imdsproxy.config.schema import Settings
    from imdsproxy.core.records.document import Records
    from imdsproxy.dataplane.launch import HaproxyProgram

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


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer.

    Attributes:
        area: `settings`, `haproxy`, `privileges`, `namespaces`, `macs`, `paths`, `directories`, `ports`, `records`,
            `tokens`, `nova`, `neutron`, `unix listener`, `audit` or `daemon`.
        exit_status: 0 when it is fine.
        warning: It is fine to start so, and somebody should look.
    """

    area: str
    text: str
    hint: str = ""
    exit_status: int = 0
    warning: bool = False

    @property
    def ok(self) -> bool:
        """Whether nobody has to act."""
        return self.exit_status == 0


def findings_of(area: str, error: ImdsproxyError) -> list[Finding]:
    """An error as findings: one for each of its problems, or one for itself."""
    if not error.problems:
        return [Finding(area, error.message, error.hint, error.exit_status)]
    return [Finding(area, str(problem), "", error.exit_status) for problem in error.problems]


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
        return findings_of("haproxy", program)
    found = [Finding("haproxy", f"HAProxy {program.version} with network namespaces")]
    if exporter_wanted and "PROMEX" not in program.features:
        found.append(
            Finding(
                "haproxy",
                "HAProxy was built without its Prometheus exporter (USE_PROMEX)",
                "metrics.haproxy_listen: null does without",
                HaproxyMissing.exit_status,
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
        Finding(
            "settings",
            f"{setting}: this host has no {_kind(setting)} {name}",
            "create it, or change the setting",
            ConfigError.exit_status,
        )
        for setting, name in wanted
        if not exists(_kind(setting), name)
    ]
    return missing or [Finding("settings", "all accounts exist")]


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
        Finding(
            "privileges", f"{name} is missing, {why}", "run as root", PrivilegeMissing.exit_status
        )
        for name, (bit, why) in _CAPABILITIES.items()
        if not effective >> bit & 1
    ]
    return missing or [Finding("privileges", "all that is needed")]


def check_namespaces(directory: Path, own: Path = Path("/proc/self/ns/net")) -> list[Finding]:
    """That the kernel has network namespaces, and where named ones are."""
    if not own.exists():
        return [
            Finding(
                "namespaces",
                "the kernel has no network namespaces (CONFIG_NET_NS)",
                "another kernel",
                HostRefused.exit_status,
            )
        ]
    if directory.exists() and not directory.is_dir():
        return [
            Finding(
                "namespaces",
                f"{directory} is no directory",
                "paths.netns_dir: /run/netns",
                HostRefused.exit_status,
            )
        ]
    count = len(list(directory.iterdir())) if directory.is_dir() else 0
    return [Finding("namespaces", f"{count} named namespace{'' if count == 1 else 's'}")]


def check_directories(
    wanted: Mapping[str, Path], writable: Callable[[Path], bool]
) -> list[Finding]:
    """That each can be made or written to, and that not everybody can write there.

    Args:
        wanted: Path by setting.
        writable: Whether this process may make files in a directory.
    """
    found = [fault for name, path in wanted.items() for fault in _directory(name, path, writable)]
    return found or [Finding("directories", "can be used")]


def _directory(setting: str, path: Path, writable: Callable[[Path], bool]) -> Iterator[Finding]:
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    status = HostRefused.exit_status
    if not there.is_dir():
        yield Finding("directories", f"{setting}: {there} is no directory", "move it away", status)
    elif not writable(there):
        yield Finding(
            "directories",
            f"{setting}: {there} cannot be written to",
            "run as root, or mount it writable",
            status,
        )
    elif there == path and there.stat().st_mode & (_WRITABLE_BY_ALL | _STICKY) == _WRITABLE_BY_ALL:
        yield Finding(
            "directories", f"{setting}: everybody can write to {path}", f"chmod o-w {path}", status
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
        Finding(
            "directories",
            f"{setting}: {account} cannot enter {closed}: guests would get 503",
            f"have it enter (chmod o+x {closed}, or setfacl), or move {setting}",
            HostRefused.exit_status,
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
            found.append(
                Finding("ports", f"{setting}: {endpoint}: {reason}", hint, HostRefused.exit_status)
            )
    return found or [Finding("ports", "are free")]


def check_records(settings: Settings) -> list[Finding]:
    """Every record file of the file source: what is refused, and which namespaces are missing."""
    source = settings.sources.file
    if not source.enabled:
        return []
    if not source.directory.is_dir():
        return [
            Finding(
                "records",
                f"sources.file.directory: there is no directory {source.directory}",
                "make it, or change the setting",
                SourceRefused.exit_status,
            )
        ]
    found: list[Finding] = []
    count = 0
    for path, records in read_record_files(source.directory):
        if isinstance(records, OSError):
            text = f"{path}: cannot be read: {records.strerror}"
            found.append(Finding("records", text, "", SourceRefused.exit_status))
            continue
        count += len(records.networks) + len(records.instances)
        found += [
            Finding("records", str(problem), "", SourceRefused.exit_status)
            for problem in records.all_problems
        ]
    return found or [Finding("records", f"{count} in {source.directory}")]


def read_record_files(directory: Path) -> Iterator[tuple[Path, Records | OSError]]:
    """What each record file of a directory holds, or why it cannot be read."""
    from imdsproxy.sources.record_file import (  # noqa: PLC0415 - rarely needed
        SUFFIXES,
        decode_records,
        payload_reader,
    )

    for path in sorted(directory.iterdir()):
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            yield path, error
            continue
        yield path, decode_records(data, file=str(path), read_file=payload_reader(directory))[0]


def check_daemon(status: Mapping[str, object]) -> list[Finding]:
    """What the running daemon says: networks that are not served, and what else is wrong."""
    left_out = cast("Sequence[Mapping[str, str]]", status["left_out"])
    found = [
        Finding(
            "namespaces",
            f"network {one['network']} is not served: {one['reason']}",
            one["hint"],
            HostRefused.exit_status,
        )
        for one in left_out
    ]
    readiness = cast("Mapping[str, object]", status["readiness"])
    pid = status["controller"]
    if readiness["ready"]:
        return [*found, Finding("daemon", f"runs and is ready (pid {pid})")]
    reasons = "; ".join(cast("Sequence[str]", readiness["reasons"]))
    text = f"runs and is not ready (pid {pid}): {reasons}"
    return [*found, Finding("daemon", text, "`imdsproxy status`", HostRefused.exit_status)]
