"""Keys of the identity tokens that HAProxy and the process for guests may keep, over a kill of the controller."""

import json
from dataclasses import dataclass
from pathlib import Path

from imdsproxy.errors import refusing
from imdsproxy.host.files import write_atomic
from imdsproxy.issuer.ring import KeyRing, parse_ring


@dataclass(slots=True)
class CachedKeys:
    """File with the ring by which all kept tokens were signed.

    The file is in the runtime directory: after a boot, nothing keeps a token.

    Args:
        rules: Settings that tokens depend on. A ring that was written with others counts as a ring of an unknown key.
    """

    path: Path
    rules: str
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
            found = self._parse(content)
            if found is None:
                return ring.add("unknown", 0)
            self._written = found
        return self._written

    def write(self, ring: KeyRing) -> None:
        """Write the ring if it has changed; raise `HostRefused` if the file system refuses."""
        if ring != self._written:
            shape = {"rules": self.rules, "ring": json.loads(ring.render())}
            write_atomic(self.path, json.dumps(shape).encode(), mode=0o600)
            self._written = ring

    def _parse(self, content: bytes) -> KeyRing | None:
        try:
            shape = json.loads(content)
            ring = parse_ring(json.dumps(shape["ring"]).encode())
        except (ValueError, TypeError, KeyError):
            return None
        return ring if shape.get("rules") == self.rules else None
