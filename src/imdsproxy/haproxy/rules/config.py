"""Complete configuration of a `DataplaneSpec`, and the names for the templates of frontends and backends.

The order inside a frontend is the order of evaluation. Expensive rules stand behind `cache-use`, which answers repeated
reads.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Final

from imdsproxy.haproxy.rules.counting import read_counter
from imdsproxy.haproxy.rules.limits import names_of_limits
from imdsproxy.haproxy.rules.model import (
    Bind,
    DataplaneSpec,
    IssuerFrontend,
    UnixBind,
    count_namespaces,
)
from imdsproxy.haproxy.rules.names import CONSTANTS
from imdsproxy.haproxy.rules.nova import (
    AGAIN_SERVERS,
    RETRIES,
    longest_s,
    loopback_names,
    names_of_nova,
    nova_backends,
)
from imdsproxy.haproxy.rules.request_log import names_of_log
from imdsproxy.haproxy.rules.text import (
    Block,
    Text,
    Value,
    blocks_of,
    fill_sections,
    name_values,
    option,
    quote,
    read_template,
    render,
)
from imdsproxy.model.entities import ID_PATTERN, IpAddress
from imdsproxy.model.wire import LONGEST_PATH, OPENSTACK_TOKEN_PATH

AGENTS: Final = "agents"
"""Name of the frontend and of its bind."""

_EVERY_IPV6: Final = IPv6Address(0)
_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_QUAD: Final = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_MAPPED: Final = (
    "(?:(?:0{1,4}:){5}|(?:::|(?:0{1,4}:)+:)(?:0{1,4}:)*)[Ff]{4}:"
    f"(?:{_QUAD}|[0-9A-Fa-f]{{1,4}}:[0-9A-Fa-f]{{1,4}})"
)
_IPV4: Final = f"^(?:{_QUAD}|{_MAPPED})$"
_IPV6: Final = f"^[0-9A-Fa-f:]+(?:{_QUAD})?$"

_BLOCKS: Final = blocks_of(read_template("backends"), read_template("identity"))

_BEYOND_HOLD_S: Final = 3
"""Extra seconds for which HAProxy waits for the resolver, beyond the maximum hold of a request."""

_SHORT_PER_MB: Final = 256
"""Short documents per MiB of the cache: an entry with its key is below 1 kB."""


def render_config(spec: DataplaneSpec) -> str:
    """Render the configuration file: equal for equal specs, whatever the order of their binds."""
    return render(_sections(spec, CONSTANTS | _values(spec)))


def _sections(spec: DataplaneSpec, values: dict[str, Value]) -> Iterator[str]:
    for name in (
        "global",
        "limits",
        "cache",
        "request_log",
        "frontends",
        "backends",
        "identity",
        "probe",
    ):
        yield from fill_sections(read_template(name), values)
    yield from nova_backends(spec, values)
    for name in ("counting", "exporter"):
        yield from fill_sections(read_template(name), values)


def _values(spec: DataplaneSpec) -> dict[str, Value]:
    """Return the names for templates in addition to `CONSTANTS`: fields of `Limits`, paths, and derived values."""
    sizes = spec.limits
    namespaces = count_namespaces((*spec.binds, *spec.unverified))
    by_chance = f"{{ rand({spec.count_reads}) 0 }}" if spec.count_reads > 1 else ""
    return (
        name_values(asdict(sizes))
        | name_values(spec.paths.named)
        | names_of_limits(sizes)
        | names_of_log(spec)
        | _frontends(spec)
        | _backends(spec)
        | names_of_nova(spec)
        | {
            "nova": bool(spec.nova),
            "fleet": spec.fleet,
            "identity": spec.identity,
            # No client of Keystone sends a session token; `identity.openstack` has rules of its own.
            "but_for_keystone": Text(
                f"!{{ path {OPENSTACK_TOKEN_PATH} }}" if spec.identity else ""
            ),
            **_issuer(spec.issuer),
            # `find_whose_keys` sets the variable only for instances with keys of their own.
            "whose_keys": Text(",concat(,txn.whose_keys)" if spec.fleet else ""),
            "cache": sizes.cache_mb > 0,
            "counts_reads": spec.count_reads > 0,
            # With Nova, most requests are not for our documents.
            "keeps_short": sizes.cache_mb > 0 and not spec.nova,
            "short_slots": sizes.cache_mb * _SHORT_PER_MB,
            "largest_cached": min(sizes.max_object_bytes, sizes.cache_mb * 1024 * 1024 // 2),
            "pipes": (namespaces + 1) // 2 or None,
            "chroot": spec.paths.chroot,
            "user": option("user", spec.user),
            "group": option("group", spec.group),
            # Excludes requests that `policy_share` counts.
            "without_own_limits": Text(f"!{CONSTANTS['has_own_limits']}" if sizes.fair else ""),
            # The random choice of the reads without a token that are counted.
            "by_chance": Text(by_chance),
            "unless_by_chance": Text(f"!{by_chance}" if spec.count_reads else ""),
            "unless_checked": Text(f"!{CONSTANTS['needs_check']}"),
            "unless_sampled": Text(f"!{CONSTANTS['needs_check']}" if spec.count_reads else ""),
            "counts_all": spec.count_reads == 1,
            "samples_left": spec.count_reads > 1 and not spec.nova,
            "read_counter": read_counter(spec.count_reads),
            "documents": bool(spec.paths.documents),
            "exporter": spec.exporter,
        }
    )


def _frontends(spec: DataplaneSpec) -> dict[str, Value]:
    bind = spec.unix or UnixBind("", "", 0, 0)
    return {
        "guests": bool(spec.binds),
        "binds": _bind_lines(spec.binds, spec),
        "gated": bool(spec.unverified),
        "unverified_binds": _bind_lines(spec.unverified, spec),
        "unbound": not spec.binds and spec.unix is None,
        "agents": spec.unix is not None,
        **name_values(asdict(bind), "agents_"),
        "eighth": max(1, spec.limits.maxconn_per_network // 8),
        "nearly_full": bind.maxconn * 3 // 4,
        "id_pattern": ID_PATTERN,
        "ipv4": _IPV4,
        "ipv6": _IPV6,
        "forwarded_twice": Text("{ req.fhdr_cnt(x-forwarded-for) gt 1 }"),
    }


@lru_cache(maxsize=64)
def _host(address: IpAddress) -> str:
    # There are two metadata addresses and thousands of binds; an IPv6 address takes 4 µs to spell.
    return f"[{address}]" if address.version == 6 else str(address)  # noqa: PLR2004 - IP version


def _bind_lines(binds: Iterable[Bind], spec: DataplaneSpec) -> Text:
    # Without a template: there may be 20,000 binds, and each costs a few microseconds at every change of a network.
    end = f"proto h1 maxconn {spec.limits.maxconn_per_network}"
    return Text("\n".join(f"{_bind(bind)} {end}" for bind in sorted(binds, key=_bind_order)))


def _bind(bind: Bind) -> str:
    device, namespace = option("interface", bind.device), option("namespace", bind.namespace)
    start = f"bind {_host(bind.address)}:{bind.port} name {quote(bind.network)}"
    # Without `v6only` the IPv6 wildcard would also accept IPv4 connections.
    only = "v6only" if bind.address == _EVERY_IPV6 else ""
    return " ".join(filter(None, (start, only, device, namespace)))


def _bind_order(bind: Bind) -> tuple[str, int, str, int, str, str]:
    device, namespace = bind.device or "", bind.namespace or ""
    host = _host(bind.address)
    return bind.network, bind.address.version, host, bind.port, device, namespace


def _backends(spec: DataplaneSpec) -> dict[str, Value]:
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


def _issuer(issuer: IssuerFrontend | None) -> dict[str, Value]:
    documents = () if issuer is None else issuer.documents
    rows: list[dict[str, Value]] = [
        {"path": path, "type": content_type, "file": file} for path, content_type, file in documents
    ]
    return {
        "issuer": issuer is not None,
        "issuer_listen": None if issuer is None else issuer.listen,
        "issuer_certificate": None if issuer is None else issuer.certificate,
        "issuer_contents": None if issuer is None else issuer.contents,
        "issuer_documents": _each("issuer_document", rows),
    }


def _servers(workers: list[dict[str, Value]], checks: str) -> Block:
    rows = [{**one, "checks": Text(checks.format(name=one["name"]))} for one in workers]
    return _each("document_servers", rows)


def _each(block: str, rows: Sequence[Mapping[str, Value]]) -> Block:
    return replace(_BLOCKS[block], rows=rows)
