"""Configuration of one network's own proxy in its namespace: Neutron's agents start one for each network.

The proxy sends its guests' requests to one unix socket, with the id of the network or router and the guest's address as
headers. The listener there knows nothing else about them. Unless a comment gives a reason, the configuration equals
Neutron's own (`neutron/agent/metadata/driver_base.py`): a transparent proxy with the same times, limits and log.
"""

import re
from dataclasses import asdict, dataclass
from typing import Final

from imdsproxy.errors import RequestRefused
from imdsproxy.haproxy.rules.names import CONSTANTS
from imdsproxy.haproxy.rules.text import Value, fill_sections, name_values, read_template, render

_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE | re.ASCII)

# Reasons for some of the headers below:
# - connection: a receiver that obeys RFC 9110 section 7.6.1 would take named headers out of the request again.
# - upgrade: an answer 101 makes a tunnel, in which a guest would speak to the socket without these rules.
# - x-imdsproxy-.*: between imdsproxy's own processes.
_FORGEABLE: Final = (
    "connection|upgrade|x-forwarded-for|x-imdsproxy-.*|x-instance-id.*|x-metadata-provider.*|x-neutron-.*"
    "|x-ovn-network-id|x-tenant-id"
)
"""Headers that a guest must not send, as a regular expression on lower-case names."""


@dataclass(frozen=True, slots=True)
class NamespaceProxySpec:
    """Complete input of the configuration file.

    Attributes:
        header: Name of the header that gives the agent behind the socket the id of the guests' network, or of their
            networks' router.
        upstream: Absolute path of the unix socket for requests.
        port: TCP port, at every address of the namespace.
        user: Account for HAProxy after its binds; `None` keeps the account that starts it.
        group: Group for HAProxy after its binds; `None` keeps the group that starts it.
        syslog: Socket for the request log; `None` for no log.
        facility: Syslog facility, by HAProxy's name.
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
    """Render the configuration file; raise `UnquotableWord` if a path or name holds a control character."""
    own: dict[str, Value] = {
        "level": "debug" if spec.debug else "info",
        "forgeable": f"^(?:{_FORGEABLE})$",
        "upstream": f"unix@{spec.upstream}",
    }
    return render(
        fill_sections(read_template("namespace_proxy"), CONSTANTS | name_values(asdict(spec)) | own)
    )


def parse_resource(network_id: str | None, router_id: str | None) -> tuple[str, str]:
    """Return the header that names the proxy's network or router, and its uuid.

    Raises `RequestRefused` if both ids are given, or none, or the id is not a UUID.
    """
    if network_id is not None and router_id is not None:
        raise RequestRefused(
            "a network's id and a router's id are given, and a proxy serves one of the two",
            hint="give --network-id or --router-id",
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
    """Check an id and return it unchanged: agents search the command line for exactly this text.

    Raises `RequestRefused` if the id is not a UUID in its usual form, and may hold characters that a path or header
    must not have.
    """
    if _UUID.fullmatch(text) is None:
        raise RequestRefused(
            f"{text!r} is not a UUID", hint="a UUID looks like 8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
        )
    return text
