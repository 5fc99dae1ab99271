"""Collector of a bundle's parts, and of reasons for missing parts."""

import asyncio
import http.client
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from imdsproxy.api.client import AdminClient
from imdsproxy.errors import ImdsproxyError, RuntimeUnavailable
from imdsproxy.haproxy.master import MasterClient, WorkerEnded
from imdsproxy.host.process import run_program
from imdsproxy.model.wire import hide_signatures
from imdsproxy.tools.bundle.plan import (
    MOST_BYTES,
    Admin,
    Endpoint,
    File,
    Part,
    Program,
    Worker,
    keep_end,
)

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
    """Collected parts by name, and missing parts with reasons."""

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

        Args:
            unread: Unreadable files with secrets, each with the reason.
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
    """Collect all parts, one after the other."""
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
