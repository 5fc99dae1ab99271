"""Sockets of HAProxy to itself: HAProxy makes them and never removes them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from imdsproxy.core.haproxy.nova import hop_sockets
from imdsproxy.host.files import ensure_directory
from imdsproxy.host.refusal import host_refused


def sweep_hops(directory: Path, config: str) -> None:
    """Remove the sockets of hops that the configuration in force does not have any more.

    Raises:
        HostRefused: The file system refuses.
        PrivilegeMissing: We may not do that.
    """
    kept = hop_sockets(config)
    try:
        for path in directory.glob("hop-*.sock"):
            if path.name not in kept:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise host_refused(f"remove what is not needed any more in {directory}", error) from error


def lead_back(jail: Path) -> None:
    """Have the jail's own path lead to it from inside: HAProxy connects to a peer by the path that it has bound.

    Raises:
        HostRefused: The file system refuses.
        PrivilegeMissing: We may not do that.
    """
    inside = jail.joinpath(*jail.parts[1:])
    ensure_directory(inside.parent)
    try:
        with contextlib.suppress(FileExistsError):
            inside.symlink_to("/")
    except OSError as error:
        raise host_refused(f"make the link {inside}", error) from error
