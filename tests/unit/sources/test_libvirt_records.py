from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from imdsproxy.core.model import (
    BridgeListener,
    Dialect,
    Instance,
    InstanceId,
    Network,
    NetworkId,
    SshKey,
    Subnet,
)
from imdsproxy.core.observation import RecordSet
from imdsproxy.errors import Problem
from imdsproxy.sources.libvirt.records import LibvirtKnown, NetworkXml, Selection
from imdsproxy.sources.libvirt.xml import METADATA_URI
from support.libvirt_backing import domain_xml, uuid_of
from support.record_builders import port

MAC = "52:54:00:00:00:05"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE somebody@host"

NAT = """
<network><name>default</name><uuid>0679b8b8-5b2d-47cf-bad2-51bbaa3888bf</uuid>
  <forward mode='nat'><nat><port start='1024' end='65535'/></nat></forward>
  <bridge name='virbr0' stp='on' delay='0'/><mtu size='1400'/>
  <ip address='192.168.122.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.122.2' end='192.168.122.254'/>
      <host mac='52:54:00:00:00:05' name='x' ip='192.168.122.5'/>
      <host name='by-name-only' ip='192.168.122.6'/>
    </dhcp>
  </ip>
  <ip family='ipv6' address='fd00:122::1' prefix='64'/>
</network>"""
ISOLATED = """
<network><name>inside</name><uuid>7549bd34-a6c5-418a-9a1b-29d7383fcbde</uuid>
  <bridge name='virbr1' stp='on' delay='0'/></network>"""
BRIDGED = """
<network><name>lan</name><uuid>1549bd34-a6c5-418a-9a1b-29d7383fcbde</uuid>
  <forward mode='bridge'/><bridge name='br0'/></network>"""
MACVTAP = """
<network><name>direct</name><uuid>2549bd34-a6c5-418a-9a1b-29d7383fcbde</uuid>
  <forward dev='eth0' mode='bridge'><interface dev='eth0'/></forward></network>"""


def element(inside: str, attributes: str = "") -> str:
    return f"<i:instance xmlns:i='{METADATA_URI}' {attributes}>{inside}</i:instance>"


def known(
    domains: Iterable[str] = (),
    networks: Iterable[str] = (NAT,),
    *,
    selection: Selection | None = None,
    active: bool = True,
) -> LibvirtKnown:
    found = LibvirtKnown(selection or Selection())
    update(found, domains, networks, active=active)
    return found


def update(
    found: LibvirtKnown,
    domains: Iterable[str],
    networks: Iterable[str] = (NAT,),
    *,
    active: bool = True,
) -> RecordSet:
    """What libvirt reports; domains by the UUID in their XML."""
    named = {text.partition("<uuid>")[2].partition("<")[0]: text for text in domains}
    return found.update(named, [NetworkXml(text, active) for text in networks])


def web(inside: str = "", *interfaces: tuple[str, str], name: str = "web") -> str:
    return domain_xml(name, interfaces or [("network=default", MAC)], inside)


def the_instance(found: LibvirtKnown) -> Instance:
    assert not found.problems
    (instance,) = found.instances.values()
    return instance


def the_problem(found: LibvirtKnown) -> Problem:
    (problem,) = found.problems
    return problem


def test_a_nat_network_is_reached_by_its_bridge_and_described_as_by_libvirts_dhcp() -> None:
    (network,) = known().networks.values()
    gateway4, gateway6 = ip_address("192.168.122.1"), ip_address("fd00:122::1")
    assert network == Network(
        NetworkId("default"),
        BridgeListener("virbr0"),
        mtu=1400,
        subnets=(
            Subnet(ip_network("192.168.122.0/24"), gateway4, (gateway4,)),
            Subnet(ip_network("fd00:122::/64"), gateway6, (gateway6,)),
        ),
    )


def test_an_isolated_network_without_a_host_address_is_reached_from_a_namespace() -> None:
    (network,) = known(networks=[ISOLATED]).networks.values()
    assert network == Network(NetworkId("inside"), BridgeListener("virbr1"))


def test_an_isolated_network_with_a_host_address_has_no_gateway() -> None:
    text = ISOLATED.replace(
        "</network>", "<dns enable='no'/><ip address='10.1.0.1' prefix='24'/></network>"
    )
    (network,) = known(networks=[text]).networks.values()
    assert network.listener == BridgeListener("virbr1")
    assert network.subnets == (Subnet(ip_network("10.1.0.0/24")),)


def test_a_networks_name_that_is_no_id_is_its_name_and_its_uuid_the_id() -> None:
    (network,) = known(networks=[NAT.replace("default", "my net")]).networks.values()
    assert (network.id, network.name) == ("0679b8b8-5b2d-47cf-bad2-51bbaa3888bf", "my net")


def test_an_inactive_network_is_not_listened_on_and_strands_no_port() -> None:
    found = known([web()], active=False)
    assert not found.networks
    assert found.implied == {"default"}
    assert the_instance(found).ports[0].network == "default"


def test_a_network_that_libvirt_does_not_have_is_not_vouched_for() -> None:
    found = known([web()], networks=[])
    assert the_instance(found).ports[0].network == "default"
    assert not found.implied


def test_a_domain_without_our_element_is_known_by_its_name_and_uuid() -> None:
    instance = the_instance(known([web()]))
    assert instance == Instance(
        id=instance.id,
        name="web",
        hostname="web",
        ports=(port("default", "192.168.122.5", mac=MAC),),
    )
    assert instance.id == uuid_of("web")


def test_the_element_says_what_documents_are_made_of() -> None:
    inside = (
        "<i:hostname>www.example.org</i:hostname><i:project>p1</i:project>"
        f"<i:ssh-key>{KEY}</i:ssh-key><i:ssh-key name='spare'> {KEY}\n</i:ssh-key>"
        "<i:tag name='role'>web</i:tag><i:availability-zone>az</i:availability-zone>"
        "<i:instance-type>small</i:instance-type><i:dialect name='ec2' serve='no'/>"
        "<i:user-data><![CDATA[\n#cloud-config\na: <b> & c\n]]></i:user-data>"
        "<i:vendor-data>#cloud-config\n</i:vendor-data>"
    )
    instance = the_instance(known([web(element(inside, "id='web-1'"))]))
    assert instance == Instance(
        id=instance.id,
        name="web",
        hostname="www.example.org",
        project="p1",
        ports=(port("default", "192.168.122.5", mac=MAC),),
        ssh_keys=(SshKey("somebody@host", KEY), SshKey("spare", KEY)),
        tags=(("role", "web"),),
        user_data=b"#cloud-config\na: <b> & c\n",
        vendor_data=b"#cloud-config\n",
        availability_zone="az",
        instance_type="small",
        dialects=frozenset({Dialect.OPENSTACK, Dialect.NOCLOUD}),
    )
    assert instance.id == "web-1"


def test_user_data_in_base64_may_be_broken_into_lines() -> None:
    inside = "<i:user-data encoding='base64'>\n  AAEC\n  /w==\n</i:user-data>"
    assert the_instance(known([web(element(inside))])).user_data == b"\x00\x01\x02\xff"


def test_user_data_that_begins_at_the_tag_is_as_it_is() -> None:
    inside = "<i:user-data>#!/bin/sh\n\ntrue</i:user-data>"
    assert the_instance(known([web(element(inside))])).user_data == b"#!/bin/sh\n\ntrue"


@pytest.mark.parametrize(
    ("inside", "field", "words"),
    [
        ("<i:host-name>x</i:host-name>", "instance.host-name", "did you mean hostname?"),
        ("<hostname>x</hostname>", "instance.hostname", "unknown element"),
        ("<i:user-data-file>/etc/shadow</i:user-data-file>", "instance.user-data-file", "unknown"),
        ("stray", "instance", "text outside"),
        ("<i:hostname lang='en'>x</i:hostname>", "instance.hostname", "attribute lang"),
        ("<i:hostname>x</i:hostname><i:hostname>y</i:hostname>", "instance.hostname", "twice"),
        ("<i:hostname>not a name</i:hostname>", "instance.hostname", "not acceptable"),
        ("<i:ssh-key>AAAA</i:ssh-key>", "instance.ssh_keys[0]", "not acceptable"),
        ("<i:tag>web</i:tag>", "instance.tag", "no name"),
        ("<i:tag name='a'/><i:tag name='a'/>", "instance.tag", "twice"),
        ("<i:user-data encoding='gzip'/>", "instance.user-data", "encoding gzip"),
        ("<i:user-data encoding='base64'>*</i:user-data>", "instance.user_data.base64", "base64"),
        ("<i:user-data>a</i:user-data><i:user-data/>", "instance.user-data", "twice"),
        ("<i:vendor-data encoding='base64'/>", "instance.vendor-data", "encoding base64"),
        ("<i:dialect name='ec2'/>", "instance.dialect", "not understood"),
        ("<i:dialect name='gce' serve='no'/>", "instance.dialects.gce", "unknown key"),
    ],
)
def test_what_is_wrong_with_the_element_is_reported_with_the_domain(
    inside: str, field: str, words: str
) -> None:
    found = known([web(element(inside))])
    problem = the_problem(found)
    assert (problem.field, problem.file) == (field, "domain web")
    assert words in str(problem)
    assert not found.instances


def test_an_element_that_breaks_leaves_what_was_in_force() -> None:
    found = known([web(element("<i:hostname>good</i:hostname>"))])
    assert not update(found, [web(element("<i:nonsense/>", "id='bad id'"))]).instances
    (instance,) = found.instances.values()
    assert instance.hostname == "good"
    assert any("stays in force" in problem.hint for problem in found.problems)


def test_of_two_domains_with_one_id_the_one_in_force_keeps_it() -> None:
    first = web(element("", "id='x'"), name="second")
    clone = web(element("", "id='x'"), ("network=default", "52:54:00:00:00:09"), name="clone")
    found = known([first])
    update(found, [clone])
    assert {each.name for each in found.instances.values()} == {"second"}
    problem = the_problem(found)
    assert (problem.field, problem.file) == ("instance.id", "domain clone")
    assert "domain second" in problem.reason


def test_of_two_domains_with_one_mac_the_one_in_force_keeps_it() -> None:
    found = known([web(name="second")])
    update(found, [web(name="clone")])
    assert {each.name for each in found.instances.values()} == {"second"}
    assert {problem.file for problem in found.problems} == {"domain clone"}
    assert any("192.168.122.5" in problem.reason for problem in found.problems)


def test_guests_on_a_bridge_of_the_hosts_are_in_one_network_that_the_operator_adds() -> None:
    domain = web("", ("network=lan", MAC), ("bridge=br0", "52:54:00:00:00:06"))
    found = known([domain], [BRIDGED])
    assert not found.networks
    assert found.implied == {"br0"}
    assert the_instance(found).ports == (
        port("br0", mac=MAC),
        port("br0", mac="52:54:00:00:00:06"),
    )


@pytest.mark.parametrize("place", ["network=direct", "user=x"])
def test_an_interface_whose_guest_cannot_reach_the_host_is_no_port(place: str) -> None:
    assert not known([web("", (place, MAC))], [MACVTAP]).instances


def test_a_domain_with_our_element_is_reported_without_a_port() -> None:
    found = known([web(element(""), ("network=direct", MAC))], [MACVTAP])
    assert the_instance(found).ports == ()


def test_only_the_chosen_networks_are_reported() -> None:
    domain = web("", ("network=default", MAC), ("network=inside", "52:54:00:00:00:06"))
    chosen = Selection(networks=frozenset({"inside"}))
    found = known([domain, web(name="other")], [NAT, ISOLATED], selection=chosen)
    assert set(found.networks) == {"inside"}
    assert the_instance(found).ports == (port("inside", mac="52:54:00:00:00:06"),)


@pytest.mark.parametrize("chosen", ["lan", "br0"])
def test_a_bridge_is_chosen_by_its_name_or_its_networks(chosen: str) -> None:
    selection = Selection(networks=frozenset({chosen}))
    found = known([web("", ("network=lan", MAC))], [BRIDGED], selection=selection)
    assert the_instance(found).ports == (port("br0", mac=MAC),)


def test_marked_domains_only_where_that_is_chosen() -> None:
    domains = [web(element("")), web("", ("network=default", "52:54:00:00:00:06"), name="plain")]
    assert the_instance(known(domains, selection=Selection(marked_only=True))).name == "web"


def test_a_static_host_that_changes_changes_its_domains_record() -> None:
    found = known([web()])
    changes = update(found, [], [NAT.replace("192.168.122.5", "192.168.122.50")])
    ((changed, record),) = changes.instances.items()
    assert record == replace(
        the_instance(found), ports=(port("default", "192.168.122.50", mac=MAC),)
    )
    assert changed == uuid_of("web")
    assert not changes.networks


def test_what_is_read_again_unchanged_is_no_change() -> None:
    found = known([web()])
    changes = update(found, [web()])
    assert not changes.instances
    assert not changes.networks


def test_what_is_gone_from_everything_is_gone() -> None:
    found = known([web()])
    changes = found.update({}, [], everything=True)
    assert changes == RecordSet(
        networks_removed=[NetworkId("default")], instances_removed=[InstanceId(uuid_of("web"))]
    )
    assert not found.instances


def test_xml_that_cannot_be_parsed_is_reported_and_affects_nothing_else() -> None:
    found = known([web()])
    found.update(
        {"u": "<domain"}, [NetworkXml("<network", active=True), NetworkXml(NAT, active=True)]
    )
    assert {problem.file for problem in found.problems} == {"a domain", "a network"}
    assert set(found.networks) == {"default"}
    assert len(found.instances) == 1


def test_a_problem_of_a_port_is_reported_with_its_domain() -> None:
    found = known([web()])
    (instance,) = found.instances
    origin = found.origin_of_port(instance)
    assert origin is not None
    assert origin.field == "instance.ports"
    assert found.origin_of_port(type(instance)("nobody")) is None
