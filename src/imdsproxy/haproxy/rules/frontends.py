"""Frontends: binds, identification of guests, and the rules that every request passes."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Final

from imdsproxy.haproxy.rules.model import Bind, DataplaneSpec, UnixBind
from imdsproxy.haproxy.rules.text import Text, Value, name_values, option, quote
from imdsproxy.model.entities import ID_PATTERN, IpAddress

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


def names_of_frontends(spec: DataplaneSpec) -> dict[str, Value]:
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
