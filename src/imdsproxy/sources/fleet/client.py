"""A host's connection to a hub: TLS, stream of lines, requests, fetched user data, renewal of the certificate."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

import httpcore

from imdsproxy.config.sources import FleetSourceSettings
from imdsproxy.errors import (
    AccessDenied,
    AlreadyExists,
    ImdsproxyError,
    NotFound,
    SourceError,
    SourceRefused,
    SourceUnavailable,
    UserDataUnreadable,
    optional_library,
)
from imdsproxy.fleet.layout import UserData
from imdsproxy.fleet.members import LIBRARY_HINT, PASSWORD_PATH
from imdsproxy.fleet.stream import (
    BLOB_PATH,
    CONNECT_S,
    MAX_LINE,
    STREAM_PATH,
    UPGRADE,
    Broken,
    FromHost,
    FromHub,
    parse_from_hub,
    render_line,
)
from imdsproxy.host.clock import Clock
from imdsproxy.host.http import Unanswered, ask
from imdsproxy.host.process import run_program
from imdsproxy.model.entities import InstanceId

_HTTPS_PORT: Final = 443
_MOST_OF_ANSWER: Final = 1024 * 1024
_JOIN: Final = "join the fleet: `imdsproxy fleet join`, with what `imdsproxy fleet enrol` printed"
_REFUSALS: Final = frozenset(
    {AccessDenied.code, AlreadyExists.code, NotFound.code, UserDataUnreadable.code}
)
"""Codes of refusals that last until an operator acts."""

_SHOWN: Final = 500
_OUT_OF_TIME: Final = (9, 10)
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""

_CLOCKS: Final = "compare the clocks of both; a hub renews its certificate by itself while it runs"
_NAMES: Final = "compare its URL with the names in its certificate, and its CA with this host's"


@dataclass(frozen=True, slots=True)
class HostFiles:
    """Files of a host that joined a fleet, in PEM but for `hubs`, which has a URL a line.

    `certificate` and `key` may be the same file. `authority` has several CAs while the fleet replaces its CA.
    """

    hubs: Path
    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Return the paths of the files that `imdsproxy fleet join` writes into this directory."""
        names = ("hubs", "host.pem", "host.pem", "ca.crt")
        return cls(*(directory / name for name in names))

    @classmethod
    def configured(cls, wanted: FleetSourceSettings, state_dir: Path) -> Self:
        """Return the files that the settings name, or else those of `imdsproxy fleet join`."""
        joined = cls.of(state_dir / "fleet")
        return cls(
            joined.hubs,
            wanted.certificate_file or joined.certificate,
            wanted.private_key_file or joined.key,
            wanted.ca_file or joined.authority,
        )

    @property
    def keeps_authority(self) -> bool:
        """Whether `authority` is the file of `imdsproxy fleet join`, which imdsproxy keeps equal to the fleet's CAs."""
        return self.authority == self.of(self.hubs.parent).authority

    def read_hubs(self) -> tuple[str, ...]:
        """Return the URLs; raise `SourceUnavailable` if there are none."""
        try:
            found = tuple(self.hubs.read_text("ascii").split())
        except (OSError, ValueError) as error:
            raise SourceUnavailable(f"{self.hubs} cannot be read: {error}", hint=_JOIN) from error
        if not found:
            raise SourceUnavailable(f"{self.hubs} names no hub", hint=_JOIN)
        return found

    def context(self) -> ssl.SSLContext:
        """Make a TLS client context from the current files; raise `SourceUnavailable` if a file cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.authority)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise SourceUnavailable(
                f"the certificate of this host in {self.certificate.parent} cannot be used: {error}",
                hint=_JOIN,
            ) from error
        return context


@dataclass(slots=True)
class HubStream:
    """Stream of lines over one connection, with a second connection for user data and passwords."""

    hub: str
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _pool: httpcore.AsyncConnectionPool
    _timeout_s: float

    async def read(self, within_s: float) -> FromHub:
        """Read the next line; raise `SourceUnavailable` without a valid line in time."""
        try:
            async with asyncio.timeout(within_s):
                line = await self._reader.readline()
        except TimeoutError as error:
            raise SourceUnavailable(f"the hub sent nothing for {within_s:g} s") from error
        except (OSError, ValueError) as error:
            raise SourceUnavailable(f"the stream broke: {error}") from error
        if not line.endswith(b"\n"):
            raise SourceUnavailable("the hub ended the stream")
        try:
            return parse_from_hub(line)
        except Broken as error:
            raise SourceUnavailable(f"the hub sent an invalid line: {error}") from error

    def close(self) -> None:
        self._writer.transport.abort()

    async def send(self, *messages: FromHost) -> None:
        """Write lines; raise `SourceUnavailable` if the connection has ended."""
        try:
            self._writer.write(b"".join(map(render_line, messages)))
            await self._writer.drain()
        except OSError as error:
            raise SourceUnavailable(f"the stream broke: {error}") from error

    async def user_data(self, sha256: str, size: int) -> bytes:
        """Fetch user data of an instance on this host.

        Raises `SourceRefused` if the hub does not have the data for this host or cannot read it, else
        `SourceUnavailable`.
        """
        most = max(size, _MOST_OF_ANSWER)
        status, data = await _ask(
            self._pool, "GET", f"{self.hub}{BLOB_PATH}{sha256}", self._timeout_s, most=most
        )
        if status != 200:  # noqa: PLR2004 - HTTP's
            raise _refusal_of(self.hub, "give its user data", status, data)
        if len(data) != size or sha256_of(data).hexdigest() != sha256:
            raise SourceUnavailable(f"{self.hub} sends other user data than {sha256}")
        return data

    async def give_password(self, instance: InstanceId, password: bytes) -> None:
        """Send the hub a password that a guest posted on this host.

        Raises `SourceRefused` if the instance is not on this host or has another password, else `SourceUnavailable`.
        """
        body = {"instance": instance, "password": base64.b64encode(password).decode()}
        url, raw = f"{self.hub}{PASSWORD_PATH}", json.dumps(body).encode()
        status, answer = await _ask(self._pool, "POST", url, self._timeout_s, body=raw)
        if status != 200:  # noqa: PLR2004 - HTTP's
            raise _refusal_of(self.hub, "keep the password", status, answer)


@dataclass(frozen=True, slots=True)
class HubClient:
    """Client of hubs, by their URLs `https://NAME:PORT`; `identity` is `None` only for hubs without TLS."""

    identity: HostFiles | None
    timeout_s: float

    @contextlib.asynccontextmanager
    async def stream(self, hub: str, within_s: float = CONNECT_S) -> AsyncIterator[HubStream]:
        """Open a hub's stream for the duration of the block.

        Raises `SourceUnavailable` without an answer within `within_s`, and `SourceRefused` if the hub refuses this
        host.
        """
        url = urlsplit(hub)
        context = self._context(hub)
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(within_s):
                with _failures(hub):
                    reader, writer = await asyncio.open_connection(
                        url.hostname, url.port or _HTTPS_PORT, ssl=context, limit=MAX_LINE
                    )
                    writer.write(
                        f"GET {STREAM_PATH} HTTP/1.1\r\nhost: {url.netloc}\r\nconnection: upgrade\r\n"
                        f"upgrade: {UPGRADE}\r\n\r\n".encode()
                    )
                    head = await reader.readuntil(b"\r\n\r\n")
            _check_status(hub, head)
            # Requests share a connection that stays open.
            async with httpcore.AsyncConnectionPool(ssl_context=context, max_connections=1) as pool:
                yield HubStream(hub.rstrip("/"), reader, writer, pool, self.timeout_s)
        except TimeoutError as error:
            raise SourceUnavailable(f"{hub} did not answer in {within_s:g} s") from error
        finally:
            if writer is not None:
                # A regular close waits for the peer's TLS close_notify, which a hub that hangs does not send.
                writer.transport.abort()

    async def request(
        self, method: str, hub: str, path: str, *, body: bytes = b""
    ) -> tuple[int, bytes]:
        """Send one request, and return the status and body of the answer; raise `SourceUnavailable`."""
        async with httpcore.AsyncConnectionPool(ssl_context=self._context(hub)) as pool:
            url = f"{hub.rstrip('/')}{path}"
            return await _ask(pool, method, url, self.timeout_s, body=body)

    def _context(self, hub: str) -> ssl.SSLContext | None:
        return self.identity.context() if self.identity and hub.startswith("https:") else None


def _refusal_of(hub: str, what: str, status: int, body: bytes) -> SourceError:
    """Return the error for a hub's answer: a problem with a code, or an answer of another program."""
    try:
        found = json.loads(body)
        code, message = str(found["code"]), str(found["message"])[:_SHOWN]
    except (ValueError, TypeError, KeyError, RecursionError):
        return SourceUnavailable(f"{hub} does not {what}: it answers {status}")
    kind = SourceRefused if code in _REFUSALS else SourceUnavailable
    return kind(f"{hub} does not {what} ({code}): {message}")


async def _ask(
    pool: httpcore.AsyncConnectionPool,
    method: str,
    url: str,
    timeout_s: float,
    *,
    body: bytes = b"",
    most: int = _MOST_OF_ANSWER,
) -> tuple[int, bytes]:
    limits = dict.fromkeys(("read", "write", "pool"), timeout_s) | {"connect": CONNECT_S}
    try:
        return await ask(pool, method, url, limits, body=body or None, most=most)
    except Unanswered as error:
        raise SourceUnavailable(f"{url} does not answer: {error}") from error


@contextlib.contextmanager
def _failures(hub: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise SourceUnavailable(
            f"{hub} has no certificate of this fleet: {error.verify_message}",
            hint=_CLOCKS if error.verify_code in _OUT_OF_TIME else _NAMES,
        ) from error
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        why = "it ended the connection" if isinstance(error, EOFError) else error
        raise SourceUnavailable(f"{hub} cannot be reached: {why}") from error


def _check_status(hub: str, head: bytes) -> None:
    status = head.partition(b"\r\n")[0].decode("latin-1").split(" ")[1:2]
    if status == ["101"]:
        return
    if status in (["401"], ["403"]):
        raise SourceRefused(
            f"{hub} does not admit this host",
            hint="`imdsproxy fleet hosts` shows whether it is revoked; `imdsproxy fleet enrol` admits it again",
        )
    raise SourceUnavailable(f"{hub} answers {' '.join(status) or 'no HTTP'}, and no stream")


@dataclass(slots=True)
class UserDataFetcher:
    """Fetches user data from a hub, and stores it on disk by `keep`, which raises `SourceError`."""

    keep: Callable[[bytes], Awaitable[None]]
    _failures: dict[str, SourceError] = field(default_factory=dict)

    async def fetch(self, stream: HubStream, wanted: Iterable[UserData]) -> None:
        for data in sorted(wanted, key=lambda one: (one.size, one.sha256)):
            try:
                await self.keep(await stream.user_data(data.sha256, data.size))
            except SourceError as error:
                self._failures[data.sha256] = error
            else:
                self._failures.pop(data.sha256, None)

    def reasons(self) -> Mapping[str, str]:
        return {
            sha256: f"{error.message} ({error.hint})" if error.hint else error.message
            for sha256, error in self._failures.items()
        }

    def is_refused(self, data: UserData) -> bool:
        """Return whether the last attempt failed for a reason that lasts until an operator acts."""
        return isinstance(self._failures.get(data.sha256), SourceRefused)

    def forget(self, needed: Iterable[UserData]) -> None:
        left = {data.sha256 for data in needed}
        for sha256 in self._failures.keys() - left:
            del self._failures[sha256]


_CHILD: Final = f"import sys; from {__name__} import renew_here; renew_here(sys.argv[1])"
_DEADLINE_S: Final = 120.0
_FAILED: Final = 1


async def renew_apart(files: HostFiles, hubs: Sequence[str], timeout_s: float) -> float:
    """Replace the certificate if renewal is due; return the Unix time at which the current certificate ends.

    Raises `SourceUnavailable` if the old certificate stays, and `HostRefused` if the process hangs.
    """
    paths = files.hubs, files.certificate, files.key, files.authority
    order = json.dumps([list(map(str, paths)), list(hubs), timeout_s])
    command = (sys.executable, "-P", "-c", _CHILD, order)
    status, words = await run_program(*command, deadline_s=_DEADLINE_S)
    message, hint = words.rpartition("\n")[2], "the process for the renewal ended"
    if status == 0:
        return float(message)
    if status == _FAILED and message.startswith("["):
        message, hint = json.loads(message)
    raise SourceUnavailable(f"this host's certificate is not renewed: {message}", hint=hint)


def renew_here(order: str) -> None:
    """Renew the certificate in this process. Print the certificate's end, or the error, as the last line."""
    paths, hubs, timeout_s = json.loads(order)
    files = HostFiles(*map(Path, paths))
    try:
        with optional_library("cryptography", LIBRARY_HINT):
            from imdsproxy.sources.fleet.membership import end_of, renew_if_due  # it may be missing
        client, now = HubClient(files, timeout_s), Clock().now()
        asyncio.run(renew_if_due(files, client, hubs, now))
        sys.stdout.write(str(end_of(files).timestamp()))
    except ImdsproxyError as error:
        sys.stdout.write(json.dumps([error.message, error.hint]))
        sys.exit(_FAILED)
