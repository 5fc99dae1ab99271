"""Where guests come in, who they are, and whose answer they get: the rules that every request goes through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from imdsproxy.core.haproxy.audit import (
    audit_found,
    audit_rules,
    hear_tokens,
    marked,
    passed,
    without_marks,
)
from imdsproxy.core.haproxy.backends import ask_the_cache
from imdsproxy.core.haproxy.counting import (
    COUNTED,
    SAMPLED,
    hear_operator,
    sample_reads,
)
from imdsproxy.core.haproxy.guard import (
    ASKED,
    GUARDED,
    hear_forwarded,
    note_asked,
    pass_at_once,
    policy_rules,
)
from imdsproxy.core.haproxy.limits import (
    count_connections,
    count_newcomers,
    fair_share,
    has_said_share,
)
from imdsproxy.core.haproxy.model import Bind, DataplaneSpec, Section, Words
from imdsproxy.core.haproxy.nova import use_nova
from imdsproxy.core.haproxy.rules import (
    CONFLICT,
    KNOWN,
    NOVA,
)
from imdsproxy.core.haproxy.short import (
    KEPT_SHORT,
    answer_plain,
    answer_short,
)
from imdsproxy.core.haproxy.unix_listener import agent_rules, share_rules, unix_bind
from imdsproxy.core.haproxy.watching import watch_rules
from imdsproxy.core.model import IpAddress
from imdsproxy.core.wire import (
    HEADER_ADDRESS,
    HEADER_NETWORK,
    HEADER_RECORD,
)

__all__ = [
    "agents_frontend",
    "found_frontend",
    "guests_frontend",
    "unverified_frontend",
    "without_guests",
]


@lru_cache(maxsize=64)
def _spelled(address: IpAddress) -> str:
    # There are two metadata addresses and thousands of binds; an IPv6 address takes 4 µs to spell.
    return str(address)


def _bind(bind: Bind, maxconn: int) -> Words:
    address = _spelled(bind.address)
    host = f"[{address}]" if bind.address.version == 6 else address  # noqa: PLR2004 - IP version
    words: list[str] = ["bind", f"{host}:{bind.port}", "name", bind.network]
    if bind.device is not None:
        words += ["interface", bind.device]
    if bind.namespace is not None:
        words += ["namespace", bind.namespace]
    return (*words, "proto", "h1", "maxconn", str(maxconn))


def guests_frontend(spec: DataplaneSpec) -> Section:
    """Where guests connect; a connection is one guest's."""
    return Section(
        ("frontend", "guests"),
        (
            *_binds(spec.binds, spec),
            *_peer(),
            ("tcp-request", "connection", "set-var(sess.key)", "so_name,concat(/,sess.address)"),
            *count_connections(spec),
            *_told(spec),
            *_look_up(spec),
            *fair_share(spec, by_connection=True),
            *answer_plain(spec, unless=has_said_share(spec)),
            *note_asked(),
            *(
                ()
                if spec.nova
                else pass_at_once(spec.paths.token_keys, unless=has_said_share(spec))
            ),
            *hear_tokens(spec.audit),
            *_answer(spec),
        ),
    )


def unverified_frontend(spec: DataplaneSpec) -> Section:
    """Whoever the kernel has not let through to `guests`: the resolver asks whose the address is now."""
    return Section(
        ("frontend", "unverified"),
        (
            *_binds(spec.unverified, spec),
            *_peer(),
            ("tcp-request", "connection", "set-var(sess.unverified)", "src_port"),
            *count_newcomers(spec),
            *_told(spec),
            # The next request comes verified, if it may.
            ("option", "httpclose"),
            ("default_backend", "resolver"),
        ),
    )


def _told(spec: DataplaneSpec, *, headers: bool = False) -> tuple[Words, ...]:
    """Whom the requests of a frontend are told: who watches, and the audit log."""
    audit = audit_rules(
        spec.audit,
        spec.paths.audit_last,
        nova=bool(spec.nova),
        headers=headers,
        watched=spec.watched,
    )
    return (*(watch_rules(audited=bool(audit)) if spec.watched else ()), *audit)


def _marks(spec: DataplaneSpec, rules: tuple[Words, ...]) -> tuple[Words, ...]:
    return rules if spec.audit else without_marks(rules)


def _binds(binds: Iterable[Bind], spec: DataplaneSpec) -> Iterator[Words]:
    for bind in sorted(binds, key=_bind_order):
        yield _bind(bind, spec.limits.maxconn_per_network)


def _peer() -> tuple[Words, ...]:
    # Who asks is a property of the connection; what that means is looked up for each request.
    # As text: an address would be spelled anew for each request.
    return (
        ("tcp-request", "connection", "set-var(sess.address)", "src,concat()"),
        ("tcp-request", "connection", "set-var(sess.network)", "so_name"),
    )


def agents_frontend(spec: DataplaneSpec) -> Section:
    """Where Neutron's proxies connect; each request says whose it is."""
    assert spec.unix is not None  # noqa: S101 - for the type checker; the caller has looked
    return Section(
        ("frontend", "agents"),
        (
            unix_bind(spec.unix),
            *_told(spec, headers=True),
            *_marks(spec, (marked("unix-listener"),)),
            *agent_rules(),
            *_marks(spec, (marked("share"),)),
            *share_rules(spec.limits.maxconn_per_network, spec.unix.maxconn),
            *_marks(spec, (passed(),)),
            *_look_up(spec),
            *fair_share(spec, by_connection=False),
            *answer_plain(spec, unless=has_said_share(spec)),
            *note_asked(),
            *(
                ()
                if spec.nova
                else pass_at_once(spec.paths.token_keys, unless=has_said_share(spec))
            ),
            *hear_tokens(spec.audit),
            *_answer(spec),
        ),
    )


def found_frontend(spec: DataplaneSpec) -> Section:
    """Where the resolver hands in requests of guests that it has just found; only we can open it."""
    return Section(
        ("frontend", "found"),
        (
            ("bind", f"unix@{spec.paths.found}", "name", "found", "mode", "600", "proto", "h1"),
            *(_told(spec, headers=True) if spec.audit else ()),
            *audit_found(spec.audit),
            ("http-request", "set-var(txn.record)", f"req.fhdr({HEADER_RECORD})"),
            ("http-request", "set-var(sess.address)", f"req.fhdr({HEADER_ADDRESS})"),
            ("http-request", "set-var(sess.network)", f"req.fhdr({HEADER_NETWORK})"),
            *policy_rules(),
            *hear_forwarded(),
            hear_operator(),
            *fair_share(spec, by_connection=False, counted=False),
            ("http-request", "set-var(sess.found)", "bool(true)"),
            *note_asked(),
            *(
                ()
                if spec.nova
                else pass_at_once(spec.paths.token_keys, unless=has_said_share(spec))
            ),
            *hear_tokens(spec.audit),
            *_answer(spec, found=True),
        ),
    )


def _answer(spec: DataplaneSpec, *, found: bool = False) -> tuple[Words, ...]:
    """From `txn.record` to whoever answers."""
    return (
        *sample_reads(
            spec.count_reads, ASKED, chosen=() if spec.nova or found else KEPT_SHORT, found=found
        ),
        # In front of Nova most requests have nothing to do with the cache, and its filter would cost each of them
        # a tenth. Elsewhere all have, and a hit that first chose a backend takes a third more instructions.
        *(() if spec.nova or found else answer_short(spec, unless=ASKED)),
        *(() if spec.nova else ask_the_cache(spec, unless=ASKED)),
        *(_choose_nova(spec, found=found) if spec.nova else ()),
        *((("use_backend", f"documents{COUNTED}", "if", *SAMPLED),) if spec.count_reads else ()),
        ("use_backend", f"documents{GUARDED}", "if", *ASKED, *KNOWN),
        ("use_backend", "documents", "if", *KNOWN),
        ("use_backend", "conflict", "if", *CONFLICT),
        # What comes from the resolver does not go back to it.
        ("default_backend", "conflict" if found else "resolver"),
    )


def _choose_nova(spec: DataplaneSpec, *, found: bool) -> tuple[Words, ...]:
    if found:
        # A set that a reload took away meanwhile.
        return (*use_nova(spec), ("use_backend", "conflict", "if", *NOVA))
    return (
        # Nova reads a body by its Content-Length, and HAProxy cannot add one.
        ("use_backend", "resolver", "if", "{", "req.fhdr(transfer-encoding)", "-m", "found", "}", *NOVA),
        *use_nova(spec),
        # An endpoint set that is not in this configuration yet, or not any more.
        ("use_backend", "resolver", "if", *NOVA),
    )  # fmt: skip


def _look_up(spec: DataplaneSpec) -> tuple[Words, ...]:
    return (
        ("http-request", "set-var(txn.record)", f"var(sess.key),map_str({spec.paths.overlay_map})"),
        ("http-request", "set-var(txn.record)", f"var(sess.key),map_str({spec.paths.base_map})",
         "if", "!{", "var(txn.record)", "-m", "found", "}"),
        *policy_rules(),
    )  # fmt: skip


def without_guests(spec: DataplaneSpec) -> Section:
    """What stands in the place of frontends while nobody can be listened to.

    HAProxy knows a map only by a rule that uses it, and records come before listeners: without this, none could be
    taken in.
    """
    return Section(("backend", "records"), _look_up(spec))


def _bind_order(bind: Bind) -> tuple[str, int, str, int, str, str]:
    return (
        bind.network,
        bind.address.version,
        _spelled(bind.address),
        bind.port,
        bind.device or "",
        bind.namespace or "",
    )
