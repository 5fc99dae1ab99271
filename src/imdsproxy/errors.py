"""Exceptions of imdsproxy's modules, grouped by who must act.

`ConfigError`: the operator must change a file. `SourceError`: a source needs repair. `DataplaneError`: HAProxy or the
host refused. `AdminError`: the caller of the admin API must act.

Each exception has a stable `code` (kebab-case: logs, metrics, admin API and the reference use it), an exit status for
commands, a status for the admin API, and may carry a hint. Library exceptions never leave their adapter; they are
chained with `raise … from`.
"""

import errno
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

_SHOWN: Final = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file, record or setting.

    Attributes:
        field: Path in the document, as `ports[0].addresses[1]` or `haproxy.maxconn`.
        hint: The correct form, if it is known.
        line: 1-based, or `None`.
    """

    field: str
    reason: str
    hint: str = ""
    file: str | None = None
    line: int | None = None
    record: str | None = None

    def __str__(self) -> str:
        place = "" if self.file is None else self.file
        if self.line is not None:
            place = f"{place}:{self.line}"
        head = f"{place}: {self.field}" if place else self.field
        tail = f" ({self.hint})" if self.hint else ""
        return f"{head}: {self.reason}{tail}"


def quoted(value: str) -> str:
    """Quote a value for a `Problem`, on one line and cut if it is long."""
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def spell_count(number: int, noun: str) -> str:
    """Return number and noun: `1 key`, `2 keys`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class ImdsproxyError(Exception):
    """Root of the tree; never raised itself."""

    code: ClassVar[str] = "error"
    """Name of the subclass in kebab-case, without a final `Error`."""

    exit_status: ClassVar[int] = 70
    http_status: ClassVar[int] = 500
    """Status of the admin API's answer; 503 if a retry can help."""

    remedy: ClassVar[str] = ""
    """The operator's remedy, for the reference; the hint of an error is more exact."""

    def __init_subclass__(cls) -> None:
        # Other modules' subclasses keep the code of their parent class.
        if cls.__module__ == __name__:
            name = cls.__name__.removesuffix("Error")
            cls.code = re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower()

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class ConfigError(ImdsproxyError):
    """The operator must change a configuration file."""

    exit_status = 78
    http_status = 422
    remedy = "Change the file that the message names; `imdsproxy check` shows all problems at once."


class ConfigInvalid(ConfigError):
    """The configuration violates the schema; `problems` has every violation."""

    remedy = (
        "Correct each field that is listed, as the reference of settings or records has it; then "
        "`imdsproxy reload`."
    )


class ConfigUnreadable(ConfigError):
    """A configuration file is missing, unreadable or not YAML."""

    remedy = (
        "Create the file, make it readable for root, or mend its YAML at the line that is named."
    )


class FileUntrusted(ConfigError):
    """A user other than root and the program's own account may change another program's file or its directories."""

    remedy = (
        "See who has changed the file. If the file is genuine, give it and its directories to root, "
        "writable by no other user."
    )


class SettingsDropped(ConfigError):
    """A settings file is blank, was emptied or removed, or every policy is missing; `problems` has the details."""

    remedy = (
        "Restore the file. If the settings are meant to go: `imdsproxy reload --allow-dropped`, "
        "or `{}` in the file before a start."
    )


class SecretUnreadable(ConfigError):
    """A file for a secret is missing, empty, or open to others."""

    remedy = "Write the secret into the file, owned by root with mode 0600."


class SourceError(ImdsproxyError):
    """A source needs repair."""

    exit_status = 69
    remedy = "Mend the source that `imdsproxy status` names; known guests are served meanwhile."


class SourceUnavailable(SourceError):
    """The source does not answer now."""

    http_status = 503
    remedy = (
        "Wait: it is tried again. If it lasts, look at the service that the message names: "
        "libvirtd, Neutron, Keystone."
    )


class ClockWrong(SourceUnavailable):
    """The clocks of two machines differ, or a clock is before a time that has passed."""

    remedy = "Set the clock of the machine that the message names, by NTP if possible."


class LibraryMissing(SourceUnavailable):
    """An optional library, which a source or a command needs, is not installed."""

    remedy = "Install what the hint names, and restart the controller."


class EtcdUnavailable(SourceUnavailable):
    """No member of etcd answers as expected; hosts keep the last known state in force."""

    remedy = (
        "Wait: it is tried again with each member. If it lasts, look at etcd: `etcdctl endpoint "
        "status --cluster`."
    )


class EtcdFull(EtcdUnavailable):
    """etcd's database has reached its quota: reads work, writes fail."""

    remedy = (
        "`etcdctl compact` to a recent revision, `etcdctl defrag` member by member until `etcdctl endpoint status` "
        "shows that its file is smaller (each compacts in the background), `etcdctl alarm disarm`; raise "
        "`--quota-backend-bytes` if it fills again."
    )


class WriteUnknown(EtcdUnavailable):
    """etcd has not confirmed a write, which may have happened."""

    remedy = "Read what was to be written, and write it again where it is missing."


class SourceRefused(SourceError):
    """The source refused a request; `problems` has the fields."""

    http_status = 409
    remedy = "Correct the fields that are listed."


class RecordConflict(SourceRefused):
    """Another record has the address, listener or id, or needs the record that should be removed or moved."""

    exit_status = 73
    remedy = "Give one of the records another address, listener or id; or change the one that is in the way first."


class RestoreSuspected(SourceRefused):
    """A hub or two hosts have data that the fleet's etcd lacks: etcd may be restored from a backup, and writes stop."""

    remedy = (
        "Look at `imdsproxy fleet status`. If etcd was restored on purpose: `imdsproxy fleet "
        "accept-restore`; until then hosts keep what they have."
    )


class SourceCorrupt(SourceError):
    """The source's store is damaged."""

    remedy = "Restore the store from a backup, or move it away and add its records again."


class UserDataUnreadable(SourceCorrupt):
    """The fleet's etcd has user data that was changed, or that is sealed with a key that the hub lacks."""

    remedy = (
        "Where the hub lacks a key, copy `envelope.key` from a hub that has it, and restart the hub; else write the "
        "user data again: `imdsproxy --fleet URL instance set`. The host asks for it again by itself."
    )


class DataplaneError(ImdsproxyError):
    """HAProxy or the host refused something."""

    exit_status = 70
    remedy = (
        "Read the message, which has HAProxy's or the kernel's own words, and `journalctl -u "
        "imdsproxy-haproxy`."
    )


class HaproxyMissing(DataplaneError):
    """HAProxy is not installed, cannot be run, or is too old."""

    exit_status = 71
    remedy = "Install HAProxy 3.0 or later, or name it in `haproxy.binary`."


class ConfigRejected(DataplaneError):
    """HAProxy refuses the configuration; the message is HAProxy's."""

    remedy = (
        "Known guests are served on. Undo the last change of settings; if nothing has "
        "changed, report it with the message."
    )


class ReloadFailed(DataplaneError):
    """The master could not start a new worker; the old worker continues."""

    http_status = 503
    remedy = (
        "Wait: it is tried again. If it lasts, look for memory and open files in `journalctl "
        "-u imdsproxy-haproxy`."
    )


class CommandRefused(DataplaneError):
    """HAProxy answered a Runtime API command with an error."""

    remedy = (
        "Wait: it is tried again. If `imdsproxy status` goes on naming it, report it with the "
        "message."
    )


class RuntimeUnavailable(DataplaneError):
    """HAProxy's master or worker socket does not answer."""

    http_status = 503
    remedy = (
        "Wait: HAProxy is started again within a second. If it lasts, `systemctl status "
        "imdsproxy-haproxy`."
    )


class HostRefused(DataplaneError):
    """The operating system refused a namespace, link, address, process or file operation."""

    exit_status = 71
    remedy = (
        "Do what the hint says: it depends on what the kernel refused (space, memory, a "
        "device that is gone)."
    )


class RecordCorrupt(DataplaneError):
    """A compiled record is truncated, damaged, or of a format that this version does not read."""

    http_status = 503
    remedy = (
        "Restart the controller, which compiles the record again; if it comes again, check "
        "the disk."
    )


class PrivilegeMissing(DataplaneError):
    """The command needs root or a capability."""

    exit_status = 77
    remedy = (
        "Run the command as root, or as a member of the group `imdsproxy`; the daemon by its unit."
    )


class AdminError(ImdsproxyError):
    """The caller of the admin API must act."""

    exit_status = 64
    remedy = "Correct the request; the message says what is wrong with it."


class AdminUnavailable(AdminError):
    """The daemon's admin socket does not answer."""

    exit_status = 69
    http_status = 503
    remedy = (
        "Start the daemon: `systemctl start imdsproxy`. If it runs, compare `admin.socket` "
        "with `--socket`."
    )


class Starting(AdminUnavailable):
    """The daemon is starting, and answers afterwards."""

    remedy = "Wait; `imdsproxy status --wait` returns when it is ready, and shows how far it is."
    steps: Sequence[Mapping[str, Any]] = ()
    """Work in progress, each `{what, done, of}`; `of` is 0 if the total is unknown."""

    @classmethod
    def at(cls, steps: Sequence[Mapping[str, Any]]) -> Self:
        """Build the error with these steps; its message names the first."""
        words = "the daemon is starting"
        if steps:
            what, done, of = (steps[0][key] for key in ("what", "done", "of"))
            words += f": {what}, {done:,} of {of:,}" if of else f": {what}"
        error = cls(words, hint="`imdsproxy status --wait` waits for it")
        error.steps = steps
        return error


class AccessDenied(AdminError):
    """A fleet's hub does not accept the certificate or the token, or they do not allow the request."""

    exit_status = 77
    http_status = 403
    remedy = (
        "Use a certificate whose role allows it (`imdsproxy fleet operator`); a host that was "
        "refused joins again with a new token (`imdsproxy fleet enrol`)."
    )


class NotFound(AdminError):
    """No network, instance or address has that name."""

    exit_status = 66
    http_status = 404
    remedy = "List what there is: `imdsproxy network list`, `imdsproxy instance list`."


class AlreadyExists(AdminError):
    """A network or instance with this id exists already, and the request asked for a new record."""

    exit_status = 73
    http_status = 409
    remedy = "Use `set` instead of `add`, or another id."


class RevisionOutdated(AdminError):
    """The revision of a fleet's record is not the expected one."""

    exit_status = 73
    http_status = 409
    remedy = "Read the record again, and change what it is now."


class RequestRefused(AdminError):
    """The body of a request is not acceptable; `problems` has the fields."""

    http_status = 422
    remedy = "Correct the fields that are listed."


@contextmanager
def optional_library(name: str, hint: str) -> Iterator[None]:
    """Import an optional library. Raises `LibraryMissing`: the library is not installed, or not for this Python."""
    try:
        yield
    except ImportError as error:
        raise LibraryMissing(f"{name} cannot be imported: {error}", hint=hint) from error


@contextmanager
def hidden_library(name: str) -> Iterator[None]:
    """Hide a library that is not loaded yet: libraries imported in the block do without the hidden one."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # by the import system's own rules: there is none
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


KINDS: Final = tuple(
    one for one in vars().values() if isinstance(one, type) and issubclass(one, ImdsproxyError)
)
"""Every exception of the tree, in the order of this module."""

_HINTS: Final = {
    errno.ENOSPC: "the file system is full: free some space",
    errno.EDQUOT: "the quota of the file system is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EMFILE: "raise LimitNOFILE of the service",
    errno.ENFILE: "raise fs.file-max of the host",
    errno.ENOMEM: "the host is short of memory",
    errno.ENODEV: "the device is gone; it is looked at again when it comes back",
    errno.EBUSY: "another process uses it",
    errno.EOPNOTSUPP: "this kernel lacks the feature",
    errno.ENOENT: "it does not exist (any more)",
    errno.EEXIST: "something else of that name is there already",
}


def host_refused(
    action: str, error: OSError, *, hint: str = "", denied: str = ""
) -> HostRefused | PrivilegeMissing:
    """Build the exception to raise for `error` during `action` ("create namespace blue").

    Without a `hint`, the errno decides the hint. EPERM and EACCES become `PrivilegeMissing`, with the hint `denied`.
    """
    number = error.errno or 0
    name = errno.errorcode.get(number, "unknown error")
    text = error.strerror or str(error)
    message = f"cannot {action}: {text} ({name})"
    if number in (errno.EPERM, errno.EACCES):
        return PrivilegeMissing(
            message, hint=hint or denied or "run as root, or with CAP_SYS_ADMIN and CAP_NET_ADMIN"
        )
    return HostRefused(message, hint=hint or _HINTS.get(number, ""))


@contextmanager
def refusing(action: str, *, hint: str = "", denied: str = "") -> Iterator[None]:
    """Raise an `OSError` of the block as `host_refused`."""
    try:
        yield
    except OSError as error:
        raise host_refused(action, error, hint=hint, denied=denied) from error


class Ignoring:
    """Context that suppresses `OSError`s with these numbers; the error ends the block."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        return isinstance(error, OSError) and error.errno in self._numbers


def first_expected(group: BaseExceptionGroup[BaseException]) -> ImdsproxyError | None:
    """Return the first of failures that tasks raised together, which caused the others; `None` if one is not ours."""
    expected, others = group.split(ImdsproxyError)
    if expected is None or others is not None:
        return None
    first: BaseException = expected
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first if isinstance(first, ImdsproxyError) else None
