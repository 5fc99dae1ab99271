"""Signing keys of the issuer: made, read and written as PEM, and described as JSON Web Keys.

A key's file holds the private key and a self-signed certificate. The certificate is for the member `x5c` of the key's
JWK (RFC 7517 section 4.7): Ceph's RGW up to 19 takes no key without it.
"""

import hashlib
import json
from base64 import b64encode, urlsafe_b64encode
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, TypeAlias, TypeGuard

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from imdsproxy.errors import SecretUnreadable

Algorithm: TypeAlias = Literal["RS256", "ES256"]
PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
Jwk: TypeAlias = dict[str, Any]

_RSA_BITS: Final = 2048
_LIFETIME: Final = timedelta(days=3650)
"""Validity of the certificate; verifiers of tokens do not look at it."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """Private key with its certificate.

    Attributes:
        id: Thumbprint of the public key (RFC 7638), the member `kid`.
    """

    private: PrivateKey
    certificate: x509.Certificate

    @property
    def algorithm(self) -> Algorithm:
        return "RS256" if isinstance(self.private, rsa.RSAPrivateKey) else "ES256"

    @property
    def id(self) -> str:
        return id_of(self.private)

    def jwk(self) -> Jwk:
        """Return the public key as a JWK (RFC 7517)."""
        der = self.certificate.public_bytes(Encoding.DER)
        return _public_members(self.private) | {
            "kid": self.id,
            "alg": self.algorithm,
            "use": "sig",
            "x5c": [b64encode(der).decode()],
        }

    def render(self) -> bytes:
        """Render the key's file: PEM, the private key in PKCS#8 first, then the certificate."""
        key = self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key + self.certificate.public_bytes(Encoding.PEM)


def make_key(algorithm: Algorithm, issuer: str, now: datetime) -> SigningKey:
    private: PrivateKey
    if algorithm == "RS256":
        private = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    else:
        private = ec.generate_private_key(ec.SECP256R1())
    return SigningKey(private, make_certificate(private, issuer, now))


def make_certificate(private: PrivateKey, issuer: str, now: datetime) -> x509.Certificate:
    """Make a key's certificate, signed by the key itself."""
    # A common name has 64 characters at most.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer.rpartition("/")[2][:64])])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _LIFETIME)
        .sign(private, hashes.SHA256())
    )


def parse_key(content: bytes, place: str) -> SigningKey:
    """Parse the result of `SigningKey.render`; raise `SecretUnreadable` if the file holds something else."""
    try:
        private = load_pem_private_key(content, None)
        certificate = x509.load_pem_x509_certificate(content)
    except (ValueError, TypeError) as error:
        raise SecretUnreadable(
            f"{place} holds no signing key with its certificate: {error}",
            hint="restore the file from a backup, or remove it: a new key is made",
        ) from error
    if not can_sign(private) or certificate.public_key() != private.public_key():
        raise SecretUnreadable(f"{place} holds no RSA-2048 or P-256 key with its own certificate")
    return SigningKey(private, certificate)


def can_sign(private: object) -> TypeGuard[PrivateKey]:
    """Return whether tokens can be signed with a key: RSA of 2048 bits or more, or P-256."""
    if isinstance(private, rsa.RSAPrivateKey):
        return private.key_size >= _RSA_BITS
    return isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(
        private.curve, ec.SECP256R1
    )


def id_of(private: PrivateKey) -> str:
    """Return a key's id: the thumbprint of its public key."""
    return thumbprint_of(_public_members(private))


def thumbprint_of(members: Jwk) -> str:
    """Return the thumbprint of a public key's required members (RFC 7638 section 3)."""
    text = json.dumps(members, separators=(",", ":"), sort_keys=True)
    return _base64(hashlib.sha256(text.encode()).digest())


def _public_members(private: PrivateKey) -> Jwk:
    if isinstance(private, rsa.RSAPrivateKey):
        numbers = private.public_key().public_numbers()
        return {"kty": "RSA", "n": _base64_of(numbers.n), "e": _base64_of(numbers.e)}
    point = private.public_key().public_numbers()
    return {
        "kty": "EC",
        "crv": "P-256",
        "x": _base64(point.x.to_bytes(32)),
        "y": _base64(point.y.to_bytes(32)),
    }


def _base64_of(number: int) -> str:
    return _base64(number.to_bytes((number.bit_length() + 7) // 8))


def _base64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
