from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.namespace_proxy import (
    FACILITIES,
    NamespaceProxySpec,
    Resource,
    Syslog,
    parse_facility,
    parse_port,
    parse_resource,
    parse_uuid,
    render_namespace_proxy,
)
from imdsproxy.core.haproxy.text import UnquotableWord
from imdsproxy.core.wire import RETRY_AFTER_S
from imdsproxy.errors import RequestRefused

_GOLDEN = Path(__file__).parents[2] / "golden" / "haproxy"
_UUID = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
_SPEC = NamespaceProxySpec(
    Resource("network", _UUID),
    "/var/lib/neutron/metadata_proxy",
    80,
    dual_stack=True,
    user="nobody",
    group="nogroup",
    syslog=Syslog(),
)
_CASES = {
    "namespace-network": _SPEC,
    "namespace-router": NamespaceProxySpec(
        Resource("router", _UUID), "/srv/state path/metadata_proxy", 9697, dual_stack=False
    ),
    "namespace-debug": replace(_SPEC, syslog=Syslog(facility="user", level="debug")),
}
_FORGEABLE = (
    "x-neutron-network-id",
    "x-neutron-router-id",
    "x-ovn-network-id",
    "x-instance-id",
    "x-instance-id-signature",
    "x-tenant-id",
    "x-metadata-provider",
    "x-metadata-provider-signature",
    "x-forwarded-for",
    "connection",
    "upgrade",
)


def _rules(spec: NamespaceProxySpec = _SPEC) -> list[list[str]]:
    _, listen = render_namespace_proxy(spec).split("listen metadata\n")
    return [shlex.split(line) for line in listen.splitlines()]


def _deleted(spec: NamespaceProxySpec = _SPEC) -> re.Pattern[str]:
    return re.compile(next(line[2] for line in _rules(spec) if line[1] == "del-header"))


@pytest.mark.parametrize("name", sorted(_CASES))
def test_the_configuration_is_the_golden_one(name: str) -> None:
    path = _GOLDEN / f"{name}.cfg"
    text = render_namespace_proxy(_CASES[name])
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("name", _FORGEABLE)
def test_a_guest_cannot_say_what_the_proxy_says(name: str) -> None:
    assert _deleted().fullmatch(name)


@pytest.mark.parametrize(
    "name", ["host", "x-instance", "my-x-tenant-id", "content-type", "x-aws-ec2-metadata-token"]
)
def test_every_other_header_of_a_guest_passes(name: str) -> None:
    assert _deleted().search(name) is None


def test_our_headers_are_set_after_the_guests_are_deleted() -> None:
    actions = [line[1] for line in _rules()]
    names = [line[2] for line in _rules() if line[1] == "set-header"]
    set_at = [index for index, line in enumerate(_rules()) if line[1] == "set-header"]
    assert set_at[0] < actions.index("del-header") < set_at[1]
    assert names == ["X-Forwarded-By", "X-Neutron-Network-ID", "X-Forwarded-For", "X-Forwarded-For"]


def test_a_router_is_named_by_its_own_header_and_no_other() -> None:
    text = render_namespace_proxy(_CASES["namespace-router"])
    assert f"set-header X-Neutron-Router-ID {_UUID}" in text
    assert "X-Neutron-Network-ID" not in text


def test_what_the_proxy_answers_itself_says_when_to_come_again() -> None:
    text = render_namespace_proxy(_SPEC)
    for code in (502, 503, 504):
        assert f"http-error status {code} hdr Retry-After {RETRY_AFTER_S} " in text
    assert "404" not in text


def test_without_a_log_nothing_is_said_of_one() -> None:
    assert " log" not in render_namespace_proxy(replace(_SPEC, syslog=None))


def test_a_log_line_has_the_uuid_in_its_tag() -> None:
    assert f"log-tag haproxy-metadata-proxy-{_UUID}\n" in render_namespace_proxy(_SPEC)


@given(st.text(st.characters(codec="utf-8")))
def test_no_socket_path_makes_another_line(name: str) -> None:
    spec = replace(_SPEC, upstream=f"/{name}")
    try:
        text = render_namespace_proxy(spec)
    except UnquotableWord:
        return
    assert len(text.split("\n")) == len(render_namespace_proxy(_SPEC).split("\n"))


@given(st.sampled_from(["upstream", "port", "dual_stack", "user", "group", "syslog"]))
def test_everything_in_the_spec_shows_in_the_file(field: str) -> None:
    other = {"port": 81, "dual_stack": False, "syslog": None}.get(field, "/other")
    changed = replace(_SPEC, **{field: other})  # type: ignore[arg-type]  # each of its own type
    assert render_namespace_proxy(changed) != render_namespace_proxy(_SPEC)


def test_a_network_or_a_router() -> None:
    assert parse_resource(_UUID, None) == Resource("network", _UUID)
    assert parse_resource(None, _UUID) == Resource("router", _UUID)


def test_both_ids_are_refused() -> None:
    with pytest.raises(RequestRefused, match="a network's id and a router's id are given"):
        parse_resource(_UUID, _UUID)


def test_no_id_is_refused() -> None:
    with pytest.raises(RequestRefused, match="the id of a network or of a router is needed"):
        parse_resource(None, None)


def test_an_id_stays_as_it_is_written() -> None:
    assert parse_uuid(_UUID.upper()) == _UUID.upper()


@pytest.mark.parametrize(
    "text", ["", "blue", "../../etc/passwd", _UUID + "\n", _UUID[:-1], _UUID.replace("-", ""), "8" * 36]
)  # fmt: skip
def test_what_is_no_uuid_is_refused(text: str) -> None:
    with pytest.raises(RequestRefused, match="is no UUID"):
        parse_uuid(text)


@pytest.mark.parametrize(("given", "port"), [("80", 80), (9697, 9697), ("65535", 65535), ("1", 1)])
def test_a_port(given: str | int, port: int) -> None:
    assert parse_port(given) == port


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


def test_a_facility_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RequestRefused, match="is no facility"):
        parse_facility("LOG_LOCAL8")
