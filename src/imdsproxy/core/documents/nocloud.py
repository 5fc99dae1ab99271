"""The NoCloud dialect: the four files that cloud-init reads below `http://169.254.169.254/nocloud/`.

All four are always there, if need be empty: a 404 on an optional one costs a boot ten seconds.
"""

from __future__ import annotations

import json
import re
from typing import Final

from imdsproxy.core.compiled import DocumentRecord
from imdsproxy.core.documents.ec2 import named_keys
from imdsproxy.core.documents.network import render_network_config
from imdsproxy.core.documents.tree import BINARY, JsonValue, Node, listing, vendor_text

NOCLOUD_ROOT: Final = "nocloud"
"""The first name of the tree's paths."""

_YAML: Final = b"text/yaml; charset=utf-8"
_PLAIN: Final = re.compile(r"[a-z][a-z-]*")
_UNPRINTABLE: Final = re.compile(
    r"[^\t\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
"""All but YAML 1.2 §5.1's printable characters less the line ends and the byte order mark."""


def nocloud_directory(record: DocumentRecord, _version: str) -> Node:
    """Everything below `/nocloud`."""
    network = render_network_config(record)
    children = {
        "meta-data": Node(_meta_data(record), _YAML),
        "user-data": Node(record["user_data"] or b"", BINARY),
        "vendor-data": Node(vendor_text(record["vendor_data"]), BINARY),
        "network-config": Node(b"" if network is None else render_yaml(network), _YAML),
    }
    return Node(listing(children), children=children)


def _meta_data(record: DocumentRecord) -> bytes:
    optional: dict[str, JsonValue] = {
        "availability-zone": record["availability_zone"],
        "instance-type": record["instance_type"],
        "public-keys": {**named_keys(record)},
        "tags": {**dict(record["tags"])},
    }
    given: dict[str, JsonValue] = {name: value for name, value in optional.items() if value}
    return render_yaml(
        {"instance-id": record["uuid"], "local-hostname": record["hostname"], **given}
    )


def render_yaml(document: dict[str, JsonValue]) -> bytes:
    """A mapping as YAML, one line for each member, no newline at the end.

    Values are JSON (which YAML includes), with the characters escaped that YAML does not allow as they are.
    """
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
