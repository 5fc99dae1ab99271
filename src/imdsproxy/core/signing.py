"""Nova's proof that a request comes from a metadata proxy (nova/api/metadata/handler.py)."""

from __future__ import annotations

import hashlib
import hmac

from imdsproxy.core.model import InstanceId

__all__ = ["sign_instance"]


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
