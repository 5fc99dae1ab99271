"""Nova's proof that a request comes from a metadata proxy (nova/api/metadata/handler.py)."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

from imdsproxy.core.model import InstanceId

__all__ = ["UnlikelySecret", "parse_secret", "sign_instance"]

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_OPTION: Final = re.compile(rb"metadata_proxy_shared_secret\s*=")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class UnlikelySecret(ValueError):
    """It cannot be what stands in Nova's configuration; says why, without a word of it."""


def parse_secret(data: bytes) -> bytes:
    """The secret in a file's bytes: the value of Nova's option, which oslo.config frees from blanks around it.

    Raises:
        UnlikelySecret: No value of that option looks so. Nova would refuse whatever is signed with it.
    """
    if data.startswith(_BYTE_ORDER_MARK):
        raise UnlikelySecret("begins with a byte order mark")
    secret = data.strip()
    if b"\n" in secret or b"\r" in secret:
        raise UnlikelySecret("has more than one line")
    if _CONTROL.search(secret):
        raise UnlikelySecret("holds a control character")
    if _OPTION.match(secret):
        raise UnlikelySecret("holds Nova's whole option, and has to hold only the secret")
    return secret


def sign_instance(secret: bytes, instance: InstanceId) -> str:
    """`X-Instance-ID-Signature`: HMAC-SHA256 of the instance's id, 64 lower-case hexadecimal digits.

    Args:
        secret: Nova's `[neutron] metadata_proxy_shared_secret`.
        instance: The id that is signed, as it stands in `X-Instance-ID`.

    Raises:
        ValueError: The secret is empty: anybody could sign with it.
    """
    if not secret:
        raise ValueError("an empty secret signs nothing")
    return hmac.new(secret, instance.encode(), hashlib.sha256).hexdigest()
