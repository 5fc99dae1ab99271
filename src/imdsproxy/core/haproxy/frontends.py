"""Where guests come in, who they are, and whose answer they get: the rules that every request goes through."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from imdsproxy.core.haproxy.access_rules import (
    NOTE_CHECKS,
    READ_FORWARDING,
    READ_POLICY,
    SHOW_TOKEN_LIFE,
    SKIP_CHECKS,
)
from imdsproxy.core.haproxy.backends import ask_the_cache
from imdsproxy.core.haproxy.counting import READ_OPERATOR, sample_reads
from imdsproxy.core.haproxy.limits import (
    COUNT_CONNECTIONS,
    COUNT_NEWCOMERS,
    SHARE_BY_CONNECTION,
    SHARE_BY_REQUEST,
    SHARE_OF_FOUND,
)
from imdsproxy.core.haproxy.model import Bind, DataplaneSpec
from imdsproxy.core.haproxy.nova import use_nova
from imdsproxy.core.haproxy.request_log import NOTE_GOOD_TOKEN, log_rules
from imdsproxy.core.haproxy.short_documents import answer_plain, answer_short
from imdsproxy.core.haproxy.text import Form, Option, Text, quote
from imdsproxy.core.haproxy.unix_listener import AGENT_RULES, UNIX_BIND, names_of_agents
from imdsproxy.core.model import IpAddress

# The guest's address is a property of the connection; what that means is looked up for each request.
# As text: an address would be spelled anew for each request.
_PEER: Final = """
    tcp-request connection set-var(sess.address) src,concat()
    tcp-request connection set-var(sess.network) so_name
"""

_LOOK_UP: Final = (
    """
    http-request set-var(txn.record) var(sess.key),map_str(<overlay_map>)
    http-request set-var(txn.record) var(sess.key),map_str(<base_map>) if !{ var(txn.record) -m found }
"""
    + READ_POLICY
)

_READ_FOUND: Final = (
    """
    # No second line in the audit log: here it is known who asks.
    [audited] http-after-response set-header <header_logged> yes
    http-request set-var(txn.record) req.fhdr(<header_record>)
    http-request set-var(sess.address) req.fhdr(<header_address>)
    http-request set-var(sess.network) req.fhdr(<header_network>)
"""
    + READ_POLICY
    + READ_FORWARDING
    + READ_OPERATOR
    + SHARE_OF_FOUND
    + """
    http-request set-var(sess.from_resolver) bool(true)
"""
)

_CHOOSE_DOCUMENTS: Final = """
    [counts_reads] use_backend documents.sampled if <is_sampled>
    use_backend documents.checked if <needs_check> <known>
    use_backend documents if <known>
    use_backend conflict if <in_conflict>
"""


def guests_frontend(spec: DataplaneSpec, form: Form) -> Text:
    """Where guests connect; a connection is one guest's."""
    return form.section(
        "frontend guests",
        _binds(spec.binds, spec),
        _PEER,
        "tcp-request connection set-var(sess.key) so_name,concat(/,sess.address)",
        COUNT_CONNECTIONS,
        log_rules(spec, form),
        _LOOK_UP,
        SHARE_BY_CONNECTION,
        answer_plain(spec, form),
        _answer(spec, form),
    )


def unverified_frontend(spec: DataplaneSpec, form: Form) -> Text:
    """Connections that the kernel has not let through to `guests`: the resolver looks up whose each address is now."""
    return form.section(
        "frontend unverified",
        _binds(spec.unverified, spec),
        _PEER,
        "tcp-request connection set-var(sess.unverified) src_port",
        COUNT_NEWCOMERS,
        log_rules(spec, form),
        # The next request comes verified, if it may.
        "option httpclose",
        "default_backend resolver",
    )


def agents_frontend(spec: DataplaneSpec, form: Form) -> Text:
    """Where Neutron's proxies connect; each request names its guest."""
    assert spec.unix is not None  # noqa: S101 - for the type checker; the caller has looked
    names = names_of_agents(spec.unix, spec.limits.maxconn_per_network, form)
    return form.section(
        "frontend agents",
        form.fill(UNIX_BIND, **names),
        log_rules(spec, form, headers=True),
        form.fill(AGENT_RULES, **names),
        _LOOK_UP,
        SHARE_BY_REQUEST,
        answer_plain(spec, form),
        _answer(spec, form),
    )


def found_frontend(spec: DataplaneSpec, form: Form) -> Text:
    """Where the resolver hands in requests of guests that it has just found; only we can open it."""
    return form.section(
        "frontend found",
        "bind <found_socket> name found mode 600 proto h1",
        log_rules(spec, form, headers=True) if spec.audit else Text(),
        _READ_FOUND,
        _answer(spec, form, found=True),
    )


def records_backend(form: Form) -> Text:
    """What stands in the place of frontends while there is nothing to listen to.

    HAProxy knows a map only by a rule that uses it, and records come before listeners: without this, none could be
    taken in.
    """
    return form.section("backend records", _LOOK_UP)


def _answer(spec: DataplaneSpec, form: Form, *, found: bool = False) -> Text:
    """From `txn.record` to the backend that answers."""
    # What comes from the resolver does not go back to it.
    default = "default_backend conflict" if found else "default_backend resolver"
    if spec.nova:
        return form.fill(
            NOTE_CHECKS,
            NOTE_GOOD_TOKEN,
            sample_reads(spec, form, found=found),
            use_nova(spec, form, found=found),
            _CHOOSE_DOCUMENTS,
            default,
        )
    # In front of Nova most requests have nothing to do with the cache, and its filter would cost each of them
    # a tenth. Elsewhere all have, and a hit that first chose a backend takes a third more instructions.
    return form.fill(
        NOTE_CHECKS,
        SKIP_CHECKS,
        SHOW_TOKEN_LIFE,
        NOTE_GOOD_TOKEN,
        sample_reads(spec, form, found=found),
        Text() if found else answer_short(spec, form),
        ask_the_cache(form, checked_elsewhere=True),
        _CHOOSE_DOCUMENTS,
        default,
    )


@lru_cache(maxsize=64)
def _host(address: IpAddress) -> str:
    # There are two metadata addresses and thousands of binds; an IPv6 address takes 4 µs to spell.
    return f"[{address}]" if address.version == 6 else str(address)  # noqa: PLR2004 - IP version


def _binds(binds: Iterable[Bind], spec: DataplaneSpec) -> Text:
    # Not by a template: there may be 20,000, and each is a few microseconds of every change of a network.
    end = f"proto h1 maxconn {spec.limits.maxconn_per_network}"
    return Text(tuple(f"{_bind(bind)} {end}" for bind in sorted(binds, key=_bind_order)))


def _bind(bind: Bind) -> str:
    words = [f"bind {_host(bind.address)}:{bind.port} name {quote(bind.network)}"]
    options = (Option("interface", bind.device), Option("namespace", bind.namespace))
    return " ".join((*words, *(str(one) for one in options if one.word is not None)))


def _bind_order(bind: Bind) -> tuple[str, int, str, int, str, str]:
    return (
        bind.network,
        bind.address.version,
        _host(bind.address),
        bind.port,
        bind.device or "",
        bind.namespace or "",
    )
