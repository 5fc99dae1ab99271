"""Client of the admin API: HTTP over a host's unix socket, or to a fleet's hubs over TLS. Errors are the daemon's."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import ssl
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from imdsproxy import errors
from imdsproxy.fleet.stream import ALIVE_PATH, CONNECT_S

if TYPE_CHECKING:
    from imdsproxy.model.entities import Network
    from imdsproxy.model.records import Refused

_T = TypeVar("_T")

_TIMEOUT_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.5
_UNIT: Final = "imdsproxy.service"
_UNIT_DIRECTORIES: Final = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
)
"""Directories of units of the system manager (systemd.unit(5))."""


def path_to(*steps: str) -> str:
    """Return a route, each step quoted: `path_to("networks", "blue")` is `/v1/networks/blue`."""
    return "/v1/" + "/".join(quote(step, safe="") for step in steps)


def read_problem(shape: Mapping[str, Any]) -> errors.Problem:
    return errors.Problem(*(shape[key] for key in ("field", "reason", "hint", "file", "line")))


OnStarting: TypeAlias = Callable[[errors.Starting], None]
OnWait: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], None]


@contextlib.contextmanager
def _silently() -> Iterator[OnStarting]:
    yield lambda _: None


@dataclass(frozen=True, slots=True)
class Client(ABC):
    """Client of the admin API. Each request has its own connection, and is sent again only while the daemon starts.

    Attributes:
        of_host: Whether the client talks to a host's daemon; otherwise to a fleet.
        timeout_s: Seconds for one answer, and for a start without progress.
        waiting: Context to enter if the daemon is starting; the callable that it yields is called now and then with the
            progress. `None` does not wait for the start.
    """

    of_host: ClassVar[bool]
    timeout_s: float = field(default=_TIMEOUT_S, kw_only=True)
    waiting: Callable[[], AbstractContextManager[OnStarting]] | None = field(
        default=_silently, kw_only=True
    )

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        return self.request("GET", path, query=query)

    def request(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None
    ) -> Any:
        """Send a request and return the decoded answer; text if the answer is not JSON.

        Raises:
            AdminUnavailable: No daemon answers on the socket, or not in time.
            Starting: The daemon is starting, and takes too long.
            PrivilegeMissing: This account may not use the socket.
            ImdsproxyError: The daemon refused the request; raised as the daemon's own class.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        raw = None if body is None else json.dumps(body).encode()
        headers = {} if raw is None else {"content-type": "application/json"}
        return self._when_started(lambda: self._ask(method, target, raw, headers))

    @abstractmethod
    def _ask(self, method: str, target: str, raw: bytes | None, headers: Mapping[str, str]) -> Any:
        """Send the request once and return the decoded answer."""

    @abstractmethod
    def post_records(
        self, lines: Iterable[bytes], query: Mapping[str, str], on_wait: OnWait
    ) -> Any:
        """Store records, one a line; wait as long as the daemon reports its progress.

        Args:
            on_wait: Called now and then with `/v1/progress`, and with the progress of a daemon that is still starting.

        Raises:
            ImdsproxyError: As `request`.
        """

    def _when_started(self, ask: Callable[[], Any]) -> Any:
        """Return the answer; ask again as long as the daemon's start makes progress."""
        before, deadline = "", 0.0
        with contextlib.ExitStack() as stack:
            note: OnStarting | None = None
            while True:
                try:
                    return ask()
                except errors.Starting as error:
                    now = time.monotonic()
                    if error.message != before:
                        before, deadline = error.message, now + self.timeout_s
                    if self.waiting is None or now >= deadline:
                        raise
                    note = note or stack.enter_context(self.waiting())
                    note(error)
                time.sleep(_LOOK_EVERY_S)


@dataclass(frozen=True, slots=True)
class AdminClient(Client):
    """Client of the daemon on this host, at its unix socket."""

    of_host: ClassVar[bool] = True
    socket: Path

    def _ask(self, method: str, target: str, raw: bytes | None, headers: Mapping[str, str]) -> Any:
        with self._connection() as connection:
            connection.request(method, target, raw, headers)
            return _decoded(connection.getresponse())

    def post_records(
        self, lines: Iterable[bytes], query: Mapping[str, str], on_wait: OnWait
    ) -> Any:
        # The lines can be sent only once, so wait for the start first.
        replace(self, waiting=lambda: nullcontext(lambda error: on_wait(error.steps))).get(
            path_to("progress")
        )
        with self._connection() as connection:
            _post_lines(connection, lines, query)
            while not select.select([connection.sock], [], [], _LOOK_EVERY_S)[0]:
                on_wait(self.get(path_to("progress")))
            return _decoded(connection.getresponse())

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("imdsproxy", timeout=self.timeout_s)
        try:
            # A connection that has its socket already does not look up the host.
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(self.timeout_s)
            connection.sock.connect(str(self.socket))
            yield connection
        except PermissionError as error:
            raise errors.PrivilegeMissing(
                f"{self.socket} is not open to this account",
                hint="run as root, or as a member of the socket's group (admin.group)",
            ) from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise errors.AdminUnavailable(
                f"no daemon answers on {self.socket}",
                hint=f"start it with `{_start_command()}`, or name its socket with --socket or --config",
            ) from error
        except TimeoutError as error:
            raise errors.AdminUnavailable(
                f"the daemon did not answer on {self.socket} within {self.timeout_s:.0f} s",
                hint="read the daemon's log",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise errors.AdminUnavailable(
                f"the daemon's answer on {self.socket} broke off: {str(error) or type(error).__name__}",
                hint="its log has the reason",
            ) from error
        finally:
            connection.close()


def _post_lines(
    connection: http.client.HTTPConnection, lines: Iterable[bytes], query: Mapping[str, str]
) -> None:
    target = f"{path_to('records')}?{urlencode(query)}"
    # The daemon may refuse a body before its end; its answer can be read nevertheless.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", target, lines, {"content-type": "application/x-ndjson"})


def _start_command() -> str:
    installed = any(Path(directory, _UNIT).exists() for directory in _UNIT_DIRECTORIES)
    return "systemctl start imdsproxy" if installed else "imdsproxy run"


def _decoded(response: http.client.HTTPResponse) -> Any:
    """Decode the answer; raise an error as the class that the daemon raised, for the same exit status."""
    answer = response.read()
    is_json = response.headers.get_content_type().endswith("json")
    try:
        decoded = json.loads(answer) if is_json else answer.decode()
    except ValueError as error:
        raise errors.AdminError(
            f"the daemon's answer cannot be read: {error}", hint="is it the same version?"
        ) from error
    if response.status < HTTPStatus.BAD_REQUEST:
        return decoded
    if not isinstance(decoded, dict) or "code" not in decoded:
        raise errors.AdminError(
            f"the daemon answered {response.status}", hint="is it the same version?"
        )
    if decoded["code"] == errors.Starting.code:
        raise errors.Starting.at(decoded.get("progress", ()))
    kinds = {kind.code: kind for kind in errors.KINDS} | {"internal": errors.ImdsproxyError}
    # HAProxy answers for a hub that has ended or hangs.
    away = response.status >= HTTPStatus.BAD_GATEWAY
    other = errors.AdminUnavailable if away else errors.AdminError
    raised = kinds.get(str(decoded["code"]), other)
    problems = [read_problem(one) for one in decoded.get("problems", ())]
    hint = str(decoded.get("hint", ""))
    raise raised(str(decoded["message"]), hint=hint, problems=problems)


@dataclass(frozen=True, slots=True)
class FleetClient(Client):
    """Client of a fleet's hubs, which asks the first hub that answers.

    Each write has a unique name: if a hub's answer is lost, the next hub does not repeat a write that is done. A hub
    knows all records that another has stored, so `post_records` goes on with the next one: it iterates `lines` again
    for each.

    Attributes:
        certificate: The operator's certificate with its key, and the fleet's CA certificate, in one PEM file.
    """

    of_host: ClassVar[bool] = False
    certificate: Path
    urls: tuple[str, ...]

    def _ask(self, method: str, target: str, raw: bytes | None, headers: Mapping[str, str]) -> Any:
        named = {**headers, "idempotency-key": uuid.uuid4().hex}
        context, asked, reasons = self._context(), list[str](), list[errors.ImdsproxyError]()

        def ask(url: str) -> Any:
            with self._hub(url, context) as connection:
                asked.append(url)
                connection.request(method, target, raw, named)
                return _decoded(connection.getresponse())

        try:
            return self._first_answer(ask, reasons)
        except errors.RestoreSuspected as error:
            if len(asked) == 1 or method == "GET":
                raise
            # The previous hub may have written the record, and hosts may have received it before the restore.
            raise errors.WriteUnknown(_joined(reasons).message, hint=error.hint) from error

    def post_records(
        self, lines: Iterable[bytes], query: Mapping[str, str], on_wait: OnWait
    ) -> Any:
        context = self._context()

        def post(url: str) -> Any:
            hub = replace(self, urls=(url,))
            hub.get(path_to("progress"))
            with self._hub(url, context) as connection:
                _post_lines(connection, lines, query)
                answer = _decoded(connection.getresponse())
            while "importing" in answer:
                on_wait(answer["progress"])
                answer = hub.get(path_to("imports", answer["importing"]))
            return answer

        return self._first_answer(post, [])

    def _first_answer(self, ask: Callable[[str], Any], reasons: list[errors.ImdsproxyError]) -> Any:
        """Return the answer of the first hub that answers; add the errors of the others to `reasons`."""
        for url in self.urls:
            try:
                return ask(url)
            except (errors.AdminUnavailable, errors.SourceUnavailable) as error:
                reasons.append(error)
        raise _joined(reasons)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_cert_chain(self.certificate)
            context.load_verify_locations(self.certificate)
        except (OSError, ValueError) as error:
            raise errors.SecretUnreadable(
                f"the operator's certificate {self.certificate} cannot be used: {error}",
                hint="`imdsproxy fleet operator` on a hub makes one; --fleet-certificate names it",
            ) from error
        return context

    @contextlib.contextmanager
    def _hub(self, url: str, context: ssl.SSLContext) -> Iterator[http.client.HTTPConnection]:
        where = urlsplit(url)
        connection = http.client.HTTPSConnection(
            where.hostname or "", where.port, timeout=CONNECT_S, context=context
        )
        try:
            # HAProxy accepts connections for a hub that hangs. A short probe finds that out; an answer may take long.
            connection.request("GET", ALIVE_PATH)
            _decoded(connection.getresponse())
            connection.timeout = self.timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(self.timeout_s)
            yield connection
        except ssl.SSLError as error:
            # An alert is the hub's verdict on our certificate; other errors are ours on the hub's certificate.
            alert = "ALERT" in (error.reason or "")
            if alert and any(one in error.reason for one in ("CERTIFICATE", "UNKNOWN_CA")):
                raise errors.AccessDenied(
                    f"{url} refuses the operator's certificate {self.certificate}: {error.reason}",
                    hint="it has ended, or is of another CA: `imdsproxy fleet operator` on a hub makes a new one",
                ) from error
            raise errors.AdminUnavailable(
                f"{url} does not prove that it is a hub of this fleet: {error.reason or error}",
                hint="compare its URL with the names in its certificate",
            ) from error
        except TimeoutError as error:
            raise errors.AdminUnavailable(
                f"{url} did not answer in time",
                hint="is the hub running, or does it hang: `systemctl status imdsproxy-hub` there",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise errors.AdminUnavailable(
                f"{url} does not answer: {str(error) or type(error).__name__}",
                hint="is the hub running, and its port open to this machine?",
            ) from error
        finally:
            connection.close()


def _joined(reasons: Sequence[errors.ImdsproxyError]) -> errors.ImdsproxyError:
    """Return the error of the only hub, or one error with the reasons of all hubs."""
    if len(reasons) == 1:
        return reasons[0]
    words = "; ".join(one.message for one in reasons)
    return errors.AdminUnavailable(f"no hub can answer: {words}", hint=reasons[0].hint)


def read_record(
    kind: str, parse: Callable[[object], _T | Refused], record: Mapping[str, Any]
) -> _T:
    """Parse a record from the daemon; raise `AdminError` if the record is invalid in this version."""
    from imdsproxy.model.records import Refused

    read = parse(record)
    if isinstance(read, Refused):
        raise errors.AdminError(
            f"the daemon's record of {kind} {record.get('id')} is not understood",
            hint="is the daemon of the same version as this command?",
        )
    return read


def read_networks(daemon: AdminClient) -> list[Network]:
    """Return all networks of the daemon; raise as `read_record`."""
    from imdsproxy.model.records import parse_network

    return [
        read_record("network", parse_network, shape["record"])
        for shape in daemon.get("/v1/networks")
    ]
