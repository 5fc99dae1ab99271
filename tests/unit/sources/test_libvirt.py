"""What libvirt's domains and networks say, and the source that reads them."""

import asyncio
import sys
import threading
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from unittest.mock import MagicMock

import pytest

from imdsproxy.config.sources import LibvirtSourceSettings
from imdsproxy.errors import SourceUnavailable
from imdsproxy.model.entities import (
    BridgeListener,
    Dialect,
    Instance,
    InstanceId,
    Network,
    NetworkId,
    SshKey,
    Subnet,
)
from imdsproxy.model.observation import Observation
from imdsproxy.reconcile.reconciler import Reconciler
from imdsproxy.sources.libvirt.records import LibvirtKnown
from imdsproxy.sources.libvirt.source import LibvirtClient, LibvirtEvents, LibvirtSource
from imdsproxy.sources.libvirt.xml import METADATA_URI, parse_domain, parse_libvirt_network
from support.libvirt_backing import FakeLibvirt, domain_xml, uuid_of
from support.record_builders import port
from support.source_runs import running

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
    selected: frozenset[str] | None = None,
    marked_only: bool = False,
    active: bool = True,
) -> LibvirtKnown:
    found = LibvirtKnown(selected, marked_only=marked_only)
    update(found, domains, networks, active=active)
    return found


def update(
    found: LibvirtKnown,
    domains: Iterable[str],
    networks: Iterable[str] = (NAT,),
    *,
    active: bool = True,
) -> Observation:
    """What libvirt reports; domains by the UUID in their XML."""
    named = {text.partition("<uuid>")[2].partition("<")[0]: parse_domain(text) for text in domains}
    return found.update(named, [parse_libvirt_network(text, active=active) for text in networks])


def web(inside: str = "", *interfaces: tuple[str, str], name: str = "web") -> str:
    return domain_xml(name, interfaces or [("network=default", MAC)], inside)


def the_instance(found: LibvirtKnown) -> Instance:
    assert not found.problems
    (instance,) = found.records.instances.values()
    return instance


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


def test_an_isolated_network_has_no_gateway_and_its_uuid_as_id_where_its_name_is_none() -> None:
    text = ISOLATED.replace(
        "</network>", "<dns enable='no'/><ip address='10.1.0.1' prefix='24'/></network>"
    ).replace("inside", "my net")
    assert list(known(networks=[ISOLATED, text]).networks.values()) == [
        Network(NetworkId("inside"), BridgeListener("virbr1")),
        Network(
            NetworkId("7549bd34-a6c5-418a-9a1b-29d7383fcbde"),
            BridgeListener("virbr1"),
            name="my net",
            subnets=(Subnet(ip_network("10.1.0.0/24")),),
        ),
    ]


@pytest.mark.parametrize(("networks", "implied"), [([NAT], {"default"}), ([], set())])
def test_an_inactive_network_strands_no_port_and_one_that_libvirt_does_not_have_does(
    networks: list[str], implied: set[str]
) -> None:
    found = known([web()], networks, active=False)
    assert not found.networks
    assert found.implied == implied
    assert the_instance(found).ports[0].network == "default"


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


@pytest.mark.parametrize(
    ("inside", "field", "words"),
    [
        ("<i:host-name>x</i:host-name>", "instance.host-name", "did you mean hostname?"),
        ("<hostname>x</hostname>", "instance.hostname", "unknown element"),
        ("stray", "instance", "text outside"),
        ("<i:hostname lang='en'>x</i:hostname>", "instance.hostname", "attribute lang"),
        ("<i:hostname>x</i:hostname><i:hostname>y</i:hostname>", "instance.hostname", "twice"),
        ("<i:hostname>not a name</i:hostname>", "instance.hostname", "not acceptable"),
        ("<i:tag>web</i:tag>", "instance.tag", "no name"),
        ("<i:tag name='a'/><i:tag name='a'/>", "instance.tag", "twice"),
        ("<i:user-data encoding='gzip'/>", "instance.user-data", "encoding gzip"),
        ("<i:user-data encoding='base64'>*</i:user-data>", "instance.user_data.base64", "base64"),
        ("<i:vendor-data encoding='base64'/>", "instance.vendor-data", "encoding base64"),
        ("<i:dialect name='ec2'/>", "instance.dialect", "not understood"),
        ("<i:dialect name='gce' serve='no'/>", "instance.dialects.gce", "unknown key"),
    ],
)
def test_what_is_wrong_with_the_element_is_reported_with_the_domain(
    inside: str, field: str, words: str
) -> None:
    found = known([web(element(inside))])
    (problem,) = found.problems
    assert (problem.field, problem.file) == (field, "domain web")
    assert words in str(problem)
    assert not found.records.instances


def test_a_domain_keeps_its_record_when_its_element_breaks_or_another_claims_the_same() -> None:
    good = web(element("<i:hostname>good</i:hostname>"))
    found = known([good])
    assert not update(found, [web(element("<i:nonsense/>", "id='bad id'"))]).instances
    assert any("stays in force" in problem.hint for problem in found.problems)
    same = element("", f"id='{uuid_of('web')}'")
    clone = web(same, ("network=default", "52:54:00:00:00:09"), name="clone")
    assert not update(found, [good, clone, web(name="thief")]).instances
    reasons = {(each.file, each.field): each.reason for each in found.problems}
    assert "domain web" in reasons["domain clone", "instance.id"]
    assert "192.168.122.5" in reasons["domain thief", "instance.ports[0].addresses[0]"]
    ((key, instance),) = found.records.instances.items()
    assert instance.hostname == "good"
    assert found.place_of(key) == "domain web"
    assert found.place_of(InstanceId("nobody")) is None


def test_guests_on_a_bridge_of_the_hosts_are_in_one_network_that_the_operator_adds() -> None:
    domain = web("", ("network=lan", MAC), ("bridge=br0", "52:54:00:00:00:06"))
    found = known([domain], [BRIDGED])
    assert not found.networks
    assert the_instance(found).ports == (port("br0", mac=MAC), port("br0", mac="52:54:00:00:00:06"))
    before = dict(found.records.instances)
    # What cannot be parsed any more keeps its record, and the network that it is in.
    update(found, [domain.partition("<devices>")[0]], [BRIDGED])
    assert found.problems
    assert found.records.instances == before
    assert found.implied == {"br0"}


@pytest.mark.parametrize(
    ("place", "chosen", "network"),
    [
        ("network=inside", None, "inside"),
        ("network=inside", "inside", "inside"),
        ("network=inside", "default", None),
        ("network=lan", "lan", "br0"),
        ("network=lan", "br0", "br0"),
        ("network=lan", "default", None),
        ("bridge=br0", "br0", "br0"),
        ("bridge=br0", "lan", None),
        ("network=direct", None, None),
        ("user=x", None, None),
    ],
)
def test_an_interface_is_a_port_where_its_network_is_chosen_and_its_guest_reaches_the_host(
    place: str, chosen: str | None, network: str | None
) -> None:
    selected = None if chosen is None else frozenset({chosen})
    plain, marked = web("", (place, MAC)), web(element(""), (place, MAC), name="marked")
    for text in (plain, marked):
        found = known([text], [NAT, ISOLATED, BRIDGED, MACVTAP], selected=selected)
        assert set(found.networks) == {"default", "inside"} & (
            {chosen} if chosen else {"default", "inside"}
        )
        if network is not None:
            assert the_instance(found).ports == (port(network, mac=MAC),)
        elif text is marked:
            assert the_instance(found).ports == ()
        else:
            assert not found.records.instances


def test_marked_domains_only_where_that_is_chosen() -> None:
    domains = [web(element("")), web("", ("network=default", "52:54:00:00:00:06"), name="plain")]
    assert the_instance(known(domains, marked_only=True)).name == "web"


def test_a_static_host_that_changes_changes_its_domains_record() -> None:
    found = known([web()])
    networks = [NAT.replace("192.168.122.5", "192.168.122.50")]
    changes = update(found, [], networks)
    (changed,) = changes.instances.values()
    assert changed.ports == (port("default", "192.168.122.50", mac=MAC),)
    assert not changes.networks
    assert not update(found, [web()], networks).has_records


def test_xml_that_cannot_be_parsed_is_reported_and_affects_nothing_else() -> None:
    found = known([web()])
    update(found, ["<domain"], ["<network", NAT])
    assert {problem.file for problem in found.problems} == {"a domain", "a network"}
    assert set(found.networks) == {"default"}
    assert len(found.records.instances) == 1


def _source(client: LibvirtClient) -> LibvirtSource:
    connections = Reconciler("libvirt", "", 0.001, 0.002, retried=SourceUnavailable)
    return LibvirtSource(client, LibvirtSourceSettings(reread_s=3600), connections)


async def test_after_a_connection_is_made_anew_only_what_changed_meanwhile_is_reported() -> None:
    libvirt = FakeLibvirt()
    libvirt.network_xml["default"] = NAT
    other = web("", ("network=default", "52:54:00:00:00:06"), name="b")
    libvirt.xml = {uuid_of("a"): web(name="a"), uuid_of("b"): other}
    async with running(_source(libvirt)) as heard:
        libvirt.lose("gone")
        await heard.until(lambda each: not each.last.in_sync)
        assert set(heard.inventory.instances) == {uuid_of("a"), uuid_of("b")}
        async with asyncio.timeout(30):
            while libvirt.connections < 5:
                await asyncio.sleep(0.001)
        del libvirt.xml[uuid_of("b")]
        libvirt.xml[uuid_of("c")] = web("", ("network=default", "52:54:00:00:00:07"), name="c")
        libvirt.failure = None
        await heard.until(lambda each: each.last.in_sync)
        # A failure that goes on is reported once.
        assert [each.full for each in heard.observations] == [True, False, False]
        assert set(heard.last.instances) == {uuid_of("c")}
        assert set(heard.last.instances_removed) == {uuid_of("b")}
        assert not heard.last.problems
        assert libvirt.open
    assert not libvirt.open


async def test_without_libvirts_module_the_hint_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    async with running(_source(LibvirtClient("qemu:///system"))) as heard:
        (problem,) = heard.last.problems
        assert not heard.last.in_sync
        assert "Python module" in problem.reason
        assert "apt install python3-libvirt" in problem.hint


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """libvirt's module, whose connections are one."""
    made = MagicMock(libvirtError=type("LibvirtError", (Exception,), {}))
    made.virEventRunDefaultImpl.side_effect = threading.Event().wait
    monkeypatch.setitem(sys.modules, "libvirt", made)
    return made


async def test_a_connection_whose_end_cannot_be_watched_is_closed(library: MagicMock) -> None:
    connection = library.openReadOnly.return_value
    connection.registerCloseCallback.side_effect = library.libvirtError("not supported")
    client = LibvirtClient("test:///default")
    with pytest.raises(SourceUnavailable, match="not supported"):
        await client.connect(LibvirtEvents())
    await client.close()
    connection.close.assert_called_once()


async def test_a_connection_that_comes_too_late_is_closed_and_none_is_made_meanwhile(
    library: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, connection = threading.Event(), MagicMock()

    def open_late(_uri: str) -> MagicMock:
        answers.wait()
        return connection

    library.openReadOnly.side_effect = open_late
    monkeypatch.setattr("imdsproxy.sources.libvirt.source._CLOSE_S", 0.01)
    client = LibvirtClient("test:///default", connect_s=0.1)
    try:
        for _ in range(3):
            with pytest.raises(SourceUnavailable, match="does not answer"):
                await client.connect(LibvirtEvents())
            await client.close()
        names = [each.name for each in threading.enumerate()]
        # The call that hangs, and the closing that waits for it.
        assert names.count("imdsproxy-libvirt") == 2
        connection.close.assert_not_called()
    finally:
        answers.set()
    async with asyncio.timeout(20):
        while not connection.close.called:
            await asyncio.sleep(0.001)
        # The closing has called `close`, and may not have returned yet.
        while client._closing is not None and not client._closing.done():
            await asyncio.sleep(0.001)
    await client.connect(LibvirtEvents())
    await client.close()
