"""Where we have put tables in the kernel, by network, so that a later process takes away those that nobody needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from imdsproxy.core.model import NetworkId
from imdsproxy.errors import HostRefused


def read_places(path: Path, *, family: str) -> dict[NetworkId, list[str | None]]:
    """What was noted of each network; without a file nothing was.

    Args:
        path: The journal.
        family: Of nftables, for the hint: where what is left shows.

    Raises:
        HostRefused: It cannot be read.
    """
    try:
        told = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HostRefused(
            f"cannot read {path}: {error}",
            hint=f"remove it; nft list tables {family} shows what is left",
        ) from error
    return {NetworkId(name): list(words) for name, words in told.items()}


def render_places(places: Mapping[NetworkId, Sequence[str | None]]) -> bytes:
    """The journal's bytes, networks in order."""
    return json.dumps(dict(sorted(places.items()))).encode()
