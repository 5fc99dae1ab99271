from dataclasses import replace

import pytest

from imdsproxy.model.entities import (
    Dialect,
    InterfaceListener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.tools.snippets import Target, choose_dialect, looks_like_amazon, plan_route
from support.snippets import MAC, UUID, machine_of, network, snippet

VIRBR0 = InterfaceListener("virbr0")
every_target = pytest.mark.parametrize("target", list(Target))
_KINDS = {"SMBIOS", "container", "NIC", "route", "systemd-imdsd", "note"}


@every_target
def test_the_documents_that_most_clients_ask_are_the_default(target: Target) -> None:
    everything = frozenset(Dialect)
    best = Dialect.NOCLOUD if target is Target.INCUS else Dialect.OPENSTACK

    assert choose_dialect(target, everything) is best
    assert choose_dialect(target, everything - {best}) in everything - {best}
    assert choose_dialect(target, {Dialect.EC2}) is Dialect.EC2
    assert choose_dialect(target, ()) is None


_DEVICE_OF_OTHERS = {
    Target.QEMU: "ifname=tap",
    Target.LIBVIRT: "type='ethernet'",
    Target.PROXMOX: "bridge=bridge",
    Target.INCUS: "parent=bridge",
}
"""What stands for the device, in lower case, where the network is a namespace of others."""


@every_target
def test_every_port_has_its_card_and_every_network_its_route(target: Target) -> None:
    other = replace(network(InterfaceListener("eno1")), id=NetworkId("other"))
    foreign = replace(network(NamespaceListener("qdhcp-1")), id=NetworkId("foreign"))
    made = snippet(target, Dialect.OPENSTACK, network(), other, foreign, macs=[MAC, None])

    assert {part.kind for part in made.parts} <= _KINDS
    cards = [part.text.lower() for part in made.parts if part.kind == "NIC"]
    unknown, macs = _DEVICE_OF_OTHERS[target], [True, False] * 3
    devices = ["br0", "br0", "eno1", "eno1", unknown, unknown]
    assert [device in card for device, card in zip(devices, cards, strict=True)] == [True] * 6
    # The MAC by which the guest is known, or nothing about one.
    assert [MAC in card for card in cards] == macs
    assert not [card for card in cards[1::2] if "mac" in card or "hwaddr" in card]
    first, second, third = (part for part in made.parts if part.kind == "route")
    # What is for a gateway is led off its way on a bridge.
    assert ("lan" in first.place, first.text) == (True, "")
    assert ("other" in second.place, f"{_ON_LINK},0.0.0.0/0,10.0.0.1" in second.text) == (
        True,
        True,
    )
    assert ("foreign" in third.place, third.text) == (True, "")


@every_target
def test_systemd_imdsd_is_led_to_the_ec2_documents_where_there_are_some(target: Target) -> None:
    kernel = machine_of(snippet(target, Dialect.OPENSTACK)).kernel

    # systemd's src/imds/imdsd.c and imds-generator.c; the manual page of v261 has the address's name wrong.
    for word in (
        "systemd.imds=1",
        "systemd.imds.data_url=http://169.254.169.254/latest",
        "systemd.imds.address_ipv4=169.254.169.254",
        "systemd.imds.network=unlocked",
        "systemd.imds.key.userdata=/user-data",
    ):
        assert word in kernel.split()
    assert "token" not in kernel
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
        pytest.param(network(VIRBR0), True, "virbr0 answers packets", "", id="host-is-gateway"),
        # Clients that receive option 121 look at no other default route.
        pytest.param(network(VIRBR0), False, "virbr0 itself", f"{_ON_LINK},0.0.0.0/0,10.0.0.1", id="foreign-gateway"),
        pytest.param(network(VIRBR0, gateway=None), False, "virbr0 itself", _ON_LINK, id="isolated-interface"),
        pytest.param(network(VIRBR0, cidr="2001:db8::/64", gateway="2001:db8::1"), True,
                     "If the guests' gateway is this host, no route", _ON_LINK, id="no-subnet"),
        pytest.param(network(cidr=""), False, "If guests have a gateway, no route", _ON_LINK, id="bridge-no-subnet"),
        pytest.param(network(cidr=""), False, "add 0.0.0.0/0,GATEWAY", _ON_LINK, id="unknown-gateway"),
        pytest.param(network(), False, "br0 answers packets", "", id="bridge-with-gateway"),
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
