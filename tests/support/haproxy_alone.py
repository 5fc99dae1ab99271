"""A HAProxy with our configuration and nothing beside it: what a test is about stands behind it, or nobody does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.model import DataplaneSpec, Paths

__all__ = ["paths_below", "run_haproxy"]


def paths_below(directory: Path) -> Paths:
    """Everything in one directory that is there, without a jail; the maps are empty."""
    maps = ("base.map", "overlay.map", "token-keys.map", "short.map", "path-rules.map")
    for name in (*maps, "503.http"):
        (directory / name).write_text("HTTP/1.1 503 No\r\n\r\n" if name.endswith("http") else "")
    return Paths(
        base_map=str(directory / "base.map"),
        overlay_map=str(directory / "overlay.map"),
        unavailable=str(directory / "503.http"),
        probe=str(directory / "p.sock"),
        jail=None,
        documents=(str(directory / "d.sock"),),
        resolver=str(directory / "r.sock"),
        token_keys=str(directory / "token-keys.map"),
        path_rules=str(directory / "path-rules.map"),
        short=str(directory / "short.map"),
        found=str(directory / "s.sock"),
        silence=str(directory / "none.http"),
        loopback=str(directory),
        loopback_inside=str(directory),
        audit=str(directory / "audit.sock"),
        audit_last=str(directory / "audit-last.sock"),
    )


@contextmanager
def run_haproxy(spec: DataplaneSpec, directory: Path, more: str = "") -> Iterator[None]:
    """Run it for the time of the context; `more` is put behind its configuration."""
    config = directory / "h.cfg"
    config.write_text(render_config(spec) + more)
    process = subprocess.Popen(["haproxy", "-f", str(config)], stderr=subprocess.DEVNULL)  # noqa: S607 - Debian's
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)
