"""Keys of the identity tokens that HAProxy and the process for guests may keep, over a kill of the controller."""

from dataclasses import dataclass
from pathlib import Path

from imdsproxy.errors import refusing
from imdsproxy.host.files import write_atomic
from imdsproxy.issuer.ring import KeyRing, parse_ring


@dataclass(slots=True)
class CachedKeys:
    """File with the ring by which all kept tokens were signed.

    The file is in the runtime directory: after a boot, nothing keeps a token.
    """

    path: Path
    _written: KeyRing | None = None

    def read(self, published: str | None) -> KeyRing:
        """Return the ring; a damaged file counts as a ring of an unknown key.

        Args:
            published: Key that signed by the documents of the last run. It counts without a file.

        Raises:
            HostRefused: The file system refuses.
        """
        if self._written is None:
            with refusing(f"read {self.path}"):
                content = self.path.read_bytes() if self.path.exists() else None
            ring = KeyRing()
            if content is None:
                return ring if published is None else ring.add(published, 0)
            try:
                self._written = parse_ring(content)
            except ValueError:
                return ring.add("unknown", 0)
        return self._written

    def write(self, ring: KeyRing) -> None:
        """Write the ring if it has changed; raise `HostRefused` if the file system refuses."""
        if ring != self._written:
            write_atomic(self.path, ring.render(), mode=0o600)
            self._written = ring
