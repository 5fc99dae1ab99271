"""The whole configuration of a `DataplaneSpec`.

The order inside a frontend is the order of evaluation; rules that cost time stand behind `cache-use`, where repeated
reads never come.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from imdsproxy.core.haproxy.backends import BACKENDS, names_of_backends
from imdsproxy.core.haproxy.counting import COUNTING_TABLES, read_counter
from imdsproxy.core.haproxy.frontends import FRONTENDS, names_of_frontends
from imdsproxy.core.haproxy.limits import LIMIT_RULES, names_of_limits
from imdsproxy.core.haproxy.model import DataplaneSpec, count_namespaces
from imdsproxy.core.haproxy.names import CONSTANTS
from imdsproxy.core.haproxy.nova import names_of_nova, nova_backends
from imdsproxy.core.haproxy.request_log import LOG_RULES, names_of_log
from imdsproxy.core.haproxy.text import Text, Value, fill_sections, name_values, option, render

_SHORT_PER_MB: Final = 256
"""Short documents for each MiB of the cache: with its key an entry is below 1 kB."""

_FIRST: Final = """
global
    nbthread <nbthread>
    maxconn <maxconn>
    # HAProxy makes room for connections, binds and pipes (two descriptors each), not for namespaces; we use no pipes.
    # Without room it ends itself (BUG_ON) at its next connection.
    maxpipes <pipes>
    hard-stop-after <hard_stop_after_s>s
    # HAProxy ends older workers at once, requests that they still work on included (ADR 22).
    mworker-max-reloads 20
    tune.maxrewrite 1024
    # HAProxy's default is three for each request; counting of reads takes two more.
    tune.stick-counters 5
    # Otherwise it is the host's name, which may change.
    [fair] localpeer imdsproxy
    # Hosts that were set up together would ask Nova together.
    [nova] spread-checks 25
    <nova_counters>
    <user>
    <group>
    [chroot] chroot <jail>

defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    timeout queue 2s
    timeout http-request 10s
    timeout tarpit 1s
    timeout http-keep-alive 15s
    # Without it a reload cuts kept connections off between two requests.
    option idle-close-on-response
    # WSGI upstreams read X_Instance_ID as X-Instance-ID.
    option http-restrict-req-hdr-names delete
    option socket-stats
    # A guest must never see 502 or 504: cloud-init's OpenStack source waits on 503 only.
    errorfile 502 <unavailable>
    errorfile 503 <unavailable>
    errorfile 504 <unavailable>
"""

_CACHE: Final = """
[cache] cache documents
    total-max-size <cache_mb>
    # HAProxy refuses an object size above half of the cache.
    max-object-size <largest_cached>
    max-age 86400
"""

_PROBE: Final = """
frontend probe
    bind unix@<probe_socket> name probe mode 600 proto h1
    [!documents] http-request return status 200 content-type text/plain string ok
    [documents] http-request return status 200 content-type text/plain string ok unless { path <probe_path> }
    # A revision that no record has: nothing is cached, and the file is read each time.
    [documents] http-request set-var(txn.record) str(<probe_instance>|-)
    [documents] default_backend documents
"""

_EXPORTER: Final = """
[exporter] frontend exporter
    bind <exporter> name exporter proto h1 maxconn 16
    # All listeners of 5,000 networks are 8 MB and 0.3 s of the only thread.
    http-request set-query 'scope=global&scope=frontend&scope=backend'
    http-request use-service prometheus-exporter if { path /metrics }
    http-request return status 404"""


def render_config(spec: DataplaneSpec) -> str:
    """The configuration file's text: the same for the same spec, whatever the order of its binds.

    Raises:
        UnquotableWord: A name or path holds a control character.
    """
    return render(_sections(spec, CONSTANTS | _values(spec)))


def _sections(spec: DataplaneSpec, values: dict[str, Value]) -> Iterator[str]:
    for text in (_FIRST, LIMIT_RULES, _CACHE, LOG_RULES, FRONTENDS, BACKENDS, _PROBE):
        yield from fill_sections(text, values)
    yield from nova_backends(spec, values)
    for text in (COUNTING_TABLES, _EXPORTER):
        yield from fill_sections(text, values)


def _values(spec: DataplaneSpec) -> dict[str, Value]:
    """What templates may name beside `CONSTANTS`: the fields of `Limits`, the paths, and what is made of the rest."""
    sizes = spec.limits
    namespaces = count_namespaces((*spec.binds, *spec.unverified))
    by_chance = f"{{ rand({spec.count_reads}) 0 }}" if spec.count_reads > 1 else ""
    return (
        name_values(asdict(sizes))
        | name_values(spec.paths.named)
        | names_of_limits(sizes)
        | names_of_log(spec)
        | names_of_frontends(spec)
        | names_of_backends(spec)
        | names_of_nova(spec)
        | {
            "nova": bool(spec.nova),
            "cache": sizes.cache_mb > 0,
            "counts_reads": spec.count_reads > 0,
            # In front of Nova most requests have nothing to do with documents of ours.
            "keeps_short": sizes.cache_mb > 0 and not spec.nova,
            "short_slots": sizes.cache_mb * _SHORT_PER_MB,
            "largest_cached": min(sizes.max_object_bytes, sizes.cache_mb * 1024 * 1024 // 2),
            "pipes": (namespaces + 1) // 2 or None,
            "chroot": spec.paths.chroot,
            "user": option("user", spec.user),
            "group": option("group", spec.group),
            # `policy_share` has something to count of a request.
            "without_own_limits": Text(f"!{CONSTANTS['has_own_limits']}" if sizes.fair else ""),
            # Of reads without a token one in so many is counted, and chance has chosen this one.
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
