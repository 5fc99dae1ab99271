"""What several sources agree on that tell of the same network or instance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from imdsproxy.core.model import Instance, Network

_V = TypeVar("_V")


def distinct(records: Iterable[_V | None]) -> tuple[_V, ...]:
    """The different ones, in their order; a plain list search, for there are as many as sources."""
    found: list[_V] = []
    for record in records:
        if record is not None and record not in found:
            found.append(record)
    return tuple(found)


def without_vaguer(versions: tuple[Instance, ...]) -> tuple[Instance, ...]:
    """Those of which no other says the same and, beside it, when the instance was made."""
    if len(versions) == 1:
        return versions
    dated = [version for version in versions if version.created_at is not None]
    known = [replace(version, created_at=None) for version in dated]
    return tuple(
        version for version in versions if version.created_at is not None or version not in known
    )


def agreed(versions: tuple[Network, ...]) -> Network | None:
    """What all versions of a network agree on, if that is enough for a listener."""
    if len(versions) == 1:
        return versions[0]
    if len({version.listener for version in versions}) == 1:
        checked = any(version.mac_check for version in versions)
        return Network(versions[0].id, versions[0].listener, mac_check=checked)
    return None
