"""Turns an `OSError` into the exception that says who must act."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from imdsproxy.errors import HostRefused, PrivilegeMissing

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
    """The exception to raise for `error`, met while doing `action` ("create namespace blue").

    Without a `hint` one is chosen by the errno. EPERM and EACCES become `PrivilegeMissing`, with the hint `denied`.
    """
    number = error.errno or 0
    name = errno.errorcode.get(number, "unknown error")
    text = os.strerror(number) if number else str(error)
    message = f"cannot {action}: {text} ({name})"
    if number in (errno.EPERM, errno.EACCES):
        return PrivilegeMissing(
            message, hint=hint or denied or "run as root, or with CAP_SYS_ADMIN and CAP_NET_ADMIN"
        )
    return HostRefused(message, hint=hint or _HINTS.get(number, ""))


@contextlib.contextmanager
def refusing(action: str, *, hint: str = "", denied: str = "") -> Iterator[None]:
    """Raise what the system refuses in the block as `host_refused`."""
    try:
        yield
    except OSError as error:
        raise host_refused(action, error, hint=hint, denied=denied) from error
