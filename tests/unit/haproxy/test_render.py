"""The configurations that HAProxy gets, ours and of Neutron's proxies, and that no text in them is more than a word."""

import ast
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.neutron_agents import FACILITIES, parse_facility, parse_port
from imdsproxy.errors import RequestRefused
from imdsproxy.haproxy import rules
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.rules.config import render_config
from imdsproxy.haproxy.rules.model import (
    Bind,
    DataplaneSpec,
    IssuerFrontend,
    Limits,
    NovaBackend,
    NovaServer,
    NovaTimes,
    NovaTls,
    UnixBind,
)
from imdsproxy.haproxy.rules.namespace_proxy import (
    NamespaceProxySpec,
    parse_uuid,
    render_namespace_proxy,
)
from imdsproxy.haproxy.rules.text import UnquotableWord, fill, quote, read_template
from imdsproxy.model.entities import METADATA_IPV4, METADATA_IPV6, NetworkId

_GOLDEN = Path(__file__).parents[2] / "golden" / "haproxy"

_PATHS = Layout(Path("/run/imdsproxy"), Path("/var/lib/imdsproxy")).haproxy_paths()

_NOVA = (NovaServer(IPv4Address("192.0.2.1"), 8775), NovaServer(IPv6Address("2001:db8::1"), 8775))

_BLUE, _RED = NetworkId("blue"), NetworkId("red")
_PLAIN = DataplaneSpec((Bind(_BLUE, METADATA_IPV4, 80, "virbr0"),), _PATHS)
_BEHIND = replace(_PLAIN.binds[0], port=254)
_ROUTER = Bind(_RED, METADATA_IPV4, 80, None, "../imdsproxy/netns/qrouter-1@43")
_GREEN = Bind(NetworkId("green"), METADATA_IPV6, 80, "imds0", "../imdsproxy/netns/imds-1@42")
_UNVERIFIED = replace(_PLAIN.binds[0], port=8080)
_DEFAULT = NovaBackend("default", _NOVA, "nova.example:8775")
_UNIX = UnixBind("/run/imdsproxy/metadata_proxy", "0664", 0, 0)
_REPLACED = (
    NovaBackend(
        "default", (_NOVA[0], replace(_NOVA[1], slot=1)), "nova.example:8775", NovaTls("n.example")
    ),
    NovaBackend("done", (replace(_NOVA[0], slot=1),), "nova.example:8775", loopback=True),
)
_UUID = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
_PROXY = NamespaceProxySpec(
    "X-Neutron-Network-ID",
    _UUID,
    "/var/lib/neutron/metadata_proxy",
    80,
    dual_stack=True,
    user="nobody",
    group="nogroup",
    syslog="/dev/log",
)
_AS_HAPROXY = replace(_PLAIN, user="haproxy", group="haproxy")

_ISSUER = IssuerFrontend(
    "192.0.2.10:443",
    "/run/imdsproxy/issuer.pem",
    "0123456789abcdef",
    (("/jwks", "application/json", "/run/imdsproxy/jwks"),),
)

_CASES = {
    "with-identity": replace(_AS_HAPROXY, audit=1, identity=True, issuer=_ISSUER),
    "empty": replace(_AS_HAPROXY, binds=()),
    "three-networks": replace(
        _AS_HAPROXY,
        binds=(*_PLAIN.binds, _GREEN, replace(_GREEN, address=METADATA_IPV4), _ROUTER),
        limits=Limits(nbthread=2, maxconn=1000, maxconn_per_network=50, cache_mb=8),
        exporter="127.0.0.1:9466",
        count_reads=20,
    ),
    "behind-a-gate": replace(_PLAIN, binds=(_BEHIND, _ROUTER), unverified=_PLAIN.binds),
    "without-chroot": DataplaneSpec(
        (Bind(_RED, METADATA_IPV4, 80, "eth0"),),
        replace(
            _PATHS,
            named={**_PATHS.named, "resolver_socket": "/tmp/r.sock"},  # noqa: S108 - a name only
            documents=("/tmp/a b.sock",),  # noqa: S108 - a name only
            chroot=False,
        ),
        Limits(cache_mb=0),
    ),
    "in-front-of-nova": replace(
        _AS_HAPROXY, nova=(NovaBackend("cell-2", (), "cell2.example:8775"), _DEFAULT), unix=_UNIX
    ),
    "fair": replace(
        _PLAIN,
        binds=(_BEHIND,),
        limits=Limits(fair=True),
        user="haproxy",
        nova=(_DEFAULT,),
        unix=_UNIX,
        unverified=_PLAIN.binds,
    ),
    "in-front-of-nova-alone": replace(
        _PLAIN, paths=replace(_PATHS, documents=()), nova=(_DEFAULT,), count_reads=20
    ),
    "watched": replace(
        _PLAIN, nova=(_DEFAULT,), unix=_UNIX, unverified=(_UNVERIFIED,), watched=True
    ),
    "audited": replace(_PLAIN, unix=_UNIX, unverified=(_UNVERIFIED,), audit=100),
    "of-a-fleet": replace(_PLAIN, fleet=True),
    "audited-and-watched": replace(_PLAIN, nova=(_DEFAULT,), watched=True, audit=100),
    "while-a-secret-is-replaced": replace(
        _PLAIN, nova=_REPLACED, nova_times=NovaTimes(check="http")
    ),
}
_PROXIES = {
    "namespace-network": _PROXY,
    "namespace-router": NamespaceProxySpec(
        "X-Neutron-Router-ID", _UUID, "/srv/state path/metadata_proxy", 9697, dual_stack=False
    ),
    "namespace-debug": replace(_PROXY, facility="user", debug=True),
}


def _is_golden(name: str, text: str) -> bool:
    path = _GOLDEN / f"{name}.cfg"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    return path.read_text() == text


@pytest.mark.parametrize("name", sorted(_PROXIES))
def test_the_configuration_of_a_proxy_is_the_golden_one(name: str) -> None:
    assert _is_golden(name, render_namespace_proxy(_PROXIES[name]))


@pytest.mark.parametrize("name", sorted(_CASES))
def test_the_configuration_is_the_golden_one_whatever_the_order_of_binds(name: str) -> None:
    spec = _CASES[name]
    text = render_config(spec)
    assert render_config(replace(spec, binds=spec.binds[::-1])) == text
    for bind in re.findall("^  bind (?!.*/fairness.sock).*", text, re.MULTILINE):
        # No guest speaks HTTP/2, and none takes the connections of another network. Verifiers are no guests.
        assert " proto h1" in bind or " name issuer " in bind
        assert " maxconn " in bind or " unix@" in bind
    assert _is_golden(name, text)


def test_a_controller_takes_no_template_of_the_version_that_is_installed_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_template.cache_clear()
    render_config(replace(_PLAIN, nova=(_DEFAULT,)))
    monkeypatch.delattr("pkgutil.get_data")
    assert "/hop-" in render_config(_CASES["while-a-secret-is-replaced"])


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


def _with_another_text(value: Any, text: str) -> Iterator[tuple[str, Any]]:
    """Copies that differ in one of the texts, each behind the place of that text."""
    if isinstance(value, str):
        yield "", text
    elif isinstance(value, tuple):
        for at, one in enumerate(value):
            for place, other in _with_another_text(one, text):
                yield f"[{at}]{place}", (*value[:at], other, *value[at + 1 :])
    elif isinstance(value, dict):
        yield from ((f"[{name}]", {**value, name: text}) for name in value)
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
    usual = render_config(_ALL)
    for (place, spec), (_, plain) in zip(
        _with_another_text(_ALL, "/a\nb"), _with_another_text(_ALL, "/ab"), strict=True
    ):
        if render_config(plain) != usual:
            with pytest.raises(UnquotableWord):
                render_config(spec)
        else:
            # The configuration has none of these.
            assert place.startswith(".paths.named[")


# The proxy that Neutron's agents start

_FORGEABLE = """
x-neutron-network-id x-neutron-router-id x-ovn-network-id x-instance-id x-instance-id-signature x-tenant-id
x-metadata-provider x-metadata-provider-signature x-forwarded-for connection upgrade
"""


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
    (pattern,) = re.findall(r"del-header (\S+) -m reg", render_namespace_proxy(_PROXY))
    assert bool(re.search(shlex.split(pattern)[0], name)) is deleted


@pytest.mark.parametrize(
    "text", ["", "blue", "../../etc/passwd", _UUID + "\n", _UUID[:-1], _UUID.replace("-", ""), "8" * 36]
)  # fmt: skip
def test_what_is_no_uuid_is_refused(text: str) -> None:
    with pytest.raises(RequestRefused, match="is not a UUID"):
        parse_uuid(text)


@pytest.mark.parametrize(
    "text", ["0", "70000", "65536", "-1", "", "http", "8 0", "٨٠", "80\n", "9" * 5000, 0, -1, 70000]
)
def test_what_is_no_port_is_refused(text: str | int) -> None:
    with pytest.raises(RequestRefused, match="is not a TCP port") as refused:
        parse_port(text)
    assert refused.value.hint == "give a number from 1 to 65535"


def test_a_facility_is_known_by_the_names_of_neutron_and_of_haproxy() -> None:
    assert parse_facility("LOG_LOCAL3") == "local3"
    assert parse_facility("LOG_AUTHPRIV") == "auth2"
    assert {parse_facility(name) for name in FACILITIES} == FACILITIES


# Words


@pytest.mark.parametrize("word", ["a\nb", "\0", "a\rb", "\x1b[0m"])
def test_control_characters_are_refused(word: str) -> None:
    with pytest.raises(UnquotableWord):
        quote(word)


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
def test_what_is_written_is_read_as_the_same_word(word: str) -> None:
    # What `quote` writes a shell reads as HAProxy does (manual, section 2.2).
    assert shlex.split(quote(word)) == [word]


@pytest.mark.parametrize("value", [True, 1.5, b"x"])
def test_what_is_no_text_or_not_there_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"<map> is .*, which can't be written"):
        fill("map_str(<map>)", {"map": value})
    with pytest.raises(KeyError, match="map"):
        fill("map_str(<map>)", {"other": value})


def test_no_template_of_a_rule_is_an_f_string() -> None:
    """What is put in by an f-string is not quoted."""
    assert rules.__file__
    for path in Path(rules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                text = [one for one in node.args if isinstance(one, ast.JoinedStr)]
                assert not text or name not in {"fill", "fill_sections", "Block"}, path


@pytest.mark.parametrize("name", [name for name in _CASES if name != "with-identity"])
def test_no_rule_of_identity_is_there_while_identity_is_off(name: str) -> None:
    spec = _CASES[name]
    text = render_config(replace(spec, audit=0))
    assert not re.search(r"identity|issuer|oauth2", text)
    assert re.search(r"identity|oauth2", render_config(replace(spec, audit=0, identity=True)))
