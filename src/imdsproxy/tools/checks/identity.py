"""Checks of identity tokens."""

from imdsproxy.controller.key_file import find_key_error
from imdsproxy.tools.checks import Finding, Subject, found, refused


def check_signing_key(on: Subject) -> list[Finding]:
    """Check that the signer can use the operator's key, if the settings name one."""
    identity = on.settings.identity
    if identity.key_file is None:
        return []
    error = find_key_error(identity)
    if error is not None:
        return refused(error, "identity.key_file")
    return [found("signing-key", path=identity.key_file)]
