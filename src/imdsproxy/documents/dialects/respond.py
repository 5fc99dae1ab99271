"""Answer to a request for a record's documents. Pure: independent of the HTTP server."""

from base64 import b64encode
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

from imdsproxy.documents.compiled import Blob, DocumentRecord
from imdsproxy.documents.dialects import ec2, nocloud, openstack, tree
from imdsproxy.model.entities import Dialect
from imdsproxy.model.wire import RETRY_AFTER_S, TEXT

SEED_LENGTH: Final = 512
"""Bytes of `random_seed`, as in Nova."""

PASSWORD_LIMIT: Final = 1020
"""Maximum bytes of a posted password, as in Nova (four pieces of 255)."""

Header: TypeAlias = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to a request.

    Attributes:
        headers: Headers with lower-case names, Content-Length included, also for HEAD.
        body: Bytes, or their place in the record's content.
        cacheable: Whether the same request gets the same answer while the record's revision is the same.
        new_password: Password to store for this instance, once and for all, before the server sends the answer. If the
            instance already has one, the server answers 409 instead.
    """

    status: int
    headers: tuple[Header, ...]
    body: bytes | Blob = b""
    cacheable: bool = False
    new_password: bytes | None = None


def refusal(status: int, *headers: Header, text: str = "") -> Answer:
    """Return an answer with one line of text for people, or without a body."""
    kind = ((b"content-type", b"text/plain"),) if text else ()
    body = text.encode("ascii")
    return Answer(status, (*headers, *kind, (b"content-length", b"%d" % len(body))), body)


def retry_later() -> Answer:
    """Return a 503 that makes the client retry: the document exists and is unavailable now."""
    return refusal(503, (b"retry-after", b"%d" % RETRY_AFTER_S))


_Documents: TypeAlias = "tuple[Dialect, Mapping[str, str], tree.Rows]"
"""Dialect, a version with equal documents for each of its versions, and all documents."""

_EC2: Final[_Documents] = (Dialect.EC2, ec2.GENERATIONS, ec2.FILES)
_OTHERS: Final[Mapping[str, _Documents]] = {
    nocloud.NOCLOUD_ROOT: (Dialect.NOCLOUD, {"": ""}, nocloud.FILES),
    "openstack": (Dialect.OPENSTACK, {one: one for one in openstack.VERSIONS}, openstack.FILES),
}
"""Dialects by the first name of their paths; any other first name is a version of EC2's."""


class DocumentTree:
    """Documents of one record. Costly documents are built at the first request and kept."""

    __slots__ = ("_built", "_root", "record")

    def __init__(self, record: DocumentRecord) -> None:
        self.record = record
        self._built: dict[tuple[Dialect, str], tree.Node] = {}
        self._root = _root(record["dialects"])

    def find(self, names: tuple[str, ...]) -> tree.Node | None:
        if not names:
            return self._root
        dialect, versions, files = _OTHERS.get(names[0], _EC2)
        if dialect not in self.record["dialects"]:
            return None
        below = names if dialect is Dialect.EC2 else names[1:]
        if dialect is Dialect.NOCLOUD:
            # NoCloud's paths have no version.
            below = ("", *below)
        if not below:
            return tree.Node(tree.listing(openstack.VERSIONS))
        version = versions.get(below[0])
        if version is None:
            return None
        top = self._built.get((dialect, version))
        if top is None:
            top = tree.make_directory(files, self.record, version)
            self._built[dialect, version] = top
        return tree.find_node(top, below[1:])


def _root(dialects: Collection[str]) -> tree.Node | None:
    """Return the listing of `/`: EC2's versions, as in EC2 and Nova; without EC2, the roots of the other dialects."""
    if Dialect.EC2 in dialects:
        return tree.Node(tree.listing(ec2.VERSIONS))
    names = [f"{root}/" for root, (dialect, *_) in _OTHERS.items() if dialect in dialects]
    return tree.Node(tree.listing(names)) if names else None


def respond(
    method: str,
    path: bytes,
    body: bytes,
    documents: DocumentTree,
    *,
    random_seed: Callable[[], bytes],
    password: Callable[[], bytes | None],
) -> Answer:
    """Answer one request of the guest that owns these documents.

    A path without a document gets 404 with any method, and errors have no body: clients use the body of a token
    request's answer as a token. No answer is a redirect.

    Args:
        path: Path as received, without the query, which no document uses.
        random_seed: Returns `SEED_LENGTH` fresh bytes; called only if needed.
        password: Returns the instance's present password; called only if needed.
    """
    names = tree.parse_path(path)
    if isinstance(names, int):
        return refusal(names)
    node = documents.find(names)
    if node is None:
        return refusal(404)
    if node.kind is tree.Kind.POSTED and method == "POST":
        return _post_password(body, password())
    if method not in {"GET", "HEAD"}:
        posted = b", POST" if node.kind is tree.Kind.POSTED else b""
        return refusal(405, (b"allow", b"GET, HEAD" + posted))
    found = node.body
    if node.kind is tree.Kind.POSTED:
        found = password() or b""
    elif node.kind is tree.Kind.SEEDED:
        seed = b64encode(random_seed())
        found = b'%b, "random_seed": "%b"}' % (cast("bytes", found)[:-1], seed)
    headers = (b"content-type", node.content_type), (b"content-length", b"%d" % len(found))
    return Answer(200, headers, b"" if method == "HEAD" else found, node.kind is tree.Kind.FIXED)


def _post_password(body: bytes, present: bytes | None) -> Answer:
    if present is not None:
        return refusal(409)
    if len(body) > PASSWORD_LIMIT:
        return refusal(400)
    headers = (b"content-type", TEXT), (b"content-length", b"0")
    return Answer(200, headers, new_password=body or None)


_OF_NOVA: Final = (
    "ancestor-ami-ids",
    "kernel-id",
    "product-codes",
    "public-hostname",
    "public-ipv4",
    "ramdisk-id",
)
"""Categories of `nova/api/metadata/base.py`, `get_ec2_metadata`, that our documents lack."""

_WITH_MORE_BENEATH: Final = (
    *(f"latest/meta-data/{name}/" for name in (*ec2.CATEGORIES, *_OF_NOVA)),
    "latest/dynamic/instance-identity/",
    "openstack/content/",
)
_SERVED: Final = (
    *_WITH_MORE_BENEATH,
    "latest/user-data/",
    *(f"openstack/latest/{name}/" for _, name, _ in openstack.FILES),
    *(f"nocloud/{name}/" for _, name, _ in nocloud.FILES),
)


def can_be_served(path: str) -> bool:
    """Return whether a document may exist at a plain path (`model.path_rules`), or below it."""
    plain = "".join(f"{name}/" for name in filter(None, path.split("/")))
    return plain.startswith(_WITH_MORE_BENEATH) or any(one.startswith(plain) for one in _SERVED)
