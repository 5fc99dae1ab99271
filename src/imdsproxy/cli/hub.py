"""`imdsproxy hub`: connects etcd and the hosts of a fleet."""

import os

from imdsproxy.cli import options
from imdsproxy.errors import optional_library

_HINT = "apt install python3-cryptography, or pip install 'imdsproxy[fleet]'"


@options.config_command
def hub(run: options.Invocation) -> None:
    """Run a hub of a fleet in the foreground: send each host its records, and answer operators."""
    with optional_library("cryptography", _HINT):
        from imdsproxy.hub.hub import run as run_hub
    run_hub(run.settings, dict(os.environ))
