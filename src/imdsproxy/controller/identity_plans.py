"""Settings of the two processes for identity tokens, compared with those that running processes were started with.

Both processes outlive the controller, so they can be older than the settings.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

import structlog

from imdsproxy.config.identity import IdentitySettings
from imdsproxy.haproxy.launch import kill_process
from imdsproxy.issuer.serve import Plan

_log: Final = structlog.get_logger()


def spell_rules(identity: IdentitySettings) -> str:
    """Return the settings that tokens depend on, as text: tokens of other settings are worth nothing to verifiers."""
    audiences = {name: (one.lifetime_s, one.subject) for name, one in identity.audiences.items()}
    return json.dumps([identity.issuer, identity.domain, audiences], sort_keys=True)


def end_outdated(pid: int | None, plan: Plan) -> None:
    """End a process that was started with other settings; its supervisor starts it again."""
    started = None if pid is None else _read_plan(pid)
    if pid is None or started is None or started == json.loads(json.dumps(asdict(plan))):
        return
    _log.info("settings of identity tokens changed: ending a process", pid=pid)
    kill_process(pid)


def _read_plan(pid: int) -> object:
    """Return the settings on a process's command line (`Plan.execute`); `None` if it has none."""
    try:
        last = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").rpartition(b"\0")[2]
        return json.loads(last)
    except (OSError, ValueError):
        return None
