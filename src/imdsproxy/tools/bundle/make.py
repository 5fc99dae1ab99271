"""Maker of a bundle: collect the parts, redact secrets, write the archive."""

import gzip
import io
import json
import os
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from imdsproxy import __version__
from imdsproxy.api.client import AdminClient
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.errors import ConfigError, RequestRefused, refusing
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.master import MasterClient
from imdsproxy.tools.bundle.collect import Collected, collect
from imdsproxy.tools.bundle.known import read_known
from imdsproxy.tools.bundle.plan import Places, plan_parts, render_readme
from imdsproxy.tools.bundle.redact import Redactor
from imdsproxy.tools.checks.every import run_checks

_TIMEOUT_S: Final = 10.0
_LIBRARIES: Final = (
    "fastapi",
    "httptools",
    "pydantic",
    "starlette",
    "structlog",
    "typer",
    "uvicorn",
)


@dataclass(frozen=True, slots=True)
class Made:
    """Bundle on disk: path, parts, and missing parts with reasons."""

    path: Path
    parts: Sequence[str]
    lacking: Sequence[tuple[str, str]]


def make_bundle(
    load: Callable[[], Loaded], daemon_socket: Path | None, output: Path | None
) -> Made:
    """Make a bundle.

    Args:
        load: Reader of the settings.
        daemon_socket: The daemon's admin socket; `None` for that of the settings.
        output: Target file; `None` for a file in the working directory, named after host and time.

    Raises:
        RequestRefused: The file exists.
        HostRefused: The file is not writable.
    """
    now, host = time.gmtime(), socket.gethostname()
    name = f"imdsproxy-{host}-{time.strftime('%Y%m%d-%H%M%S', now)}"
    path = output or Path(f"{name}.tar.gz")
    collected = Collected()
    settings, broken = _read_settings(load)
    layout = Layout.of(settings)
    known = read_known(settings, layout)
    if broken is None:
        collected.texts["settings.json"] = settings.model_dump_json(indent=1)
    else:
        collected.lacking.append(
            ("settings.json", f"{broken}: the bundle uses the defaults instead")
        )
        # Without the settings, the paths of files with secrets are not known.
        known.unread.append(broken)
    redactor = Redactor.of(known.secrets, known.data, known.names)
    daemon = AdminClient(daemon_socket or settings.admin_socket, timeout_s=_TIMEOUT_S)
    collected.take("checks.json", lambda: _check(load, daemon_socket))
    collected.take("versions/python.txt", _versions)
    parts = plan_parts(_places(settings, layout))
    collect(parts, daemon, MasterClient(layout.master_socket), collected)
    collected.withhold(known.unread)
    files = {one: redactor.clean(text) for one, text in sorted(collected.texts.items())}
    lacking = [(one, redactor.clean(reason)) for one, reason in collected.lacking]
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", now)
    readme = render_readme(host, when, __version__, tuple(files), lacking)
    _write(path, name, {"README.txt": readme, **files}, int(time.time()))
    return Made(path, tuple(files), lacking)


def _read_settings(load: Callable[[], Loaded]) -> tuple[Settings, str | None]:
    """Return the settings, or the defaults and the error if the settings are invalid."""
    try:
        return load().settings, None
    except ConfigError as error:
        return Settings(), error.message


def _check(load: Callable[[], Loaded], socket: Path | None) -> str:
    rows = [
        {"area": area, "ok": one.ok, "warning": one.warning, "text": one.text, "hint": one.hint}
        for area, one in run_checks(load, socket)
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False)


def _versions() -> str:
    lines = [f"imdsproxy {__version__}", f"python {sys.version}"]
    for name in _LIBRARIES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines) + "\n"


def _places(settings: Settings, layout: Layout) -> Places:
    haproxy = [
        *(layout.config, layout.candidate, layout.rejected, layout.last_good, layout.networks),
        *(layout.base_map, layout.overlay_map, layout.path_rules_map, layout.managed_journal),
    ]
    logs = [
        one for log in (layout.haproxy_log, layout.documents_log) for one in (log, Path(f"{log}.1"))
    ]
    metrics = settings.metrics
    listens = (("controller", metrics.listen), ("haproxy", metrics.haproxy_listen))
    return Places(
        files=[
            *((f"haproxy/{one.name}", str(one)) for one in haproxy),
            *((f"logs/{one.name}", str(one)) for one in logs),
        ],
        haproxy=settings.haproxy.binary,
        metrics=[(name, one.host, one.port) for name, one in listens if one is not None],
    )


def _write(path: Path, name: str, files: dict[str, str], now: int) -> None:
    """Write the archive, created with mode 0600."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for one, text in files.items():
            content = text.encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"{name}/{one}")
            entry.size, entry.mode, entry.mtime = len(content), 0o600, now
            archive.addfile(entry, io.BytesIO(content))
    with refusing(f"write {path}"):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise RequestRefused(
                f"{path} already exists", hint="name another file with --output"
            ) from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(gzip.compress(raw.getvalue(), mtime=now))
