"""Keys and certificates of a fleet's hosts and hubs, made and parsed by the cryptography library."""

from datetime import datetime
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from imdsproxy.errors import ConfigInvalid

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def make_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def render_key(key: PrivateKey) -> bytes:
    """Return a key as PEM (PKCS #8, not encrypted)."""
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, plain)


def render_request(key: PrivateKey) -> bytes:
    """Return a certificate signing request as PEM. It has no subject: the hub knows the requesting host."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def render_certificate(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def parse_certificate(pem: bytes, where: str) -> x509.Certificate:
    """Parse the first certificate of a PEM file; if there is none, raise `ConfigInvalid`, which names `where`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigInvalid(f"{where} holds no certificate in PEM") from error


def parse_certificates(pem: bytes, where: str) -> list[x509.Certificate]:
    """Parse all certificates of a PEM file; raises as `parse_certificate`."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigInvalid(f"{where} holds no certificate in PEM") from error


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate (DER), in lower-case hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def renewal_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Return whether a certificate's life is two thirds over, or has not begun: its maker's clock was ahead."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not begin <= now < begin + (end - begin) * 2 / 3
