"""HAProxy's maps as of the last stop, for a start that would make the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import structlog

from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import DataplaneError
from imdsproxy.host.files import ensure_directory, write_atomic

_STAMP: Final = "stamp"


@dataclass(frozen=True, slots=True)
class KeptMaps:
    """Copies of the maps, with a digest of them and of everything that they were made of.

    Without the copies, or where the digest differs, a start makes all records: they may be deleted at any time.
    """

    layout: Layout

    @property
    def _copies(self) -> dict[Path, Path]:
        """Each map that HAProxy reads, and its copy."""
        layout = self.layout
        maps = (layout.base_map, layout.overlay_map, layout.path_rules_map)
        return {path: layout.kept_maps / path.name for path in maps}

    def save(self, made_of: bytes) -> None:
        """Copy the maps. What fails here costs the next start its time, and nothing else."""
        try:
            ensure_directory(self.layout.kept_maps, mode=0o700)
            texts = [path.read_bytes() for path in self._copies]
            for copy, text in zip(self._copies.values(), texts, strict=True):
                write_atomic(copy, text, mode=0o600)
            write_atomic(self.layout.kept_maps / _STAMP, _digest(made_of, texts), mode=0o600)
        except (OSError, DataplaneError) as error:
            structlog.get_logger().warning("the next start makes all records", reason=str(error))

    def restore(self, made_of: Callable[[], bytes | None]) -> bool:
        """Have the copies where HAProxy reads them, if they are what would be made now; whether they are.

        Args:
            made_of: As `save` got it; called only where there are copies.

        Raises:
            HostRefused: A map cannot be written.
        """
        try:
            stamp = (self.layout.kept_maps / _STAMP).read_bytes()
            texts = [copy.read_bytes() for copy in self._copies.values()]
        except OSError:
            return False
        now = made_of()
        if now is None or stamp != _digest(now, texts):
            return False
        for path, text in zip(self._copies, texts, strict=True):
            write_atomic(path, text)
        return True


def _digest(made_of: bytes, texts: list[bytes]) -> bytes:
    digest = blake2b(made_of)
    for text in texts:
        digest.update(b"%d:" % len(text))
        digest.update(text)
    return digest.hexdigest().encode()
