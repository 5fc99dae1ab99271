"""The upstream `nova` in HAProxy's rules: sections that send a signed request and nothing else.

Of a guest's request Nova gets method, path, query, body and the allow-listed headers, each as it was, and four
headers that we set out of the record. Two backends stand for each endpoint set: what may be asked twice is asked
again when an endpoint fails; everything else is sent once, over a connection of its own, since a kept one may
close just then and nobody could say whether it had arrived.

Endpoints of one set that have different secrets, as while these are replaced, are reached by a hop through
HAProxy itself: which signature is right depends on the endpoint, and rules run before one is chosen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from imdsproxy.core.haproxy.counting import COUNTED, SAMPLED
from imdsproxy.core.haproxy.guard import ASKED, GUARDED, looked_at
from imdsproxy.core.haproxy.limits import bound_body
from imdsproxy.core.haproxy.model import (
    DataplaneSpec,
    NovaBackend,
    NovaServer,
    NovaTimes,
    NovaTls,
    Section,
    Words,
)
from imdsproxy.core.haproxy.rules import (
    allow_methods,
    delete_guest_headers,
    milliseconds,
    negated,
    originate,
    refuse_lengths,
    tell_to_continue,
)
from imdsproxy.core.wire import MAP_NOVA

__all__ = [
    "hop_sockets",
    "longest_s",
    "set_of_backend",
    "nova_backends",
    "nova_globals",
    "refused_counter",
    "use_nova",
]

_NEXT: Final = "x-imdsproxy-next-signature"
"""Between HAProxy and itself only."""

_HOP_SOCKET: Final = re.compile(r"\bhop-[0-9a-f]{16}\.sock\b")
_REPEATABLE: Final = ("{", "method", "GET", "HEAD", "OPTIONS", "}")
_SIGNATURE: Final = 64
"""Characters of a signature."""

_RETRIES: Final = 2
_CHECK_S: Final = 3.0
"""A Nova whose workers are all busy answers late; one that takes longer twice in a row would keep guests waiting."""
_CHECK_SPREAD_PERCENT: Final = 25
_BEYOND_HOP_S: Final = 1.0
"""How much longer a request may take that goes through a hop: the hop's own time is over first."""


def refused_counter(endpoint_set: str) -> str:
    """The variable of HAProxy that counts how often the set's Nova said 403: it refuses our signature."""
    return f"proc.nova_refused_{endpoint_set.replace('-', '_')}"


def hop_sockets(config: str) -> frozenset[str]:
    """The file names of the hops' sockets that a configuration binds or connects to."""
    return frozenset(_HOP_SOCKET.findall(config))


def longest_s(times: NovaTimes) -> float:
    """After how many seconds HAProxy has either Nova's answer or one of its own."""
    return (_RETRIES + 1) * times.connect_s + times.response_s + _BEYOND_HOP_S


def set_of_backend(backend: str) -> str | None:
    """The endpoint set that a backend of HAProxy's counters stands for; `None` for any other proxy."""
    nova, _, name = backend.partition(".")
    for ending in (COUNTED, GUARDED, ".once"):
        name = name.removesuffix(ending)
    return name if nova == "nova" and "." not in name else None


def nova_globals(spec: DataplaneSpec) -> tuple[Words, ...]:
    """Lines of `global`: every counter begins at 0, so that it can be read before anything was counted.

    Checks are spread, or hosts that were set up together would ask Nova together.
    """
    if not spec.nova:
        return ()
    counters = (("set-var", refused_counter(one.name), "int(0)") for one in spec.nova)
    return (("spread-checks", str(_CHECK_SPREAD_PERCENT)), *counters)


def use_nova(spec: DataplaneSpec) -> tuple[Words, ...]:
    """Which backend takes a request whose record is of Nova; what is most often so comes first."""
    plain = negated(ASKED)
    reads: list[Words] = []
    others: list[Words] = []
    for backend in spec.nova:
        mine = ("{", "var(txn.record)", "-m", "beg", f"{MAP_NOVA}{backend.name}|", "}")
        name, once = _name(backend), _once(backend)
        reads.append(("use_backend", name, "if", *mine, *_REPEATABLE, *plain))
        if spec.count_reads:
            others.append(("use_backend", f"{name}{COUNTED}", "if", *SAMPLED, *mine))
        others.append(("use_backend", f"{name}{GUARDED}", "if", *mine, *_REPEATABLE))
        others.append(("use_backend", f"{once}{GUARDED}", "if", *mine, *ASKED))
        others.append(("use_backend", once, "if", *mine))
    return (*reads, *others)


def nova_backends(spec: DataplaneSpec) -> Iterator[Section]:
    """The backends of each endpoint set, by what is looked at and sent again, and hops of a set with two secrets."""
    for backend in spec.nova:
        mixed = _mixed(backend)
        for kind in ("", GUARDED):
            for once in (False, True):
                yield _backend(spec, backend, kind, once=once, mixed=mixed)
        if spec.count_reads:
            yield _backend(spec, backend, COUNTED, once=False, mixed=mixed)
        if mixed or backend.hops:
            for server in backend.servers:
                yield _hop(spec, backend, server, used=mixed)


def _mixed(backend: NovaBackend) -> bool:
    return len({server.slot for server in backend.servers}) > 1


def _name(backend: NovaBackend) -> str:
    return f"nova.{backend.name}"


def _once(backend: NovaBackend) -> str:
    return f"{_name(backend)}.once"


def _hop_name(backend: NovaBackend, server: NovaServer) -> str:
    return f"{_name(backend)}.hop.{server.name}"


def _hop_socket(directory: str, backend: NovaBackend, server: NovaServer) -> str:
    # HAProxy takes paths of 97 characters, and set and address alone may have 65.
    name = hashlib.sha256(f"{backend.name} {server.name}".encode()).hexdigest()[:16]
    return f"unix@{directory}/hop-{name}.sock"


def _contents(tls: NovaTls | None) -> tuple[Words, ...]:
    # The same text is no reload; a renewed certificate has to be one.
    return (("description", f"certificates {tls.contents}"),) if tls and tls.contents else ()


def _backend(
    spec: DataplaneSpec, backend: NovaBackend, kind: str, *, once: bool, mixed: bool
) -> Section:
    first = not once and not kind
    times = spec.nova_times
    response_s = times.response_s + (_BEYOND_HOP_S if mixed else 0.0)
    if mixed:
        servers = tuple(_to_hop(spec, backend, server) for server in backend.servers)
    else:
        servers = tuple(
            _server(backend.tls, server, times, tracked=None if first else _name(backend))
            for server in backend.servers
        )
    counter = refused_counter(backend.name)
    return Section(
        ("backend", f"{_once(backend) if once else _name(backend)}{kind}"),
        (
            *looked_at(spec, kind, nova=True),
            *_contents(backend.tls),
            *_plain_request(spec, once=once),
            ("http-request", "set-header", "host", backend.host),
            *_identity(backend, mixed=mixed),
            ("http-request", "set-header", "x-forwarded-for", "%[var(sess.address)]"),
            ("timeout", "connect", milliseconds(times.connect_s)),
            ("timeout", "server", milliseconds(response_s)),
            (
                "http-response",
                f"set-var({counter})",
                f"var({counter}),add(1)",
                "if",
                "{",
                "status",
                "403",
                "}",
            ),
            *_again(once=once),
            *(_check(backend, times) if first and not mixed else ()),
            *servers,
        ),
    )


def _plain_request(spec: DataplaneSpec, *, once: bool) -> tuple[Words, ...]:
    return (
        # What may be repeated came here by its method.
        *(allow_methods(nova=True) if once else ()),
        originate(),
        refuse_lengths(),
        *(bound_body(spec) if once else ()),
        tell_to_continue(),
        delete_guest_headers(),
    )


def _identity(backend: NovaBackend, *, mixed: bool) -> tuple[Words, ...]:
    """Who asks, out of the record: `@SET|SIGNATURE|INSTANCE|PROJECT`, perhaps `|NEXT-SIGNATURE`."""
    begin = len(f"{MAP_NOVA}{backend.name}|")
    rest = f"var(txn.record),bytes({begin + _SIGNATURE + 1})"
    following = f"{rest},field(3,|)"
    signature: Words = ("http-request", "set-header", "x-instance-id-signature")
    rules: list[Words] = [
        ("http-request", "set-header", "x-instance-id", f"%[{rest},field(1,|)]"),
        ("http-request", "set-header", "x-tenant-id", f"%[{rest},field(2,|)]"),
        (*signature, f"%[var(txn.record),bytes({begin},{_SIGNATURE})]"),
    ]
    if mixed:
        rules.append(("http-request", "set-header", _NEXT, f"%[{following}]"))
    elif backend.servers and backend.servers[0].slot:
        # After the last step of a replacement there is one signature again before these rules are.
        rules.append((*signature, f"%[{following}]", "if", "{", following, "-m", "found", "}"))
    return tuple(rules)


def _again(*, once: bool) -> tuple[Words, ...]:
    tries: tuple[Words, ...] = (("retries", str(_RETRIES)), ("option", "redispatch", "1"))
    if once:
        return (
            *tries,
            ("retry-on", "conn-failure"),
            # `http-reuse never` alone would let a guest's next request have the connection of its last one.
            # Pretending keeps `connection: close` from Nova.
            ("http-reuse", "never"),
            ("option", "http-server-close"),
            ("option", "http-pretend-keepalive"),
        )
    return (
        *tries,
        # Slow answers are not asked for again: whoever is slow has enough to do.
        ("retry-on", "conn-failure", "empty-response", "junk-response"),
        # A request over a connection that others have used gets no answer, not even 503, when its last try fails:
        # HAProxy closes the guest's and leaves the rest to the guest. So a guest's first request has its own.
        ("http-reuse", "safe"),
    )


def _check(backend: NovaBackend, times: NovaTimes) -> tuple[Words, ...]:
    if times.check != "http":
        return ()
    send: Words = ("http-check", "send", "meth", "GET", "uri", "/", "ver", "HTTP/1.1")
    return (
        ("option", "httpchk"),
        (*send, "hdr", "host", backend.host),
        # A proxy in front of Nova may keep `/` to itself: whatever it says of that, it is there.
        ("http-check", "expect", "!", "rstatus", "^5"),
        ("timeout", "check", milliseconds(min(_CHECK_S, times.response_s))),
    )


def _server(
    tls: NovaTls | None, server: NovaServer, times: NovaTimes, *, tracked: str | None
) -> Words:
    words: list[str] = ["server", server.name, server.authority]
    if tls is not None:
        words += ["ssl", "sni", f"str({tls.name})", "alpn", "http/1.1"]
        if tls.verify:
            words += ["verify", "required", "ca-file", tls.ca, "verifyhost", tls.name]
        else:
            words += ["verify", "none"]
        if tls.client is not None:
            words += ["crt", tls.client]
    if times.check == "off":
        return tuple(words)
    if tracked is not None:
        return (*words, "track", f"{tracked}/{server.name}")
    pace = milliseconds(times.check_interval_s)
    soon = milliseconds(min(times.check_interval_s, 0.5))
    down = milliseconds(min(times.check_interval_s, 2.0))
    if tls is not None:
        words += ["check-sni", tls.name]
    return (*words, "check", "inter", pace, "fastinter", soon, "downinter", down,
            "fall", "2", "rise", "1", "observe", "layer4", "on-error", "fastinter")  # fmt: skip


def _to_hop(spec: DataplaneSpec, backend: NovaBackend, server: NovaServer) -> Words:
    words = ("server", server.name, _hop_socket(spec.paths.hops_inside, backend, server))
    if spec.nova_times.check == "off":
        return words
    return (*words, "track", f"{_hop_name(backend, server)}/{server.name}")


def _hop(spec: DataplaneSpec, backend: NovaBackend, server: NovaServer, *, used: bool) -> Section:
    """One endpoint behind a socket of our own, which takes the signature that it wants.

    One that is not `used` is there for workers that still have the configuration before: the sockets are the same.
    """
    times = spec.nova_times if used else replace(spec.nova_times, check="off")
    if server.slot:
        choose: tuple[Words, ...] = (
            ("http-request", "set-header", "x-instance-id-signature", f"%[req.fhdr({_NEXT})]",
             "if", "{", f"req.fhdr({_NEXT})", "-m", "found", "}"),
        )  # fmt: skip
    else:
        choose = ()
    # The master binds the socket, as root; the worker that connects to it is another user.
    owner = () if spec.user is None else ("user", spec.user)
    return Section(
        ("listen", _hop_name(backend, server)),
        (
            ("bind", _hop_socket(spec.paths.hops, backend, server), *owner, "mode", "600", "proto", "h1"),
            *choose,
            ("http-request", "del-header", _NEXT),
            ("timeout", "connect", milliseconds(times.connect_s)),
            ("timeout", "server", milliseconds(times.response_s)),
            ("retries", "0"),
            # Who is before the hop tries another endpoint when this one gives no answer.
            *(("errorfile", code, spec.paths.silence) for code in ("502", "503", "504")),
            ("http-reuse", "safe"),
            *_check(backend, times),
            _server(backend.tls, server, times, tracked=None),
        ),
    )  # fmt: skip
