"""Hubs of a fleet as the source of tokens: they sign what this host's certificate and their records allow."""

import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpcore

from imdsproxy.errors import ClockWrong, SourceUnavailable
from imdsproxy.fleet.members import IDENTITY_DOCUMENT_PATH, IDENTITY_PATH
from imdsproxy.host.http import Unanswered, ask
from imdsproxy.issuer.claims import Refusal
from imdsproxy.issuer.exchange import CLOCKS_S, Token, parse_documents, parse_shape
from imdsproxy.issuer.holder import Wanted
from imdsproxy.model.subject import Subject

HUBS_FILE: Final = "hubs.json"
CERTIFICATE_FILE: Final = "host.pem"
AUTHORITY_FILE: Final = "ca.crt"

_LIMITS: Final = {"connect": 2.0, "read": 4.0, "write": 4.0, "pool": 4.0}
_MOST_BYTES: Final = 512 * 1024
_OK: Final = 200

_Stamp: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class HubSource:
    """Source of tokens on a host of a fleet.

    Args:
        directory: Copies of the host's certificate with its key, of the fleet's CAs, and the hubs' URLs.
        now: Returns the wall clock's time, Unix time.
        random: Returns numbers from 0 to 1, for the order of hubs: each hub has its share of the hosts.
    """

    directory: Path
    now: Callable[[], float]
    random: Callable[[], float]
    _hubs: list[str] = field(default_factory=list)
    _pool: httpcore.AsyncConnectionPool | None = None
    _stamp: _Stamp = ()

    async def request(self, wanted: Sequence[Wanted]) -> list[Token | Refusal]:
        """Return a token, or the reason why there is none, for each; see `holder.TokenSource`."""
        pool = await self._open()
        tokens = [
            {
                "instance": one.subject.instance,
                "network": one.subject.network,
                "project": one.subject.project,
                "audience": one.audience,
                "nonce": one.nonce,
            }
            for one in wanted
        ]
        shape = await self._ask_hubs(pool, IDENTITY_PATH, {"tokens": tokens})
        try:
            answers = [parse_shape(one) for one in shape["answers"]]
        except (ValueError, KeyError, TypeError) as error:
            raise SourceUnavailable("a hub answers with no tokens") from error
        if len(answers) != len(wanted):
            raise SourceUnavailable("a hub answers with another number of tokens")
        return answers

    async def document(self, _name: str, subject: Subject) -> dict[str, str] | Refusal:
        """Return the document of a subject with its signatures, or why there is none; see `holder.TokenSource`."""
        place = {"instance": subject.instance, "network": subject.network}
        shape = await self._ask_hubs(await self._open(), IDENTITY_DOCUMENT_PATH, place)
        try:
            return parse_documents(shape)
        except ValueError as error:
            raise SourceUnavailable("a hub answers with no document") from error

    async def _ask_hubs(
        self, pool: httpcore.AsyncConnectionPool, path: str, question: Mapping[str, object]
    ) -> dict[str, Any]:
        """Return the answer of the first hub that gives one."""
        body, errors = json.dumps(question).encode(), list[SourceUnavailable]()
        for hub in tuple(self._hubs):
            try:
                return await self._ask(pool, f"{hub}{path}", body)
            except SourceUnavailable as error:
                errors.append(error)
                # The next request begins with a hub that may answer.
                self._hubs.append(self._hubs.pop(0))
        reasons = "; ".join(error.message for error in errors)
        kind = (
            ClockWrong if any(isinstance(one, ClockWrong) for one in errors) else SourceUnavailable
        )
        raise kind(f"no hub signs identity tokens: {reasons}", hint="imdsproxy fleet status")

    async def _ask(
        self, pool: httpcore.AsyncConnectionPool, url: str, body: bytes
    ) -> dict[str, Any]:
        try:
            status, data = await ask(pool, "POST", url, _LIMITS, body=body, most=_MOST_BYTES)
        except Unanswered as error:
            raise SourceUnavailable(f"{url} does not answer: {error}") from error
        try:
            shape: dict[str, Any] = json.loads(data)
            if status != _OK:
                raise SourceUnavailable(f"{url} answers {status}: {shape.get('message', '')}")
            ahead_s = float(shape["now"]) - self.now()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SourceUnavailable(f"{url} answers {status}, and nothing of a hub") from error
        if abs(ahead_s) > CLOCKS_S:
            raise ClockWrong(
                f"the clock of {url} is {ahead_s:+.0f} s from this host's: its tokens would be refused"
            )
        return shape

    async def _open(self) -> httpcore.AsyncConnectionPool:
        """Return connections with the present certificate; the controller renews it."""
        names = (HUBS_FILE, CERTIFICATE_FILE, AUTHORITY_FILE)
        paths = [self.directory / name for name in names]
        try:
            stamp = tuple((one.stat().st_ino, one.stat().st_mtime_ns) for one in paths)
            if self._pool is not None and stamp == self._stamp:
                return self._pool
            context = ssl.create_default_context(cafile=paths[2])
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(paths[1])
            hubs = [str(one).rstrip("/") for one in json.loads(paths[0].read_bytes())]
            hubs.sort(key=lambda _: self.random())
        except (OSError, ValueError) as error:
            raise SourceUnavailable(
                f"this host's certificate for its fleet cannot be used: {error}",
                hint="the controller copies it here; see `imdsproxy status`",
            ) from error
        if self._pool is not None:
            await self._pool.aclose()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context, max_connections=4, keepalive_expiry=60
        )
        self._hubs, self._stamp = hubs, stamp
        return self._pool
