"""Backends behind a frontend: the document server, the resolver, and the documents in HAProxy's memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from imdsproxy.haproxy.rules.model import DataplaneSpec
from imdsproxy.haproxy.rules.nova import AGAIN_SERVERS, RETRIES, longest_s, loopback_names
from imdsproxy.haproxy.rules.text import Block, Text, Value, blocks_of, read_template
from imdsproxy.model.wire import LONGEST_PATH

_BLOCKS: Final = blocks_of(read_template("backends"))

_BEYOND_HOLD_S: Final = 3
"""Extra seconds for which HAProxy waits for the resolver, beyond the maximum hold of a request."""


def names_of_backends(spec: DataplaneSpec) -> dict[str, Value]:
    # The resolver holds a request first. Then it may wait for Nova as long as HAProxy itself would.
    held_s = spec.limits.hold_s + _BEYOND_HOLD_S
    workers: list[dict[str, Value]] = [
        {"index": str(index), "name": f"documents-{index}", "socket": f"unix@{path}"}
        for index, path in enumerate(spec.paths.documents)
    ]
    nexts = [one["name"] for one in (*workers[1:], *workers[:1])]
    return {
        "resolver_s": math.ceil(held_s + longest_s(spec.nova_times) if spec.nova else held_s),
        "longest_path": LONGEST_PATH,
        "documents_turn": "proc.documents_turn" if workers else None,
        "document_workers": len(workers),
        "retries": RETRIES,
        "documents_in_turn": _each("documents_in_turn", workers),
        "any_document_server": _each("any_document_server", workers),
        "next_in_turn": _each(
            "next_in_turn",
            [{**worker, "next": name} for worker, name in zip(workers, nexts, strict=True)],
        ),
        "documents_again": _each(
            "documents_again", [{"name": name} for name in AGAIN_SERVERS] if workers else []
        ),
        # No endpoint set has an empty name.
        **loopback_names(spec, " documents", "documents_again_"),
        "document_servers": _servers(workers, "check inter 1s fall 2 rise 1 backup"),
        "tracked_document_servers": _servers(workers, "track documents/{name} backup"),
        "document_servers_again": _servers(workers, "track documents/{name}"),
    }


def _servers(workers: list[dict[str, Value]], checks: str) -> Block:
    rows = [{**one, "checks": Text(checks.format(name=one["name"]))} for one in workers]
    return _each("document_servers", rows)


def _each(block: str, rows: Sequence[Mapping[str, Value]]) -> Block:
    return replace(_BLOCKS[block], rows=rows)
