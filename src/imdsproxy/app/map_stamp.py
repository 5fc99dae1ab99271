"""What HAProxy's maps were made of, so that a start makes them anew only where that has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import structlog

from imdsproxy.dataplane.records import Writer
from imdsproxy.errors import HostRefused


@dataclass(frozen=True, slots=True)
class MapStamp:
    """A digest of the maps and of everything that they were made of.

    Without the file, or where it does not fit, a start makes all records: it may be deleted at any time.

    Args:
        path: The file. It goes when the maps go, as at a reboot.
        maps: The maps.
        write: Replaces it.
    """

    path: Path
    maps: tuple[Path, ...]
    write: Writer

    def save(self, made_of: bytes) -> None:
        """Leave it for the next start. What fails here costs that its time, and nothing else."""
        try:
            self.write(self.path, self._digest(made_of))
        except (OSError, HostRefused) as error:
            structlog.get_logger().warning(
                "the next start makes all records", reason=str(error), file=str(self.path)
            )

    def fits(self, made_of: Callable[[], bytes | None]) -> bool:
        """Whether the maps are the ones that would be made now.

        Args:
            made_of: As `save` got it; called only where there is a stamp.
        """
        try:
            saved = self.path.read_bytes()
            now = made_of()
            return now is not None and saved == self._digest(now)
        except OSError:
            return False

    def _digest(self, made_of: bytes) -> bytes:
        digest = blake2b(made_of)
        for path in self.maps:
            text = path.read_bytes()
            digest.update(b"%d:" % len(text))
            digest.update(text)
        return digest.hexdigest().encode()
