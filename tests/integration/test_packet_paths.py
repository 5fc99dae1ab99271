"""How a guest's packet for 169.254.169.254 arrives, on each kind of network that a hypervisor has.

Guests are namespaces, with real DHCP clients, whose only settings are those that a real DHCP server gave them.
"""

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.model.entities import BridgeListener, Dialect, InterfaceListener, NamespaceListener
from imdsproxy.network.anti_spoofing.host_rules import (
    GuestBridge,
    GuestBridges,
    observe_guests,
    read_rules,
)
from imdsproxy.tools.snippets import Target
from support.daemon import Daemon
from support.dhcp_client import take_lease
from support.guest import inside
from support.hostlab import HostLab
from support.impostor import open_wire
from support.lab import Lab, batch, ip, run, until, within
from support.recorder import Recorder, reply
from support.snippets import network, snippet
from support.vm.networks import VmHost
from support.world import World

pytestmark = pytest.mark.root

_SUBNET: Final = "192.168.122"
_METADATA: Final = "169.254.169.254"
_MAC: Final = "52:54:00:00:00:{:02x}"
_CLAIM: Final = ("busybox", "arping", "-U", "-c", "3", "-I", "eth0", "169.254.169.254")
_CLOUD: Final = "the host's own cloud"
_FORWARD: Final = (
    "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }"
)
"""As Docker's; bridged packets meet it where br_netfilter hands them over."""

_MASQUERADE: Final = (
    f"table ip nat {{ chain POSTROUTING {{ type nat hook postrouting priority srcnat; "
    f"ip saddr {_SUBNET}.0/24 ip daddr != {_SUBNET}.0/24 masquerade; }}; }}"
)
"""As libvirt's; it is for packets that leave the host, and meets bridged ones too where br_netfilter is loaded."""

_WALL: Final = "table inet wall { chain in { type filter hook input priority 0; policy drop; udp dport 67 accept; }; }"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[VmHost]:
    with closing(Lab()) as lab, closing(VmHost(lab, tmp_path)) as made:
        yield made


@pytest.fixture
def daemon(host: VmHost) -> Iterator[Daemon]:
    with closing(Daemon(host.lab)) as made:
        yield made.start()


def _lease(host: VmHost, guest: str) -> str:
    """Have a guest ask for its address by DHCP; the address."""
    return take_lease(guest, host.directory)


def _ask(guest: str, url: str = "http://169.254.169.254/latest/meta-data/hostname") -> str:
    """What curl(1) gets in a guest; its exit status in place of an answer."""
    done = subprocess.run(
        (*within(guest), "/usr/bin/curl", "--silent", "--max-time", "8", url),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout if done.returncode == 0 else f"curl {done.returncode}"


def _know(daemon: Daemon, name: str, network: str, address: str, mac: str) -> None:
    words = ("--network", network, "--mac", mac, "--hostname", name)
    _told(daemon, "instance", "add", name, *words, *(("--address", address) if address else ()))


def _told(daemon: Daemon, *words: str) -> None:
    done = daemon.command(*words)
    assert done.status == 0, done.err


def _guest(host: VmHost, daemon: Daemon, bridge: str, network: str, number: int) -> str:
    """A guest with a lease, and its record; its namespace."""
    mac = _MAC.format(number)
    name = f"{network}{number}"
    guest = host.guest_port(bridge, name, mac)
    _know(daemon, name, network, _lease(host, guest), mac)
    return guest


def _asked(tap: socket.socket) -> list[bytes]:
    """The frames to the metadata address that it has heard."""
    frames = []
    while True:
        try:
            frames.append(tap.recv(2000))
        except BlockingIOError:
            return [one for one in frames if one[30:34] == bytes((169, 254, 169, 254))]


def _lan(host: VmHost, bridge: str, *options: str, subnet: str = _SUBNET) -> None:
    """A bridge with a router of somebody else's on it, which is gateway and DHCP server."""
    router = host.lab.namespace(f"{bridge}-router")
    batch(
        host.lab.host,
        [
            # With a MAC of its own, as libvirt gives it: else it changes, and tells, with each port.
            f"link add {bridge} address 52:54:00:ff:ff:01 type bridge stp_state 0 forward_delay 0",
            f"link set {bridge} up",
            f"link add {bridge}-up up master {bridge} type veth peer name eth0 netns {router}",
        ],
    )
    batch(router, ["link set eth0 up", f"address add {subnet}.1/24 dev eth0"])
    host.serve_dhcp(router, "eth0", subnet, *options)


def _announced(gateway: str | None) -> str:
    """What `imdsproxy snippet` prints for the DHCP server of a network with that gateway."""
    lan = network(InterfaceListener("br0"), f"{_SUBNET}.0/24", gateway)
    return f"--{snippet(Target.QEMU, Dialect.OPENSTACK, lan).of('route')}"


def _nat(host: VmHost) -> None:
    """Of libvirt's: the host is the gateway."""
    host.nat_network("virbr0")


def _isolated(host: VmHost) -> None:
    """DHCP gives the route, and no other."""
    host.isolated_network("iso0", options=(_announced(None),))


def _router(host: VmHost) -> None:
    _lan(host, "br0")


def _announcing(host: VmHost) -> None:
    """Behind a foreign gateway, DHCP gives the route too."""
    _lan(host, "br0", _announced(f"{_SUBNET}.1"))


def _walled(host: VmHost) -> None:
    """As firewalld's zone `libvirt`, which lets guests have DHCP and DNS of the host and nothing else."""
    host.nat_network("virbr0")
    run(*within(host.lab.host), "nft", _WALL)


def _masquerading(host: VmHost) -> None:
    """Of libvirt's, with its NAT."""
    host.nat_network("virbr0")
    run(*within(host.lab.host), "nft", _MASQUERADE)


@pytest.mark.parametrize(
    ("make", "reach", "device", "routes"),
    [
        (_nat, "--interface", "virbr0", {"default"}),
        pytest.param(_masquerading, "--bridge", "virbr0", {"default"}, marks=pytest.mark.slow),
        pytest.param(_nat, "--bridge", "virbr0", {"default"}, marks=pytest.mark.slow),
        (_walled, "--bridge", "virbr0", {"default"}),
        (_isolated, "--bridge", "iso0", {_METADATA}),
        # Behind a foreign gateway a guest needs none on a bridge; elsewhere it keeps that gateway beside it.
        (_router, "--bridge", "br0", {"default"}),
        (_announcing, "--interface", "br0", {"default", _METADATA}),
    ],
)
def test_a_guest_reaches_the_service_on_each_kind_of_network(
    host: VmHost,
    daemon: Daemon,
    make: Callable[[VmHost], None],
    reach: str,
    device: str,
    *,
    routes: set[str],
) -> None:
    make(host)
    _told(daemon, "network", "add", "net", reach, device)
    guest = _guest(host, daemon, device, "net", 1)
    lines = ip("-n", guest, "route").splitlines()
    assert {line.split()[0] for line in lines} == {*routes, f"{_SUBNET}.0/24"}
    assert _ask(guest) == "net1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "reach", "device", "rules"),
    [(_nat, "--interface", "virbr0", _WALL), (_router, "--bridge", "br0", _FORWARD)],
)
def test_check_names_the_rules_that_let_guests_in(
    host: VmHost,
    daemon: Daemon,
    make: Callable[[VmHost], None],
    reach: str,
    device: str,
    *,
    rules: str,
) -> None:
    make(host)
    _told(daemon, "network", "add", "net", reach, device)
    guest = _guest(host, daemon, device, "net", 1)
    run(*within(host.lab.host), "nft", rules)
    run(*within(host.lab.host), "sysctl", "-q", "net.bridge.bridge-nf-call-iptables=1")
    assert _ask(guest) == "curl 28"
    (finding,) = (one for one in _findings(daemon, "paths") if one["warning"])
    advice = finding["hint"].rpartition("; or ")[2].replace(", and ", "; ")
    run(*within(host.lab.host), "sh", "-c", advice)
    assert _ask(guest) == "net1"
    assert not any(one["warning"] for one in _findings(daemon, "paths"))


def _findings(daemon: Daemon, area: str) -> list[dict[str, Any]]:
    """What `imdsproxy check` finds about something, asked on the daemon's host."""
    done = subprocess.run(
        (
            *within(daemon.lab.host),
            *daemon.program,
            *("--config", str(daemon.config), "check", "--json"),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return [one for one in found if one["area"] == area]


def test_two_hosts_on_one_lan_each_answer_their_own_guests(host: VmHost, daemon: Daemon) -> None:
    """Both have the address on the link; what a guest asks never leaves its host."""
    _lan(host, "br0")
    _told(daemon, "network", "add", "lan", "--bridge", "br0")
    with closing(Lab()) as other, closing(Daemon(other)) as others:
        batch(
            other.host, ["link add br0 type bridge stp_state 0 forward_delay 0", "link set br0 up"]
        )
        ip(
            *("-n", host.lab.host, "link", "add", "trunk", "up", "master", "br0", "type", "veth"),
            *("peer", "name", "trunk", "netns", other.host),
        )
        ip("-n", other.host, "link", "set", "trunk", "up", "master", "br0")
        others.start()
        _told(others, "network", "add", "lan", "--bridge", "br0")
        there = VmHost(other, host.directory)
        mine = host.guest_port("br0", "mine", _MAC.format(4))
        theirs = there.guest_port("br0", "theirs", _MAC.format(5))
        _know(daemon, "mine", "lan", _lease(host, mine), _MAC.format(4))
        _know(others, "theirs", "lan", _lease(host, theirs), _MAC.format(5))
        with open_wire(other.host, "trunk", timeout_s=0) as trunk:
            for _ in range(3):
                # As before the bridges have met anybody: a frame for a MAC that they do not know goes everywhere.
                for place in (host.lab.host, other.host):
                    ip("-n", place, "link", "set", "br0", "type", "bridge", "fdb_flush")
                for guest in (mine, theirs):
                    ip("-n", guest, "neigh", "flush", "dev", "eth0")
                assert (_ask(mine), _ask(theirs)) == ("mine", "theirs")
            assert _asked(trunk) == []
        # What is not for the metadata service goes its way.
        ping = ("busybox", "ping", "-c", "1", "-W", "3", f"{_SUBNET}.1")
        assert "1 packets received" in run(*within(mine), *ping)


@pytest.mark.slow
def test_a_guest_cannot_be_the_metadata_service_of_its_neighbours(
    host: VmHost, daemon: Daemon
) -> None:
    _lan(host, "br0", _announced(None))
    _told(daemon, "network", "add", "lan", "--bridge", "br0")
    victim = _guest(host, daemon, "br0", "lan", 6)
    address = _lease(host, victim)
    impostor = host.guest_port("br0", "impostor", _MAC.format(7))
    own = _lease(host, impostor)
    ip("-n", impostor, "address", "add", "169.254.169.254/32", "dev", "eth0")
    ip("-n", victim, "neigh", "flush", "dev", "eth0")
    assert _ask(victim) == "lan6"
    run(*within(impostor), *_CLAIM)
    assert _ask(victim) == "lan6"
    heard = inside(victim, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with heard:
        heard.bind(("", 7))
        heard.settimeout(5)
        for source, word in (("169.254.169.254", b"a lie"), (own, b"the truth")):
            with inside(impostor, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sent:
                sent.bind((source, 7))
                sent.sendto(word, (address, 7))
        assert heard.recv(100) == b"the truth"


def test_a_guest_that_is_plugged_in_later_is_led_there_and_one_that_moves_is_not_led_back(
    host: VmHost, daemon: Daemon
) -> None:
    _lan(host, "br0")
    _lan(host, "br1", subnet="192.168.123")
    _told(daemon, "network", "add", "lan", "--bridge", "br0")
    _told(daemon, "network", "add", "other", "--bridge", "br1")
    # Beforehand: a record that comes is a reason to look at the host anew, and here the port is to be one.
    _know(daemon, "here", "lan", "", _MAC.format(8))
    _know(daemon, "there", "other", "", _MAC.format(8))
    guest = host.guest_port("br0", "lan8", _MAC.format(8))
    _lease(host, guest)
    until(lambda: _ask(guest) == "here", what="the answer of its network")
    ip("-n", host.lab.host, "link", "set", "g-lan8", "master", "br1")
    _lease(host, guest)
    until(lambda: _ask(guest) == "there", what="the answer of its new network")
    # What leads guests there goes with the networks.
    tables = (*within(host.lab.host), "nft", "list", "tables", "bridge")
    assert host.lab.prefix in run(*tables)
    for name, of in (("here", "lan"), ("there", "other")):
        _told(daemon, "instance", "remove", name)
        _told(daemon, "network", "remove", of)
    until(lambda: run(*tables) == "", what="the tables' end")


def test_a_host_that_is_a_cloud_s_guest_keeps_its_own_metadata(
    host: VmHost, daemon: Daemon
) -> None:
    cloud = host.lab.namespace("cloud")
    ip(
        *("-n", host.lab.host, "link", "add", "eth0", "up", "type", "veth"),
        *("peer", "name", "eth0", "netns", cloud),
    )
    batch(
        cloud,
        [
            "link set eth0 up",
            "address add 10.9.0.1/24 dev eth0",
            "address add 169.254.169.254/32 dev eth0",
        ],
    )
    batch(
        host.lab.host,
        [
            "address add 10.9.0.5/24 dev eth0",
            "route add default via 10.9.0.1",
            # As clouds tell it by DHCP.
            "route add 169.254.169.254 via 10.9.0.1",
        ],
    )
    with Recorder(namespace=cloud, address=_METADATA, port=80) as service:
        service.always(reply(_CLOUD.encode()))
        assert _ask(host.lab.host) == _CLOUD
        host.nat_network("virbr0")
        added = daemon.command("network", "add", "nat", "--interface", "virbr0")
        assert (added.status, "lose its own metadata service" in " ".join(added.out.split())) == (
            75,
            True,
        )
        left = daemon.not_served()["nat"]
        assert (left["code"], "--bridge virbr0" in left["hint"]) == ("host-metadata", True)
        assert _ask(host.lab.host) == _CLOUD
        _told(daemon, "network", "set", "nat", "--bridge", "virbr0")
        guest = _guest(host, daemon, "virbr0", "nat", 10)
        assert _ask(guest) == "nat10"
        assert _ask(host.lab.host) == _CLOUD


# What `check` sees of a bridge whose guests may use any MAC


def test_flags_of_ports_are_seen(lab: HostLab) -> None:
    bridge = lab.bridge("b")
    for number, name in enumerate("xyz"):
        lab.guest(name, bridge, f"10.0.0.{number + 5}/24")
    names = {name: lab.link_name(f"{name}o") for name in "xyz"}
    lab.run("/usr/sbin/bridge", "link", "set", "dev", names["x"], "learning", "off")
    lab.run("/usr/sbin/bridge", "link", "set", "dev", names["y"], "locked", "on")
    lab.run("/usr/sbin/bridge", "link", "set", "dev", names["y"], "isolated", "on")

    def seen(rules: str = "") -> GuestBridge:
        listener = BridgeListener(bridge)
        found = observe_guests(listener, lab.naming, NamespaceDirectory(), lambda _: rules)
        assert (found.missing, len(found.bridges)) == ("", 1)
        return found.bridges[0]

    macs = {names["x"]: "learning off", names["y"]: "locked", names["z"]: ""}
    assert seen() == GuestBridge(bridge, macs)
    rules = f'table bridge x {{ iifname "{names["z"]}" ether saddr != 02:00:00:00:00:01 drop }}'
    assert seen(rules).macs[names["z"]] == "a rule"


def test_what_is_no_bridge_has_no_ports(lab: HostLab) -> None:
    directory = NamespaceDirectory()
    for name, missing in ((lab.device("d"), ""), ("none", "device none")):
        found = observe_guests(InterfaceListener(name), lab.naming, directory, str)
        assert found == GuestBridges(missing=missing)
    found = observe_guests(NamespaceListener("none"), lab.naming, directory, str)
    assert found == GuestBridges(missing="namespace none")


def test_the_bridge_behind_a_namespaces_device_is_seen_and_who_may_pose_on_it(
    lab: HostLab,
) -> None:
    bridge, place = lab.bridge("b"), lab.namespace("place")
    for number, name in enumerate("xyz"):
        lab.guest(name, bridge, f"10.0.0.{number + 5}/24")
    x, y, z = (lab.link_name(f"{name}o") for name in "xyz")
    outer = lab.link_name("po")
    lab.ip(
        *("link", "add", outer, "master", bridge, "type", "veth"),
        *("peer", "name", "eth0", "netns", place),
    )
    lab.run("/usr/sbin/bridge", "link", "set", "dev", y, "isolated", "on")
    rules = f'table bridge x {{ iifname "{z}" arp saddr ip != 10.0.0.7 drop }}'
    found = observe_guests(
        NamespaceListener(place), lab.naming, NamespaceDirectory(), lambda _: rules
    )
    (seen,) = found.bridges
    assert (seen.name, set(seen.macs), seen.posing) == (bridge, {x, y, z}, (x,))


def test_rules_are_read_where_there_is_somebody_to_list_them() -> None:
    assert read_rules((("echo", "table"), ("no-such-program",))) == "table"


def test_check_warns_of_each_bridge_until_there_is_a_rule(world: World) -> None:
    world.lab.guest("red", 66)
    kernel, *found = _findings(world.daemon, "macs")
    assert (kernel["ok"], kernel["warning"]) == (True, False)
    for finding in found:
        assert finding["warning"], finding
        assert "anti-spoofing" in finding["hint"]
    inside = [f"br0 in namespace {world.lab.name(name)}" for name in ("green", "red", "red")]
    names = [one["text"].removeprefix("bridge ").partition(":")[0] for one in found]
    assert names == ["blue", *inside, "grey"]
    # Where the host leads guests to the service, none can pose as it.
    posing = [
        name for name, one in zip(names, found, strict=True) if "answering ARP" in one["text"]
    ]
    assert posing == inside[-1:]
    blue = found[0]
    # The cable of the listener itself is nobody's port.
    assert world.lab.prefix not in blue["text"]
    port = blue["text"].split("guests on ")[1].split()[0]
    rule = f'add rule bridge guests from iifname "{port}" ether saddr != {world.red.mac} drop'
    for words in (
        "add table bridge guests",
        "add chain bridge guests from { type filter hook prerouting priority -300; }",
        rule,
    ):
        run(*within(world.lab.host), "nft", words)
    try:
        _, blue, *_, grey = _findings(world.daemon, "macs")
        assert (blue["warning"], grey["warning"]) == (False, True)
        assert f"{port} (a rule)" in blue["text"]
    finally:
        run(*within(world.lab.host), "nft", "delete table bridge guests")
