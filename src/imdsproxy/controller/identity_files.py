"""Files by which the process that answers guests reaches the hubs that sign."""

import json
from dataclasses import dataclass
from pathlib import Path

from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.files import ensure_directory, write_atomic
from imdsproxy.issuer.hub_source import AUTHORITY_FILE, CERTIFICATE_FILE, HUBS_FILE
from imdsproxy.sources.fleet.client import HostFiles


@dataclass(slots=True)
class IdentityFiles:
    """Copies of this host's files for its fleet, which the process that answers guests may read.

    Args:
        group: Group of that process; -1 keeps the present group.
    """

    directory: Path
    files: HostFiles
    hubs: tuple[str, ...]
    group: int = -1

    async def copy(self) -> None:
        """Copy what has changed: the controller renews the certificate, and the fleet may replace its CA.

        Raises:
            SourceUnavailable: A file cannot be read.
            HostRefused: The file system refuses.
        """
        hubs = self.hubs or self.files.read_hubs()
        try:
            certificate, key = self.files.certificate.read_bytes(), self.files.key.read_bytes()
            wanted = {
                HUBS_FILE: json.dumps(hubs).encode(),
                CERTIFICATE_FILE: certificate if certificate == key else certificate + key,
                AUTHORITY_FILE: self.files.authority.read_bytes(),
            }
        except OSError as error:
            raise SourceUnavailable(f"this host's certificate cannot be read: {error}") from error
        owner = -1, self.group
        ensure_directory(self.directory, mode=0o750, owner=owner)
        for name, content in wanted.items():
            path = self.directory / name
            if not path.exists() or path.read_bytes() != content:
                write_atomic(path, content, mode=0o640, owner=owner)
