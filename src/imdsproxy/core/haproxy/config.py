"""The whole configuration of a `DataplaneSpec`.

The order inside a frontend is the order of evaluation; rules that cost time stand behind `cache-use`, where repeated
reads never come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from imdsproxy.core.haproxy.backends import BACKENDS, names_of_backends
from imdsproxy.core.haproxy.counting import COUNTING_TABLES
from imdsproxy.core.haproxy.frontends import FRONTENDS, names_of_frontends
from imdsproxy.core.haproxy.limits import LIMIT_RULES
from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.names import form_of
from imdsproxy.core.haproxy.nova import names_of_nova, nova_backends
from imdsproxy.core.haproxy.request_log import LOG_RULES
from imdsproxy.core.haproxy.text import Form, Text, render

_FIRST: Final = """
global
    nbthread <nbthread>
    maxconn <maxconn>
    # HAProxy makes room for connections, binds and pipes (two descriptors each), not for namespaces; we use no pipes.
    # Without room it ends itself (BUG_ON) at its next connection.
    [namespaces] maxpipes <pipes>
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
    chroot <jail>

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
    bind unix@<probe> name probe mode 600 proto h1
    [!documents] http-request return status 200 content-type text/plain string ok
    [documents] http-request return status 200 content-type text/plain string ok unless { path <probe_path> }
    # A revision that no record has: nothing is cached, and the file is read each time.
    [documents] http-request set-var(txn.record) str(<probe_instance>|-)
    [documents] default_backend documents
"""

_EXPORTER: Final = """
[exporter] frontend exporter
    bind <listen> name exporter proto h1 maxconn 16
    # All listeners of 5,000 networks are 8 MB and 0.3 s of the only thread.
    http-request set-query 'scope=global&scope=frontend&scope=backend'
    http-request use-service prometheus-exporter if { path /metrics }
    http-request return status 404"""


def render_config(spec: DataplaneSpec) -> str:
    """The configuration file's text: the same for the same spec, whatever the order of its binds.

    Raises:
        UnquotableWord: A name or path holds a control character.
    """
    form = form_of(spec)
    names = names_of_frontends(spec) | names_of_backends(spec, form) | names_of_nova(spec, form)
    return render(_sections(spec, Form({**form.values, **names})))


def _sections(spec: DataplaneSpec, form: Form) -> Iterator[Text]:
    for text in (_FIRST, LIMIT_RULES, _CACHE, LOG_RULES, FRONTENDS, BACKENDS, _PROBE):
        yield from form.sections(text)
    yield from nova_backends(spec, form)
    for text in (COUNTING_TABLES, _EXPORTER):
        yield from form.sections(text)
