from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from imdsproxy.core.haproxy.namespace_proxy import (
    FACILITIES,
    NamespaceProxySpec,
    parse_facility,
    parse_port,
    parse_uuid,
    render_namespace_proxy,
)
from imdsproxy.errors import RequestRefused

_GOLDEN = Path(__file__).parents[2] / "golden" / "haproxy"
_UUID = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
_SPEC = NamespaceProxySpec(
    "X-Neutron-Network-ID",
    _UUID,
    "/var/lib/neutron/metadata_proxy",
    80,
    dual_stack=True,
    user="nobody",
    group="nogroup",
    syslog="/dev/log",
)
_CASES = {
    "namespace-network": _SPEC,
    "namespace-router": NamespaceProxySpec(
        "X-Neutron-Router-ID", _UUID, "/srv/state path/metadata_proxy", 9697, dual_stack=False
    ),
    "namespace-debug": replace(_SPEC, facility="user", debug=True),
}
_FORGEABLE = """
x-neutron-network-id x-neutron-router-id x-ovn-network-id x-instance-id x-instance-id-signature x-tenant-id
x-metadata-provider x-metadata-provider-signature x-forwarded-for connection upgrade
"""


@pytest.mark.parametrize("name", sorted(_CASES))
def test_the_configuration_is_the_golden_one(name: str) -> None:
    path = _GOLDEN / f"{name}.cfg"
    text = render_namespace_proxy(_CASES[name])
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "deleted"),
    [
        *((name, True) for name in _FORGEABLE.split()),
        *((name, False) for name in ("host", "x-instance", "my-x-tenant-id", "content-type")),
        ("x-aws-ec2-metadata-token", False),
    ],
)  # fmt: skip
def test_a_header_that_the_proxy_sets_is_deleted_and_every_other_passes(
    name: str, *, deleted: bool
) -> None:
    (pattern,) = re.findall(r"del-header (\S+) -m reg", render_namespace_proxy(_SPEC))
    assert bool(re.search(shlex.split(pattern)[0], name)) is deleted


@pytest.mark.parametrize(
    "text", ["", "blue", "../../etc/passwd", _UUID + "\n", _UUID[:-1], _UUID.replace("-", ""), "8" * 36]
)  # fmt: skip
def test_what_is_no_uuid_is_refused(text: str) -> None:
    with pytest.raises(RequestRefused, match="is no UUID"):
        parse_uuid(text)


@pytest.mark.parametrize(
    "text", ["0", "70000", "65536", "-1", "", "http", "8 0", "٨٠", "80\n", "9" * 5000, 0, -1, 70000]
)
def test_what_is_no_port_is_refused(text: str | int) -> None:
    with pytest.raises(RequestRefused, match="is no port") as refused:
        parse_port(text)
    assert refused.value.hint == "a port is a number from 1 to 65535"


def test_a_facility_is_known_by_the_names_of_neutron_and_of_haproxy() -> None:
    assert parse_facility("LOG_LOCAL3") == "local3"
    assert parse_facility("LOG_AUTHPRIV") == "auth2"
    assert {parse_facility(name) for name in FACILITIES} == FACILITIES
