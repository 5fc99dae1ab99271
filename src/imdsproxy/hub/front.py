"""HAProxy in front of a hub: it terminates TLS, verifies certificates, and passes their subjects in headers.

HAProxy runs under an account of its own, in front of two sockets: one for streams, one for all other requests
(`front.cfg`). A command installs a renewed certificate, so that no stream ends.

A shell takes that account and waits for the hub's line, because the hub can no longer assign accounts once it has read
etcd. HAProxy ends when the hub closes the pipe to the shell, or is killed: the hub may not send signals to another
account's processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pkgutil
import subprocess
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog

from imdsproxy.config.identity import IdentitySettings
from imdsproxy.errors import ConfigRejected, HaproxyMissing, HostRefused, RuntimeUnavailable
from imdsproxy.fleet import members, stream
from imdsproxy.haproxy.master import exchange
from imdsproxy.haproxy.rules.runtime import parse_failure
from imdsproxy.haproxy.rules.text import (
    Block,
    Text,
    Value,
    blocks_of,
    fill_sections,
    name_values,
    quote,
    render,
)
from imdsproxy.host import process
from imdsproxy.host.account import Account
from imdsproxy.host.files import remove_file, write_atomic
from imdsproxy.hub.accounts import Accounts, Places
from imdsproxy.issuer.documents import DOCUMENTS
from imdsproxy.model.entities import ID_PATTERN
from imdsproxy.model.wire import RETRY_AFTER_S

MAX_CONNECTIONS: Final = 40_000
"""Maximum number of connections: two for each of 10,000 hosts fit in `SHARE_OF_HOSTS`."""
UNVERIFIED: Final = 256
"""Maximum connections without a verified certificate per prefix: an IPv4 address, or an IPv6 /64.

A thousand hosts behind one NAT that reconnect at once are admitted after a few attempts.
"""

UNVERIFIED_OF_MEMBERS: Final = 1024
"""Maximum connections without a verified certificate per prefix, for an address that has shown a certificate."""

CONNECTS: Final = 3000
"""Maximum new connections of a prefix in ten seconds: a thousand hosts, three times each."""

ANONYMOUS: Final = 64
"""Maximum established TLS connections without a certificate per prefix."""

ENROLMENTS_A_MINUTE: Final = 240
"""Maximum requests to enrol per prefix in a minute."""

CONNECTIONS_OF_HOST: Final = 16
"""Maximum connections per host certificate: a host needs two or three, and old ones may still be open."""

CONNECTS_OF_HOST: Final = 120
"""Maximum new connections per host certificate in a minute."""

REQUESTS_OF_HOST: Final = 2000
"""Maximum requests per host certificate in ten seconds: one per instance for user data. A refused host retries."""

WRITES_OF_HOST: Final = 600
"""Maximum writes per certificate in a minute: enrolments, renewals, passwords, and instances that left."""

CONNECTIONS_OF_OPERATOR: Final = 512
"""Maximum connections per certificate of an operator or hub."""

HANDSHAKE_S: Final = 10
"""Timeout for the TLS handshake."""

SHARE_OF_ANONYMOUS: Final = 0.15
"""Limit of all unverified connections, as a share of the maximum, for an address that has not shown a certificate."""

SHARE_OF_UNVERIFIED: Final = 0.3
"""Limit of all unverified connections, as a share of the maximum, for an address with only hosts' certificates."""

SHARE_OF_HOSTS: Final = 0.6
"""Share of all connections for hosts; the rest is for operators and hubs."""

_ENROLMENT_BYTES: Final = 16_384
_IDENTITY_BYTES: Final = 65_536

_ISSUER_CONNECTIONS: Final = 1000
"""Maximum connections of verifiers: they take none from hosts and operators."""

_ANSWER_S: Final = 330
"""Timeout for a hub's answer: an operator may wait for hosts."""

_CHECK_S: Final = 10.0
_START_S: Final = 20.0
_COMMAND_S: Final = 5.0
_POLL_S: Final = 0.02
_LINES: Final = 40
_OWN_DESCRIPTORS: Final = 200
_FREE_PORTS: Final = 1024
_NO_ADDRESS: Final = ("Address already in use", "Cannot assign requested address")
_LOG_EVERY_S: Final = 10.0
LOGGED: Final = 100
"""Maximum failed connections to log individually in ten seconds: clients without a certificate can cause any number."""

_WAIT_FOR_WORD: Final = """
read -r _ || exit 0
exec 3<&0 </dev/null
"$@" 3<&- &
haproxy=$!
{ while read -r _ <&3; do :; done; kill -KILL "$haproxy"; } >/dev/null 2>&1 &
wait "$haproxy"
"""
_LOW_PORTS: Final = ("--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service")
_NO_RIGHTS: Final = ("--inh-caps=-all", "--ambient-caps=-all")
_STOP_S: Final = 5.0

_SERIOUS: Final = ("[ALERT]", "[EMERG]")
_JSON: Final = "application/problem+json"
_ANSWERS: Final = {
    "bad_request": (
        400,
        "request-refused",
        "the request is not acceptable",
        "hosts' bodies need a Content-Length",
    ),
    "no_certificate": (
        401,
        "certificate-missing",
        "a client certificate of this fleet is needed",
        "hosts get theirs by `imdsproxy fleet join`, operators by `imdsproxy fleet operator`",
    ),
    "not_allowed": (
        403,
        "access-denied",
        "the client certificate's role may not use this route",
        "operators' certificates are made by `imdsproxy fleet operator`",
    ),
    "no_method": (405, "method-not-allowed", "this route does not take this method", ""),
    "too_slow": (408, "request-refused", "the request did not arrive in time", ""),
    "too_large": (413, "request-refused", "the request is too large", ""),
    "too_often": (429, "too-many-requests", "too many attempts to enrol", "wait a minute"),
    "unavailable": (503, "hub-unavailable", "the hub does not answer", "another hub may"),
}

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class IssuerSpec:
    """Listener for the documents of the issuer of identity tokens: address with port, PEM file, URL of the issuer."""

    listen: str
    certificate: Path
    url: str


@dataclass(frozen=True, slots=True)
class FrontSpec:
    """Parameters of HAProxy's configuration.

    Attributes:
        listen: Addresses with ports in the form of HAProxy's `bind`: `192.0.2.1:8469`, `[::]:8469`.
        certificate: PEM file of the hub's certificate and key.
        control: Unix socket of HAProxy's runtime API.
    """

    listen: Sequence[str]
    certificate: Path
    authority: Path
    stream_socket: Path
    api_socket: Path
    control: Path
    maxconn: int = MAX_CONNECTIONS
    nbthread: int = 1
    issuer: IssuerSpec | None = None


def fitting_maxconn(descriptors: int) -> int:
    """Return the maximum connections for a limit of open files (-1: no limit); each connection needs two files."""
    if descriptors < 0:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (descriptors - _OWN_DESCRIPTORS) // 2))


def find_issuer(identity: IdentitySettings, places: Places) -> IssuerSpec | None:
    """Return the listener for the issuer's documents; `None` if the settings have none."""
    if not identity.enabled or identity.listen is None or identity.issuer is None:
        return None
    return IssuerSpec(str(identity.listen), places.issuer_certificate, identity.issuer)


def render_front(spec: FrontSpec) -> str:
    """Render the configuration; raise `UnquotableWord` if a path has a control character."""
    template = (pkgutil.get_data(__package__, "front.cfg") or b"").decode()
    blocks = blocks_of(template)
    values: dict[str, Value] = {
        **name_values(vars(members)),
        **{f"role_{role.name.lower()}": role.value for role in members.Role},
        **{name: _problem(name) for name in _ANSWERS},
        "json": _JSON,
        # In PCRE `$` also matches before a line break at the end.
        "name": ID_PATTERN.replace("$", r"\z"),
        "own_headers": "x-imdsproxy-",
        "stream_path": stream.STREAM_PATH,
        "blob_path": f"^{stream.BLOB_PATH}[0-9a-f]{{64}}$",
        "hub_paths": "/fleet/",
        "upgrade": stream.UPGRADE,
        "retry_after_s": RETRY_AFTER_S,
        "answer_s": _ANSWER_S,
        "handshake_s": HANDSHAKE_S,
        "of_hosts": 1,
        "of_others": 2,
        "connects": CONNECTS,
        "unverified": UNVERIFIED,
        "unverified_of_members": UNVERIFIED_OF_MEMBERS,
        "share_of_anonymous": int(SHARE_OF_ANONYMOUS * spec.maxconn),
        "share_of_unverified": int(SHARE_OF_UNVERIFIED * spec.maxconn),
        "share_of_hosts": int(SHARE_OF_HOSTS * spec.maxconn),
        "connections_of_host": CONNECTIONS_OF_HOST,
        "connects_of_host": CONNECTS_OF_HOST,
        "connections_of_operator": CONNECTIONS_OF_OPERATOR,
        "requests_of_host": REQUESTS_OF_HOST,
        "writes_of_host": WRITES_OF_HOST,
        "anonymous": ANONYMOUS,
        "enrolments": ENROLMENTS_A_MINUTE,
        "enrolment_bytes": _ENROLMENT_BYTES,
        "identity_bytes": _IDENTITY_BYTES,
        "maxconn": spec.maxconn,
        "nbthread": spec.nbthread,
        "control": str(spec.control),
        "certificate": str(spec.certificate),
        "authority": str(spec.authority),
        "stream_socket": f"unix@{spec.stream_socket}",
        "api_socket": f"unix@{spec.api_socket}",
        "binds": Block(blocks["bind"].template, [{"address": one} for one in spec.listen]),
    }
    return render(fill_sections(template, {**values, **_issuer_values(spec.issuer)}))


def _issuer_values(issuer: IssuerSpec | None) -> dict[str, Value]:
    if issuer is None:
        return {"issuer": None}
    below = urlsplit(issuer.url).path
    return {
        "issuer": 1,
        "issuer_listen": issuer.listen,
        "issuer_certificate": str(issuer.certificate),
        "issuer_maxconn": _ISSUER_CONNECTIONS,
        "issuer_paths": Text(" ".join(quote(below + path) for path in DOCUMENTS)),
        "issuer_prefix": members.ISSUER_PATH,
    }


def _problem(name: str) -> str:
    status, code, message, hint = _ANSWERS[name]
    shape = {"status": status, "code": code, "message": message, "hint": hint, "problems": []}
    return json.dumps(shape)


class FrontProcess:
    """Shell that becomes the parent of HAProxy, which binds ports below 1024 if `low_port`; raises `HaproxyMissing`."""

    def __init__(
        self, command: tuple[str, ...], account: Account | None, *, low_port: bool
    ) -> None:
        words = ["/bin/sh", "-c", _WAIT_FOR_WORD, "imdsproxy-front", *command]
        if account is not None:
            rights = _LOW_PORTS if low_port else _NO_RIGHTS
            ids = (f"--reuid={account.user}", f"--regid={account.group}", "--clear-groups")
            words = ["setpriv", *ids, *rights, *words]
        try:
            self._child = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._begun = False
        except OSError as error:
            raise HaproxyMissing(
                f"cannot run {error.filename or words[0]}: {error.strerror}"
            ) from error

    async def begin(self) -> asyncio.StreamReader:
        """Start HAProxy; return the stream of its standard error."""
        assert self._child.stdin is not None  # noqa: S101 - it is a pipe
        self._begun = True
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._child.stderr
        )
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(b"\n")
            self._child.stdin.flush()
        return reader

    def is_over(self) -> bool:
        return self._child.poll() is not None

    async def wait(self) -> int:
        """Wait until HAProxy has ended; return its exit status, 128 and more for a signal."""
        if not self.is_over():
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            pidfd = os.pidfd_open(self._child.pid)
            loop.add_reader(pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)
        return self._child.wait()

    async def stop(self) -> None:
        self.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self.wait()
        except TimeoutError:
            # If HAProxy has another account, systemd ends the process.
            with contextlib.suppress(PermissionError):
                self._child.kill()

    def close(self) -> None:
        """Close the pipe, so that HAProxy ends or does not start."""
        assert self._child.stdin is not None  # noqa: S101 - it is a pipe
        assert self._child.stderr is not None  # noqa: S101 - as above
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        if not self._begun:
            self._child.stderr.close()


class Front:
    """HAProxy in front of a hub, from start to end. `config` is the path of the configuration to write."""

    def __init__(
        self, program: str, spec: FrontSpec, config: Path, accounts: Accounts | None = None
    ) -> None:
        self.program, self._spec, self._config = program, spec, config
        self._accounts = accounts or Accounts()
        self._process: FrontProcess | None = None
        self._reading: asyncio.Task[None] | None = None
        self._last: deque[str] = deque(maxlen=_LINES)

    def prepare(self) -> None:
        """Create HAProxy's process while this process may still assign an account; otherwise `start` creates it.

        Raises `HaproxyMissing` if a program cannot be run.
        """
        command = (self.program, "-db", "-f", str(self._config))
        low = any(int(one.rpartition(":")[2]) < _FREE_PORTS for one in self._spec.listen)
        self._process = FrontProcess(command, self._accounts.haproxy, low_port=low)

    async def start(self) -> None:
        """Check the configuration, start HAProxy, and wait until it accepts connections.

        Raises:
            ConfigRejected: HAProxy refuses the configuration or a certificate; the error has HAProxy's words.
            HaproxyMissing: HAProxy cannot be run.
            HostRefused: An address is in use or missing, the file cannot be written, or the check does not end.
            RuntimeUnavailable: HAProxy does not come up in time.
        """
        if self._process is None:
            self.prepare()
        assert self._process is not None  # noqa: S101 - it was prepared
        front, text = self._process, render_front(self._spec).encode()
        try:
            write_atomic(self._config, text, mode=0o640, owner=self._accounts.shared)
            await self._check()
            # The socket of an earlier HAProxy may still answer.
            remove_file(self._spec.control, "remove the socket of an earlier HAProxy")
            self._reading = asyncio.create_task(self._read(await front.begin()))
            async with asyncio.timeout(_START_S):
                await self._wait_until_up(front)
        except TimeoutError as error:
            await self.stop()
            raise RuntimeUnavailable(f"HAProxy did not come up within {_START_S:g} s") from error
        except BaseException:
            await self.stop()
            raise

    async def _check(self) -> None:
        words = (self.program, "-f", str(self._config), "-c")
        try:
            status, printed = await process.run_program(*words, deadline_s=_CHECK_S)
        except OSError as error:
            raise HaproxyMissing(
                f"cannot run {error.filename or self.program}: {error.strerror}"
            ) from error
        if status != 0:
            raise ConfigRejected(f"HAProxy refuses {self._config}: {parse_failure(printed)}")

    async def _wait_until_up(self, process: FrontProcess) -> None:
        while True:
            if process.is_over():
                words = await self.wait()
                if any(one in words for one in _NO_ADDRESS):
                    raise HostRefused(
                        f"the hub cannot listen on {', '.join(self._spec.listen)}: {words}",
                        hint="hub.listen: `ss -ltnp` shows which process has the port",
                    )
                raise ConfigRejected(f"HAProxy did not start: {words}")
            with contextlib.suppress(RuntimeUnavailable):
                await self._send("show info")
                return
            await asyncio.sleep(_POLL_S)

    async def _read(self, words: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        until, left, more = 0.0, 0, 0
        while line := (await words.readline()).decode("utf-8", "replace").strip():
            self._last.append(line)
            if line.startswith(_SERIOUS):
                _log.error("HAProxy in front of the hub", haproxy=line)
                continue
            if loop.time() >= until:
                if more:
                    _log.warning("more connections to the hub failed", count=more)
                until, left, more = loop.time() + _LOG_EVERY_S, LOGGED, 0
            if left:
                left -= 1
                _log.info("connection to the hub", haproxy=line)
            else:
                more += 1

    async def wait(self) -> str:
        """Wait until HAProxy has ended; return the reason."""
        if self._process is None or self._reading is None:
            return "it was not started"
        status = await self._process.wait()
        await self._reading
        words = parse_failure("\n".join(self._last))[-2000:] or "it wrote nothing"
        return f"exit status {status}: {words}"

    async def replace_certificate(self, pem: bytes) -> None:
        """Use a certificate (with its key, PEM) for new connections; open connections stay.

        Raises `ConfigRejected` if HAProxy refuses the certificate, and the old one stays; raises `RuntimeUnavailable`.
        """
        path = self._spec.certificate
        text = "\n".join(line for line in pem.decode().splitlines() if line.strip())
        answer = await self._send(f"set ssl cert {path} <<\n{text}\n")
        if "Transaction created" in answer or "Transaction updated" in answer:
            answer = await self._send(f"commit ssl cert {path}")
        if "Success!" not in answer:
            await self._send(f"abort ssl cert {path}")
            raise ConfigRejected(f"HAProxy refuses the renewed certificate: {answer.strip()}")

    async def _send(self, command: str) -> str:
        try:
            answer = await exchange(self._spec.control, f"{command}\n", _COMMAND_S, end=True)
        except OSError as error:
            raise RuntimeUnavailable(f"HAProxy does not answer: {error}") from error
        return answer.decode("utf-8", "replace")

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()
        if self._reading is not None:
            await self._reading
