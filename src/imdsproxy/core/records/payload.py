"""The large values of records: user data and vendor data."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.records.fields import MAX_PAYLOAD, Field, Unreadable
from imdsproxy.core.records.schema import Json, Key, Kind, Table

_DEEPEST: Final = 64


def _parse_user_data(field: Field) -> bytes | None:
    return _bounded(field, _decode(field))


def _parse_user_data_file(field: Field) -> bytes | None:
    return _bounded(field, _read(field))


def _parse_vendor_data(field: Field) -> bytes | None:
    value = field.value
    if isinstance(value, Mapping):
        clean = _check_json(field, 0)
        return _bounded(field, json.dumps(value, ensure_ascii=False).encode()) if clean else None
    if isinstance(value, str):
        return _bounded(field, _encode(field, value))
    if isinstance(value, bytes) and _is_utf8(value):
        return _bounded(field, value)
    field.refuse("expected text or a mapping", "binary data and bare numbers do not go here")
    return None


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _bounded(field: Field, payload: bytes | None) -> bytes | None:
    if payload is not None and len(payload) > MAX_PAYLOAD:
        field.refuse(f"has {len(payload)} bytes", f"at most {MAX_PAYLOAD} (16 MiB)")
        return None
    return payload


def _read(field: Field) -> bytes | None:
    name = field.text(longest=4096)
    if name is None:
        return None
    read_file = field.findings.read_file
    if read_file is None:
        field.refuse("files are not read here", "send the bytes as user_data")
        return None
    found = read_file(name)
    if isinstance(found, Unreadable):
        field.refuse(found.reason, found.hint)
        return None
    return found


def _decode(field: Field) -> bytes | None:
    value = field.value
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return _encode(field, value)
    if not isinstance(value, Mapping):
        field.refuse("expected text, bytes or {base64: …}", "put numbers in quotes")
        return None
    entries = field.mapping(("base64",), required=("base64",))
    encoded = None if entries is None else entries.get("base64")
    return None if encoded is None else _decode_base64(encoded)


def _decode_base64(field: Field) -> bytes | None:
    if isinstance(field.value, str):
        try:
            return base64.b64decode(field.value, validate=True)
        except (binascii.Error, ValueError):
            pass  # refused below, with everything else that is no base64
    field.refuse("is not base64 (RFC 4648 §4)", "A-Z a-z 0-9 + / and = at the end")
    return None


def _encode(field: Field, text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:
        field.refuse("holds half of a surrogate pair", "bytes go as !!binary or {base64: …}")
        return None


def _check_json(field: Field, depth: int) -> bool:
    """Whether JSON can carry the value: text keys, no bytes, no NaN, nothing too deep."""
    value = field.value
    if depth > _DEEPEST:
        field.refuse("is nested too deep", f"at most {_DEEPEST} levels")
        return False
    if isinstance(value, Mapping):
        entries = field.mapping() or {}
        clean = [_encode(field, key) is not None for key in value if isinstance(key, str)]
        clean += [_check_json(entry, depth + 1) for entry in entries.values()]
        return all(clean) and all(isinstance(key, str) for key in value)
    if isinstance(value, list | tuple):
        return all(tuple(_check_json(item, depth + 1) for item in field.items()))
    return _check_json_scalar(field)


def _check_json_scalar(field: Field) -> bool:
    value = field.value
    if isinstance(value, str):
        return _encode(field, value) is not None
    if isinstance(value, float) and not math.isfinite(value):
        field.refuse(f"JSON has no {value}", "put it in quotes")
        return False
    if isinstance(value, bool | int | float | None):
        return True
    field.refuse("JSON cannot carry bytes", "write text")
    return False


def _render_user_data(payload: object) -> Json:
    # May be `StoredBytes`, which are fetched now.
    raw = bytes(payload)  # type: ignore[call-overload] # as above
    try:
        return str(raw.decode())
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


@dataclass(frozen=True, slots=True)
class _Base64:
    base64: str


_BASE64: Final = Table(
    "Base64",
    _Base64,
    "Bytes that are no UTF-8 text.",
    Key("base64", Kind(_decode_base64, {"type": "string"}), required=True),
)
USER_DATA: Final = Kind(_parse_user_data, {"type": "string"}, _render_user_data, (_BASE64,))
USER_DATA_FILE: Final = Kind(_parse_user_data_file, {"type": "string"})
VENDOR_DATA: Final = Kind(
    _parse_vendor_data,
    {"anyOf": [{"type": "string"}, {"type": "object"}]},
    lambda payload: payload.decode(),
)
"""Text as UTF-8, a mapping as JSON."""
