"""Requests to the JSON gateways of etcd's members: choice of the member, HTTP, lines of watches, TLS, tokens.

The client asks the same member while it answers, then the next in a random order.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Final, cast

import httpcore

from imdsproxy.errors import quoted
from imdsproxy.host.clock import Clock
from imdsproxy.host.http import Unanswered, answering, ask
from imdsproxy.hub.store import etcd_messages as messages
from imdsproxy.hub.store.etcd_messages import Fault, Garbled, Json, Kind
from imdsproxy.reconcile.progress import Backoff

_FIRST_S: Final = 0.05
_LONGEST_S: Final = 2.0


@dataclass(slots=True)
class _Member:
    url: str
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_S, _LONGEST_S))
    rests_until: float = 0.0
    failure: str = ""
    answers: bool = True


START_MEMBERS: Final = (
    "start the other members: etcd needs more than half; `etcdctl endpoint status --cluster`"
)


def spell_outage(answering: int, of: int) -> str:
    """Describe an etcd without a leader of which some members answer."""
    what = "no leader" if answering > of // 2 else "no quorum"
    return f"{what}: {answering} of {of} members answer"


class Members:
    """Members of etcd, as far as this client knows them.

    Args:
        urls: URLs of the JSON gateways, `https://HOST:PORT`.
        random: Order of the members, and jitter of pauses: hubs that lose a member must not all choose the same next
            member.
    """

    def __init__(self, urls: Sequence[str], *, random: Random, clock: Clock) -> None:
        self._members = [_Member(url.rstrip("/")) for url in urls]
        random.shuffle(self._members)
        self._random, self._clock = random, clock

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of all members."""
        return tuple(one.url for one in self._members)

    @property
    def failures(self) -> str:
        """Last errors of the failing members."""
        return "; ".join(f"{one.url}: {one.failure}" for one in self._members if one.failure)

    @property
    def lost_quorum(self) -> str | None:
        """Description of a lost quorum, if all members fail and at least one answers; otherwise `None`."""
        answering = [one for one in self._members if one.answers]
        if not answering or not all(one.failure for one in answering):
            return None
        return spell_outage(len(answering), len(self._members))

    def choose(self) -> tuple[str, float]:
        """Return the member to ask, and the pause before, in seconds; the member stays the same while it answers."""
        now = self._clock.monotonic()
        # `min` takes the first of equal members, and failed members move to the end.
        best = min(self._members, key=lambda one: max(one.rests_until, now))
        return best.url, max(0.0, best.rests_until - now)

    def fail(self, url: str, reason: str, *, answers: bool = False) -> None:
        """Let a failed member rest, for longer each time, so that others come first.

        Args:
            url: URL of the member.
            reason: Error of the member.
            answers: Whether the member answers, but knows no leader.
        """
        member = self._find(url)
        # If the others fail as well, this member is asked again after its pause.
        self._members.remove(member)
        self._members.append(member)
        member.failure, member.answers = reason, answers
        pause = member.backoff.fail() * self._random.uniform(0.5, 1.0)
        member.rests_until = self._clock.monotonic() + pause

    def succeed(self, url: str) -> None:
        """Record that a member has answered."""
        member = self._find(url)
        member.backoff.succeed()
        member.rests_until, member.failure, member.answers = 0.0, "", True

    def _find(self, url: str) -> _Member:
        return next(one for one in self._members if one.url == url)


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
