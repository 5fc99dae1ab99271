"""Neutron's REST API, as far as tests and the seed need it; and plain HTTP/1.1 for asking anyone anything."""

import http.client
import json
import socket
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from support.guest import inside
from support.patience import patience

Shape = dict[str, Any]

_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, its body complete and as it was on the wire apart from chunks."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first header of that name, in any case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


class Refused(Exception):
    """Neutron did not do what it was asked."""


def ask(
    url: str,
    method: str,
    target: str,
    *,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes | None = None,
    timeout_s: float | None = None,
    namespace: str = "",
) -> Answer:
    """One request on a connection of its own, the target as it is given.

    Args:
        url: `http://HOST:PORT`, or `unix:PATH`.
        target: Path and query, neither decoded nor encoded.
        headers: Beside Host, and Content-Length where there is a body.
        namespace: Where it is asked; the machine's own by default.

    Raises:
        OSError: It cannot be reached, or does not answer in time.
        http.client.HTTPException: The answer is none, or is not complete.
    """
    connection = _connection(
        url, _TIMEOUT_S * patience() if timeout_s is None else timeout_s, namespace
    )
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value.encode())
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return Answer(answer.status, answer.reason, tuple(answer.getheaders()), answer.read())
    finally:
        connection.close()


def _connection(url: str, timeout_s: float, namespace: str) -> http.client.HTTPConnection:
    if url.startswith("unix:"):
        connection = http.client.HTTPConnection("metadata", timeout=timeout_s)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout_s)
        connection.sock.connect(url.removeprefix("unix:"))
        return connection
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout_s)
    if namespace:
        inside(namespace, connection.connect)
    return connection


class NeutronClient:
    """The lab's Neutron; every caller is an administrator.

    Args:
        url: The root, without `/v2.0`.
        namespace: Where it is asked; the machine's own by default.
    """

    def __init__(self, url: str, namespace: str = "") -> None:
        self.url = url
        self._namespace = namespace

    def create(self, kind: str, **attributes: object) -> Shape:
        """Makes one.

        Args:
            kind: In the singular, as in a body: `network`, `port`, `security_group`.
            attributes: As in the API reference; `__` stands for the colon (`binding__host_id`).

        Raises:
            Refused: Neutron says no.
        """
        made: Shape = self.send("POST", _path(kind), {kind: _named(attributes)})[kind]
        return made

    def update(self, kind: str, ident: str, **attributes: object) -> None:
        self.send("PUT", f"{_path(kind)}/{ident}", {kind: _named(attributes)})

    def delete(self, kind: str, ident: str) -> None:
        self.send("DELETE", f"{_path(kind)}/{ident}")

    def list(self, kind: str) -> tuple[Shape, ...]:
        """All of a kind, each as Neutron shows it."""
        return tuple(self.send("GET", _path(kind))[f"{kind}s"])

    def send(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Shape:
        """One request below `/v2.0`; the answer's JSON, empty if it has none."""
        answer = ask(
            self.url,
            method,
            f"/v2.0{path}",
            headers=(("Content-Type", "application/json"),),
            body=None if body is None else json.dumps(body).encode(),
            namespace=self._namespace,
        )
        if answer.status >= 300:
            raise Refused(
                f"{method} {path}: {answer.status} {answer.body.decode(errors='replace')}"
            )
        shape: Shape = json.loads(answer.body) if answer.body else {}
        return shape


def _path(kind: str) -> str:
    return f"/{kind.replace('_', '-')}s"


def _named(attributes: Mapping[str, object]) -> Shape:
    return {name.replace("__", ":"): value for name, value in attributes.items()}
