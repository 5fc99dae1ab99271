"""The namespaces in which we created tables, so that a later process removes those that are no longer needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imdsproxy.core.model import NetworkId
from imdsproxy.errors import HostRefused


@dataclass(slots=True)
class TableJournal:
    """A JSON file, read once: `{network: [namespace or null, …]}`.

    Attributes:
        write: Replaces the file as a whole.
        family: Of nftables, for the hint that shows what is left.
    """

    path: Path
    write: Callable[[Path, bytes], None]
    family: str
    _places: dict[NetworkId, list[str | None]] | None = None

    def load(self) -> dict[NetworkId, list[str | None]]:
        """The entry of each network; none without a file.

        Raises:
            HostRefused: The file cannot be read.
        """
        if self._places is None:
            try:
                found = json.loads(self.path.read_bytes())
            except FileNotFoundError:
                found = {}
            except (OSError, ValueError) as error:
                raise HostRefused(
                    f"cannot read {self.path}: {error}",
                    hint=f"remove it; nft list tables {self.family} shows what is left",
                ) from error
            self._places = {NetworkId(name): list(places) for name, places in found.items()}
        return self._places

    def store(self, places: Mapping[NetworkId, Sequence[str | None]]) -> None:
        """Replace the file unless it says that already.

        Raises:
            HostRefused: The file cannot be written.
        """
        wanted = {name: list(places[name]) for name in sorted(places)}
        if wanted != self._places:
            self.write(self.path, json.dumps(wanted).encode())
            self._places = wanted
