"""Every exit status of the command line and what it means: the one mapping there is.

Errors bring their own (`imdsproxy.errors`, after sysexits.h); the rest stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from imdsproxy import errors
from imdsproxy.errors import ImdsproxyError

OK: Final = 0
NO: Final = 1
USAGE: Final = 64
NOT_IN_FORCE: Final = 75
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141

EXIT_STATUSES: Final[Mapping[int, str]] = {
    OK: "Done.",
    NO: "Done, and the answer is no: `get` or `explain --probe` was answered 400 or above, `explain` found no "
    "instance, `doctor` found an error, `status --check` found the daemon not ready.",
    USAGE: "The command line, or what it asked of the daemon, is not acceptable.",
    66: "There is no network or instance of that name.",
    69: "The daemon, or a source of records, does not answer or refuses.",
    70: "HAProxy refuses a configuration or command, or imdsproxy has a fault.",
    71: "The operating system refuses, or HAProxy is missing or too old.",
    73: "What should be made is there already.",
    NOT_IN_FORCE: "Stored, and not in force: the answer says why and what helps; `status --check` found a network that "
    "is configured and not served.",
    77: "Root, a capability, or access to the admin socket is needed.",
    78: "A configuration file must be changed.",
    INTERRUPTED: "Interrupted (Ctrl-C).",
    PIPE_CLOSED: "Who read the output went away.",
}


def errors_by_status(status: int) -> list[type[ImdsproxyError]]:
    """The errors that end a command with `status`, in the order of `imdsproxy.errors`."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    return [
        kind
        for kind in kinds
        if isinstance(kind, type)
        and issubclass(kind, ImdsproxyError)
        and kind.exit_status == status
    ]
