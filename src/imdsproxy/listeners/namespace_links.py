"""Symbolic links by which HAProxy opens namespaces.

HAProxy hands a listening socket over to its next worker by the names of its namespace and device. When
one of them was deleted and made again under its name, that would be the dead one's socket; a link with
another name (`listeners.binds.link_name`) makes it open a new one. HAProxy opens `/var/run/netns/NAME` and
refuses no slash in NAME, so the links live in a directory of ours, out of sight of `ip netns`:
`bind … namespace ../imdsproxy/netns/blue@4026532317`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from imdsproxy.host.refusal import host_refused

HAPROXY_NETNS: Final = Path("/var/run/netns")
"""Where HAProxy looks (compiled in: `src/namespace.c`)."""

_TEMPORARY: Final = ".tmp-"


def haproxy_name(directory: Path) -> str:
    """What to write after `namespace` in a bind line, before `/NAME`, so that HAProxy opens `directory/NAME`."""
    return os.path.relpath(os.path.realpath(directory), os.path.realpath(HAPROXY_NETNS))


def apply_links(directory: Path, links: Mapping[str, Path | str]) -> bool:
    """Make `directory` hold exactly these symbolic links; true when something was changed.

    Each link is there whole or not at all; links that stay are not touched. The directory is made
    when it is missing. Other kinds of files in it are left alone.

    Raises:
        HostRefused: The file system refused.
        PrivilegeMissing: This process may not write there.
    """
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        present = _present(directory)
        base = os.fspath(directory)
        for name in present.keys() - links.keys():
            os.unlink(f"{base}/{name}")  # noqa: PTH108 - for every network at a stop: see `_present`
        missing = {n: text for n, t in links.items() if present.get(n) != (text := str(t))}
        for name, target in missing.items():
            if name in present:
                _replace(directory, name, target)
            else:
                _place(f"{base}/{name}", target)
    except OSError as error:
        raise host_refused(f"link namespaces in {directory}", error) from error
    return bool(missing) or bool(present.keys() - links.keys())


def _present(directory: Path) -> dict[str, str]:
    with os.scandir(directory) as entries:
        # At each reload, for every network: a Path for each costs more than the kernel's part.
        return {one.name: os.readlink(one.path) for one in entries if one.is_symlink()}  # noqa: PTH115 - as above


def _place(path: str, target: str) -> None:
    try:
        os.symlink(target, path)  # noqa: PTH211 - for every network at a start: see `_present`
    except FileExistsError:
        # Some other kind of file has the name.
        _replace(Path(path).parent, Path(path).name, target)


def _replace(directory: Path, name: str, target: str) -> None:
    temporary = directory / f"{_TEMPORARY}{name}"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    temporary.replace(directory / name)
