"""Secrets as they are in etcd: sealed with a key that only hubs have (AES-256-GCM).

A sealed value is bound to its key in etcd: in another place it does not open. It names the key that opens it, so that
keys can be replaced one after the other.
"""

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from imdsproxy.errors import SecretUnreadable, SourceCorrupt

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_LINE: Final = re.compile(r"([a-z0-9-]{1,32}) ([A-Za-z0-9+/]{43}=)")


@dataclass(frozen=True, slots=True)
class Envelope:
    """The keys, by their names; the first one seals."""

    keys: Mapping[str, bytes]

    def __repr__(self) -> str:
        return f"Envelope({', '.join(self.keys)})"

    def seal(self, place: str, secret: bytes) -> bytes:
        """A secret as it may be written to the key `place` of etcd."""
        name = next(iter(self.keys))
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self.keys[name]).encrypt(nonce, secret, place.encode())
        return name.encode() + b"\0" + nonce + sealed

    def open(self, place: str, sealed: bytes) -> bytes:
        """The reverse of `seal`.

        Raises:
            SourceCorrupt: No key opens it here: it was changed, moved from another place, or sealed by another fleet.
        """
        name, _, rest = sealed.partition(b"\0")
        key = self.keys.get(name.decode("latin-1"))
        if key is None:
            raise SourceCorrupt(
                f"{place} is sealed with a key that this hub does not have",
                hint="copy envelope.key from a hub that has it",
            )
        try:
            return AESGCM(key).decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], place.encode())
        except (InvalidTag, ValueError) as error:
            raise SourceCorrupt(f"{place} does not open: another program has changed it") from error


def make_envelope(name: str = "1") -> bytes:
    """The text of a file with one new key."""
    key = base64.b64encode(os.urandom(_KEY_BYTES)).decode()
    return f"{name} {key}\n".encode()


def parse_envelope(text: bytes, where: str) -> Envelope:
    """Keys out of a file: a line each, `NAME BASE64`.

    Raises:
        SecretUnreadable: A line is none; `where` names the file. The message has nothing of its content.
    """
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.decode("latin-1").splitlines(), 1):
        found = _LINE.fullmatch(line)
        if found is None or found[1] in keys:
            raise SecretUnreadable(
                f"line {number} of {where} is no key",
                hint="each line is a name of its own and 32 bytes in base64",
            )
        keys[found[1]] = base64.b64decode(found[2])
    if not keys:
        raise SecretUnreadable(f"{where} has no key", hint="imdsproxy fleet init makes one")
    return Envelope(keys)
