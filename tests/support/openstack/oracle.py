"""What Nova says when it is asked directly: everything that an instance's guest can read, found by Nova's listings."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from support.guest import Connection, Reply
from support.openstack.lab import OpenStack
from support.openstack.table import Instance

_SEED: Final = re.compile(rb'"random_seed": "[^"]*"')
_ROOTS: Final = ("/", "/openstack/")
_OF_THE_CONNECTION: Final = frozenset({"connection", "date", "keep-alive"})


@dataclass(frozen=True, slots=True)
class Request:
    """What a guest asks; `headers` are whole lines."""

    target: str
    method: str = "GET"
    headers: tuple[str, ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer without what is of its connection only, and without `random_seed`, which is new in each.

    Attributes:
        headers: With names in lower case, in order of the names.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def said_to_guest(reply: Reply) -> Said:
    """What a guest was told."""
    lines = reply.head.decode("latin-1").split("\r\n")[1:]
    return Said(reply.status, _headers(_pair(line) for line in lines), _SEED.sub(b"", reply.body))


def _headers(headers: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    named = ((name.lower(), value) for name, value in headers)
    return tuple(sorted((name, value) for name, value in named if name not in _OF_THE_CONNECTION))


@dataclass(slots=True)
class Oracle:
    """Asks Nova once for each thing."""

    openstack: OpenStack
    _said: dict[tuple[str, str, Request], Said] = field(default_factory=dict)
    _documents: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def says(self, uuid: str, project: str, request: Request, *, again: bool = False) -> Said:
        """Nova's answer to an instance; `again` asks anew."""
        key = (uuid, project, request)
        if again or key not in self._said:
            answer = self.openstack.ask_nova(
                uuid,
                project,
                request.target,
                request.method,
                body=request.body or None,
                headers=[_pair(line) for line in request.headers],
            )
            headers = _headers(answer.headers)
            self._said[key] = Said(answer.status, headers, _SEED.sub(b"", answer.body))
        return self._said[key]

    def documents(self, instance: Instance) -> tuple[str, ...]:
        """The path of everything that Nova's listings lead to, of every version, and of the listings themselves."""
        if instance.uuid not in self._documents:
            found = tuple(path for root in _ROOTS for path in self._walk(instance, root))
            self._documents[instance.uuid] = found
        return self._documents[instance.uuid]

    def _walk(self, instance: Instance, path: str) -> Iterator[str]:
        yield path
        said = self.says(instance.uuid, instance.project_id, Request(path))
        if said.status != 200:
            return
        for line in said.body.decode().splitlines():
            name, key, _ = line.partition("=")
            if path in _ROOTS or key or name.endswith("/"):
                yield from self._walk(instance, f"{path}{name.rstrip('/')}/")
            else:
                yield f"{path}{name}"


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name, value.strip()


def crawl(
    oracle: Oracle,
    connect: Callable[[], Connection],
    who: tuple[str, str],
    requests: Iterable[Request],
) -> list[str]:
    """Ask for all of it as a guest, over one connection; in words, everything that is not as Nova says it.

    Args:
        connect: Opens a connection, at first and wherever an answer ends one.
        who: Uuid and project by which Nova is asked.
    """
    wrong = []
    connection: Connection | None = None
    try:
        for request in requests:
            connection = connection or connect()
            reply = connection.request(
                request.target, method=request.method, headers=request.headers, body=request.body
            )
            got = said_to_guest(reply)
            # What Nova keeps for some seconds may be another thing since it was asked directly.
            if got != oracle.says(*who, request) and got != oracle.says(*who, request, again=True):
                wrong.append(f"{request}: {got} instead of {oracle.says(*who, request)}")
            if reply.closes:
                connection.close()
                connection = None
    finally:
        if connection is not None:
            connection.close()
    return wrong
