from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.model import Dialect, InterfaceListener, NamespaceListener, Network, NetworkId
from imdsproxy.core.snippets import Target, choose_dialect, looks_like_amazon, plan_route
from support.snippets import MAC, UUID, kernel_words, machine_of, network, snippet

VIRBR0 = InterfaceListener("virbr0")
every_target = pytest.mark.parametrize("target", list(Target))
_KINDS = {"SMBIOS", "container", "network card", "route", "systemd-imdsd", "note"}


@every_target
def test_the_documents_that_most_clients_ask_are_the_default(target: Target) -> None:
    everything = frozenset(Dialect)
    best = Dialect.NOCLOUD if target is Target.INCUS else Dialect.OPENSTACK

    assert choose_dialect(target, everything) is best
    assert choose_dialect(target, everything - {best}) in everything - {best}
    assert choose_dialect(target, {Dialect.EC2}) is Dialect.EC2
    assert choose_dialect(target, ()) is None


@every_target
def test_the_card_has_the_mac_by_which_the_guest_is_known(target: Target) -> None:
    text = snippet(target, Dialect.OPENSTACK).of("network card")
    bare = snippet(target, Dialect.OPENSTACK, macs=[None]).of("network card")

    assert MAC in text.lower()
    assert "br0" in text
    assert "mac" not in bare.lower()
    assert "hwaddr" not in bare


@every_target
def test_every_port_has_its_card_and_every_network_its_route(target: Target) -> None:
    other = replace(network(), id=NetworkId("other"))
    made = snippet(target, Dialect.OPENSTACK, network(), other, macs=[MAC, None])

    kinds = [part.kind for part in made.parts]
    assert (kinds.count("network card"), kinds.count("route")) == (4, 2)
    assert set(kinds) <= _KINDS
    routes = [part.place for part in made.parts if part.kind == "route"]
    assert ["lan" in routes[0], "other" in routes[1]] == [True, True]


@every_target
def test_a_route_is_printed_where_no_gateway_leads_there(target: Target) -> None:
    def printed(of: Network) -> str:
        return snippet(target, Dialect.OPENSTACK, of).of("route")

    assert f"{_ON_LINK},0.0.0.0/0,10.0.0.1" in printed(network(InterfaceListener("eno1")))
    # What is for a gateway is led off its way on a bridge.
    assert printed(network()) == ""
    assert printed(network(NamespaceListener("qdhcp-1"))) == ""


@every_target
def test_without_a_known_gateway_the_default_route_is_to_be_added(target: Target) -> None:
    unknown = network(cidr="2001:db8::/64", gateway=None)

    text = snippet(target, Dialect.OPENSTACK, unknown).text

    assert "0.0.0.0/0,GATEWAY" in " ".join(text.split())


@every_target
def test_systemd_imdsd_is_led_to_the_ec2_documents_where_there_are_some(target: Target) -> None:
    words = kernel_words(snippet(target, Dialect.OPENSTACK))

    # systemd's src/imds/imdsd.c and imds-generator.c; the manual page of v261 has the address's name wrong.
    assert words["systemd.imds"] == "1"
    assert words["systemd.imds.data_url"] == "http://169.254.169.254/latest"
    assert words["systemd.imds.address_ipv4"] == "169.254.169.254"
    assert words["systemd.imds.network"] == "unlocked"
    assert words["systemd.imds.key.userdata"] == "/user-data"
    assert not any("token" in name for name in words)

    without = snippet(target, Dialect.OPENSTACK, dialects=frozenset({Dialect.OPENSTACK}))
    assert "systemd" not in without.text


@pytest.mark.parametrize(
    ("uuid", "amazon"),
    [
        ("ec2e1916-9099-4caf-8d21-012345abcdef", True),
        ("EC2E1916-9099-4CAF-8D21-012345ABCDEF", True),
        ("45e12aec-dcd1-4213-94ed-012345abcdef", True),
        ("45e12bec-dcd1-4213-94ed-012345abcdef", True),
        ("45e13aec-dcd1-4213-94ed-012345abcdef", False),
        ("aec2e191-9099-4caf-8d21-012345abcdef", False),
        (UUID, False),
    ],
)
def test_a_uuid_that_looks_like_amazons_is_not_shown(uuid: str, *, amazon: bool) -> None:
    assert looks_like_amazon(uuid) is amazon
    for target in Target:
        made = snippet(target, Dialect.OPENSTACK, uuid=uuid)
        shown = uuid in machine_of(made).dmi.values()
        assert shown is (not amazon and target is not Target.INCUS)
        assert any(part.kind == "note" for part in made.parts) is (
            amazon and target is not Target.INCUS
        )


def test_names_are_quoted_for_the_shell() -> None:
    text = snippet(Target.INCUS, Dialect.NOCLOUD, name="web 1; x").text

    assert "incus config set 'web 1; x' raw.qemu" in text


def test_an_xml_comment_never_holds_two_hyphens() -> None:
    text = snippet(Target.LIBVIRT, Dialect.OPENSTACK, name="web--1").text

    comments = [one.partition("-->")[0] for one in text.split("<!--")[1:]]
    assert comments
    assert not [one for one in comments if "--" in one]


_ON_LINK = "169.254.169.254/32,0.0.0.0"


@pytest.mark.parametrize(
    ("of", "here", "advice", "announced"),
    [
        pytest.param(network(VIRBR0), True, "answered on virbr0", "", id="host-is-gateway"),
        # Clients that receive option 121 look at no other default route.
        pytest.param(network(VIRBR0), False, "virbr0 itself", f"{_ON_LINK},0.0.0.0/0,10.0.0.1", id="foreign-gateway"),
        pytest.param(network(VIRBR0, gateway=None), False, "virbr0 itself", _ON_LINK, id="isolated-interface"),
        pytest.param(network(VIRBR0, cidr="2001:db8::/64", gateway="2001:db8::1"), True,
                     "nothing, if the guests' gateway is this host", _ON_LINK, id="no-subnet"),
        pytest.param(network(cidr=""), False, "nothing, if guests have a gateway", _ON_LINK, id="bridge-no-subnet"),
        pytest.param(network(), False, "answered on br0", "", id="bridge-with-gateway"),
        pytest.param(network(gateway=None), True, "br0 itself", _ON_LINK, id="isolated"),
        pytest.param(network(NamespaceListener("qdhcp-1")), True, "namespace qdhcp-1", "", id="namespace"),
    ],
)  # fmt: skip
def test_the_way_to_the_address_follows_from_the_listener(
    of: Network, *, here: bool, advice: str, announced: str
) -> None:
    planned = plan_route(of, lambda _: here)
    assert advice in planned.advice
    assert planned.announced == announced
