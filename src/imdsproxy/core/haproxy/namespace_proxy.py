"""The configuration of one network's own proxy, in its namespace: what an agent of Neutron spawns for each.

Its guests' requests go to one unix socket, with the network's or the router's id and the guest's address as
headers, which is all that the listener there knows of them. Unless a comment gives a reason it is as Neutron's own
(`neutron/agent/metadata/driver_base.py`): a transparent proxy with the same times, limits and log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from imdsproxy.core.haproxy.quoting import render_word
from imdsproxy.core.haproxy.rules import METHODS, UNDONE
from imdsproxy.core.haproxy.section import add_banner
from imdsproxy.core.wire import RETRY_AFTER_S
from imdsproxy.errors import RequestRefused

DEFAULT_PORT: Final = 9697
DEFAULT_STATE_PATH: Final = "/var/lib/neutron"
MAX_PORT: Final = 65535

_HEADERS: Final = {"network": "X-Neutron-Network-ID", "router": "X-Neutron-Router-ID"}
_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)
_ALERT: Final = re.compile(r"\[ALERT\]\s+(?:\S+\s+)?\(\d+\) : (.*)")

# Those below that need a reason:
# - connection: a receiver that obeys RFC 9110 section 7.6.1 would take named headers out of the request again.
# - upgrade: an answer 101 makes a tunnel, in which a guest would speak to the socket without these rules.
# - x-imdsproxy-.*: between imdsproxy's own processes.
_FORGEABLE: Final = (
    "connection|upgrade|x-forwarded-for|x-imdsproxy-.*|x-instance-id.*|x-metadata-provider.*|x-neutron-.*"
    "|x-ovn-network-id|x-tenant-id"
)
"""Headers that a guest must not send, as a regular expression on lower-case names."""

# Where Neutron's differs, or for a reason that the text does not show:
# - noreuseport: two that share a port would each get some of the requests. The second shall fail.
# - log-tag: the prefix by which Debian's rsyslog files it in /var/log/haproxy.log.
# - http-server-close: a kept connection that ends under a request would cost the guest its own.
# - http-restrict-req-hdr-names: WSGI upstreams read X_Instance_ID as X-Instance-ID.
# - METH_CONNECT, status 101: a tunnel, as that of an upgrade.
# - 403: a token that another program forwarded, however its path is spelled.
# - X-Forwarded-By: the guest's X-Forwarded-For is replaced below; a receiver's `refuse_forwarded` looks at this.
# - ::ffff:0:0/96: on a socket for both families the kernel has IPv4 peers as ::ffff:a.b.c.d.
# - set-status 503: what the upstream itself answers is passed on. Of the rest a guest sees 503 only, which
#   cloud-init's OpenStack source waits on.
_TEMPLATE: Final = """\
global
{process}  maxconn 1024
  nbthread 1
  noreuseport

defaults
  mode http
{log}  option http-server-close
  option http-restrict-req-hdr-names delete
  retries 3
  timeout http-request 30s
  timeout connect 30s
  timeout client 32s
  timeout server 32s
  timeout http-keep-alive 30s
  http-error status 502 hdr Retry-After {retry} hdr Cache-Control no-store
  http-error status 503 hdr Retry-After {retry} hdr Cache-Control no-store
  http-error status 504 hdr Retry-After {retry} hdr Cache-Control no-store

listen metadata
  bind {bind} proto h1
  http-request return status 405 hdr Allow {methods} if METH_CONNECT
  http-request set-var(txn.path) {path} if {{ method PUT }}
  http-request return status 403 if {{ method PUT }} {forwarded} {{ var(txn.path) -m end /api/token /api/token/ }}
  http-request set-header X-Forwarded-By guest if {forwarded}
  http-request del-header {forgeable} -m reg
  http-request set-header {header} {uuid}
  http-request set-header X-Forwarded-For %[src]
  http-request set-header X-Forwarded-For %[src,regsub(^::ffff:,)] if {{ src ::ffff:0:0/96 }}
  http-response deny deny_status 502 if {{ status 101 }}
  http-response set-var(txn.answered) bool(true)
  http-after-response set-status 503 if {{ status 502 504 }} !{{ var(txn.answered) -m bool }}
  server metadata {upstream}
"""
_LOG: Final = """\
  log global
  option httplog
  option dontlognull
"""

_FACILITIES: Final = (
    "kern user mail daemon auth syslog lpr news uucp cron auth2 ftp ntp audit alert cron2 "
    "local0 local1 local2 local3 local4 local5 local6 local7"
)
FACILITIES: Final = frozenset(_FACILITIES.split())
"""The names that HAProxy has for the facilities of syslog (configuration manual, `log`)."""


@dataclass(frozen=True, slots=True)
class Resource:
    """What the guests of one proxy have in common: their network, or a router that their networks are on."""

    kind: Literal["network", "router"]
    uuid: str

    @property
    def header(self) -> str:
        """The header that names it, as the agent behind the socket knows it."""
        return _HEADERS[self.kind]


@dataclass(frozen=True, slots=True)
class Syslog:
    """Where requests are logged."""

    socket: str = "/dev/log"
    facility: str = "local0"
    level: Literal["info", "debug"] = "info"


@dataclass(frozen=True, slots=True)
class NamespaceProxySpec:
    """Everything that the file is a function of.

    Attributes:
        upstream: Absolute path of the unix socket that requests go to.
        port: TCP port, at every address of the namespace.
        dual_stack: Listen for IPv6 too.
        user: Name of the account that HAProxy takes once it listens; `None` keeps the one it is started by.
        group: The same of the group.
        syslog: `None` for no log.
    """

    resource: Resource
    upstream: str
    port: int
    dual_stack: bool
    user: str | None = None
    group: str | None = None
    syslog: Syslog | None = None


def render_namespace_proxy(spec: NamespaceProxySpec) -> str:
    """The file's text.

    Raises:
        UnquotableWord: A path or name holds a control character.
    """
    process: list[str] = []
    if (log := spec.syslog) is not None:
        process += [
            f"log {render_word(log.socket)} {log.facility} {log.level}",
            f"log-tag haproxy-metadata-proxy-{spec.resource.uuid}",
        ]
    if spec.user is not None:
        process.append(f"user {render_word(spec.user)}")
    if spec.group is not None:
        process.append(f"group {render_word(spec.group)}")
    return add_banner(
        _TEMPLATE.format(
            process="".join(f"  {line}\n" for line in process),
            log=_LOG if log else "",
            retry=RETRY_AFTER_S,
            bind=f":::{spec.port} v4v6" if spec.dual_stack else f"0.0.0.0:{spec.port}",
            methods=render_word(", ".join(METHODS)),
            path=render_word(UNDONE),
            forwarded="{ req.fhdr_cnt(x-forwarded-for) gt 0 }",
            forgeable=render_word(f"^(?:{_FORGEABLE})$"),
            header=spec.resource.header,
            uuid=spec.resource.uuid,
            upstream=render_word(f"unix@{spec.upstream}"),
        )
    )


def parse_resource(network_id: str | None, router_id: str | None) -> Resource:
    """Whose proxy it is.

    Raises:
        RequestRefused: Both ids are there, or none, or the one is no UUID.
    """
    if network_id is not None and router_id is not None:
        raise RequestRefused(
            "a network's id and a router's id are given: a proxy is for one of them",
            hint="start it with --network-id or with --router-id",
        )
    if network_id is not None:
        return Resource("network", parse_uuid(network_id))
    if router_id is not None:
        return Resource("router", parse_uuid(router_id))
    raise RequestRefused(
        "the id of a network or of a router is needed",
        hint="give --network-id UUID or --router-id UUID",
    )


def parse_uuid(text: str) -> str:
    """The id as it is written: agents look for exactly that in the command line.

    Raises:
        RequestRefused: It is no UUID in its usual form, and so may hold what a path or a header must not.
    """
    if _UUID.fullmatch(text) is None:
        raise RequestRefused(
            f"{text!r} is no UUID", hint="it is written as 8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
        )
    return text


def parse_port(text: str | int) -> int:
    """A TCP port.

    Raises:
        RequestRefused: It is none.
    """
    digits = str(text)
    if _PORT.fullmatch(digits) is None or not 0 < int(digits) <= MAX_PORT:
        raise RequestRefused(
            f"{digits!r} is no port to listen on", hint=f"a port is a number from 1 to {MAX_PORT}"
        )
    return int(digits)


def parse_facility(text: str) -> str:
    """HAProxy's name of a syslog facility; `LOG_LOCAL3`, as Neutron has it, is `local3`.

    Raises:
        RequestRefused: HAProxy has none of that name.
    """
    name = text.lower().removeprefix("log_")
    # POSIX has a second name for one of them, which HAProxy has not.
    name = {"authpriv": "auth2"}.get(name, name)
    if name not in FACILITIES:
        raise RequestRefused(
            f"{text!r} is no facility of syslog",
            hint="they are called LOG_USER, LOG_LOCAL0 and so on",
        )
    return name


def parse_failure(errors: str) -> str:
    """Why HAProxy failed, in one line: its alerts, or all of its standard error where there are none."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    alerts = [found[1] for line in lines if (found := _ALERT.fullmatch(line)) is not None]
    return "; ".join(dict.fromkeys(alerts or lines))
