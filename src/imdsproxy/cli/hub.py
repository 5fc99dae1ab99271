"""`imdsproxy hub`: between etcd and the hosts of a fleet."""

import os

from imdsproxy.cli import options
from imdsproxy.errors import optional_library

_HINT = "apt install python3-cryptography, or pip install 'imdsproxy[fleet]'"


@options.config_command
def hub(run: options.Invocation) -> None:
    """Be a hub of a fleet: give each host what is placed on it, and answer operators, until stopped."""
    with optional_library("cryptography", _HINT):
        from imdsproxy.hub.hub import run as run_hub  # noqa: PLC0415 - the others need not load it
    run_hub(run.settings, dict(os.environ))
