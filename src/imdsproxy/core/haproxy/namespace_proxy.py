"""The configuration of one network's own proxy, in its namespace: what an agent of Neutron spawns for each.

Its guests' requests go to one unix socket, with the network's or the router's id and the guest's address as
headers, which is all that the listener there knows of them. Unless a comment gives a reason it is as Neutron's own
(`neutron/agent/metadata/driver_base.py`): a transparent proxy with the same times, limits and log.
"""

import re
from dataclasses import asdict, dataclass
from typing import Final

from imdsproxy.core.haproxy.names import CONSTANTS
from imdsproxy.core.haproxy.text import Value, fill_sections, name_values, read_template, render
from imdsproxy.errors import RequestRefused

DEFAULT_PORT: Final = 9697
DEFAULT_STATE_PATH: Final = "/var/lib/neutron"
MAX_PORT: Final = 65535

_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)

# Those below that need a reason:
# - connection: a receiver that obeys RFC 9110 section 7.6.1 would take named headers out of the request again.
# - upgrade: an answer 101 makes a tunnel, in which a guest would speak to the socket without these rules.
# - x-imdsproxy-.*: between imdsproxy's own processes.
_FORGEABLE: Final = (
    "connection|upgrade|x-forwarded-for|x-imdsproxy-.*|x-instance-id.*|x-metadata-provider.*|x-neutron-.*"
    "|x-ovn-network-id|x-tenant-id"
)
"""Headers that a guest must not send, as a regular expression on lower-case names."""

_FACILITIES: Final = (
    "kern user mail daemon auth syslog lpr news uucp cron auth2 ftp ntp audit alert cron2 "
    "local0 local1 local2 local3 local4 local5 local6 local7"
)
FACILITIES: Final = frozenset(_FACILITIES.split())
"""The names that HAProxy has for the facilities of syslog (configuration manual, `log`)."""


@dataclass(frozen=True, slots=True)
class NamespaceProxySpec:
    """Everything that the file is a function of.

    Attributes:
        header: What names the guests' network, or the router that their networks are on, to the agent behind the
            socket.
        uuid: Of that network or router.
        upstream: Absolute path of the unix socket that requests go to.
        port: TCP port, at every address of the namespace.
        dual_stack: Listen for IPv6 too.
        user: Name of the account that HAProxy takes once it listens; `None` keeps the one it is started by.
        group: The same of the group.
        syslog: Socket that requests are logged to; `None` for no log.
        facility: Syslog's, by HAProxy's name.
        debug: Log at the level debug instead of info.
    """

    header: str
    uuid: str
    upstream: str
    port: int
    dual_stack: bool
    user: str | None = None
    group: str | None = None
    syslog: str | None = None
    facility: str = "local0"
    debug: bool = False


def render_namespace_proxy(spec: NamespaceProxySpec) -> str:
    """The file's text.

    Raises:
        UnquotableWord: A path or name holds a control character.
    """
    own: dict[str, Value] = {
        "level": "debug" if spec.debug else "info",
        "forgeable": f"^(?:{_FORGEABLE})$",
        "upstream": f"unix@{spec.upstream}",
    }
    return render(
        fill_sections(read_template("namespace_proxy"), CONSTANTS | name_values(asdict(spec)) | own)
    )


def parse_resource(network_id: str | None, router_id: str | None) -> tuple[str, str]:
    """Whose proxy it is: the header that names the network or the router, and its uuid.

    Raises:
        RequestRefused: Both ids are there, or none, or the one is no UUID.
    """
    if network_id is not None and router_id is not None:
        raise RequestRefused(
            "a network's id and a router's id are given: a proxy is for one of them",
            hint="start it with --network-id or with --router-id",
        )
    if network_id is not None:
        return "X-Neutron-Network-ID", parse_uuid(network_id)
    if router_id is not None:
        return "X-Neutron-Router-ID", parse_uuid(router_id)
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
