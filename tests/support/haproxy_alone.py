"""A HAProxy with the real rules and nothing of ours beside it: a test stands in for what is behind it."""

import base64
import contextlib
import hashlib
import hmac
import itertools
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import BinaryIO, Final

from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.rules.config import render_config
from imdsproxy.haproxy.rules.model import (
    Bind,
    DataplaneSpec,
    Limits,
    NovaBackend,
    NovaServer,
    NovaTimes,
    Paths,
    UnixBind,
)
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.path_rules import PathRules, render_set
from imdsproxy.model.policy import OperatorOverride, Policy, render_policy_word
from imdsproxy.model.tokens import TokenKey, render_key_map
from imdsproxy.model.wire import (
    HEADER_ADDRESS,
    HEADER_NETWORK,
    HEADER_RECORD,
    EmbeddedRecord,
    NovaRecord,
    render_map_value,
)
from support.guest import IPV4, Asker, Connection, Lost, Reply, connect_unix
from support.lab import until
from support.openstack.servers import free_port

KEY: Final = TokenKey(b"k" * 32)
WAYS: Final = ("guests", "found", "agents")
"""The frontends: of a network, of requests that the resolver hands in, of Neutron's proxies."""

_ADDRESS: Final = "127.0.0.1"
_UNCHECKED: Final = NovaTimes(check="off")
_LIMITS: Final = Limits(maxconn=400, cache_mb=1)


def mint_token(
    key: TokenKey, network: NetworkId, instance: InstanceId, epoch: int, expires_at: int
) -> str:
    """A token as HAProxy makes it (`haproxy/rules/access_rules.cfg`); `expires_at` is Unix time."""
    head = f"{key.kid}.{expires_at}"
    bound = f"{head}|{network}|{instance}|{epoch or ''}"
    mac = hmac.new(key.secret, bound.encode("utf-8"), hashlib.sha256).digest()
    return f"{head}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode('ascii')}"


def paths_below(directory: Path) -> Paths:
    """Everything in one directory, without a jail; the maps are empty."""
    layout = Layout(directory, directory, documents_workers=1, chroot=False)
    layout.jail.mkdir()
    for name in ("base", "overlay", "token-keys", "short", "path-rules"):
        (directory / f"{name}.map").touch()
    layout.unavailable.write_text("HTTP/1.1 503 No\r\nRetry-After: 1\r\n\r\n")
    return layout.haproxy_paths()


@contextmanager
def run_haproxy(
    spec: DataplaneSpec,
    directory: Path,
    more: str = "",
    arguments: Sequence[str] = (),
    program: str = "haproxy",
) -> Iterator[None]:
    """Run it for the time of the context; `more` is put behind its configuration."""
    config = directory / "h.cfg"
    config.write_text(render_config(spec) + more)
    command = [program, *arguments, "-f", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


@dataclass(frozen=True, slots=True)
class Document:
    """What is answered to each request; OWN in `body` becomes the instance's id."""

    body: bytes = b"i-0123"
    status: str = "200 OK"
    content_type: str = "text/plain; charset=utf-8"
    lifetime: bool = True


@dataclass(slots=True)
class Documents:
    """Stands in for the document server and for Nova, with the same for each path.

    Attributes:
        heads: The heads of requests, as they came.
    """

    document: Document = Document()
    heads: list[bytes] = field(default_factory=list)

    @property
    def asked(self) -> list[str]:
        """The targets of requests."""
        return [head.split(b" ", 2)[1].decode("latin-1") for head in self.heads]

    def answer(self, head: bytes, lines: Mapping[bytes, bytes]) -> bytes:
        method, target = head.split(b" ", 2)[:2]
        if target == b"/livez":
            return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        self.heads.append(head)
        one = self.document
        owner = lines.get(b"x-imdsproxy-instance", lines.get(b"x-instance-id", b""))
        body = one.body.replace(b"OWN", owner)
        lifetime = "Cache-Control: max-age=3600\r\n" if one.lifetime else ""
        answer = f"HTTP/1.1 {one.status}\r\nContent-Type: {one.content_type}\r\n{lifetime}Content-Length: {len(body)}"
        return f"{answer}\r\n\r\n".encode() + (b"" if method == b"HEAD" else body)

    @contextmanager
    def serve(self, *listeners: socket.socket) -> Iterator[None]:
        """Answer on these for the time of the context."""
        threads = [threading.Thread(target=self._take, args=(one,)) for one in listeners]
        for one, thread in zip(listeners, threads, strict=True):
            one.listen(64)
            thread.start()
        try:
            yield
        finally:
            for one, thread in zip(listeners, threads, strict=True):
                one.shutdown(socket.SHUT_RDWR)
                thread.join()
                one.close()

    def _take(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                talk = threading.Thread(
                    target=self._talk, args=(listener.accept()[0],), daemon=True
                )
                talk.start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as sent:
            while head := _read_lines(sent):
                lines = dict(line.lower().partition(b": ")[::2] for line in head.split(b"\r\n"))
                sent.read(int(lines.get(b"content-length", b"0")))
                if b"transfer-encoding" in lines:
                    while size := int(sent.readline(), 16):
                        sent.read(size + 2)
                    _read_lines(sent)
                connection.sendall(self.answer(head, lines))


def _read_lines(sent: BinaryIO) -> bytes:
    """To an empty one, without its end; nothing where no more is sent."""
    return b"".join(itertools.takewhile(b"\r\n".__ne__, iter(sent.readline, b""))).rstrip(b"\r\n")


@dataclass(slots=True)
class Alone:
    """A HAProxy for the networks `red` and `green`, whose guests `i-red` and `i-green` have one address.

    Attributes:
        nova: Records are of Nova.
        records: What the map holds, by network.
    """

    directory: Path
    ports: dict[str, int]
    nova: bool
    documents: Documents = field(default_factory=Documents)
    records: dict[str, str] = field(default_factory=dict)
    _askers: dict[tuple[str, str], Asker] = field(default_factory=dict)
    _revisions: Iterator[int] = field(default_factory=itertools.count)

    def renew(self) -> None:
        """Begin a test: both guests at the default policy, nothing kept of what others were answered."""
        self.documents.document, self.documents.heads = Document(), []
        self.command(f"clear map {self.directory}/short.map")
        self.write_keys(KEY)
        for network in self.ports:
            self.put(network)

    def put(self, network: str = "red", word: str = "", *, instance: str = "") -> None:
        """Have a network's guest be an instance under a policy word, at a new revision."""
        owner = InstanceId(instance or f"i-{network}")
        record = (
            NovaRecord("default", owner, "p", ("a" * 64,), word)
            if self.nova
            else EmbeddedRecord(owner, f"{next(self._revisions):08x}", word)
        )
        self.write(network, render_map_value(record))

    def have(self, policy: Policy, *, epoch: int = 0, created: int | None = None) -> None:
        """Have this policy in force for red's guest."""
        self.put(word=render_policy_word(policy, OperatorOverride(epoch), created))

    def write(self, network: str, value: str) -> None:
        """Put a value into the map as it is."""
        self.records[network] = value
        self.forget(network)
        self.command(f"add map {self.directory}/base.map {network}/{_ADDRESS} {value}")

    def forget(self, network: str = "red") -> None:
        """Have no record of a network's guest."""
        self.command(f"del map {self.directory}/base.map {network}/{_ADDRESS}")

    def write_keys(self, *keys: TokenKey, **of_instances: tuple[TokenKey, ...]) -> None:
        """Have exactly these keys of session tokens, the first in force; of an instance `i-red` as `i_red`."""
        path = f"{self.directory}/token-keys.map"
        theirs = {InstanceId(name.replace("_", "-")): own for name, own in of_instances.items()}
        self.command(f"clear map {path}")
        for kid, text in render_key_map(keys, theirs).items():
            self.command(f"add map {path} {kid} {text}")

    def token(
        self,
        network: str = "red",
        *,
        epoch: int = 0,
        expires_at: int,
        key: TokenKey = KEY,
        instance: str = "",
    ) -> str:
        """A token of its guest, made by Python."""
        owner = InstanceId(instance or f"i-{network}")
        return mint_token(key, NetworkId(network), owner, epoch, expires_at)

    def connect(self, network: str = "red", way: str = "guests") -> Connection:
        if way == "guests":
            return Connection(socket.create_connection((_ADDRESS, self.ports[network]), 10))
        return connect_unix(self.directory / f"{way}.sock")

    def lines(self, network: str, way: str) -> tuple[str, ...]:
        """Whose a request is, where it doesn't come over the guest's own connection."""
        if way == "found":
            return (
                f"{HEADER_RECORD}: {self.records[network]}",
                f"{HEADER_NETWORK}: {network}",
                f"{HEADER_ADDRESS}: {_ADDRESS}",
            )
        if way == "agents":
            return (f"X-Neutron-Network-ID: {network}", f"X-Forwarded-For: {_ADDRESS}")
        return ()

    def ask(
        self,
        target: str,
        network: str = "red",
        way: str = "guests",
        *,
        method: str = "GET",
        host: str = IPV4,
        headers: Sequence[str] = (),
        kept: bool = True,
    ) -> Reply:
        """Ask over the connection that the guest keeps there, or over a new one."""
        lines = (*self.lines(network, way), *headers)
        if not kept:
            with self.connect(network, way) as connection:
                return connection.request(target, method=method, host=host, headers=lines)
        asker = self._askers.get((network, way))
        if asker is None:
            asker = Asker(lambda: self.connect(network, way))
            self._askers[network, way] = asker
        return asker.ask(target, method=method, host=host, headers=lines)

    def command(self, text: str) -> str:
        """The worker's answer to a command of its Runtime API."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(self.directory / "cli.sock"))
            asking.sendall(text.encode() + b"\n")
            answer = b""
            while more := asking.recv(65_536):
                answer += more
        return answer.decode("utf-8", "surrogateescape")

    def is_up(self) -> bool:
        try:
            return self.ask("/latest/up", kept=False).status == 200
        except (OSError, Lost):
            return False

    def close(self) -> None:
        for asker in self._askers.values():
            asker.close()


@contextmanager
def open_alone(
    *,
    nova: bool = False,
    paths: Sequence[PathRules] = (),
    count_reads: int = 0,
    limits: Limits = _LIMITS,
    audit: int = 0,
    watched: bool = False,
    novas: Sequence[int] = (),
    times: NovaTimes = _UNCHECKED,
    fleet: bool = False,
    program: str = "haproxy",
) -> Iterator[Alone]:
    """Run one for the time of the context.

    Args:
        nova: Records are of Nova, whose place is taken as well.
        paths: The sets of path rules that records may refer to.
        count_reads: As of `DataplaneSpec`.
        limits: The same.
        audit: The same.
        watched: The same.
        novas: The ports of Novas that stand there already, where the stand-in is none.
        times: How they are waited for and checked.
        fleet: As of `DataplaneSpec`.
        program: HAProxy.
    """
    # Not below pytest's own directory: a socket's path has 97 characters.
    place = Path(tempfile.mkdtemp(prefix="imdst-"))
    holders = {network: free_port() for network in ("red", "green")}
    ports = {network: holder.getsockname()[1] for network, holder in holders.items()}
    files = paths_below(place)
    sets = {key: value for rules in paths for key, value in render_set(rules).items()}
    Path(files.named["path_rules_map"]).write_text(
        "".join(f"{key} {value}\n" for key, value in sets.items())
    )
    Path(files.named["base_map"]).write_text(
        "".join(f"{network}/{_ADDRESS} i-{network}|0\n" for network in ports)
    )
    documents, upstream = socket.socket(socket.AF_UNIX), socket.create_server((_ADDRESS, 0))
    documents.bind(files.documents[0])
    servers = tuple(
        NovaServer(IPv4Address(_ADDRESS), port) for port in novas or [upstream.getsockname()[1]]
    )
    spec = DataplaneSpec(
        tuple(Bind(NetworkId(name), IPv4Address(_ADDRESS), port) for name, port in ports.items()),
        files,
        limits,
        nova=(NovaBackend("default", servers, f"{_ADDRESS}:{servers[0].port}"),) if nova else (),
        nova_times=times,
        unix=UnixBind(str(place / "agents.sock"), "0600", 0, 0, maxconn=100),
        count_reads=count_reads,
        audit=audit,
        watched=watched,
        fleet=fleet,
    )
    more = f"\nglobal\n  stats socket {place}/cli.sock mode 600 level admin\n"
    alone = Alone(place, ports, nova)
    try:
        with (
            alone.documents.serve(documents, upstream),
            run_haproxy(spec, place, more, program=program),
        ):
            until(alone.is_up, what="HAProxy's answer")
            yield alone
            alone.close()
    finally:
        for holder in holders.values():
            holder.close()
        shutil.rmtree(place)
