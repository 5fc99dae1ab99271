"""The NoCloud dialect: the four files that cloud-init reads below `http://169.254.169.254/nocloud/`.

All four always exist, empty if there is no data: a 404 on an optional file delays the boot by ten seconds.
"""

import json
import re
from typing import Final

from imdsproxy.documents.compiled import DocumentPort, DocumentRecord
from imdsproxy.documents.dialects import tree
from imdsproxy.documents.dialects.tree import JsonValue, Node

NOCLOUD_ROOT: Final = "nocloud"
"""First name in the paths of the tree."""

_YAML: Final = b"text/yaml; charset=utf-8"
_PLAIN: Final = re.compile(r"[a-z][a-z-]*")
_UNPRINTABLE: Final = re.compile(
    r"[^\t\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
"""Characters that YAML 1.2 §5.1 calls not printable, and line ends and the byte order mark."""


def _make_meta_data(record: DocumentRecord, _version: str) -> Node:
    optional: dict[str, JsonValue] = {
        "availability-zone": record["availability_zone"],
        "instance-type": record["instance_type"],
        "public-keys": {**tree.named_keys(record)},
        "tags": {**dict(record["tags"])},
    }
    given: dict[str, JsonValue] = {name: value for name, value in optional.items() if value}
    names = {"instance-id": record["uuid"], "local-hostname": record["hostname"]}
    return Node(render_yaml({**names, **given}), _YAML)


def _make_network_config(record: DocumentRecord, _version: str) -> Node:
    """Build version 2, matched by MAC; empty if no port has a MAC.

    The document has no `set-name`: the guest keeps its device names. By its metric, a further port's default route
    yields to the first port's.
    """
    ethernets: dict[str, JsonValue] = {
        f"interface{number}": _ethernet(port, mac, metric=100 * (number + 1))
        for number, port, mac in tree.ports_with_mac(record)
    }
    return Node(render_yaml({"version": 2, "ethernets": ethernets} if ethernets else {}), _YAML)


def _ethernet(port: DocumentPort, mac: str, *, metric: int) -> dict[str, JsonValue]:
    known = [address for address in port["addresses"] if address["cidr"] is not None]
    unknown = {tree.is_ipv6(address) for address in port["addresses"] if address["cidr"] is None}
    result: dict[str, JsonValue] = {"match": {"macaddress": mac}}
    if port["mtu"] is not None:
        result["mtu"] = port["mtu"]
    result["dhcp4"] = False in unknown or not port["addresses"]
    result["dhcp6"] = True in unknown
    if known:
        result["addresses"] = [f"{a['ip']}/{str(a['cidr']).rpartition('/')[2]}" for a in known]
    gateways = {tree.is_ipv6(a): a["gateway"] for a in reversed(known) if a["gateway"] is not None}
    if gateways:
        result["routes"] = [
            {"to": f"{tree.ANYWHERE[ipv6]}/0", "via": gateway, "metric": metric}
            for ipv6, gateway in sorted(gateways.items())
        ]
    if servers := dict.fromkeys(server for a in known for server in a["dns"]):
        result["nameservers"] = {"addresses": list(servers)}
    return result


FILES: Final[tree.Rows] = (
    ("", "meta-data", _make_meta_data),
    ("", "user-data", lambda record, _: Node(record["user_data"] or b"", tree.BINARY)),
    (
        "",
        "vendor-data",
        lambda record, _: Node(tree.vendor_text(record["vendor_data"]), tree.BINARY),
    ),
    ("", "network-config", _make_network_config),
)
"""Everything below `/nocloud`, which has no versions."""


def render_yaml(document: dict[str, JsonValue]) -> bytes:
    """Render a mapping as YAML, one line for each member: values are JSON, without characters that YAML forbids."""
    return "\n".join(
        f"{key if _PLAIN.fullmatch(key) else _flow(key)}: {_flow(value)}"
        for key, value in document.items()
    ).encode("utf-8")


def _flow(value: JsonValue) -> str:
    return _UNPRINTABLE.sub(_escape, json.dumps(value, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xD800 <= code <= 0xDFFF:  # noqa: PLR2004 - a lone surrogate has no form in YAML
        return "\\uFFFD"
    return f"\\u{code:04X}"
