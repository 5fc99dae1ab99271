"""The upstream `nova` in HAProxy's rules: sections that send a signed request and nothing else.

Of a guest's request Nova gets method, path, query, body and the allow-listed headers, each as it was, and four
headers that we set out of the record. Two backends stand for each endpoint set: what may be asked twice is asked
again when an endpoint fails; everything else is sent once, over a connection of its own, since a kept one may
close just then and there is no way to know whether it had arrived.

Endpoints of one set that have different secrets, as while these are replaced, are reached by a loopback through
HAProxy itself: which signature is right depends on the endpoint, and rules run before one is chosen.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from imdsproxy.core.haproxy import model, text
from imdsproxy.core.wire import MAP_NOVA

_LOOPBACK_SOCKET: Final = re.compile(r"\bhop-[0-9a-f]{16}\.sock\b")
_SIGNATURE: Final = 64
"""Characters of a signature."""

_RETRIES: Final = 2
_CHECK_S: Final = 3.0
"""A Nova whose workers are all busy answers late; one that takes longer twice in a row would keep guests waiting."""
_BEYOND_LOOPBACK_S: Final = 1.0
"""How much longer a request may take that goes through the loopback: that one's own time is over first."""


NOVA_RULES: Final = """
origin_form:
    # The absolute form of a target becomes the origin form (RFC 9112 section 3.2); nothing else of it is touched.
    http-request set-uri %[pathq] unless { url_beg / } or { url -m str * }
all_methods:
    # Nova takes every method that is known.
    http-request return status 405 hdr Allow <allow_methods> if !{ method <methods> }
http_checks:
    option httpchk
    http-check send meth GET uri / ver HTTP/1.1 hdr host <host>
    # A proxy in front of Nova may keep `/` to itself: with any answer but 5xx, it is there.
    http-check expect ! rstatus ^5
    timeout check <check_ms>
use_nova:
    # Which backend takes a request whose record is of Nova. What is most often so comes first.
    <use_for_reads>
    <use_for_others>
"""

_USE_FOR_READS: Final = "use_backend nova.<set> if <of_set> <repeatable> !<needs_check>"
_USE_FOR_OTHERS: Final = """
    [counts_reads] use_backend nova.<set>.sampled if <is_sampled> <of_set>
    use_backend nova.<set>.checked if <of_set> <repeatable>
    use_backend nova.<set>.once.checked if <of_set> <needs_check>
    use_backend nova.<set>.once if <of_set>
"""

_BACKEND: Final = """
backend nova.<set><kind>
    [checked] <check>
    [sampled] <count_sampled(instance_of_nova)>
    # The same text is no reload; a renewed certificate has to be one.
    description <certificates>
    # What may be repeated came here by its method.
    [once] <all_methods>
    <origin_form>
    # As for the document server.
    http-request return status 400 if { req.fhdr(content-length) -m len 19: }
    [once] http-request return status 413 if { req.fhdr(content-length) -m int gt <body_bytes> }
    [once] http-request wait-for-body time 10s if { method POST PUT PATCH }
    http-request wait-for-body time 10s if { req.fhdr(expect) -m found }
    http-request del-header <other_than_guest_headers> -m reg
    http-request set-header host <host>
    # Out of the record: `@SET|SIGNATURE|INSTANCE|PROJECT`, perhaps `|NEXT-SIGNATURE`.
    http-request set-header x-instance-id %[<rest>,field(1,|)]
    http-request set-header x-tenant-id %[<rest>,field(2,|)]
    http-request set-header x-instance-id-signature %[var(txn.record),bytes(<begin>,<signature_length>)]
    [mixed] http-request set-header x-imdsproxy-next-signature %[<rest>,field(3,|)]
    # After the last step of a replacement there is one signature again before these rules are.
    [next] http-request set-header x-instance-id-signature %[<rest>,field(3,|)] if { <rest>,field(3,|) -m found }
    http-request set-header x-forwarded-for %[var(sess.address)]
    timeout connect <connect_ms>
    timeout server <server_ms>
    http-response set-var(<refused>) var(<refused>),add(1) if { status 403 }
    retries <retries>
    option redispatch 1
    # A slow answer is not asked for again: a slow server has enough to do.
    [!once] retry-on conn-failure empty-response junk-response
    # A request over a connection that others have used gets no answer, not even 503, when its last try fails: HAProxy
    # closes the guest's and leaves the rest to the guest. So a guest's first request has its own.
    [!once] http-reuse safe
    # `http-reuse never` alone would let a guest's next request have the connection of its last one. Pretending keeps
    # `connection: close` from Nova.
    [once] retry-on conn-failure
    [once] http-reuse never
    [once] option http-server-close
    [once] option http-pretend-keepalive
    [http_check] <http_checks>
    <servers>
"""

_SERVERS: Final = """
    # The loopback to it, which checks it; or itself, checked here or by the first of the backends.
    [mixed] server <name> <inside> <track_loopback>
    [checking] server <name> <authority> <tls> <check_sni> <checks>
    [!mixed] [!checking] server <name> <authority> <tls> <track_first>
"""

_TLS: Final = """
    [tls_verify] ssl sni str(<tls_name>) alpn http/1.1 verify required ca-file <tls_ca> verifyhost <tls_name> <client>
    [!tls_verify] ssl sni str(<tls_name>) alpn http/1.1 verify none <client>
"""

_CHECKS: Final = "check inter <pace> fastinter <soon> downinter <down> fall 2 rise 1 observe layer4 on-error fastinter"

_LOOPBACK: Final = """
listen <loopback_name>
    # The master binds the socket, as root; the worker that connects to it is another user.
    bind <socket> <user> mode 600 proto h1
    [next] http-request set-header x-instance-id-signature %[req.fhdr(x-imdsproxy-next-signature)]
        if { req.fhdr(x-imdsproxy-next-signature) -m found }
    http-request del-header x-imdsproxy-next-signature
    timeout connect <connect_ms>
    timeout server <server_ms>
    retries 0
    # The backend before it tries another endpoint when this one gives no answer.
    errorfile 502 <silence>
    errorfile 503 <silence>
    errorfile 504 <silence>
    http-reuse safe
    [http_check] <http_checks>
    server <name> <authority> <tls> <check_sni> <checks>
"""


def refused_counter(endpoint_set: str) -> str:
    """The variable of HAProxy that counts how often the set's Nova answered 403: it refuses our signature."""
    return f"proc.nova_refused_{endpoint_set.replace('-', '_')}"


def loopback_sockets(config: str) -> frozenset[str]:
    """The file names of HAProxy's sockets to itself that a configuration binds or connects to."""
    return frozenset(_LOOPBACK_SOCKET.findall(config))


def longest_s(times: model.NovaTimes) -> float:
    """After how many seconds HAProxy has either Nova's answer or one of its own."""
    return (_RETRIES + 1) * times.connect_s + times.response_s + _BEYOND_LOOPBACK_S


def set_of_backend(backend: str) -> str | None:
    """The endpoint set that a backend of HAProxy's counters stands for; `None` for any other proxy."""
    nova, _, name = backend.partition(".")
    for ending in (model.SAMPLED, model.CHECKED, ".once"):
        name = name.removesuffix(ending)
    return name if nova == "nova" and "." not in name else None


def names_of_nova(spec: model.DataplaneSpec) -> dict[str, text.Value]:
    """What `USE_NOVA` names, and the counters for `global`: they begin at 0, so they can be read before a count."""
    names = [_names(backend, spec.nova_times) for backend in spec.nova]
    return {
        "nova_counters": text.Block("set-var <refused> int(0)", names),
        "use_for_reads": text.Block(_USE_FOR_READS, names),
        "use_for_others": text.Block(_USE_FOR_OTHERS, names),
    }


def nova_backends(spec: model.DataplaneSpec, values: dict[str, text.Value]) -> Iterator[str]:
    """The backends of each endpoint set, by checks and repetition, and the loopback of a set with two secrets."""
    kinds = [(kind, once) for kind in ("", model.CHECKED) for once in (False, True)]
    if spec.count_reads:
        kinds.append((model.SAMPLED, False))
    by_http = spec.nova_times.check == "http"
    for backend in spec.nova:
        named = values | _names(backend, spec.nova_times)
        mixed = len({server.slot for server in backend.servers}) > 1
        servers = [_server_names(spec, backend.name, one) for one in backend.servers]
        for kind, once in kinds:
            checking = not (once or kind or mixed)
            own: dict[str, text.Value] = {
                "mixed": mixed,
                "checking": checking,
                "checked": kind == model.CHECKED,
                "sampled": kind == model.SAMPLED,
                "kind": text.Text(f"{'.once' if once else ''}{kind}"),
                "once": once,
                "next": not mixed and bool(backend.servers and backend.servers[0].slot),
                "server_ms": named["loopback_ms" if mixed else "server_ms"],
                "http_check": checking and by_http,
                "servers": text.Block(_SERVERS, servers),
            }
            yield from text.fill_sections(_BACKEND, named | own)
        # One that is not used is there for workers that still have the configuration before: the sockets are the same.
        for server in servers if mixed or backend.loopback else ():
            own = {**server, "http_check": mixed and by_http}
            own |= {} if mixed else {"checks": text.Text(""), "check_sni": text.Text("")}
            yield from text.fill_sections(_LOOPBACK, named | own)


def _names(backend: model.NovaBackend, times: model.NovaTimes) -> dict[str, text.Value]:
    mine = f"{MAP_NOVA}{backend.name}|"
    begin = len(mine)
    tls = backend.tls or model.NovaTls("")
    checked = times.check != "off"
    return {
        "set": backend.name,
        "of_set": text.Text(f"{{ var(txn.record) -m beg {text.quote(mine)} }}"),
        "begin": begin,
        "signature_length": _SIGNATURE,
        "rest": text.Text(f"var(txn.record),bytes({begin + _SIGNATURE + 1})"),
        "host": backend.host,
        "refused": refused_counter(backend.name),
        "tls": text.Block(_TLS if backend.tls else ""),
        "check_sni": text.option("check-sni", tls.name if backend.tls and checked else None),
        "checks": text.Block(_CHECKS if checked else ""),
        **text.name_values(asdict(tls), "tls_"),
        "certificates": f"certificates {tls.contents}" if tls.contents else None,
        "client": text.option("crt", tls.client),
        "connect_ms": _ms(times.connect_s),
        "server_ms": _ms(times.response_s),
        "loopback_ms": _ms(times.response_s + _BEYOND_LOOPBACK_S),
        "check_ms": _ms(min(_CHECK_S, times.response_s)),
        "pace": _ms(times.check_interval_s),
        "soon": _ms(min(times.check_interval_s, 0.5)),
        "down": _ms(min(times.check_interval_s, 2.0)),
        "retries": _RETRIES,
    }


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _server_names(
    spec: model.DataplaneSpec, backend: str, server: model.NovaServer
) -> dict[str, text.Value]:
    checked = spec.nova_times.check != "off"
    # HAProxy takes paths of 97 characters, and set and address alone may have 65.
    digest = hashlib.sha256(f"{backend} {server.name}".encode()).hexdigest()[:16]
    loopback = f"nova.{backend}.hop.{server.name}"
    jail = spec.paths.named["jail"]
    return {
        "name": server.name,
        "authority": server.authority,
        "next": bool(server.slot),
        "loopback_name": loopback,
        "socket": f"unix@{jail}/hop-{digest}.sock",
        "inside": f"unix@{'' if spec.paths.chroot else jail}/hop-{digest}.sock",
        "track_loopback": text.option("track", f"{loopback}/{server.name}" if checked else None),
        "track_first": text.option("track", f"nova.{backend}/{server.name}" if checked else None),
    }
