"""Files of a fleet on a hub: `fleet init` creates them; a hub reads them and renews its own certificate."""

import os
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from imdsproxy.errors import (
    AlreadyExists,
    ConfigInvalid,
    ConfigUnreadable,
    RequestRefused,
)
from imdsproxy.fleet.members import Role
from imdsproxy.host.certificates import (
    make_key,
    parse_certificate,
    parse_certificates,
    render_certificate,
    render_key,
    renewal_due,
)
from imdsproxy.host.files import (
    ensure_directory,
    read_secret,
    write_atomic,
)
from imdsproxy.hub.pki.authority import Authority, make_authority, parse_authority, parse_key
from imdsproxy.hub.store.envelope import Envelope, add_key, make_envelope, parse_envelope

FIRST_OPERATOR: Final = "admin"

_SECRET: Final = 0o600
_OPEN: Final = 0o644


@dataclass(frozen=True, slots=True)
class FleetFiles:
    """Files in the directory of a fleet; all but `ca.crt` are secret."""

    directory: Path

    @property
    def ca_certificate(self) -> Path:
        """CA certificate, which every host and operator gets."""
        return self.directory / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.directory / "ca.key"

    @property
    def next_key(self) -> Path:
        """Key of the next CA during a rotation, until that CA signs."""
        return self.directory / "ca-next.key"

    @property
    def hub(self) -> Path:
        return self.directory / "hub.pem"

    @property
    def envelope_key(self) -> Path:
        """Keys that seal secrets in etcd, the same on all hubs."""
        return self.directory / "envelope.key"

    @property
    def operator(self) -> Path:
        """Key and certificate of the first operator, for commands on this hub."""
        return self.directory / "operator.pem"

    @property
    def of_hub(self) -> tuple[Path, ...]:
        return (self.ca_certificate, self.ca_key, self.next_key, self.envelope_key, self.hub)

    def read(self, path: Path) -> bytes:
        """Read a secret, which may belong to the owner of the directory; raise the errors of `read_secret`."""
        owner = self.directory.stat().st_uid if self.directory.exists() else None
        return read_secret(path, owner=owner)

    def write(self, path: Path, data: bytes, *, mode: int = _SECRET) -> None:
        """Write a file, by root for the owner of the directory, which may be the hub's account; raise `HostRefused`."""
        status = self.directory.stat()
        owner = (status.st_uid, status.st_gid) if os.geteuid() == 0 else None
        write_atomic(path, data, mode=mode, owner=owner, durable=True)

    def load_authority(self) -> Authority:
        """Load the CA; raise `ConfigUnreadable`, `ConfigInvalid`, or `SecretUnreadable` for the key."""
        certificate = _read(self.ca_certificate)
        return parse_authority(certificate, self.read(self.ca_key), str(self.ca_certificate))

    def load_envelope(self) -> Envelope:
        """Load the keys that seal; raise `SecretUnreadable` if unreadable, or readable by other accounts."""
        return parse_envelope(self.read(self.envelope_key), str(self.envelope_key))

    def load_hub(self) -> x509.Certificate:
        """Load this hub's certificate; raise `ConfigInvalid` or `SecretUnreadable`."""
        return parse_certificate(self.read(self.hub), str(self.hub))


def refuse_shared_authority(authority: Authority, etcd_ca: Path) -> None:
    """Refuse the fleet's CA as etcd's CA, as etcd would accept every host's certificate; raise `ConfigError`."""
    try:
        found = x509.load_pem_x509_certificates(_read(etcd_ca))
    except ValueError as error:
        raise ConfigInvalid(f"{etcd_ca} has no certificate in PEM") from error
    own = [one.public_key() for one in (authority.certificate, *authority.others)]
    if any(one.public_key() in own for one in found):
        raise ConfigInvalid(
            f"{etcd_ca} is the fleet's own CA: etcd would let every host in",
            hint="hub.etcd.ca_file: give etcd a CA of its own, which signs members and hubs only",
        )


@dataclass(frozen=True, slots=True)
class HubNames:
    """Id of a hub, and the DNS names and IP addresses at which others reach the hub."""

    name: str
    addresses: tuple[str, ...]


def read_hub_names(certificate: x509.Certificate) -> HubNames:
    (name,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = found.get_values_for_type(x509.DNSName)
    addresses = map(str, found.get_values_for_type(x509.IPAddress))
    return HubNames(str(name.value), (*dns, *addresses))


def make_hub_pem(authority: Authority, names: HubNames, now: datetime) -> bytes:
    """Create a hub's key and certificate; raise `RequestRefused` for an invalid or missing name."""
    if not names.addresses:
        raise RequestRefused("a hub needs an address", hint="--address hub1.example.net")
    key = make_key()
    signed = authority.certify_hub(key.public_key(), names.name, names.addresses, now)
    return render_certificate(signed) + render_key(key)


def make_renewed_hub(files: FleetFiles, authority: Authority, now: datetime) -> bytes | None:
    """Create this hub's next certificate with its key, if two thirds of its life are over or another CA signed it.

    It is for `Front.replace_certificate`, then `write_hub`. Raises the errors of `FleetFiles.load_hub`.
    """
    certificate = files.load_hub()
    if not renewal_due(certificate, now) and authority.has_signed(certificate):
        return None
    return make_hub_pem(authority, read_hub_names(certificate), now)


def write_hub(files: FleetFiles, pem: bytes) -> None:
    files.write(files.hub, pem, mode=_SECRET)


def init_fleet(files: FleetFiles, given: Authority | None, hub: HubNames, now: datetime) -> str:
    """Create a fleet: a CA unless given, certificates of the first hub and operator, and the key that seals.

    Returns the fingerprint of the CA certificate. Raises `AlreadyExists`, `HostRefused`, or `RequestRefused` for a
    name.
    """
    there = [
        one
        for one in (
            *(files.ca_certificate, files.ca_key, files.hub),
            *(files.envelope_key, files.operator),
        )
        if one.exists()
    ]
    if there:
        raise AlreadyExists(
            f"{there[0]} exists already",
            hint="a fleet is created once; --directory names another directory",
        )
    authority = given or make_authority("imdsproxy fleet", now)
    # The file of a given CA may have further certificates, which the fleet does not trust.
    authority = replace(authority, others=())
    pem = make_hub_pem(authority, hub, now)
    operator = make_operator_pem(authority, FIRST_OPERATOR, Role.OPERATOR, None, now)
    _write_hub(files, authority, make_envelope(), pem)
    write_atomic(files.operator, operator, mode=_SECRET, durable=True)
    return authority.fingerprint


def add_hub(files: FleetFiles, output: Path, hub: HubNames, now: datetime) -> None:
    """Write the files of a further hub to a new directory: this hub's shared files, and a certificate of its own.

    Raises `AlreadyExists`, and the errors of `FleetFiles.load_authority`, `make_hub_pem` and `write_atomic`.
    """
    if output.exists():
        raise AlreadyExists(f"{output} exists already", hint="--output names another directory")
    authority, envelope = files.load_authority(), files.read(files.envelope_key)
    parse_envelope(envelope, str(files.envelope_key))
    pem = make_hub_pem(authority, hub, now)
    _write_hub(FleetFiles(output), authority, envelope + b"\n", pem)


def add_envelope_key(files: FleetFiles) -> str:
    """Add a key to the file of the keys that seal; return its name. Raises `HostRefused` or `SecretUnreadable`."""
    text, name = add_key(files.read(files.envelope_key), str(files.envelope_key))
    files.write(files.envelope_key, text, mode=_SECRET)
    return name


def make_operator_pem(
    authority: Authority, name: str, role: Role, scope: str | None, now: datetime
) -> bytes:
    """Create an operator's file: key, certificate, and at the end the CA certificates; raise `RequestRefused`."""
    key = make_key()
    signed = authority.certify_operator(key.public_key(), name, role, scope, now)
    return render_key(key) + render_certificate(signed) + authority.trusted


def write_secret(path: Path, pem: bytes) -> None:
    """Write a new file that only this account can read; raise `AlreadyExists` or `HostRefused`."""
    if path.exists():
        raise AlreadyExists(f"{path} exists already", hint="--output names another file")
    write_atomic(path, pem, mode=_SECRET, durable=True)


def _write_hub(files: FleetFiles, authority: Authority, envelope: bytes, pem: bytes) -> None:
    ensure_directory(files.directory, mode=0o700)
    # The CA certificate is written last, as it completes the fleet.
    files.write(files.ca_key, render_key(authority.key), mode=_SECRET)
    files.write(files.envelope_key, envelope, mode=_SECRET)
    files.write(files.hub, pem, mode=_SECRET)
    files.write(files.ca_certificate, authority.trusted, mode=_OPEN)


def begin_rotation(files: FleetFiles, now: datetime) -> None:
    """Create the next CA, which is trusted in addition to the signing CA.

    Raises `RequestRefused` while a rotation is under way, and the errors of `FleetFiles.load_authority` and
    `write_atomic`.
    """
    present = files.load_authority()
    if present.others or files.next_key.exists():
        raise RequestRefused(
            f"{files.ca_certificate} is being replaced already",
            hint="`imdsproxy fleet rotate-ca switch`, or `finish`",
        )
    made = make_authority(f"imdsproxy fleet {now:%Y-%m-%d}", now)
    files.write(files.next_key, render_key(made.key), mode=_SECRET)
    both = replace(present, others=(made.certificate,))
    files.write(files.ca_certificate, both.trusted, mode=_OPEN)


def switch_rotation(files: FleetFiles, now: datetime) -> None:
    """Make the next CA sign, keep the old CA trusted, and reissue the first operator's certificate.

    An interrupted switch can be repeated. Raises the errors of `begin_rotation`, here if there is no next CA.
    """
    if not files.next_key.exists():
        raise RequestRefused(
            "there is no next CA",
            hint="`imdsproxy fleet rotate-ca begin` creates a CA",
        )
    key, known = files.read(files.next_key), _read(files.ca_certificate)
    old, new = parse_certificates(known, str(files.ca_certificate))
    if parse_key(key, files.next_key.name).public_key() == old.public_key():
        old, new = new, old  # an earlier switch was interrupted
    authority = replace(
        parse_authority(render_certificate(new), key, str(files.ca_certificate)), others=(old,)
    )
    files.write(files.ca_certificate, authority.trusted, mode=_OPEN)
    files.write(files.ca_key, render_key(authority.key), mode=_SECRET)
    if files.operator.exists():
        pem = make_operator_pem(authority, FIRST_OPERATOR, Role.OPERATOR, None, now)
        write_atomic(files.operator, pem, mode=_SECRET, durable=True)
    files.next_key.unlink()


def finish_rotation(files: FleetFiles) -> None:
    """Trust only the signing CA; raise the errors of `begin_rotation`, and `RequestRefused` before a switch."""
    present = files.load_authority()
    if files.next_key.exists() or not present.others:
        raise RequestRefused(
            "no rotation of the CA is under way",
            hint="`imdsproxy fleet rotate-ca begin`, then `switch`",
        )
    alone = replace(present, others=())
    files.write(files.ca_certificate, alone.trusted, mode=_OPEN)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigUnreadable(
            f"cannot read {path}: {error.strerror}",
            hint="`imdsproxy fleet init` creates the file; --directory names another directory",
        ) from error
