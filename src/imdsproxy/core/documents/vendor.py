"""An operator's vendor data as each dialect wants it.

A JSON object is OpenStack's `vendor_data.json` as it is; what cloud-init is to run is its
`cloud-init` member (a text, or a list of them). Anything else is text for cloud-init itself
(`#cloud-config`, a script, …). So the same is run in every dialect, once.
"""

from __future__ import annotations

import json
from typing import cast

from imdsproxy.core.documents.network import JsonValue
from imdsproxy.core.documents.tree import encode_text

_MEMBER = "cloud-init"


def vendor_object(data: bytes | None) -> dict[str, JsonValue]:
    """What `vendor_data.json` says; an empty object when there is none, as Nova has it.

    Data that is not text (a compressed archive) has no form in JSON that cloud-init reads, and is
    left out.
    """
    if not data:
        return {}
    parsed = _parse_object(data)
    if parsed is not None:
        return parsed
    try:
        return {_MEMBER: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {}


def vendor_text(data: bytes | None) -> bytes:
    """What NoCloud's `vendor-data` says; empty when there is nothing to run."""
    if not data:
        return b""
    parsed = _parse_object(data)
    if parsed is None:
        return data
    wanted = parsed.get(_MEMBER)
    if isinstance(wanted, list):
        return b"#cloud-config-archive\n" + json.dumps(wanted).encode("ascii")
    return encode_text(wanted) if isinstance(wanted, str) else b""


def _parse_object(data: bytes) -> dict[str, JsonValue] | None:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, JsonValue]", parsed) if isinstance(parsed, dict) else None
