"""What the dialects share: the tree that their documents hang in, how a path leads through it, and vendor data.

An operator's vendor data that is a JSON object is OpenStack's `vendor_data.json` as it is; what cloud-init is to run
is its `cloud-init` member (a text, or a list of them). Anything else is text for cloud-init itself
(`#cloud-config`, a script, …). So the same is run in every dialect, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, cast
from urllib.parse import unquote_to_bytes

from imdsproxy.core.compiled import Blob

TEXT: Final = b"text/plain; charset=utf-8"
JSON: Final = b"application/json"
BINARY: Final = b"application/octet-stream"

JsonValue: TypeAlias = "str | int | bool | list[JsonValue] | dict[str, JsonValue] | None"

_VENDOR_MEMBER: Final = "cloud-init"
_BROKEN_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A document whose bytes are known."""

    body: bytes
    content_type: bytes = TEXT


@dataclass(frozen=True, slots=True)
class Data:
    """A document that is a piece of the record's content, sent as it is."""

    blob: Blob


@dataclass(frozen=True, slots=True)
class Seeded:
    """A JSON document that has fresh base64 between `before` and `after` in every answer."""

    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Password:
    """The place where a guest leaves its encrypted password and reads it again."""


@dataclass(frozen=True, slots=True)
class Directory:
    """Children by the name a path gives them, and the text that lists them.

    The two differ: `public-keys` lists `0=name` for the child `0`.
    """

    children: Mapping[str, Node]
    listing: bytes


Node: TypeAlias = Directory | Leaf | Data | Seeded | Password


@dataclass(frozen=True, slots=True)
class BadPath:
    """A path with a percent sign that begins no escape (RFC 3986 §2.1)."""


def encode_text(text: str) -> bytes:
    """UTF-8, with a question mark for half a surrogate pair, which has no form in it."""
    return text.encode("utf-8", "replace")


def listing(names: Iterable[str]) -> bytes:
    """Names as EC2 lists them: joined by LF, none after the last (clients take it for a name)."""
    return encode_text("\n".join(names))


def directory(children: Mapping[str, Node]) -> Directory:
    """A directory that lists its children in name order, directories among them with a slash."""
    return Directory(
        children,
        listing(
            f"{name}/" if isinstance(child, Directory) else name
            for name, child in sorted(children.items())
        ),
    )


def parse_path(path: bytes) -> tuple[str, ...] | BadPath | None:
    """A request's path as names; `None` when it leads nowhere.

    Slashes collapse, also at the end, and escapes are undone. Dot segments are resolved (RFC 3986 §5.2.4)
    as far as the first name, which they never take away: it says whose tree this is, and rules are made for it.
    """
    if b"%" not in path and b"/." not in path:
        return tuple(filter(None, path.decode("utf-8", "surrogateescape").split("/")))
    if _BROKEN_ESCAPE.search(path):
        return BadPath()
    names: list[str] = []
    for raw in path.split(b"/"):
        name = unquote_to_bytes(raw).decode("utf-8", "surrogateescape")
        if name in {"", "."}:
            continue
        if name != "..":
            names.append(name)
        elif len(names) > 1:
            names.pop()
        else:
            return None
    return tuple(names)


def find_node(root: Node, names: Iterable[str]) -> Node | None:
    """What lies at the end of the names below `root`; `None` when nothing does."""
    node: Node | None = root
    for name in names:
        if not isinstance(node, Directory):
            return None
        node = node.children.get(name)
    return node


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
        return {_VENDOR_MEMBER: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {}


def vendor_text(data: bytes | None) -> bytes:
    """What NoCloud's `vendor-data` says; empty when there is nothing to run."""
    if not data:
        return b""
    parsed = _parse_object(data)
    if parsed is None:
        return data
    wanted = parsed.get(_VENDOR_MEMBER)
    if isinstance(wanted, list):
        return b"#cloud-config-archive\n" + json.dumps(wanted).encode("ascii")
    return encode_text(wanted) if isinstance(wanted, str) else b""


def _parse_object(data: bytes) -> dict[str, JsonValue] | None:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, JsonValue]", parsed) if isinstance(parsed, dict) else None
