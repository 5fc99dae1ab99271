"""Who listens on a unix socket, asked without connecting: a connection would be a request to somebody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.host.process import open_sockets, read_arguments
from imdsproxy.host.socket_file import find_socket_at

_ACCEPTS: Final = 0x10000
"""`__SO_ACCEPTCON` in the flags of `/proc/net/unix` (proc_net(5))."""

_HAPROXYS: Final = re.compile(r"\.[0-9]+\.tmp")
"""What HAProxy has after a path when it binds; the socket is then renamed, and the kernel keeps the first name."""


@dataclass(frozen=True, slots=True)
class UnixListener:
    """The process that has a listening socket open; `pid` is `None` where none can be seen."""

    pid: int | None = None
    command: tuple[str, ...] = ()


def find_unix_listener(path: Path, proc: Path = Path("/proc")) -> UnixListener | None:
    """Who listens at the path; `None` when nobody does, whether or not there is a file.

    Args:
        path: The socket's absolute path, as it was bound.
        proc: Where the kernel shows processes.
    """
    listening = list(_listening(path, proc))
    if not listening:
        return None
    inodes = {inode for inode, _ in listening}
    if len(inodes) > 1:
        # A HAProxy whose socket somebody else has replaced listens still, or an agent whose socket it has replaced;
        # nobody reaches them. Where the kernel does not say who is reached, who bound by the path's own name is.
        inodes = (
            inodes & find_socket_at(path)
            or {inode for inode, exact in listening if exact}
            or inodes
        )
    for pid in sorted(int(one.name) for one in proc.glob("[0-9]*")):
        if any(inode in inodes for inode, _ in open_sockets(pid, proc)):
            return UnixListener(pid, read_arguments(pid, proc))
    return UnixListener()


def _listening(path: Path, proc: Path) -> Iterator[tuple[int, bool]]:
    """Inodes of what listens there, and whether it was bound under exactly this name."""
    try:
        lines = (proc / "net" / "unix").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines[1:]:
        # Num RefCount Protocol Flags Type St Inode Path
        fields = line.split(maxsplit=7)
        if len(fields) < 8 or not int(fields[3], 16) & _ACCEPTS:  # noqa: PLR2004 - as above
            continue
        rest = fields[7].removeprefix(str(path))
        exact = fields[7] == str(path)
        if exact or (rest != fields[7] and _HAPROXYS.fullmatch(rest)):
            yield int(fields[6]), exact
