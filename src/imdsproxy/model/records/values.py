"""Values of records: ids, addresses, MACs, device names, points in time, user data and vendor data."""

import base64
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from imdsproxy.errors import quoted
from imdsproxy.model import entities
from imdsproxy.model.records.schema import (
    CONTROL,
    MAX_PAYLOAD,
    MAX_TEXT,
    Field,
    Json,
    Key,
    Kind,
    Table,
)

ID_WANTED: Final = "1 to 64 of A-Z a-z 0-9 . _ - that begin with a letter or digit"
NAMESPACE_PATTERN: Final = "^[A-Za-z0-9_][A-Za-z0-9._@:+-]{0,127}$"
DEVICE_PATTERN: Final = "^[A-Za-z0-9_][A-Za-z0-9._@+=-]{0,14}$"
_OCTET: Final = "[0-9A-Fa-f]{2}"
MAC_PATTERN: Final = f"^{_OCTET}(?:(?::{_OCTET}){{5}}|(?:-{_OCTET}){{5}})$"
_MAC: Final = re.compile(MAC_PATTERN)
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_LONGEST_HOSTNAME: Final = 253
_LABELS: Final = rf"{_LABEL}(?:\.{_LABEL})*"
_HOSTNAME: Final = re.compile(rf"(?=.{{1,{_LONGEST_HOSTNAME}}}\Z){_LABELS}")
_NOT_IN_HOSTNAME: Final = re.compile(r"[^A-Za-z0-9._-]+")
_BROADCAST: Final = IPv4Address("255.255.255.255")


def choice_of(words: type[StrEnum]) -> Kind:
    listed = [word.value for word in words]
    schema: dict[str, Json] = {"type": "string", "enum": [*listed]}
    return Kind(lambda field: words(field.one_of(listed)), schema, lambda word: str(word.value))


def number_between(lowest: int, highest: int) -> Kind:
    schema: dict[str, Json] = {"type": "integer", "minimum": lowest, "maximum": highest}
    return Kind(lambda field: field.whole_number(lowest, highest), schema)


def _matching(pattern: str, wanted: str, *, shared: bool = False) -> Kind:
    """Return the kind of text that a pattern matches as a whole; if many records share it, they share one string."""
    compiled = re.compile(pattern)

    def parse(field: Field) -> str:
        text = field.matched(compiled, wanted)
        return sys.intern(text) if shared else text

    return Kind(parse, {"type": "string", "pattern": pattern})


SWITCH: Final = Kind(Field.boolean, {"type": "boolean"})


def one_line(longest: int) -> dict[str, Json]:
    return {
        "type": "string",
        "minLength": 1,
        "maxLength": longest,
        "pattern": f"^[^{CONTROL}]*$",
    }


def entries(names: str, value: Json) -> dict[str, Json]:
    """Return the JSON Schema of a mapping that `Field.mapping` accepts: values or null, by names of a pattern."""
    return {
        "type": "object",
        "patternProperties": {names: value},
        "additionalProperties": {"type": "null"},
    }


TEXT: Final = Kind(Field.text, one_line(MAX_TEXT))
INSTANCE_ID: Final = _matching(entities.ID_PATTERN, ID_WANTED)
NETWORK_ID: Final = _matching(entities.ID_PATTERN, ID_WANTED, shared=True)
HOST_ID: Final = NETWORK_ID
PROJECT_ID: Final = NETWORK_ID
"""Project id in Keystone's form: a header's value and a part of a map's value."""

NAMESPACE: Final = _matching(
    NAMESPACE_PATTERN, "a name in /run/netns: 1 to 128 of A-Z a-z 0-9 . _ @ : + -"
)
"""Name of a file in `/run/netns` that needs no quotes in HAProxy's configuration."""

DEVICE: Final = _matching(DEVICE_PATTERN, "a device's name: 1 to 15 of A-Z a-z 0-9 . _ @ + = -")
"""Name of a network device, at most 15 bytes (Linux IFNAMSIZ)."""


def parse_mac(field: Field) -> entities.MacAddress:
    """Parse a unicast MAC, in either spelling (`:` or `-`, any case)."""
    text = field.matched(_MAC, 'six hexadecimal octets: "52:54:00:12:34:56"')
    mac = text.lower().replace("-", ":")
    if int(mac[:2], 16) & 1:
        raise field.error(
            f"{mac} is a multicast address", "the first octet of a port's MAC is even"
        )
    if mac == "00:00:00:00:00:00":
        raise field.error("the all-zero MAC is no port's")
    return entities.MacAddress(mac)


def parse_address(field: Field) -> entities.IpAddress:
    """Parse a unicast IPv4 or IPv6 address without scope: a gateway, a name server."""
    text = field.any_text()
    try:
        address = ip_address(text)
    except ValueError:
        hint = "without the prefix length" if "/" in text else "10.0.0.5 or 2001:db8::5"
        raise field.error(f"{quoted(text)} is not an IP address", hint) from None
    for found, what, hint in _faults(address):
        if found:
            raise field.error(f"{quoted(text)} is {what}", hint)
    return address


def _faults(address: entities.IpAddress) -> Iterator[tuple[bool, str, str]]:
    """Yield whether the address has a fault that no host's address has, the fault, and the correction."""
    yield address.is_unspecified, "the unspecified address", ""
    yield address.is_loopback, "a loopback address", "no packet from it ever reaches a listener"
    yield address.is_multicast, "a multicast address", "no guest sends from it"
    if isinstance(address, IPv4Address):
        yield address == _BROADCAST or address.packed[0] == 0, "not a host's address", ""
        return
    mapped, number = address.ipv4_mapped, int(address)
    yield address.scope_id is not None, "scoped", f"write {IPv6Address(number)}"
    yield mapped is not None, "an IPv4-mapped address", f"write {mapped}"
    # HAProxy spells ::/96 with dots (inet_ntop) and Python with colons: the map would never match.
    yield number >> 32 == 0, "an IPv4-compatible address (RFC 4291 retired them)", ""


def parse_guest_address(field: Field) -> entities.IpAddress:
    address = parse_address(field)
    if address in (entities.METADATA_IPV4, entities.METADATA_IPV6):
        raise field.error(f"{address} is the metadata service's own address", "the guest's address")
    return address


def parse_cidr(field: Field) -> entities.IpNetwork:
    """Parse a range of addresses with its prefix length and no host bits."""
    text = field.any_text()
    first, _, prefix = text.partition("/")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        hint = "10.0.0.0/24 or 2001:db8::/64"
        raise field.error(f"{quoted(text)} is not a CIDR", hint) from None
    if not prefix.isdecimal():
        raise field.error(f"{quoted(text)} has no prefix length", f"for example {network}")
    if ip_address(first) != network.network_address:
        raise field.error(f"{quoted(text)} has host bits set", f"write {network}")
    if network.is_multicast or network.is_loopback:
        raise field.error(f"{network} is no range for hosts")
    return network


def hostname_of(name: str, otherwise: str) -> str:
    """Return the default host name of an instance: its name, with `-` for other characters."""
    words = _NOT_IN_HOSTNAME.sub("-", name)
    labels = (label.strip("-")[:63].strip("-") for label in words.split("."))
    hostname = ".".join(label for label in labels if label)
    return hostname if _HOSTNAME.fullmatch(hostname) else otherwise


LAST_SECOND: Final = 9_999_999_999
"""Ten digits of Unix time, the year 2286."""

# RFC 3339 §5.6; Python's own reader takes much more (weeks, no zone, no colons).
_MOMENT_PATTERN: Final = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,30})?"
    r"(?:[Zz]|[+-][0-9]{2}:[0-9]{2})$"
)
_MOMENT_TEXT: Final = re.compile(_MOMENT_PATTERN)
_MOMENT_WANTED: Final = 'Unix time, or a time with its zone: "2026-11-26T12:00:00Z"'


def unix_time_of(text: str) -> int | None:
    """Convert an RFC 3339 time from 1970 to 2286 to whole seconds of Unix time, rounded down; `None` for other text."""
    match = _MOMENT_TEXT.fullmatch(text)
    if match is None:
        return None
    whole = text.replace(match[1] or "", "")
    try:
        seconds = int(datetime.fromisoformat(whole.upper()).timestamp())
    except (ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds <= LAST_SECOND else None


def parse_moment(field: Field) -> int:
    """Parse a point in time as Unix time: a number, or text (`unix_time_of`)."""
    if not isinstance(field.value, str):
        return field.whole_number(0, LAST_SECOND)
    seconds = unix_time_of(field.value)
    if seconds is None:
        raise field.error("is no point in time", _MOMENT_WANTED)
    return seconds


_IP_ADDRESS: Final[dict[str, Json]] = {
    "type": "string",
    "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}],
}
MAC: Final = Kind(parse_mac, {"type": "string", "pattern": MAC_PATTERN})
ADDRESS: Final = Kind(parse_address, _IP_ADDRESS, str)
GUEST_ADDRESS: Final = Kind(parse_guest_address, _IP_ADDRESS, str)
CIDR: Final = Kind(parse_cidr, {"type": "string", "pattern": "^[0-9A-Fa-f.:]+/[0-9]{1,3}$"}, str)
HOSTNAME: Final = Kind(
    lambda field: field.matched(_HOSTNAME, "labels of letters, digits and -, joined by dots"),
    {"type": "string", "maxLength": _LONGEST_HOSTNAME, "pattern": f"^{_LABELS}$"},
)
"""Host name (RFC 1123, with underscores allowed), at most 253 characters."""

MOMENT: Final = Kind(
    parse_moment,
    {
        "anyOf": [
            {"type": "integer", "minimum": 0, "maximum": LAST_SECOND},
            {"type": "string", "pattern": _MOMENT_PATTERN},
        ]
    },
)

_DEEPEST: Final = 64
_LONGEST_PATH: Final = 4096


def _decode_base64(field: Field) -> bytes:
    if isinstance(field.value, str):
        with suppress(ValueError):
            return base64.b64decode(field.value, validate=True)
    raise field.error("is not base64 (RFC 4648 §4)", "A-Z a-z 0-9 + / and = at the end")


_BASE64: Final[Table[Any]] = Table(
    "Base64",
    lambda base64: base64,
    "Bytes that are no UTF-8 text.",
    Key(
        "base64",
        Kind(_decode_base64, {"type": "string", "pattern": "^[A-Za-z0-9+/]*={0,2}$"}),
        "The bytes in base64 (RFC 4648 §4), on one line.",
        required=True,
    ),
)


def _parse_user_data(field: Field) -> bytes | None:
    if isinstance(field.value, bytes | str):
        return _encode(field, field.value)
    if not isinstance(field.value, Mapping):
        raise field.error("expected text, bytes or {base64: …}", "put numbers in quotes")
    found = _BASE64.parse(field)
    return None if found is None else _encode(field, found)


def _parse_user_data_file(field: Field) -> bytes:
    field.text(longest=_LONGEST_PATH)
    if field.findings.read_file is None:
        raise field.error("files are not read here", "send the bytes as user_data")
    return _encode(field, field.findings.read_file(field))


def _parse_vendor_data(field: Field) -> bytes | None:
    value = field.value
    if isinstance(value, Mapping):
        known = len(field.findings.problems)
        _check_json(field)
        if len(field.findings.problems) > known:
            return None
        return _encode(field, json.dumps(value, ensure_ascii=False))
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            value = value.decode()
    if isinstance(value, str):
        return _encode(field, value)
    hint = "binary data and bare numbers do not go here"
    raise field.error("expected text or a mapping", hint)


def _encode(field: Field, payload: str | bytes) -> bytes:
    try:
        data = payload.encode() if isinstance(payload, str) else payload
    except UnicodeEncodeError:
        hint = "bytes go as !!binary or {base64: …}"
        raise field.error("holds half of a surrogate pair", hint) from None
    if len(data) > MAX_PAYLOAD:
        raise field.error(f"has {len(data)} bytes", f"at most {MAX_PAYLOAD} (16 MiB)")
    return data


def _check_json(field: Field, depth: int = 0) -> None:
    """Report values that JSON cannot hold (keys that are not text, bytes, NaN), and too deep nesting."""
    value = field.value
    check = partial(_check_json, depth=depth + 1)
    if depth > _DEEPEST:
        raise field.error("is nested too deep", f"at most {_DEEPEST} levels")
    if isinstance(value, Mapping):
        for entry in field.mapping().values():
            entry.read(check)
        for key in value:
            _encode(field, str(key))
    elif isinstance(value, list | tuple):
        for item in field.items():
            item.read(check)
    elif isinstance(value, str):
        _encode(field, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise field.error(f"JSON has no {value}", "put it in quotes")
    elif not isinstance(value, bool | int | float | None):
        raise field.error("JSON cannot carry bytes", "write text")


def render_payload(payload: bytes | entities.StoredBytes) -> Json:
    """Render user data as text, or `{"base64": …}` if it is not UTF-8; loads stored bytes."""
    raw = bytes(payload)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


USER_DATA: Final = Kind(_parse_user_data, {"type": "string"}, render_payload, (_BASE64,))
USER_DATA_FILE: Final = Kind(_parse_user_data_file, one_line(_LONGEST_PATH))
VENDOR_DATA: Final = Kind(
    _parse_vendor_data,
    {"anyOf": [{"type": "string"}, {"type": "object"}]},
    lambda payload: payload.decode(),
)
"""Text as UTF-8, a mapping as JSON."""
