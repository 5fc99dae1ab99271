from __future__ import annotations

import os
import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.limits import COUNTERS
from imdsproxy.core.haproxy.model import (
    Bind,
    DataplaneSpec,
    Limits,
    NovaBackend,
    NovaServer,
    NovaTimes,
    NovaTls,
    Paths,
    UnixBind,
)
from imdsproxy.core.haproxy.names import TOKEN_HEADERS
from imdsproxy.core.haproxy.text import BANNER
from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, InstanceId, NetworkId
from imdsproxy.core.wire import (
    HEADER_ADDRESS,
    HEADER_INSTANCE,
    HEADER_NETWORK,
    HEADER_REVISION,
    NovaRecord,
    render_map_value,
)
from support.haproxy_config import read_sections

_GOLDEN = Path(__file__).parents[2] / "golden" / "haproxy"

_PATHS = Paths(
    base_map="/run/imdsproxy/base.map",
    overlay_map="/run/imdsproxy/overlay.map",
    unavailable="/run/imdsproxy/unavailable.http",
    probe="/run/imdsproxy/probe.sock",
    jail="/run/imdsproxy/jail",
    documents=("/documents-0.sock", "/documents-1.sock"),
    resolver="/resolver.sock",
    token_keys="/run/imdsproxy/token-keys.map",
    short="/run/imdsproxy/short.map",
    path_rules="/run/imdsproxy/path-rules.map",
    found="/run/imdsproxy/found.sock",
    silence="/run/imdsproxy/silence.http",
    loopback="/run/imdsproxy/jail",
    loopback_inside="",
    audit="/audit.sock",
    audit_last="/audit-last.sock",
)

_NOVA = (
    NovaServer(IPv4Address("192.0.2.1"), 8775),
    NovaServer(IPv6Address("2001:db8::1"), 8775),
)

_CASES = {
    "empty": DataplaneSpec((), _PATHS, user="haproxy", group="haproxy"),
    "three-networks": DataplaneSpec(
        (
            Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),
            Bind(NetworkId("green"), METADATA_IPV6, 80, "imds0", "../imdsproxy/netns/imds-1@42"),
            Bind(NetworkId("green"), METADATA_IPV4, 80, "imds0", "../imdsproxy/netns/imds-1@42"),
            Bind(NetworkId("red"), METADATA_IPV4, 80, None, "../imdsproxy/netns/qrouter-1@43"),
        ),
        _PATHS,
        Limits(nbthread=2, maxconn=1000, maxconn_per_network=50, cache_mb=8),
        user="haproxy",
        group="haproxy",
        exporter="127.0.0.1:9466",
        count_reads=20,
    ),
    "behind-a-gate": DataplaneSpec(
        (
            Bind(NetworkId("blue"), METADATA_IPV4, 254, "virbr0"),
            Bind(NetworkId("red"), METADATA_IPV4, 80, None, "../imdsproxy/netns/qrouter-1@43"),
        ),
        _PATHS,
        unverified=(Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
    ),
    "without-chroot": DataplaneSpec(
        (Bind(NetworkId("red"), METADATA_IPV4, 80, "eth0"),),
        replace(_PATHS, jail=None, documents=("/tmp/a b.sock",), resolver="/tmp/r.sock"),  # noqa: S108 - a name only
        Limits(cache_mb=0),
    ),
    "in-front-of-nova": DataplaneSpec(
        (Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
        _PATHS,
        user="haproxy",
        group="haproxy",
        nova=(
            NovaBackend("cell-2", (), "cell2.example:8775"),
            NovaBackend("default", _NOVA, "nova.example:8775"),
        ),
        unix=UnixBind("/run/imdsproxy/metadata_proxy", "0664", 0, 0),
    ),
    "fair": DataplaneSpec(
        (Bind(NetworkId("blue"), METADATA_IPV4, 254, "virbr0"),),
        _PATHS,
        Limits(fair=True),
        user="haproxy",
        nova=(NovaBackend("default", _NOVA, "nova.example:8775"),),
        unix=UnixBind("/run/imdsproxy/metadata_proxy", "0664", 0, 0),
        unverified=(Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
    ),
    "in-front-of-nova-alone": DataplaneSpec(
        (Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
        replace(_PATHS, documents=()),
        nova=(NovaBackend("default", _NOVA, "nova.example:8775"),),
        count_reads=20,
    ),
    "watched": DataplaneSpec(
        (Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
        _PATHS,
        nova=(NovaBackend("default", _NOVA, "nova.example:8775"),),
        unix=UnixBind("/run/imdsproxy/metadata_proxy", "0664", 0, 0),
        unverified=(Bind(NetworkId("blue"), METADATA_IPV4, 8080, "virbr0"),),
        watched=True,
    ),
    "audited": DataplaneSpec(
        (Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
        _PATHS,
        unix=UnixBind("/run/imdsproxy/metadata_proxy", "0664", 0, 0),
        unverified=(Bind(NetworkId("blue"), METADATA_IPV4, 8080, "virbr0"),),
        audit=100,
    ),
    "audited-and-watched": DataplaneSpec(
        (Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
        _PATHS,
        nova=(NovaBackend("default", _NOVA, "nova.example:8775"),),
        watched=True,
        audit=100,
    ),
    "while-a-secret-is-replaced": DataplaneSpec(
        (Bind(NetworkId("blue"), METADATA_IPV4, 80, "virbr0"),),
        _PATHS,
        nova=(
            NovaBackend(
                "default",
                (_NOVA[0], replace(_NOVA[1], slot=1)),
                "nova.example:8775",
                NovaTls("n.example"),
            ),
            NovaBackend("done", (replace(_NOVA[0], slot=1),), "nova.example:8775", loopback=True),
        ),
        nova_times=NovaTimes(check="http"),
    ),
}

_NETWORKS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).map(NetworkId)
_BINDS = st.builds(
    Bind,
    network=_NETWORKS,
    address=st.sampled_from([METADATA_IPV4, METADATA_IPV6]),
    port=st.just(80),
    device=st.none() | st.sampled_from(["eth0", "virbr0"]),
    namespace=st.none() | st.sampled_from(["../imdsproxy/netns/a@1", "../imdsproxy/netns/b@2"]),
)
_SPECS = st.builds(
    DataplaneSpec,
    binds=st.lists(_BINDS, max_size=4, unique=True).map(tuple),
    paths=st.just(_PATHS),
    limits=st.builds(
        Limits, maxconn=st.integers(64, 9999), cache_mb=st.integers(0, 64), fair=st.booleans()
    ),
    exporter=st.none() | st.just("127.0.0.1:9466"),
    watched=st.booleans(),
    audit=st.sampled_from([0, 1, 7]),
    count_reads=st.sampled_from([0, 1, 20]),
    nova=st.sampled_from(
        [
            (),
            (NovaBackend("default", _NOVA, "nova"),),
            (NovaBackend("default", _NOVA[:1], "nova"),),
            (NovaBackend("default", (_NOVA[0], replace(_NOVA[1], slot=1)), "nova"),),
        ]
    ),
    unix=st.none()
    | st.builds(
        UnixBind, st.just("/run/a"), st.sampled_from(["0644", "0666"]), st.just(0), st.just(0)
    ),
)


def _section(spec: DataplaneSpec, header: str) -> list[tuple[str, ...]]:
    return read_sections(render_config(spec))[header]


@pytest.mark.parametrize("name", sorted(_CASES))
def test_the_configuration_is_the_golden_one(name: str) -> None:
    path = _GOLDEN / f"{name}.cfg"
    text = render_config(_CASES[name])
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


@given(_SPECS)
def test_the_same_spec_gives_the_same_text_whatever_the_order_of_binds(spec: DataplaneSpec) -> None:
    assert render_config(spec) == render_config(replace(spec, binds=tuple(reversed(spec.binds))))


@given(_SPECS, _SPECS)
def test_different_specs_never_give_the_same_text(one: DataplaneSpec, other: DataplaneSpec) -> None:
    same = replace(one, binds=frozenset(one.binds)) == replace(other, binds=frozenset(other.binds))  # type: ignore[arg-type]  # compared as sets
    assert (render_config(one) == render_config(other)) == same


@given(_SPECS)
def test_every_bind_speaks_http_1_only_and_has_its_own_limit(spec: DataplaneSpec) -> None:
    binds = [
        (header, line)
        for header, lines in read_sections(render_config(spec)).items()
        for line in lines
        if line[0] == "bind"
    ]
    assert binds
    for header, line in binds:
        assert header.startswith("peers ") or line[line.index("proto") + 1] == "h1"
        assert "maxconn" in line or _is_ours_alone(header)


def _is_ours_alone(header: str) -> bool:
    """Only our own processes can connect there."""
    return header.split()[1] in {"probe", "found", COUNTERS} or ".hop." in header


def test_nova_gets_its_four_headers_after_everything_of_the_guest_is_deleted() -> None:
    spec = _CASES["in-front-of-nova"]
    for backend in ("nova.default", "nova.default.once", "nova.default.checked"):
        lines = _section(spec, f"backend {backend}")
        deletion = next(index for index, line in enumerate(lines) if line[1] == "del-header")
        set_after = [line[2] for line in lines[deletion:] if line[1] == "set-header"]
        assert sorted(set_after) == [
            "host",
            "x-forwarded-for",
            "x-instance-id",
            "x-instance-id-signature",
            "x-tenant-id",
        ]
        assert not [line for line in lines[:deletion] if line[:2] == ("http-request", "set-header")]
        assert "x-aws" not in lines[deletion][2]


def test_what_must_not_be_repeated_is_sent_over_a_connection_of_its_own() -> None:
    once = _section(_CASES["in-front-of-nova"], "backend nova.default.once")
    assert ("retry-on", "conn-failure") in once
    assert ("http-reuse", "never") in once


def test_the_cache_is_only_where_no_request_of_nova_s_comes() -> None:
    sections = read_sections(render_config(_CASES["in-front-of-nova"]))
    cached = {
        header
        for header, lines in sections.items()
        for line in lines
        if {"cache-use", "cache-store"} & set(line)
    }
    assert cached == {"backend documents", "backend documents.checked"}


def test_without_nova_a_document_in_the_cache_is_found_before_a_backend_is_chosen() -> None:
    lines = _section(_CASES["three-networks"], "frontend guests")
    assert any("cache-use" in line for line in lines)


@pytest.mark.parametrize("field", ["x-instance-id", "x-tenant-id", "x-instance-id-signature"])
def test_fields_are_cut_out_of_a_record_as_it_is_rendered(field: str) -> None:
    record = NovaRecord("cell-2", InstanceId("i"), "p", ("a" * 64, "b" * 64))
    lines = _section(_CASES["in-front-of-nova"], "backend nova.cell-2")
    (text,) = [line[3] for line in lines if line[1:3] == ("set-header", field)]
    expected = {
        "x-instance-id": "i",
        "x-tenant-id": "p",
        "x-instance-id-signature": "a" * 64,
    }
    assert _converted(render_map_value(record), text) == expected[field]


def _converted(value: str, expression: str) -> str:
    """What HAProxy's `bytes` and `field` make of a value (HAProxy's configuration manual §7.3.1)."""
    for name, first, second in re.findall(r",(bytes|field)\((\d+)(?:,([^)]+))?\)", expression):
        if name == "bytes":
            value = value[int(first) :][: int(second) if second else None]
        else:
            value = value.split(second)[int(first) - 1]
    return value


@pytest.mark.parametrize("name", sorted(_CASES))
def test_no_secret_is_in_a_configuration(name: str) -> None:
    assert "secret" not in render_config(_CASES[name])


@pytest.mark.parametrize("backend", ["documents", "resolver"])
def test_identity_headers_are_set_after_everything_of_the_guest_is_deleted(backend: str) -> None:
    lines = _section(_CASES["three-networks"], f"backend {backend}")
    deletion = next(index for index, line in enumerate(lines) if line[1] == "del-header")
    ours = [HEADER_NETWORK, HEADER_ADDRESS]
    if backend == "documents":
        ours += [HEADER_INSTANCE, HEADER_REVISION]
    for header in ours:
        setting = next(
            index
            for index, line in enumerate(lines)
            if line[1] == "set-header" and line[2] == header
        )
        assert setting > deletion


def test_the_allow_list_lets_no_identity_header_through() -> None:
    lines = _section(_CASES["three-networks"], "backend documents")
    pattern = next(line[2] for line in lines if line[1] == "del-header")
    for header in (
        HEADER_INSTANCE,
        HEADER_NETWORK,
        "x-forwarded-for",
        "x_instance_id",
        "x-metadata-provider",
        "connection",
        "accepted",
        "xaccept",
    ):
        assert re.search(pattern, header), header
    for header in ("accept", "content-length", "if-none-match", "user-agent"):
        assert not re.search(pattern, header), header
    assert "x-aws-ec2-metadata-token" in TOKEN_HEADERS


def test_the_record_is_in_the_cache_key_before_the_cache_is_asked() -> None:
    lines = _section(_CASES["three-networks"], "frontend guests")
    words = [" ".join(line) for line in lines]
    plain = "!{ var(txn.needs_check) -m found }"
    use = f"http-request cache-use documents if {plain} {{ var(txn.record) -m sub | }}"
    asked = words.index(use)
    assert words.index(f"http-request set-header host %[var(txn.record)] if {plain}") < asked
    assert any(
        word.startswith("http-request set-uri /%[var(txn.record)]") for word in words[:asked]
    )


@pytest.mark.parametrize("name", sorted(_CASES))
def test_conditions_are_deleted_before_the_cache_is_asked_and_go_on_to_nova(name: str) -> None:
    deleted = "http-request del-header if- -m beg"
    for header, lines in read_sections(render_config(_CASES[name])).items():
        words = [" ".join(line) for line in lines]
        asked = [n for n, one in enumerate(words) if one.startswith("http-request cache-use")]
        assert all(deleted in words[:place] for place in asked)
        assert deleted not in words or asked, header


def test_the_banner_names_the_content() -> None:
    first, _, rest = render_config(_CASES["empty"]).partition("\n")
    assert first.startswith(f"{BANNER} ")
    assert rest
    other = render_config(replace(_CASES["empty"], user="nobody")).partition("\n")[0]
    assert first != other


def test_without_networks_there_is_no_frontend_for_guests() -> None:
    assert "frontend guests" not in read_sections(render_config(_CASES["empty"]))


def test_an_address_family_decides_the_brackets() -> None:
    spec = DataplaneSpec(
        (
            Bind(NetworkId("a"), IPv6Address("fe80::a9fe:a9fe"), 80, "eth0"),
            Bind(NetworkId("b"), IPv4Address("169.254.169.254"), 80),
        ),
        _PATHS,
    )
    lines = _section(spec, "frontend guests")
    assert lines[0][1] == "[fe80::a9fe:a9fe]:80"
    assert lines[1][1] == "169.254.169.254:80"


def test_without_a_cache_nothing_names_one() -> None:
    assert "cache" not in render_config(_CASES["without-chroot"]).replace("cache-control", "")
