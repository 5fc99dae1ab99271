"""Common parts of the dialects: document tree, path lookup, ports, keys and vendor data.

A dialect is rows of documents (`Rows`). `make_directory` builds the documents of one of its versions from them.

If an operator's vendor data is a JSON object, OpenStack's `vendor_data.json` is that object, and cloud-init runs its
`cloud-init` member (a text, or a list of texts). All other vendor data is text for cloud-init (`#cloud-config`, a
script, …). So every dialect runs the same data, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final, TypeAlias, cast
from urllib.parse import unquote_to_bytes

from imdsproxy.documents.compiled import Blob, DocumentAddress, DocumentPort, DocumentRecord
from imdsproxy.model.entities import free_name
from imdsproxy.model.wire import LONGEST_PATH, TEXT

JSON: Final = b"application/json"
BINARY: Final = b"application/octet-stream"

JsonValue: TypeAlias = "str | int | bool | list[JsonValue] | dict[str, JsonValue] | None"

ANYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - a route's destination, not a bind
"""Default destinations, indexed by `is_ipv6`."""

_DEEPEST: Final = 64
"""Maximum number of slashes in a path, with those that clients double and dot segments."""

_UNLISTABLE: Final = re.compile(r"[=/\s\x00-\x1f\x7f]+")
_VENDOR_MEMBER: Final = "cloud-init"
_BROKEN_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Kind(Enum):
    """Property that all answers of a document share."""

    FIXED = "the same, as long as the record does not change"
    SEEDED = "a JSON object to which fresh `random_seed` is added"
    POSTED = "what the guest has posted there"


@dataclass(frozen=True, slots=True)
class Node:
    """Document or directory.

    Attributes:
        body: Bytes, or their place in the record's content. The body of a directory is its listing, which may differ
            from its children's names: `public-keys` lists `0=name` for the child `0`.
    """

    body: bytes | Blob
    content_type: bytes = TEXT
    children: Mapping[str, Node] | None = None
    kind: Kind = Kind.FIXED


Content: TypeAlias = "Node | str | None"
"""Document, its text, or nothing; an empty text is nothing."""

Rows: TypeAlias = "tuple[tuple[str, str, Callable[[DocumentRecord, str], Content]], ...]"
"""First version with the document, its name, and the function that builds it for a record and a version."""


def encode_text(text: str) -> bytes:
    """Encode text in UTF-8, with a question mark for a lone surrogate, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace")


def listing(names: Iterable[str]) -> bytes:
    """Join names as EC2 does: with LF, none after the last name (clients would take it for a name)."""
    return encode_text("\n".join(names))


def directory(children: Mapping[str, Content]) -> Node:
    """Return a directory that lists its existing children in name order, directories with a slash."""
    present = _nodes(children)
    names = (
        f"{name}/" if child.children is not None else name
        for name, child in sorted(present.items())
    )
    return Node(listing(names), children=present)


def make_documents(rows: Rows, record: DocumentRecord, version: str) -> dict[str, Node]:
    """Return the version's documents of the record; of two rows with one name, the later one counts."""
    made = {name: make(record, version) for since, name, make in rows if since <= version}
    return _nodes(made)


def make_directory(rows: Rows, record: DocumentRecord, version: str) -> Node:
    """Return the version's directory, which lists plain names in the order of the rows, as EC2 and Nova do."""
    children = make_documents(rows, record, version)
    return Node(listing(children), children=children)


def _nodes(contents: Mapping[str, Content]) -> dict[str, Node]:
    return {
        name: Node(encode_text(content)) if isinstance(content, str) else content
        for name, content in contents.items()
        if content
    }


def user_data(record: DocumentRecord, _version: str) -> Node | None:
    return None if record["user_data"] is None else Node(record["user_data"], BINARY)


def json_document(value: JsonValue, kind: Kind = Kind.FIXED) -> Node:
    return Node(json.dumps(value).encode("ascii"), JSON, kind=kind)


def parse_path(path: bytes) -> tuple[str, ...] | int:
    """Split a request's path into names, or return the status of an answer to an invalid path.

    400 for a percent sign that begins no escape (RFC 3986 §2.1), 404 for a path that leaves its tree. Repeated and
    trailing slashes collapse, and escapes are decoded. Dot segments are resolved (RFC 3986 §5.2.4) but never remove the
    first name: it selects the tree, to which rules apply.

    A path that is longer or deeper than any document's gets 404 before any of this, so that it costs little.
    """
    if len(path) > LONGEST_PATH or path.count(b"/") > _DEEPEST:
        return 404
    if b"%" not in path and b"/." not in path:
        return tuple(filter(None, path.decode("utf-8", "surrogateescape").split("/")))
    if _BROKEN_ESCAPE.search(path):
        return 400
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
            return 404
    return tuple(names)


def find_node(root: Node, names: Iterable[str]) -> Node | None:
    node: Node | None = root
    for name in names:
        node = None if node is None or node.children is None else node.children.get(name)
    return node


def is_ipv6(address: DocumentAddress) -> bool:
    return ":" in address["ip"]


def ports_with_mac(record: DocumentRecord) -> Iterator[tuple[int, DocumentPort, str]]:
    """Yield the ports that have a MAC of their own, with their number and the MAC.

    Guests configure only these ports: cloud-init matches by MAC, and drops the whole data source if it cannot match an
    OpenStack link.
    """
    seen: set[str] = set()
    for number, port in enumerate(record["ports"]):
        mac = port["mac"]
        if mac is not None and mac not in seen:
            seen.add(mac)
            yield number, port, mac


@lru_cache(1024)
def unique_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of ssh keys for a listing, each once and in the given order.

    Afterburn and cloudbase-init split `0=name` at every `=`, and a trailing slash makes a name a directory. If two keys
    have one name, cloud-init keeps the last. Cached, because many instances have the same names.
    """
    taken: dict[str, None] = {}
    for index, name in enumerate(names):
        clean = _UNLISTABLE.sub("-", name).strip("-") or f"key-{index}"
        taken[free_name(clean, taken)] = None
    return tuple(taken)


def named_keys(record: DocumentRecord) -> dict[str, str]:
    names = unique_names(tuple(name for name, _ in record["ssh_keys"]))
    return dict(zip(names, (key.strip() for _, key in record["ssh_keys"]), strict=True))


def vendor_object(data: bytes | None) -> dict[str, JsonValue]:
    """Return the content of `vendor_data.json`; an empty object if there is no vendor data, as in Nova.

    Data that is not text (a compressed archive) has no JSON form that cloud-init reads, and is omitted.
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
    """Return the content of NoCloud's `vendor-data`; empty if there is nothing to run."""
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
