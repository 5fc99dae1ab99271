"""From a request and a record to the answer: pure, whatever server carries it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, assert_never

from imdsproxy.core.compiled import Blob, DocumentRecord
from imdsproxy.core.documents.ec2 import (
    EC2_CATEGORIES,
    EC2_VERSIONS,
    LATEST,
    ec2_directory,
    ec2_generation,
)
from imdsproxy.core.documents.nocloud import NOCLOUD_ROOT, nocloud_directory
from imdsproxy.core.documents.openstack import (
    openstack_directory,
    openstack_listing,
    openstack_version,
)
from imdsproxy.core.documents.tree import (
    BINARY,
    JSON,
    TEXT,
    BadPath,
    Data,
    Directory,
    Leaf,
    Node,
    Password,
    Seeded,
    find_node,
    listing,
    parse_path,
)
from imdsproxy.core.model import Dialect

SEED_LENGTH: Final = 512
"""Bytes of `random_seed`, as Nova gives them."""

PASSWORD_LIMIT: Final = 1020
"""Bytes of a posted password, as Nova takes them (four pieces of 255)."""

Header: TypeAlias = tuple[bytes, bytes]

_OPENSTACK_ROOT: Final = "openstack"


@dataclass(frozen=True, slots=True)
class DocumentRequest:
    """What a guest asks. `path` is as it came, without the query (which no document looks at)."""

    method: str
    path: bytes
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class DocumentResponse:
    """The response.

    Attributes:
        headers: With lower-case names; Content-Length is among them, also for HEAD.
        body: The bytes, or where they lie in the record's content.
        cacheable: The same request gets the same answer as long as the record's revision is the same.
        new_password: What is to be kept, once and for all, as this instance's password before the answer
            is sent; who finds that there is one already answers 409 instead.
    """

    status: int
    headers: tuple[Header, ...]
    body: bytes | Blob
    cacheable: bool = False
    new_password: bytes | None = None


class DocumentTree:
    """The documents of one record; what is costly to make is made when first asked for, and kept."""

    __slots__ = ("_built", "_root", "record")

    def __init__(self, record: DocumentRecord) -> None:
        self.record = record
        self._built: dict[tuple[str, str], Directory] = {}
        self._root = _root(record)

    def find(self, names: tuple[str, ...]) -> Node | None:
        """What a path's names lead to; `None` when there is nothing."""
        if not names or self._root is None:
            return self._root
        first, rest = names[0], names[1:]
        if first == _OPENSTACK_ROOT:
            return self._find_openstack(rest)
        if first == NOCLOUD_ROOT:
            return self._find_below(Dialect.NOCLOUD, "", rest)
        version = ec2_generation(first)
        return None if version is None else self._find_below(Dialect.EC2, version, rest)

    def _find_openstack(self, names: tuple[str, ...]) -> Node | None:
        if Dialect.OPENSTACK not in self.record.dialects:
            return None
        if not names:
            return _OPENSTACK_LISTING
        version = openstack_version(names[0])
        return None if version is None else self._find_below(Dialect.OPENSTACK, version, names[1:])

    def _find_below(self, dialect: Dialect, version: str, names: tuple[str, ...]) -> Node | None:
        if dialect not in self.record.dialects:
            return None
        key = (dialect, version)
        top = self._built.get(key)
        if top is None:
            top = self._built[key] = _build(self.record, dialect, version)
        return find_node(top, names)


def _build(record: DocumentRecord, dialect: Dialect, version: str) -> Directory:
    match dialect:
        case Dialect.EC2:
            return ec2_directory(record, version)
        case Dialect.OPENSTACK:
            return openstack_directory(record, version)
        case Dialect.NOCLOUD:
            return nocloud_directory(record)
    assert_never(dialect)


_OPENSTACK_LISTING: Final = Leaf(openstack_listing())


def _root(record: DocumentRecord) -> Leaf | None:
    """What `/` says: EC2's versions, as EC2 and Nova have it; without EC2, the roots that there are."""
    if Dialect.EC2 in record.dialects:
        return Leaf(listing((*EC2_VERSIONS, LATEST)))
    names = []
    if Dialect.NOCLOUD in record.dialects:
        names.append(f"{NOCLOUD_ROOT}/")
    if Dialect.OPENSTACK in record.dialects:
        names.append(f"{_OPENSTACK_ROOT}/")
    return Leaf(listing(names)) if names else None


def respond(
    request: DocumentRequest,
    tree: DocumentTree,
    *,
    random_seed: Callable[[], bytes],
    password: Callable[[], bytes | None],
) -> DocumentResponse:
    """Answer one request of the guest that `tree` is of.

    A path that leads nowhere is 404 whatever the method (a token request among them, whose body clients use
    as a token if there is one): errors have no body. Nothing is ever redirected.

    Args:
        request: What the guest asks.
        tree: Its documents.
        random_seed: Gives `SEED_LENGTH` fresh bytes; called only where they are needed.
        password: Gives the instance's password as it is now; called only where it is needed.
    """
    names = parse_path(request.path)
    if isinstance(names, BadPath):
        return _error(400)
    node = None if names is None else tree.find(names)
    if node is None:
        return _error(404)
    if isinstance(node, Password) and request.method == "POST":
        return _post_password(request.body, password())
    if request.method not in {"GET", "HEAD"}:
        allowed = b"GET, HEAD, POST" if isinstance(node, Password) else b"GET, HEAD"
        return _error(405, (b"allow", allowed))
    response = _get(node, random_seed, password)
    if request.method == "HEAD":
        return DocumentResponse(response.status, response.headers, b"", response.cacheable)
    return response


def _get(
    node: Node, random_seed: Callable[[], bytes], password: Callable[[], bytes | None]
) -> DocumentResponse:
    match node:
        case Leaf(body, content_type):
            return _ok(body, content_type, cacheable=True)
        case Directory():
            return _ok(node.listing, TEXT, cacheable=True)
        case Seeded(before, after):
            body = b"".join((before, b64encode(random_seed()), after))
            return _ok(body, JSON, cacheable=False)
        case Data(blob):
            headers = _headers(BINARY, blob.length)
            return DocumentResponse(200, headers, blob, cacheable=True)
        case Password():
            return _ok(password() or b"", TEXT, cacheable=False)
    assert_never(node)


def _post_password(body: bytes, present: bytes | None) -> DocumentResponse:
    if present is not None:
        return _error(409)
    if len(body) > PASSWORD_LIMIT:
        return _error(400)
    return DocumentResponse(200, _headers(TEXT, 0), b"", new_password=body or None)


def _ok(body: bytes, content_type: bytes, *, cacheable: bool) -> DocumentResponse:
    return DocumentResponse(200, _headers(content_type, len(body)), body, cacheable)


def _headers(content_type: bytes, length: int) -> tuple[Header, ...]:
    return (b"content-type", content_type), (b"content-length", b"%d" % length)


def _error(status: int, *headers: Header) -> DocumentResponse:
    return DocumentResponse(status, (*headers, (b"content-length", b"0")), b"")


_Names: TypeAlias = "Mapping[str, _Names | None]"

_ANYTHING: Final = None
_NOTHING: Final[_Names] = {}
_OF_NOVA: Final = (
    "ancestor-ami-ids",
    "kernel-id",
    "product-codes",
    "public-hostname",
    "public-ipv4",
    "ramdisk-id",
)
"""`nova/api/metadata/base.py`, `get_ec2_metadata`: what ours have not."""

_TREE: Final[_Names] = {
    "latest": {
        "meta-data": dict.fromkeys((*EC2_CATEGORIES, *_OF_NOVA), _ANYTHING),
        "user-data": _NOTHING,
        "dynamic": {"instance-identity": _ANYTHING},
    },
    "openstack": {
        "content": _ANYTHING,
        "latest": dict.fromkeys(
            (
                "meta_data.json",
                "network_data.json",
                "password",
                "user_data",
                "vendor_data.json",
                "vendor_data2.json",
            ),
            _NOTHING,
        ),
    },
    "nocloud": dict.fromkeys(("meta-data", "network-config", "user-data", "vendor-data"), _NOTHING),
}


def can_be_served(path: str) -> bool:
    """Whether there can be a document at a plain path (`core.path_rules`), or beneath it."""
    names: _Names | None = _TREE
    for name in filter(None, path.split("/")):
        if names is _ANYTHING:
            return True
        if name not in names:
            return False
        names = names[name]
    return True
