"""The source `file`: where its directory is."""

from __future__ import annotations

from pathlib import Path

from imdsproxy.config.change import Change
from imdsproxy.config.section import AbsolutePath, Section, setting


class FileSourceSettings(Section):
    """Records from a directory of YAML and JSON files."""

    enabled: bool = setting(False, Change.RESTART)
    """Read and watch the directory. Off, because an empty or missing directory is no empty inventory."""

    directory: AbsolutePath = setting(Path("/etc/imdsproxy/records"), Change.RESTART)
    """Directory of `*.yaml`, `*.yml` and `*.json` files with `networks:` and `instances:` lists."""
