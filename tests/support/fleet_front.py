"""A fleet's certificates, and the genuine HAProxy of a hub with recorders in the hub's place."""

import contextlib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from imdsproxy.fleet.members import Role, spell_serial
from imdsproxy.host.certificates import make_key, render_certificate, render_key
from imdsproxy.hub.front import FrontSpec, render_front
from imdsproxy.hub.pki.authority import Authority, make_authority
from support.guest import inside
from support.lab import until
from support.openstack.servers import ends_with_us
from support.patience import patience
from support.recorder import Recorder

ADDRESS: Final = "127.0.0.1"
_OIDS: Final = {
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "CN": NameOID.COMMON_NAME,
}


@dataclass(frozen=True, slots=True)
class Client:
    """A certificate with its key, in one PEM file."""

    pem: Path
    serial: str


@dataclass(slots=True)
class Certificates:
    """An authority and what it signs, in a directory."""

    directory: Path
    authority: Authority

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.crt"

    def hub(self, name: str = "hub-1", *addresses: str) -> Client:
        key = make_key()
        signed = self.authority.certify_hub(key.public_key(), name, addresses or (ADDRESS,), _now())
        return self._write(name, render_certificate(signed) + render_key(key), signed.serial_number)

    def host(self, name: str, *, at: datetime | None = None) -> Client:
        """A host's; signed `at` another time."""
        key = make_key()
        signed = self.authority.certify_host(key.public_key(), name, at or _now())
        return self._write(name, render_certificate(signed) + render_key(key), signed.serial_number)

    def operator(
        self, name: str, role: Role = Role.OPERATOR, *, scope: str | None = None
    ) -> Client:
        key = make_key()
        signed = self.authority.certify_operator(key.public_key(), name, role, scope, _now())
        return self._write(name, render_certificate(signed) + render_key(key), signed.serial_number)

    def odd(self, *subject: tuple[str, str]) -> Client:
        """A certificate that `Authority` does not sign, but another program with the same CA might."""
        key, now = make_key(), _now()
        names = [x509.NameAttribute(_OIDS[kind], text) for kind, text in subject]
        signed = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(names))
            .issuer_name(self.authority.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .sign(self.authority.key, hashes.SHA256())
        )
        pem = render_certificate(signed) + render_key(key)
        return self._write("odd", pem, signed.serial_number)

    def _write(self, name: str, pem: bytes, serial: int) -> Client:
        path = self.directory / f"{name}.pem"
        path.write_bytes(pem)
        path.chmod(0o600)
        return Client(path, spell_serial(serial))


def make_certificates(directory: Path, name: str = "fleet") -> Certificates:
    """A new authority, whose files are in a directory that is made."""
    directory.mkdir(exist_ok=True)
    made = Certificates(directory, make_authority(name, expired_at()))
    made.ca_file.write_bytes(render_certificate(made.authority.certificate))
    return made


def expired_at() -> datetime:
    """When a host's certificate that has ended by now was signed."""
    return _now() - timedelta(days=40)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class Fronted:
    """HAProxy in front of two recorders."""

    port: int
    certificates: Certificates
    streams: Recorder
    api: Recorder
    spec: FrontSpec

    def forget(self) -> None:
        self.streams.forget()
        self.api.forget()

    def open(self, source: str = ADDRESS) -> socket.socket:
        """A connection without TLS yet, from an address of loopback."""
        return socket.create_connection(
            (ADDRESS, self.port), timeout=10 * patience(), source_address=(source, 0)
        )

    def connect(
        self, client: Client | None = None, *, context: ssl.SSLContext | None = None
    ) -> ssl.SSLSocket:
        """A verified connection, with the client's certificate if there is one."""
        context = context or client_context(self.certificates.ca_file, client)
        sock = self.open()
        try:
            return context.wrap_socket(sock, server_hostname=ADDRESS)
        except BaseException:
            sock.close()
            raise

    def send(self, data: bytes, client: Client | None = None) -> bytes:
        """What is answered to these bytes, until the front closes; an end of ours follows them."""
        with self.connect(client) as sock:
            sock.sendall(data)
            return read_to_end(sock)


def client_context(ca_file: Path, client: Client | None = None) -> ssl.SSLContext:
    """A client's side of TLS: whom it trusts, and its own certificate."""
    context = ssl.create_default_context(cafile=str(ca_file))
    if client is not None:
        context.load_cert_chain(client.pem)
    return context


def read_to_end(sock: ssl.SSLSocket) -> bytes:
    """Everything until the other side has ended; also where it ends without a farewell."""
    found = b""
    with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):
        while chunk := sock.recv(65_536):
            found += chunk
    return found


@contextmanager
def open_front(
    directory: Path,
    certificates: Certificates | None = None,
    *,
    maxconn: int = 2000,
    namespace: str | None = None,
) -> Iterator[Fronted]:
    """HAProxy with a hub's configuration, for the time of the context.

    Args:
        directory: Of its files.
        certificates: New ones where none are given.
        maxconn: The most connections.
        namespace: The network namespace that it is in, by IPv6 as well.
    """
    certificates = certificates or make_certificates(directory / "certificates")
    with socket.socket() as holder:
        holder.bind((ADDRESS, 0))
        port = holder.getsockname()[1]
    listen = [f"{ADDRESS}:{port}"]
    command = [*ends_with_us()]
    if namespace is not None:
        listen.append(f"[::]:{port}")
        command += ["nsenter", f"--net=/run/netns/{namespace}"]
    spec = FrontSpec(
        listen=listen,
        certificate=certificates.hub().pem,
        authority=certificates.ca_file,
        stream_socket=directory / "stream.sock",
        api_socket=directory / "api.sock",
        control=directory / "control.sock",
        maxconn=maxconn,
    )
    config = directory / "front.cfg"
    config.write_text(render_front(spec))
    command += ["haproxy", "-db", "-f", str(config)]
    with Recorder(path=spec.stream_socket) as streams, Recorder(path=spec.api_socket) as api:
        haproxy = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            until(
                lambda: (
                    _listens(port)
                    if namespace is None
                    else inside(namespace, partial(_listens, port))
                ),
                what="HAProxy's start",
            )
            yield Fronted(port, certificates, streams, api, spec)
        finally:
            haproxy.terminate()
            haproxy.wait(timeout=10 * patience())


def _listens(port: int) -> bool:
    try:
        socket.create_connection((ADDRESS, port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True
