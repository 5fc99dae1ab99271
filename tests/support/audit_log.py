"""The audit log of a daemon under test, as the file that its settings name."""

import json
from pathlib import Path
from typing import Any

from support.daemon import Daemon
from support.lab import until
from support.world import World


class AuditLog:
    """The file, and what is in it now.

    Args:
        daemon: Whose it is.
        path: Where it is, if elsewhere.
    """

    def __init__(self, daemon: Daemon, path: Path | None = None) -> None:
        self.path = daemon.directory / "audit.log" if path is None else path

    def text(self) -> str:
        return self.path.read_text() if self.path.exists() else ""

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines, each of which has to be JSON."""
        return [json.loads(line) for line in self.text().rpartition("\n")[0].splitlines()]

    def has(self, **wanted: object) -> bool:
        return any(wanted.items() <= one.items() for one in self.lines())

    def wait(self, **wanted: object) -> dict[str, Any]:
        """Wait for a line that has these; the first."""
        until(lambda: self.has(**wanted), what=f"a line with {wanted}")
        return next(one for one in self.lines() if wanted.items() <= one.items())


def order_audit(
    world: World, mode: str, destination: str = "{directory}/audit.log", **more: object
) -> None:
    """Have a daemon write lines, or none; `more` are other sections of its settings."""
    audit = {"mode": mode, "destination": destination, "sample": 1000}
    settings: dict[str, Any] = {"resolver": {"hold_s": 1.0}, "audit": audit, **more}
    world.daemon.reconfigure(settings)
    # HAProxy may take the change a moment later; the command then says so.
    config = world.daemon.runtime / "haproxy.cfg"
    until(
        lambda: ("ring audit" in config.read_text()) == (mode != "off"),
        what="HAProxy's configuration",
    )
