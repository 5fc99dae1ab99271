"""`imdsproxy bundle`: one file with a host's state for other people, without secrets."""

import asyncio
import gzip
import http.client
import io
import json
import os
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from imdsproxy import __version__
from imdsproxy.api.client import AdminClient
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.errors import (
    ConfigError,
    ImdsproxyError,
    RequestRefused,
    RuntimeUnavailable,
    refusing,
)
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.master import MasterClient, WorkerEnded
from imdsproxy.host.process import run_program
from imdsproxy.model.wire import hide_signatures
from imdsproxy.tools.bundle.known import read_known
from imdsproxy.tools.bundle.plan import (
    MOST_BYTES,
    Admin,
    Endpoint,
    File,
    Part,
    Places,
    Program,
    Redactor,
    Worker,
    keep_end,
    plan_parts,
    render_readme,
)
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
    path: Path
    parts: Sequence[str]
    lacking: Sequence[tuple[str, str]]


def make_bundle(
    load: Callable[[], Loaded], daemon_socket: Path | None, output: Path | None
) -> Made:
    """Make a bundle.

    `output`: target file; `None` for a file in the working directory, named after host and time. Raises
    `RequestRefused`: the file exists; `HostRefused`: the file is not writable.
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


_DEADLINE_S: Final = 10.0
_FREE: Final = ("logs/", "daemon/", "checks.json")
_RECORD_FIELDS: Final = frozenset(
    (
        *("id", "name", "hostname", "project", "ports", "upstream", "policy", "dialects"),
        *("created_at", "listener", "subnets", "mtu", "domain"),
    )
)
"""Fields of records that a bundle contains; data only for the guest's documents is excluded."""


@dataclass(slots=True)
class Collected:
    texts: dict[str, str] = field(default_factory=dict)
    lacking: list[tuple[str, str]] = field(default_factory=list)

    def take(self, name: str, ask: Callable[[], str | None]) -> None:
        """Store the answer of `ask` as a part, or the reason of its failure; `None` adds nothing."""
        try:
            text = ask()
        except (ImdsproxyError, OSError, ValueError, http.client.HTTPException) as error:
            message = getattr(error, "message", None) or str(error) or type(error).__name__
            self.lacking.append((name, " ".join(message.split())))
            return
        if text is not None:
            self.texts[name] = keep_end(text)

    def withhold(self, unread: Sequence[str]) -> None:
        """Drop parts with free text (logs, daemon, checks) if some secrets are not known.

        `unread`: unreadable files with secrets, each with the reason.
        """
        if not unread:
            return
        reason = f"a file with secrets could not be read, so they could not be removed: {unread[0]}"
        for name in [one for one in self.texts if one.startswith(_FREE)]:
            del self.texts[name]
            self.lacking.append((name, reason))


def collect(
    parts: Iterable[Part], daemon: AdminClient, master: MasterClient, into: Collected
) -> None:
    for part in parts:
        into.take(part.name, lambda part=part: _ask(part, daemon, master))  # type: ignore[misc]


def _ask(part: Part, daemon: AdminClient, master: MasterClient) -> str | None:
    match part:
        case Admin():
            return _render(without_payloads(daemon.get(part.path)))
        case Program():
            return _run(part.words)
        case File():
            return _read_end(Path(part.path))
        case Worker():
            return asyncio.run(_ask_worker(master, part.command))
        case Endpoint():
            return _fetch(part)


def _render(value: object) -> str:
    """Return JSON, with one line per element of a list, so that the end of a truncated list stays readable."""
    if not isinstance(value, list):
        return json.dumps(value, indent=1, ensure_ascii=False)
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in value)
    return f"[\n{lines}\n]\n"


def without_payloads(value: Any) -> Any:
    """Return an admin API answer whose records contain only identity and placement."""
    match value:
        case dict():
            return {
                key: {name: one for name, one in inner.items() if name in _RECORD_FIELDS}
                if key == "record" and isinstance(inner, Mapping)
                else without_payloads(inner)
                for key, inner in value.items()
            }
        case list():
            return [without_payloads(one) for one in value]
        case _:
            return value


def _run(words: tuple[str, ...]) -> str:
    status, text = asyncio.run(run_program(*words, deadline_s=_DEADLINE_S))
    return text if status == 0 else f"{text}[ended with {status}]\n"


def _read_end(path: Path) -> str | None:
    """Return the end of a file, without the signatures in maps, with which Nova answers as that instance."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size > MOST_BYTES:
            file.seek(size - MOST_BYTES)
            # A partial line could hide a secret from the redactor.
            file.readline()
        else:
            file.seek(0)
        text = file.read().decode("utf-8", "replace")
    if path.suffix == ".map":
        lines = (line.partition(" ") for line in text.splitlines())
        return "".join(f"{key} {hide_signatures(value)}\n" for key, _, value in lines)
    return text


async def _ask_worker(master: MasterClient, command: str) -> str:
    worker = (await master.read_processes()).worker
    if worker is None:
        raise RuntimeUnavailable("HAProxy has no worker")
    try:
        return await master.send(worker, command) + "\n"
    except WorkerEnded as error:
        raise RuntimeUnavailable("HAProxy's worker ended") from error


def _fetch(part: Endpoint) -> str:
    connection = http.client.HTTPConnection(part.host, part.port, timeout=_DEADLINE_S)
    with closing(connection):
        connection.request("GET", part.path)
        response = connection.getresponse()
        return f"{response.status} {response.reason}\n{response.read().decode('utf-8', 'replace')}"
