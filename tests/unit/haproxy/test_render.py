from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

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
    UnixBind,
)
from imdsproxy.core.haproxy.text import BANNER, UnquotableWord
from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, NetworkId
from imdsproxy.dataplane.layout import Layout
from support.haproxy_config import read_sections

_GOLDEN = Path(__file__).parents[2] / "golden" / "haproxy"

_PATHS = Layout(Path("/run/imdsproxy"), Path("/var/lib/imdsproxy")).haproxy_paths()

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
        replace(
            _PATHS,
            named={**_PATHS.named, "resolver_socket": "/tmp/r.sock"},  # noqa: S108 - a name only
            documents=("/tmp/a b.sock",),  # noqa: S108 - a name only
            chroot=False,
        ),
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


@pytest.mark.parametrize("name", sorted(_CASES))
def test_the_configuration_is_the_golden_one(name: str) -> None:
    path = _GOLDEN / f"{name}.cfg"
    text = render_config(_CASES[name])
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("name", sorted(_CASES))
def test_the_order_of_binds_is_no_difference_and_each_speaks_http_1_with_its_own_limit(
    name: str,
) -> None:
    spec = _CASES[name]
    text = render_config(spec)
    assert render_config(replace(spec, binds=tuple(reversed(spec.binds)))) == text
    for header, lines in read_sections(text).items():
        for line in lines:
            if line[0] == "bind":
                assert header.startswith("peers ") or line[line.index("proto") + 1] == "h1"
                assert "maxconn" in line or _is_ours_alone(header)


def _is_ours_alone(header: str) -> bool:
    """Only our own processes can connect there."""
    return header.split()[1] in {"probe", "found", COUNTERS} or ".hop." in header


def test_the_banner_names_the_content() -> None:
    first, _, rest = render_config(_CASES["empty"]).partition("\n")
    assert first.startswith(f"{BANNER} ")
    assert rest
    other = render_config(replace(_CASES["empty"], user="nobody")).partition("\n")[0]
    assert first != other


_ALL = replace(
    _CASES["fair"],
    group="haproxy",
    exporter="127.0.0.1:9466",
    binds=_CASES["three-networks"].binds,
    nova=(
        NovaBackend(
            "cell-2",
            (_NOVA[0], replace(_NOVA[1], slot=1)),
            "n.example:8775",
            NovaTls("n.example", "/ca", True, "/own", "c0"),
        ),
    ),
    watched=True,
    audit=100,
    count_reads=20,
)
"""A configuration that has every text but the path of short documents, which Nova has none of."""


def _with_another_text(value: Any, text: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - any part of a specification
    """Copies that differ in one of the texts, each behind the place of that text."""
    if isinstance(value, str):
        yield "", text
    elif isinstance(value, tuple):
        for at, one in enumerate(value):
            for place, other in _with_another_text(one, text):
                yield f"[{at}]{place}", (*value[:at], other, *value[at + 1 :])
    elif is_dataclass(value) and not isinstance(value, NovaTimes | type):
        for one in fields(value):
            for place, other in _with_another_text(getattr(value, one.name), text):
                yield f".{one.name}{place}", replace(value, **{one.name: other})


def _words(spec: DataplaneSpec) -> list[int]:
    return sorted(len(shlex.split(line)) for line in render_config(spec).splitlines()[1:])


def test_no_text_of_the_specification_makes_another_word_or_line() -> None:
    usual = _words(_ALL)
    for place, spec in _with_another_text(_ALL, "/a 'b\" $C \\ #d <always>'"):
        assert (place, _words(spec)) == (place, usual)


def test_a_control_character_is_refused_wherever_it_would_be_written() -> None:
    for place, spec in _with_another_text(_ALL, "/a\nb"):
        if place != ".paths.short":
            with pytest.raises(UnquotableWord):
                render_config(spec)
