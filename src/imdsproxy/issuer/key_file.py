"""File with the operator's own signing keys, in PEM. The first key signs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from imdsproxy.errors import SecretUnreadable
from imdsproxy.host.files import read_secret
from imdsproxy.issuer.keys import PrivateKey, can_sign, id_of

SETTING: Final = "identity.key_file"
_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_MAKE: Final = "openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048"


@dataclass(frozen=True, slots=True)
class GivenKey:
    """Key that the signer did not make.

    Attributes:
        certificate: Certificate of the key; `None` lets the signer make one.
    """

    private: PrivateKey
    certificate: x509.Certificate | None = None

    @property
    def id(self) -> str:
        return id_of(self.private)


def read_key_file(path: Path, owner: int | None) -> bytes:
    """Read the file; raise `SecretUnreadable` if an account but root and `owner` has it or can use it."""
    return read_secret(path, owner=owner, shared=False)


def parse_key_file(content: bytes, place: str) -> tuple[GivenKey, ...]:
    """Parse private keys and their certificates, in any order; the keys keep their order.

    Raises:
        SecretUnreadable: A key cannot be used, or the file holds no key.
    """
    blocks = [(one[1], one[0]) for one in _BLOCK.finditer(content)]
    certificates = [
        _parse_certificate(text, place) for label, text in blocks if label == b"CERTIFICATE"
    ]
    keys: dict[str, GivenKey] = {}
    for label, text in blocks:
        if not label.endswith(b"PRIVATE KEY"):
            continue
        private = _parse_private(text, place)
        public = private.public_key()
        own = next((one for one in certificates if one.public_key() == public), None)
        keys.setdefault(id_of(private), GivenKey(private, own))
    if not keys:
        raise SecretUnreadable(f"{place} holds no private key in PEM", hint=f"{_MAKE} makes one")
    return tuple(keys.values())


def _parse_private(text: bytes, place: str) -> PrivateKey:
    try:
        private = load_pem_private_key(text, None)
    except TypeError as error:
        raise SecretUnreadable(
            f"a key in {place} is encrypted with a password",
            hint="openssl pkey -in FILE -out FILE2 decrypts it; systemd-creds encrypts it for this host",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        # The library's message could quote the file.
        raise SecretUnreadable(
            f"{place} holds a key that cannot be read", hint=f"{_MAKE} makes one"
        ) from error
    if not can_sign(private):
        raise SecretUnreadable(
            f"{place} holds a key that signs neither RS256 nor ES256",
            hint=f"RSA of 2048 bits or more, or P-256: {_MAKE}",
        )
    return private


def _parse_certificate(text: bytes, place: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text)
    except ValueError as error:
        raise SecretUnreadable(
            f"{place} holds a certificate that cannot be read",
            hint="remove it: the signer makes one",
        ) from error
