"""The fleet's certificate authority: certificates of hubs, hosts and operators.

The keys of these certificates are ECDSA on P-256. A certificate's subject has the role (OU), the name (CN), and the
project that an operator is limited to (O). Hubs also check a host's certificate against the serial numbers they keep.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from imdsproxy.errors import ConfigInvalid, RequestRefused
from imdsproxy.fleet.members import Role
from imdsproxy.host.certificates import (
    PrivateKey,
    fingerprint,
    is_issued_by,
    make_key,
    parse_certificate,
    parse_certificates,
    render_certificate,
)
from imdsproxy.model.entities import ID_PATTERN

HOST_LIFE: Final = timedelta(days=30)
HUB_LIFE: Final = timedelta(days=90)
OPERATOR_LIFE: Final = timedelta(days=365)
AUTHORITY_LIFE: Final = timedelta(days=3650)
MAX_REQUEST: Final = 8192
"""Maximum size of a certificate signing request in bytes; a request with a P-256 key has some 400."""

_SKEW: Final = timedelta(hours=1)
"""Lead of a certificate's validity, for hosts whose clocks are behind."""

_NAME: Final = re.compile(ID_PATTERN)
_DNS_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
_BOTH: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_CLIENT: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)

PublicKey: TypeAlias = ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class _Life:
    begin: datetime
    length: timedelta


@dataclass(frozen=True, slots=True)
class Authority:
    """CA with its certificate, its signing key, and the CA certificates that are trusted during a rotation."""

    certificate: x509.Certificate
    key: PrivateKey
    others: tuple[x509.Certificate, ...] = ()

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()})"

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate)

    @property
    def trusted(self) -> bytes:
        """Certificates of all trusted CAs in PEM, this CA's first."""
        return b"".join(map(render_certificate, (self.certificate, *self.others)))

    @property
    def trusted_digest(self) -> str:
        """Digest of `trusted`, which shows whether a host has the current CAs."""
        return hashlib.sha256(self.trusted).hexdigest()[:16]

    def has_signed(self, certificate: x509.Certificate) -> bool:
        """Return whether this CA, and not one of the others, issued a certificate."""
        return is_issued_by(certificate, self.certificate)

    def certify_hub(
        self, key: PublicKey, name: str, addresses: Sequence[str], now: datetime
    ) -> x509.Certificate:
        """Issue a hub's certificate, for a server at these DNS names and IP addresses and for a client of other hubs.

        Raises `RequestRefused` if the name or an address is invalid.
        """
        subject = _subject(Role.HUB, name)
        return self._sign(key, subject, _BOTH, _Life(now, HUB_LIFE), addresses)

    def certify_host(self, key: PublicKey, name: str, now: datetime) -> x509.Certificate:
        """Issue a host's certificate; raise `RequestRefused` for an invalid name."""
        return self._sign(key, _subject(Role.HOST, name), _CLIENT, _Life(now, HOST_LIFE))

    def certify_operator(
        self, key: PublicKey, name: str, role: Role, scope: str | None, now: datetime
    ) -> x509.Certificate:
        """Issue an operator's certificate, limited to project `scope`; raise `RequestRefused` for an invalid name."""
        return self._sign(key, _subject(role, name, scope), _CLIENT, _Life(now, OPERATOR_LIFE))

    def _sign(
        self,
        key: PublicKey,
        subject: x509.Name,
        uses: Sequence[x509.ObjectIdentifier],
        life: _Life,
        addresses: Sequence[str] = (),
    ) -> x509.Certificate:
        own = self.certificate
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(own.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            # Python's ssl and OpenSSL notice a CA that expires before its certificates only once it has expired.
            .not_valid_before(max(life.begin - _SKEW, own.not_valid_before_utc))
            .not_valid_after(min(life.begin + life.length, own.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(_authority_key_identifier(own), critical=False)
        )
        if addresses:
            names = x509.SubjectAlternativeName([_general_name(one) for one in addresses])
            # With an empty subject the extension must be critical (RFC 5280, 4.2.1.6).
            builder = builder.add_extension(names, critical=not list(subject))
        return builder.sign(self.key, hashes.SHA256())


def make_authority(name: str, now: datetime) -> Authority:
    key = make_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def parse_authority(certificate: bytes, key: bytes, where: str) -> Authority:
    """Parse a CA's certificate and key in PEM.

    Raises `ConfigInvalid` if they are invalid, do not match, may not sign certificates, or are not self-signed.
    """
    own, secret = parse_certificate(certificate, where), parse_key(key, where)
    if secret.public_key() != own.public_key():
        raise ConfigInvalid(f"the key does not belong to {where}")
    if not _may_sign(own):
        raise ConfigInvalid(
            f"{where} may not sign certificates",
            hint="a CA certificate has basicConstraints CA:TRUE and keyUsage keyCertSign",
        )
    if own.issuer != own.subject:
        raise ConfigInvalid(
            f"{where} is signed by another CA",
            hint="HAProxy trusts a chain from its root only: make a CA for the fleet alone, signed by itself",
        )
    return Authority(own, secret, tuple(parse_certificates(certificate, where)[1:]))


def parse_key(key: bytes, where: str) -> PrivateKey:
    """Parse the key of a CA with the certificate `where`; raise the errors of `parse_authority`."""
    try:
        secret = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The exception's cause may show parts of the key.
        raise ConfigInvalid(
            f"the key of {where} cannot be read",
            hint="the key must be in PEM and not encrypted: openssl pkey -in KEY",
        ) from None
    if not isinstance(secret, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ConfigInvalid(f"the key of {where} is neither ECDSA nor RSA")
    return secret


def _may_sign(own: x509.Certificate) -> bool:
    try:
        constraints = own.extensions.get_extension_for_class(x509.BasicConstraints).value
        # Python's ssl refuses a CA whose certificate has none.
        usage = own.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return constraints.ca and usage.key_cert_sign


def parse_request(pem: str) -> PublicKey:
    """Return the public key of a certificate signing request, whose signature proves that the sender has the key.

    The requested subject and extensions are ignored, since the hub knows the caller. Raises `RequestRefused` if the
    request is invalid, not signed by its own key, or its key is not on P-256.
    """
    hint = "use `imdsproxy fleet join`"
    if len(pem) > MAX_REQUEST:
        raise RequestRefused("the certificate signing request is too long", hint=hint)
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key, signed = request.public_key(), request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise RequestRefused(
            "the request is no certificate signing request in PEM", hint=hint
        ) from error
    if not signed:
        raise RequestRefused("the certificate signing request is not signed by its key", hint=hint)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestRefused("the key is not on the curve P-256", hint=hint)
    return key


def _subject(role: Role, name: str, scope: str | None = None) -> x509.Name:
    for word in (name, scope):
        if word is not None and _NAME.fullmatch(word) is None:
            raise RequestRefused(
                f"{word!r} is not a valid name for a certificate",
                hint="letters, digits, dots, dashes and underscores, at most 64",
            )
    parts = [(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value), (NameOID.COMMON_NAME, name)]
    if scope is not None:
        parts.insert(0, (NameOID.ORGANIZATION_NAME, scope))
    return x509.Name([x509.NameAttribute(oid, word) for oid, word in parts])


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(address))
    except ValueError:
        pass
    if _DNS_NAME.fullmatch(address) is None:
        raise RequestRefused(f"{address!r} is neither an IP address nor a DNS name")
    return x509.DNSName(address)


def _authority_key_identifier(own: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        found = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = own.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise ConfigInvalid("the CA's key is neither ECDSA nor RSA") from None
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
