"""Whether the audit log can be written where the settings say."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from imdsproxy.cli.preflight import Finding

if TYPE_CHECKING:
    from imdsproxy.config.audit import AuditSettings

JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
_AREA: Final = "audit"
_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


def check_audit(settings: AuditSettings, journal: Path = JOURNAL_SOCKET) -> list[Finding]:
    """Nothing where there is none. All that is wrong is a warning: guests are served without a log, too.

    Args:
        settings: Of the section `audit`.
        journal: The socket of systemd's journal.
    """
    if not settings.one_in:
        return []
    said = f"audit.destination: {settings.destination}"
    if settings.destination == "journal":
        if journal.is_socket():
            return [Finding(_AREA, "lines go to the journal")]
        hint = "start systemd-journald, or name a file in audit.destination"
        return [Finding(_AREA, f"{said}: {journal} is not there", hint, warning=True)]
    path = Path(settings.destination)
    wrong = _wrong(path)
    if wrong is None:
        return [Finding(_AREA, f"lines go to {path}")]
    reason, hint = wrong
    return [Finding(_AREA, f"{said}: {reason}", hint, warning=True)]


def _wrong(path: Path) -> tuple[str, str] | None:
    """What is wrong, and what would be right."""
    try:
        directory = path.parent.stat()
    except OSError as error:
        return f"{path.parent}: {error.strerror}", f"install -d -m 0750 {path.parent}"
    if not stat.S_ISDIR(directory.st_mode):
        return f"{path.parent} is no directory", "name a file in a directory"
    if directory.st_uid != 0 or directory.st_mode & _OTHERS:
        return (
            f"others than root may put a file of theirs into {path.parent}",
            f"chown root {path.parent}; chmod go-w {path.parent}",
        )
    if path.is_symlink():
        return "it is a link, and links are not followed", "name the file itself"
    if path.exists() and not path.is_file():
        return "it is no file", "name a file"
    place = path if path.exists() else path.parent
    writable = os.access(place, os.W_OK)
    return None if writable else (f"{place} cannot be written", "name another file")
