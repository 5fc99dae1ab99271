"""The upstream `nova` in HAProxy's rules: sections that send only signed requests.

Nova gets method, path, query, body and the allow-listed headers of a guest's request unchanged, and four headers that
HAProxy sets from the record. Each endpoint set has two backends. Requests that may be repeated share connections, and a
loopback through HAProxy itself repeats them if an endpoint fails (ADR 53). HAProxy sends all other requests once, each
over a connection of its own: a shared connection may close just then, and HAProxy could not know whether the request
had arrived.

If endpoints of one set have different secrets, as during a replacement, requests pass through another loopback: the
signature depends on the endpoint, and rules run before HAProxy selects one.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Final

from imdsproxy.haproxy.rules import model, text
from imdsproxy.model.wire import MAP_NOVA

_LOOPBACK_SOCKET: Final = re.compile(r"\bhop-[0-9a-f]{16}\.sock\b")
_BLOCKS: Final = text.blocks_of(text.read_template("nova"))
# Read at the start: when a set gets its next secret, an upgrade may have replaced the template file.
_LOOPBACK: Final = text.read_template("nova_loopback")
_AGAIN: Final = text.read_template("nova_again")
AGAIN_SERVERS: Final = ("again-1", "again-2")
_SIGNATURE: Final = 64
"""Characters of a signature."""

RETRIES: Final = 2
_CHECK_S: Final = 3.0
"""A Nova whose workers are all busy answers late; if it takes longer twice in a row, it would keep guests waiting."""
_BEYOND_LOOPBACK_S: Final = 1.0
"""Extra timeout of a request through the loopback, so that the loopback's own timeout expires first."""


def refused_counter(endpoint_set: str) -> str:
    """Return the HAProxy variable that counts 403 answers of the set's Nova, which refuses our signature."""
    return f"proc.nova_refused_{endpoint_set.replace('-', '_')}"


def loopback_sockets(config: str) -> frozenset[str]:
    """Return the file names of the loopback sockets in a configuration."""
    return frozenset(_LOOPBACK_SOCKET.findall(config))


def longest_s(times: model.NovaTimes) -> float:
    """Return the seconds after which HAProxy has Nova's answer or its own error."""
    return (RETRIES + 1) * times.connect_s + times.response_s + _BEYOND_LOOPBACK_S


def set_of_server(backend: str, server: str) -> str | None:
    """Return the endpoint set of a server in HAProxy's counters; `None` for any other server."""
    nova, _, name = backend.partition(".")
    for ending in (model.SAMPLED, model.CHECKED, ".once", ".again"):
        name = name.removesuffix(ending)
    return name if nova == "nova" and "." not in name and server not in AGAIN_SERVERS else None


def names_of_nova(spec: model.DataplaneSpec) -> dict[str, text.Value]:
    """Return the names for `use_nova`, and the counters for `global`.

    The counters begin at 0, so that they are readable before the first count.
    """
    names = [_names(backend, spec.nova_times) for backend in spec.nova]
    return {
        "nova_counters": text.Block("set-var <refused> int(0)\nset-var <turn> int(0)", names),
        "use_for_reads": replace(_BLOCKS["use_for_reads"], rows=names),
        "use_for_others": replace(_BLOCKS["use_for_others"], rows=names),
    }


def nova_backends(spec: model.DataplaneSpec, values: dict[str, text.Value]) -> Iterator[str]:
    """Yield each endpoint set's backends, by checks and repetition, and the loopback of a set with two secrets."""
    kinds = [(kind, once) for kind in ("", model.CHECKED) for once in (False, True)]
    if spec.count_reads:
        kinds.append((model.SAMPLED, False))
    by_http = spec.nova_times.check == "http"
    for backend in spec.nova:
        named = values | _names(backend, spec.nova_times)
        mixed = len({server.slot for server in backend.servers}) > 1
        servers = [_server_names(spec, backend.name, one) for one in backend.servers]
        turns: list[dict[str, text.Value]] = [
            {"name": one.name, "number": number} for number, one in enumerate(backend.servers)
        ]
        named |= {
            **loopback_names(spec, f"{backend.name} again", "again_"),
            "again": replace(_BLOCKS["again"], rows=[{"name": one} for one in AGAIN_SERVERS]),
            "in_turn": replace(_BLOCKS["in_turn"], rows=turns[:-1]),
            "any_endpoint": replace(_BLOCKS["any_endpoint"], rows=turns[-1:] + turns[:-1]),
        }
        all_next = not mixed and bool(backend.servers and backend.servers[0].slot)
        for kind, once in kinds:
            checking = not (once or kind or mixed)
            own: dict[str, text.Value] = {
                "mixed": mixed,
                "checking": checking,
                "checked": kind == model.CHECKED,
                "sampled": kind == model.SAMPLED,
                "kind": text.Text(f"{'.once' if once else ''}{kind}"),
                "once": once,
                "backup": text.Text("" if once else "backup"),
                "next": all_next,
                "server_ms": named["loopback_ms" if mixed else "server_ms"],
                "http_check": checking and by_http,
                "servers": replace(_BLOCKS["servers"], rows=servers),
            }
            yield from text.fill_sections(text.read_template("nova"), named | own)
        own = {"mixed": mixed, "next": all_next, "checking": False, "backup": text.Text("")}
        own |= {
            "server_ms": named["loopback_ms" if mixed else "server_ms"],
            "servers": replace(_BLOCKS["servers"], rows=servers),
        }
        yield from text.fill_sections(_AGAIN, named | own)
        # An unused loopback serves workers that still have the previous configuration: the sockets are the same.
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
        "turn": f"proc.nova_turn_{backend.name.replace('-', '_')}"
        if len(backend.servers) > 1
        else None,
        "endpoints": len(backend.servers),
        "tls": _BLOCKS["tls"] if backend.tls else text.Text(""),
        "check_sni": text.option("check-sni", tls.name if backend.tls and checked else None),
        "checks": _BLOCKS["checks"] if checked else text.Text(""),
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
        "retries": RETRIES,
    }


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _server_names(
    spec: model.DataplaneSpec, backend: str, server: model.NovaServer
) -> dict[str, text.Value]:
    checked = spec.nova_times.check != "off"
    loopback = f"nova.{backend}.hop.{server.name}"
    return {
        "name": server.name,
        "authority": server.authority,
        "next": bool(server.slot),
        "loopback_name": loopback,
        **loopback_names(spec, f"{backend} {server.name}"),
        "track_loopback": text.option("track", f"{loopback}/{server.name}" if checked else None),
        "track_first": text.option("track", f"nova.{backend}/{server.name}" if checked else None),
    }


def loopback_names(
    spec: model.DataplaneSpec, purpose: str, prefix: str = ""
) -> dict[str, text.Value]:
    """Return a loopback socket of HAProxy: the path of its bind, and the path for the worker."""
    # A hash, because HAProxy takes paths of 97 characters, and set and address alone may have 65.
    name = f"hop-{hashlib.sha256(purpose.encode()).hexdigest()[:16]}.sock"
    jail = spec.paths.named["jail"]
    return {
        f"{prefix}socket": f"unix@{jail}/{name}",
        f"{prefix}inside": f"unix@{'' if spec.paths.chroot else jail}/{name}",
    }
