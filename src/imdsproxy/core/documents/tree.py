"""What the dialects share: the tree of documents, how a path leads through it, ports, keys and vendor data.

A dialect is rows of documents (`Rows`), from which `make_directory` makes what one of its versions has.

An operator's vendor data that is a JSON object is OpenStack's `vendor_data.json` as it is; what cloud-init is to run
is its `cloud-init` member (a text, or a list of them). Anything else is text for cloud-init itself
(`#cloud-config`, a script, …). So the same is run in every dialect, once.
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

from imdsproxy.core.compiled import Blob, DocumentAddress, DocumentPort, DocumentRecord
from imdsproxy.core.model import free_name
from imdsproxy.core.wire import LONGEST_PATH

TEXT: Final = b"text/plain; charset=utf-8"
JSON: Final = b"application/json"
BINARY: Final = b"application/octet-stream"

JsonValue: TypeAlias = "str | int | bool | list[JsonValue] | dict[str, JsonValue] | None"

ANYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - a route's destination, not a bind
"""By `is_ipv6`."""

_DEEPEST: Final = 64
"""Slashes in a path; those that programs double, and dot segments, are among them."""

_UNLISTABLE: Final = re.compile(r"[=/\s\x00-\x1f\x7f]+")
_VENDOR_MEMBER: Final = "cloud-init"
_BROKEN_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Kind(Enum):
    """What every answer of a document has."""

    FIXED = "the same, as long as the record does not change"
    SEEDED = "a JSON object to which fresh `random_seed` is added"
    POSTED = "what the guest has posted there"


@dataclass(frozen=True, slots=True)
class Node:
    """A document, or a directory.

    Attributes:
        body: The bytes, or where they lie in the record's content. Of a directory the text that lists it, which may
            differ from its children's names: `public-keys` lists `0=name` for the child `0`.
        children: Of a directory, by the name that a path gives them.
    """

    body: bytes | Blob
    content_type: bytes = TEXT
    children: Mapping[str, Node] | None = None
    kind: Kind = Kind.FIXED


Content: TypeAlias = "Node | str | None"
"""A document, its text, or none; an empty text is none."""

Rows: TypeAlias = "tuple[tuple[str, str, Callable[[DocumentRecord, str], Content]], ...]"
"""The version that brought a document, its name, and what makes it for a record and a version."""


def encode_text(text: str) -> bytes:
    """UTF-8, with a question mark for half a surrogate pair, which has no form in it."""
    return text.encode("utf-8", "replace")


def listing(names: Iterable[str]) -> bytes:
    """Names as EC2 lists them: joined by LF, none after the last (clients take it for a name)."""
    return encode_text("\n".join(names))


def directory(children: Mapping[str, Content]) -> Node:
    """A directory that lists the children that there are in name order, directories among them with a slash."""
    present = _nodes(children)
    names = (
        f"{name}/" if child.children is not None else name
        for name, child in sorted(present.items())
    )
    return Node(listing(names), children=present)


def make_documents(rows: Rows, record: DocumentRecord, version: str) -> dict[str, Node]:
    """What the version has for the record; of two rows with one name the later one counts."""
    made = {name: make(record, version) for since, name, make in rows if since <= version}
    return _nodes(made)


def make_directory(rows: Rows, record: DocumentRecord, version: str) -> Node:
    """The same in a directory that lists plain names in the order of the rows, as EC2 and Nova do there."""
    children = make_documents(rows, record, version)
    return Node(listing(children), children=children)


def _nodes(contents: Mapping[str, Content]) -> dict[str, Node]:
    return {
        name: Node(encode_text(content)) if isinstance(content, str) else content
        for name, content in contents.items()
        if content
    }


def user_data(record: DocumentRecord, _version: str) -> Node | None:
    """The record's own, byte for byte."""
    return None if record["user_data"] is None else Node(record["user_data"], BINARY)


def json_document(value: JsonValue, kind: Kind = Kind.FIXED) -> Node:
    """A document in JSON."""
    return Node(json.dumps(value).encode("ascii"), JSON, kind=kind)


def parse_path(path: bytes) -> tuple[str, ...] | int:
    """A request's path as names, or the status of the answer to one that has none.

    400 for a percent sign that begins no escape (RFC 3986 §2.1), 404 for a path that leads out of its tree.
    Slashes collapse, also at the end, and escapes are undone. Dot segments are resolved (RFC 3986 §5.2.4)
    as far as the first name, which they never take away: it says whose tree this is, and rules are made for it.

    A path that is longer or deeper than any document's is 404 before that: who asks pays as little as it costs.
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
    """What lies at the end of the names below `root`; `None` when nothing does."""
    node: Node | None = root
    for name in names:
        node = None if node is None or node.children is None else node.children.get(name)
    return node


def is_ipv6(address: DocumentAddress) -> bool:
    """Of the two families."""
    return ":" in address["ip"]


def ports_with_mac(record: DocumentRecord) -> Iterator[tuple[int, DocumentPort, str]]:
    """The ports that have a MAC of their own, with their number and the MAC.

    Guests configure only these: cloud-init matches by the MAC, and gives up the whole data source on an OpenStack link
    that it cannot match.
    """
    seen: set[str] = set()
    for number, port in enumerate(record["ports"]):
        mac = port["mac"]
        if mac is not None and mac not in seen:
            seen.add(mac)
            yield number, port, mac


@lru_cache(1024)
def unique_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of ssh keys fit for a listing, each once and in the order given. Many instances have the same ones.

    Afterburn and cloudbase-init split `0=name` at every `=`, and a slash at the end makes a directory of it;
    of two keys with one name cloud-init keeps the last.
    """
    taken: dict[str, None] = {}
    for index, name in enumerate(names):
        clean = _UNLISTABLE.sub("-", name).strip("-") or f"key-{index}"
        taken[free_name(clean, taken)] = None
    return tuple(taken)


def named_keys(record: DocumentRecord) -> dict[str, str]:
    """The record's ssh keys, by the names that documents have for them."""
    names = unique_names(tuple(name for name, _ in record["ssh_keys"]))
    return dict(zip(names, (key.strip() for _, key in record["ssh_keys"]), strict=True))


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
