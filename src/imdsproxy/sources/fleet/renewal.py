"""Renewal of this host's certificate in a separate process, so that its libraries do not stay in the controller."""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from imdsproxy.errors import ImdsproxyError, SourceUnavailable, optional_library
from imdsproxy.fleet.members import LIBRARY_HINT
from imdsproxy.host.clock import Clock
from imdsproxy.host.process import run_program
from imdsproxy.sources.fleet.client import HostFiles, HubClient

_CHILD: Final = f"import sys; from {__name__} import renew_here; renew_here(sys.argv[1])"
_DEADLINE_S: Final = 120.0
_FAILED: Final = 1


async def renew_apart(files: HostFiles, hubs: Sequence[str], timeout_s: float) -> float:
    """Replace the certificate if renewal is due; return the Unix time at which the current certificate ends.

    Raises `SourceUnavailable` if the old certificate stays, and `HostRefused` if the process hangs.
    """
    paths = files.hubs, files.certificate, files.key, files.authority
    order = json.dumps([list(map(str, paths)), list(hubs), timeout_s])
    command = (sys.executable, "-P", "-c", _CHILD, order)
    status, words = await run_program(*command, deadline_s=_DEADLINE_S)
    message, hint = words.rpartition("\n")[2], "the process for the renewal ended"
    if status == 0:
        return float(message)
    if status == _FAILED and message.startswith("["):
        message, hint = json.loads(message)
    raise SourceUnavailable(f"this host's certificate is not renewed: {message}", hint=hint)


def renew_here(order: str) -> None:
    """Renew the certificate in this process. Print the certificate's end, or the error, as the last line."""
    paths, hubs, timeout_s = json.loads(order)
    files = HostFiles(*map(Path, paths))
    try:
        with optional_library("cryptography", LIBRARY_HINT):
            from imdsproxy.sources.fleet.membership import end_of, renew_if_due  # it may be missing
        client, now = HubClient(files, timeout_s), Clock().now()
        asyncio.run(renew_if_due(files, client, hubs, now))
        sys.stdout.write(str(end_of(files).timestamp()))
    except ImdsproxyError as error:
        sys.stdout.write(json.dumps([error.message, error.hint]))
        sys.exit(_FAILED)
