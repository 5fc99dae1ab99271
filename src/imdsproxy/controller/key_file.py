"""Check of the operator's key file, as the signer would use it."""

from pathlib import Path
from typing import Final

from imdsproxy.config.identity import IdentitySettings
from imdsproxy.errors import ConfigError, ImdsproxyError, LibraryMissing, optional_library
from imdsproxy.host.account import find_account
from imdsproxy.issuer.check import LIBRARY_HINT

SIGNER_USER: Final = "identity.signer_user"
_CREDENTIALS: Final = Path("/run/credentials")


def find_key_error(settings: IdentitySettings) -> ImdsproxyError | None:
    """Return why the signer cannot use the operator's key file; `None` if it can, or if only the signer sees the file.

    Raises `HostRefused` if the signer's account does not exist.
    """
    path = settings.key_file
    if path is None or (path.is_relative_to(_CREDENTIALS) and not path.exists()):
        # A credential is there while the unit of the signer runs.
        return None
    account = find_account(settings.signer_user, None, SIGNER_USER)
    try:
        with optional_library("cryptography", LIBRARY_HINT):
            from imdsproxy.issuer.key_file import parse_key_file, read_key_file
        parse_key_file(read_key_file(path, None if account is None else account.user), str(path))
    except (ConfigError, LibraryMissing) as error:
        return error
    return None
