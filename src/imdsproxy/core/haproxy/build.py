"""From `DataplaneSpec` to sections: the life of a request, in HAProxy's rules.

Each rule that guards something says what it guards. The order inside a frontend is the order of
evaluation; rules that cost time stand behind `cache-use`, where repeated reads never come.
"""

from __future__ import annotations

from imdsproxy.core.haproxy.audit import audit_ring
from imdsproxy.core.haproxy.backends import conflict_backend, documents_backend, resolver_backend
from imdsproxy.core.haproxy.counting import (
    COUNTED,
    STICK_COUNTERS,
    counting_tables,
)
from imdsproxy.core.haproxy.frontends import (
    agents_frontend,
    found_frontend,
    guests_frontend,
    unverified_frontend,
    without_guests,
)
from imdsproxy.core.haproxy.guard import GUARDED
from imdsproxy.core.haproxy.limits import (
    limit_sections,
    local_peer,
)
from imdsproxy.core.haproxy.model import DataplaneSpec, Section, Words
from imdsproxy.core.haproxy.nova import (
    nova_backends,
    nova_globals,
)
from imdsproxy.core.haproxy.watching import watch_ring
from imdsproxy.core.wire import PROBE_INSTANCE, PROBE_PATH

__all__ = ["build_sections"]


def build_sections(spec: DataplaneSpec) -> tuple[Section, ...]:
    """The whole configuration; the same spec always gives the same sections."""
    sections = [_global(spec), _defaults(spec)]
    sections += limit_sections(spec)
    if spec.limits.cache_mb:
        sections.append(_cache(spec))
    if spec.watched:
        sections.append(watch_ring(audited=bool(spec.audit)))
    if spec.audit:
        sections.append(audit_ring(spec.paths.audit))
    if spec.binds:
        sections.append(guests_frontend(spec))
    if spec.unverified:
        sections.append(unverified_frontend(spec))
    if spec.unix is not None:
        sections.append(agents_frontend(spec))
    if not spec.binds and spec.unix is None:
        sections.append(without_guests(spec))
    sections += [found_frontend(spec), documents_backend(spec), documents_backend(spec, GUARDED)]
    if spec.count_reads:
        sections.append(documents_backend(spec, COUNTED))
    sections += [resolver_backend(spec), conflict_backend(), _probe(spec)]
    sections += nova_backends(spec)
    sections += counting_tables()
    if spec.exporter is not None:
        sections.append(_exporter(spec.exporter))
    return tuple(sections)


def _global(spec: DataplaneSpec) -> Section:
    lines: list[Words] = [
        ("nbthread", str(spec.limits.nbthread)),
        ("maxconn", str(spec.limits.maxconn)),
        ("hard-stop-after", f"{spec.limits.hard_stop_after_s}s"),
        # Whoever is older is ended at once, requests that it still works on included (ADR 0022).
        ("mworker-max-reloads", "20"),
        ("tune.maxrewrite", "1024"),
        ("tune.stick-counters", str(STICK_COUNTERS)),
        *local_peer(spec),
        *nova_globals(spec),
    ]
    if spec.user is not None:
        lines.append(("user", spec.user))
    if spec.group is not None:
        lines.append(("group", spec.group))
    if spec.paths.jail is not None:
        lines.append(("chroot", spec.paths.jail))
    return Section(("global",), tuple(lines))


def _cache(spec: DataplaneSpec) -> Section:
    # HAProxy refuses an object size above half of the cache.
    largest = min(spec.limits.max_object_bytes, spec.limits.cache_mb * 1024 * 1024 // 2)
    return Section(
        ("cache", "documents"),
        (
            ("total-max-size", str(spec.limits.cache_mb)),
            ("max-object-size", str(largest)),
            ("max-age", "86400"),
        ),
    )


def _defaults(spec: DataplaneSpec) -> Section:
    return Section(
        ("defaults",),
        (
            ("mode", "http"),
            ("timeout", "connect", "2s"),
            ("timeout", "client", "30s"),
            ("timeout", "server", "30s"),
            ("timeout", "queue", "2s"),
            ("timeout", "http-request", "10s"),
            ("timeout", "tarpit", "1s"),
            ("timeout", "http-keep-alive", "15s"),
            # Without it a reload cuts kept connections off between two requests.
            ("option", "idle-close-on-response"),
            # WSGI upstreams read X_Instance_ID as X-Instance-ID.
            ("option", "http-restrict-req-hdr-names", "delete"),
            ("option", "socket-stats"),
            # A guest must never see 502 or 504: cloud-init's OpenStack source waits on 503 only.
            *(("errorfile", code, spec.paths.unavailable) for code in ("502", "503", "504")),
        ),
    )


def _probe(spec: DataplaneSpec) -> Section:
    alive: Words = (
        "http-request", "return", "status", "200", "content-type", "text/plain", "string", "ok",
    )  # fmt: skip
    document: tuple[Words, ...] = (
        (*alive, "unless", "{", "path", PROBE_PATH, "}"),
        # A revision that no record has: nothing is cached, and the file is read each time.
        ("http-request", "set-var(txn.record)", f"str({PROBE_INSTANCE}|-)"),
        ("default_backend", "documents"),
    )
    return Section(
        ("frontend", "probe"),
        (
            ("bind", f"unix@{spec.paths.probe}", "name", "probe", "mode", "600", "proto", "h1"),
            *(document if spec.paths.documents else (alive,)),
        ),
    )


def _exporter(listen: str) -> Section:
    return Section(
        ("frontend", "exporter"),
        (
            ("bind", listen, "name", "exporter", "proto", "h1", "maxconn", "16"),
            # All listeners of 5,000 networks are 8 MB and 0.3 s of the only thread.
            ("http-request", "set-query", "scope=global&scope=frontend&scope=backend"),
            (
                "http-request",
                "use-service",
                "prometheus-exporter",
                "if",
                "{",
                "path",
                "/metrics",
                "}",
            ),
            ("http-request", "return", "status", "404"),
        ),
    )
