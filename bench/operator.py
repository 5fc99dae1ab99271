"""An operator of a fleet, who uses a hub's API on a kept connection with a certificate, as `imdsproxy --fleet` does."""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException, HTTPSConnection
from typing import Any, Final, Self

from bench.fleet import Fleet
from bench.place import BenchError
from imdsproxy.fleet.members import Role
from imdsproxy.hub.pki.files import make_operator_pem

__all__ = ["Operator", "Written"]

_KEPT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Written:
    """A change; times are of the monotonic clock.

    Attributes:
        sent: Time when the request was sent.
        answered: Time of the answer, when the change was in force on every host that it concerns.
    """

    revision: int
    sent: float
    answered: float


class Operator:
    """Client of the first hub; creates its own certificate."""

    def __init__(self, fleet: Fleet) -> None:
        self._port = fleet.hubs[0].port
        pem = fleet.directory / "operator.pem"
        authority, now = fleet.files.load_authority(), datetime.now(UTC)
        pem.write_bytes(make_operator_pem(authority, "bench", Role.OPERATOR, None, now))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.load_verify_locations(pem)
        self._context.load_cert_chain(pem)
        self._connection: HTTPSConnection | None = None
        self._used = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def tag(self, instance: str, tag: str) -> Written:
        """Change an instance's tag."""
        return self._change("PATCH", f"/v1/instances/{instance}", {"tags": {"role": tag}})

    def set_policy(self, rules: dict[str, object]) -> Written:
        """Change the policy of the fleet."""
        return self._change("PATCH", "/v1/policies/fleet", rules)

    def _change(self, method: str, path: str, body: object) -> Written:
        sent = time.monotonic()
        answer = self.ask(method, path, body)
        if answer["applied"] is not True:
            raise BenchError(f"{method} {path}: {str(answer['pending'])[:300]}")
        return Written(answer["revision"], sent, time.monotonic())

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Send a request; return the decoded answer.

        Raises:
            BenchError: The answer is an error, or there is none.
        """
        if self._connection is None or time.monotonic() - self._used > _KEPT_S:
            # The hub's HAProxy closes a connection after a minute without requests.
            self.close()
            self._connection = HTTPSConnection(
                "127.0.0.1", self._port, timeout=120, context=self._context
            )
        raw = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        try:
            self._connection.request(method, path, raw, headers)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, HTTPException) as error:
            raise BenchError(f"{method} {path}: {error}") from error
        self._used = time.monotonic()
        if response.status >= 400:  # noqa: PLR2004 - HTTP's errors
            raise BenchError(f"{method} {path}: {response.status} {answer[:500]!r}")
        return json.loads(answer)
