"""The file that holds the secret shared with Nova."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imdsproxy.core.signing import UnlikelySecret, parse_secret
from imdsproxy.errors import SecretUnreadable
from imdsproxy.host.files import read_secret

if TYPE_CHECKING:
    from pathlib import Path


def read_signing_secret(path: Path) -> bytes:
    """The secret in `path`, as Nova has it.

    Raises:
        SecretUnreadable: As `read_secret`; or it cannot be what Nova has.
    """
    try:
        return parse_secret(read_secret(path))
    except UnlikelySecret as error:
        raise SecretUnreadable(
            f"the secret {path} {error}",
            hint="have the value of Nova's `[neutron] metadata_proxy_shared_secret` in it, and nothing else",
        ) from error
