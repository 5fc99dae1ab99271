"""Requests to the JSON gateways of etcd's members: HTTP, lines of watches, TLS, and tokens if etcd has users."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

import httpcore

from imdsproxy.errors import quoted
from imdsproxy.host.http import Unanswered, answering, ask
from imdsproxy.hub.store import etcd_messages as messages
from imdsproxy.hub.store.etcd_messages import Fault, Garbled, Json, Kind

_CONNECT_S: Final = 1.0
_SMALL_S: Final = 2.0
_OK: Final = 200


class Failed(Exception):
    """A member failed to answer correctly.

    Attributes:
        behind: Whether the answer had an older revision or raft term than known.
        silent: Whether no answer came in time.
    """

    def __init__(self, fault: Fault, *, behind: bool = False, silent: bool = False) -> None:
        super().__init__(fault.message)
        self.fault, self.behind, self.silent = fault, behind, silent


def open_tls(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return a TLS context with the CA of members, and with the client's certificate, if given.

    Raises:
        OSError: A file cannot be read, or has no certificate or key (`ssl.SSLError`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


class Gateway:
    """Client of all members' gateways.

    Args:
        tls: See `open_tls`.
        user: User name, with `password`, if etcd has authentication enabled.
    """

    def __init__(self, *, tls: ssl.SSLContext | None, user: str, password: str) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            # Without a limit, since a request that waits for a connection would count as the member's failure.
            ssl_context=tls,
            max_connections=None,
            max_keepalive_connections=64,
            keepalive_expiry=30.0,
        )
        self._user, self._password = user, password
        self._logging_in = asyncio.Lock()
        self.token = ""

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    def drop_token(self, token: str) -> bool:
        """Log in again before the next request, unless done already; return whether there is a user at all."""
        if self.token == token:
            self.token = ""
        return bool(self._user)

    async def ask(self, url: str, path: str, body: Json, timeout_s: float) -> Json:
        """Return a member's answer; raise `Failed`."""
        await self._log_in(url)
        return await self._send(url, path, body, timeout_s)

    async def follow(
        self, url: str, path: str, body: Json, silence_s: float
    ) -> AsyncGenerator[Json, None]:
        """Yield the objects of a stream, one per line, whatever the chunks; raise `Failed`."""
        with failing():
            await self._log_in(url)
            async with self._pool.stream(
                "POST",
                f"{url}{path}",
                headers=self._headers,
                content=json.dumps(body).encode(),
                extensions={"timeout": _limits(silence_s)},
            ) as response:
                if response.status != _OK:
                    raise _refused(response.status, await response.aread())
                rest: list[bytes] = []
                async for chunk in response.aiter_stream():
                    *whole, last = chunk.split(b"\n")
                    for line in whole:
                        yield _object(b"".join((*rest, line)))
                        rest.clear()
                    rest.append(last)

    async def quota(self, url: str) -> int:
        """Return the quota of a member's database in bytes, or 0; raise `Failed`."""
        with failing():
            _, content = await ask(self._pool, "GET", f"{url}/metrics", _limits(_SMALL_S))
            return messages.parse_quota(content)

    async def _send(self, url: str, path: str, body: Json, timeout_s: float) -> Json:
        with failing():
            status, content = await ask(
                self._pool,
                "POST",
                f"{url}{path}",
                _limits(timeout_s),
                body=json.dumps(body).encode(),
                headers=self._headers,
            )
            if status != _OK:
                raise _refused(status, content)
            answer = _object(content)
        if "error" in answer:
            raise Failed(messages.parse_fault(answer))
        return answer

    @property
    def _headers(self) -> list[tuple[str, str]]:
        headers = [
            # Without this header, etcd takes the user from the gateway's own certificate.
            ("Accept", "application/json"),
            ("Content-Type", "application/json"),
            # A member without a leader then refuses at once instead of waiting.
            ("Grpc-Metadata-hasleader", "true"),
        ]
        return [*headers, ("Authorization", self.token)] if self.token else headers

    async def _log_in(self, url: str) -> None:
        async with self._logging_in:
            if not self._user or self.token:
                return
            body = {"name": self._user, "password": self._password}
            try:
                answer = await self._send(url, "/v3/auth/authenticate", body, _SMALL_S)
            except Failed as failed:
                if "not enabled" not in failed.fault.message:
                    raise Failed(replace(failed.fault, certain=True)) from failed
                answer = {}
            # Without authentication etcd accepts any token, and refuses this one once authentication is enabled.
            self.token = str(answer.get("token", "none"))


@contextmanager
def failing() -> Iterator[None]:
    """Convert errors of connections and answers to `Failed`."""
    try:
        with answering():
            yield
    except Unanswered as error:
        fault = Fault(Kind.OUTAGE, str(error), certain=not error.sent)
        raise Failed(fault, silent=error.silent) from error
    except ValueError as error:
        # `Garbled`, or invalid JSON.
        fault = Fault(Kind.OUTAGE, f"no answer of etcd's: {error}", certain=False)
        raise Failed(fault) from error


def _limits(read_s: float) -> dict[str, float]:
    return {"connect": _CONNECT_S, "write": _SMALL_S, "read": read_s}


def _object(content: bytes) -> Json:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise Garbled("an answer that is no object")
    return cast("Json", found)


def _refused(status: int, content: bytes) -> Failed:
    try:
        return Failed(messages.parse_fault(_object(content)))
    except ValueError:
        # The answer comes from etcd's checks of certificates and host names, or from another program.
        words = quoted(content.decode(errors="replace").strip())
        return Failed(Fault(Kind.OUTAGE, f"it answers {status}, {words}", certain=False))
