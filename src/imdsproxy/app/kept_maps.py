"""HAProxy's maps as of the last stop, for a start that would make the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import structlog

from imdsproxy.dataplane.records import Writer
from imdsproxy.errors import DataplaneError
from imdsproxy.host.files import ensure_directory, write_atomic

_STAMP: Final = "stamp"


@dataclass(frozen=True, slots=True)
class KeptMaps:
    """Copies of the maps, with a digest of them and of everything that they were made of.

    Without the copies, or where the digest differs, a start makes all records: they may be deleted at any time.

    Args:
        directory: Of the copies.
        maps: The maps that HAProxy reads.
        write: Replaces one of these.
    """

    directory: Path
    maps: tuple[Path, ...]
    write: Writer

    def save(self, made_of: bytes) -> None:
        """Copy the maps. What fails here costs the next start its time, and nothing else."""
        try:
            ensure_directory(self.directory, mode=0o700)
            texts = [path.read_bytes() for path in self.maps]
            for path, text in zip(self.maps, texts, strict=True):
                write_atomic(self.directory / path.name, text, mode=0o600)
            write_atomic(self.directory / _STAMP, _digest(made_of, texts), mode=0o600)
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
            stamp = (self.directory / _STAMP).read_bytes()
            texts = [(self.directory / path.name).read_bytes() for path in self.maps]
        except OSError:
            return False
        now = made_of()
        if now is None or stamp != _digest(now, texts):
            return False
        for path, text in zip(self.maps, texts, strict=True):
            self.write(path, text)
        return True


def _digest(made_of: bytes, texts: list[bytes]) -> bytes:
    digest = blake2b(made_of)
    for text in texts:
        digest.update(b"%d:" % len(text))
        digest.update(text)
    return digest.hexdigest().encode()
