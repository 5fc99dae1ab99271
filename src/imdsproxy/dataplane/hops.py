"""Sockets of HAProxy to itself: HAProxy makes them and never removes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imdsproxy.core.haproxy.nova import hop_sockets
from imdsproxy.host.refusal import host_refused

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["sweep_hops"]


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
