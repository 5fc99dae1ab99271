"""The whole configuration of a `DataplaneSpec`.

The order inside a frontend is the order of evaluation; rules that cost time stand behind `cache-use`, where repeated
reads never come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from imdsproxy.core.haproxy.backends import documents_backend, resolver_backend
from imdsproxy.core.haproxy.counting import STICK_COUNTERS, counting_tables
from imdsproxy.core.haproxy.frontends import (
    LOOK_UP,
    agents_frontend,
    found_frontend,
    guests_frontend,
    unverified_frontend,
)
from imdsproxy.core.haproxy.limits import limit_sections
from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.names import CHECKED, SAMPLED, form_of
from imdsproxy.core.haproxy.nova import nova_backends, nova_counters
from imdsproxy.core.haproxy.request_log import log_rings
from imdsproxy.core.haproxy.text import Form, Text, Word, render
from imdsproxy.core.wire import PROBE_INSTANCE, PROBE_PATH

_GLOBAL: Final = """
    nbthread <nbthread>
    maxconn <maxconn>
    # HAProxy makes room for connections, binds and pipes (two descriptors each), not for namespaces; we use no pipes.
    # Without room it ends itself (BUG_ON) at its next connection.
    [namespaces] maxpipes <pipes>
    hard-stop-after <hard_stop_after_s>s
    # HAProxy ends older workers at once, requests that they still work on included (ADR 22).
    mworker-max-reloads 20
    tune.maxrewrite 1024
    tune.stick-counters <stick_counters>
    # Otherwise it is the host's name, which may change.
    [fair] localpeer imdsproxy
    # Hosts that were set up together would ask Nova together.
    [nova] spread-checks 25
    <nova_counters>
    <user>
    <group>
    chroot <jail>
"""

_DEFAULTS: Final = """
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
    total-max-size <cache_mb>
    # HAProxy refuses an object size above half of the cache.
    max-object-size <largest_cached>
    max-age 86400
"""

_PROBE: Final = """
    bind unix@<probe> name probe mode 600 proto h1
    [!documents] http-request return status 200 content-type text/plain string ok
    [documents] http-request return status 200 content-type text/plain string ok unless { path <probe_path> }
    # A revision that no record has: nothing is cached, and the file is read each time.
    [documents] http-request set-var(txn.record) str(<probe_instance>|-)
    [documents] default_backend documents
"""

_EXPORTER: Final = """
    bind <listen> name exporter proto h1 maxconn 16
    # All listeners of 5,000 networks are 8 MB and 0.3 s of the only thread.
    http-request set-query 'scope=global&scope=frontend&scope=backend'
    http-request use-service prometheus-exporter if { path /metrics }
    http-request return status 404
"""


def render_config(spec: DataplaneSpec) -> str:
    """The configuration file's text: the same for the same spec, whatever the order of its binds.

    Raises:
        UnquotableWord: A name or path holds a control character.
    """
    return render(_sections(spec, form_of(spec)))


def _sections(spec: DataplaneSpec, form: Form) -> Iterator[Text]:
    yield form.section(
        "global", _GLOBAL, stick_counters=STICK_COUNTERS, nova_counters=nova_counters(spec, form)
    )
    yield form.section("defaults", _DEFAULTS)
    if spec.limits.fair:
        yield from limit_sections(form)
    if spec.limits.cache_mb:
        yield form.section("cache documents", _CACHE)
    yield from log_rings(spec, form)
    if spec.binds:
        yield guests_frontend(spec, form)
    if spec.unverified:
        yield unverified_frontend(spec, form)
    if spec.unix is not None:
        yield agents_frontend(spec, spec.unix, form)
    if not spec.binds and spec.unix is None:
        # HAProxy knows a map only by a rule that uses it, and records come before listeners: without this, none could
        # be taken in.
        yield form.section("backend records", LOOK_UP)
    yield found_frontend(spec, form)
    for kind in ("", CHECKED, *((SAMPLED,) if spec.count_reads else ())):
        yield documents_backend(spec, form, kind)
    yield resolver_backend(spec, form)
    # For an address that two instances claim: never a guess.
    yield form.section("backend conflict", "http-request return status 503 hdr Retry-After 5")
    yield form.section(
        "frontend probe",
        _PROBE,
        documents=bool(spec.paths.documents),
        probe_path=Word(PROBE_PATH),
        probe_instance=Word(PROBE_INSTANCE),
    )
    yield from nova_backends(spec, form)
    yield from counting_tables(form)
    if spec.exporter is not None:
        yield form.section("frontend exporter", _EXPORTER, listen=Word(spec.exporter))
