"""The networks that HAProxy was last configured for, kept beside its configuration.

A controller that starts while a source cannot be read (a damaged store, a missing directory) would otherwise take
every network for removed, and HAProxy would stop listening in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from imdsproxy.core.model import Network, NetworkId
from imdsproxy.core.records import Refused, parse_network, render_network
from imdsproxy.errors import HostRefused


@dataclass(slots=True)
class KeptNetworks:
    """The file, and what it held when this process first asked."""

    path: Path
    write: Callable[[Path, bytes], None]
    _networks: Mapping[NetworkId, Network] | None = None
    _written: Mapping[NetworkId, Network] = field(default_factory=dict)

    def beside(
        self, known: Mapping[NetworkId, Network], *, in_sync: bool
    ) -> dict[NetworkId, Network]:
        """The networks to listen for: those of the sources, and until all are in sync, also those that were kept."""
        if in_sync:
            return dict(known)
        return {**self.load(), **known}

    def keep(self, networks: Mapping[NetworkId, Network]) -> None:
        """Note what HAProxy is configured for now.

        Only the next process needs it, so a failure is only logged.
        """
        self._networks = dict(networks)
        if networks == self._written:
            return
        text = json.dumps([render_network(networks[one]) for one in sorted(networks)])
        try:
            self.write(self.path, text.encode())
        except HostRefused as error:
            structlog.get_logger().warning(
                "networks not kept", code=error.code, error=error.message, hint=error.hint
            )
            return
        self._written = self._networks

    def load(self) -> Mapping[NetworkId, Network]:
        """The networks that HAProxy is configured for."""
        if self._networks is None:
            self._networks = _read(self.path)
        return self._networks


def _read(path: Path) -> dict[NetworkId, Network]:
    try:
        records = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        structlog.get_logger().warning("kept networks not read", path=str(path), error=str(error))
        return {}
    parsed = [parse_network(one) for one in records] if isinstance(records, list) else []
    return {one.id: one for one in parsed if not isinstance(one, Refused)}
