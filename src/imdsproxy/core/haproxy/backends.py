"""The backends behind a frontend, the document server and the resolver, and the documents that HAProxy keeps."""

import math
from typing import Final

from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.nova import longest_s
from imdsproxy.core.haproxy.text import Block, Value

_BEYOND_HOLD_S: Final = 3
"""How much longer than a request may be held HAProxy waits for the resolver."""


def names_of_backends(spec: DataplaneSpec) -> dict[str, Value]:
    """What `backends.cfg` names beside what every template may."""
    # The resolver holds a request at first; then it may have to wait for Nova as long as HAProxy itself would.
    held_s = spec.limits.hold_s + _BEYOND_HOLD_S
    workers: list[dict[str, Value]] = [
        {"index": index, "socket": f"unix@{path}"}
        for index, path in enumerate(spec.paths.documents)
    ]
    return {
        "resolver_s": math.ceil(held_s + longest_s(spec.nova_times) if spec.nova else held_s),
        "document_servers": Block(
            "server documents-<index> <socket> check inter 1s fall 2 rise 1", workers
        ),
        "tracked_document_servers": Block(
            "server documents-<index> <socket> track documents/documents-<index>", workers
        ),
    }
