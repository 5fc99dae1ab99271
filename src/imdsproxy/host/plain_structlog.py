"""Imports structlog without rich, before anybody else imports structlog.

structlog loads rich wherever it is installed, for tracebacks in colour. Ours are plain (`host.logs`), and rich is
several MiB of a process that runs for ever and a fifteenth of its start. Who needs rich, as the tables of the command
line do, finds it afterwards.
"""

from __future__ import annotations

import sys
from typing import Final

_RICH: Final = "rich"

if _RICH not in sys.modules:
    sys.modules[_RICH] = None  # type: ignore[assignment]  # by the import system's own rules: there is none
    try:
        import structlog  # noqa: F401 - that it is loaded is the purpose
    finally:
        del sys.modules[_RICH]
