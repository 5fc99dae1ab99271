"""OVN's Southbound database as the source has it: every kind of endpoint, losses of all kinds, many foreign ports."""

import asyncio
import contextlib
import errno
import re
import resource
import shutil
import signal
import socket
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bench.place import BenchError
from bench.southbound import (
    CHASSIS,
    HOST,
    OvsdbServer,
    SbNetwork,
    SbPort,
    Southbound,
    add_chassis_to_vswitch,
    plan_cloud,
)
from imdsproxy.config.sources import OvnSourceSettings
from imdsproxy.host import netlink
from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import DEFAULT_DIRECTORY, NamespaceDirectory, NamespaceThread
from imdsproxy.model.entities import NetworkId
from imdsproxy.network.listeners.host import SystemHost
from imdsproxy.network.listeners.plan import ovn_place
from imdsproxy.sources.ovn.ports import namespace_of
from imdsproxy.sources.ovn.source import OvnSource
from support.certificates import make_authority
from support.lab import until
from support.patience import patience
from support.source_runs import DEADLINE_S, Heard, running
from support.southbound import SouthboundWorld, open_southbound

pytestmark = [
    pytest.mark.root,
    # Of python-ovs's log, which is off.
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
]

NETWORK = SbNetwork(0, "ffff")
PORT = SbPort(NETWORK, 0)
OTHER = SbPort(NETWORK, 1)
MEBIBYTE = 2**20


class Databases:
    """The source alone, on real servers: a Southbound database, and Open vSwitch's, which names it."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self._stack = directory, stack
        self.vswitch = self.server("Open_vSwitch", "vswitch").create().start()
        self.sb = self.server("OVN_Southbound", "sb").create().start()
        self.rows = self.begin(self.sb)
        with contextlib.closing(self.vswitch.client()) as client:
            add_chassis_to_vswitch(client, self.sb.remote)

    def server(
        self, database: str, name: str, *remotes: str, options: tuple[str, ...] = ()
    ) -> OvsdbServer:
        made = OvsdbServer(self.directory, database, name, remotes, options)
        self._stack.callback(made.kill)
        return made

    def begin(self, server: OvsdbServer) -> Southbound:
        """Write this chassis, a network and its first port."""
        rows = Southbound(self._stack.enter_context(contextlib.closing(server.client())))
        rows.begin()
        rows.add_networks([NETWORK])
        rows.add_port(PORT)
        return rows

    def reopen(self, rows: Southbound, server: OvsdbServer) -> None:
        """Write to another server, or to one that was started again, with the same rows."""
        rows.client = self._stack.enter_context(contextlib.closing(server.client()))

    def source(self, **settings: object) -> OvnSource:
        values = {"enabled": True, "open_vswitch": self.vswitch.remote, **settings}
        return OvnSource(OvnSourceSettings.model_validate(values))

    @contextlib.asynccontextmanager
    async def running(self, *ports: SbPort, **settings: object) -> AsyncIterator[Heard]:
        """What the source reports, from when it is in sync with these ports."""
        async with running(self.source(**settings)) as heard:
            await serves(heard, *ports)
            yield heard


async def serves(heard: Heard, *ports: SbPort) -> None:
    """Wait until the source is in sync with these ports."""
    wanted = {port.instance for port in ports}
    await heard.until(lambda one: set(one.inventory.instances) == wanted and one.last.in_sync)


def tcp_port(server: OvsdbServer) -> str:
    """What the kernel has chosen."""
    log = server.directory / f"{server.name}.log"
    pattern = re.compile(r"listening on port (\d+)")
    until(lambda: pattern.search(log.read_text()), what="a TCP port")
    return str(pattern.findall(log.read_text())[0])


def takes_writes(server: OvsdbServer) -> bool:
    """Whether a member of a cluster has a leader."""
    nothing = {
        "op": "mutate",
        "table": "SB_Global",
        "where": [],
        "mutations": [["nb_cfg", "+=", 0]],
    }
    with contextlib.closing(server.client()) as client:
        try:
            client.transact("OVN_Southbound", nothing)
        except BenchError:
            return False
    return True


@contextlib.contextmanager
def hanging(server: OvsdbServer) -> Iterator[None]:
    """The server answers nothing; connections to it stay open, and the kernel accepts new ones."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@pytest.fixture
def databases(tmp_path: Path) -> Iterator[Databases]:
    with contextlib.ExitStack() as stack:
        yield Databases(tmp_path, stack)


async def test_rows_are_followed_over_a_unix_socket_and_over_tcp(databases: Databases) -> None:
    tcp = databases.server("OVN_Southbound", "tcp", "ptcp:0:127.0.0.1").create().start()
    rows = databases.begin(tcp)
    for remote, own in ((None, databases.rows), (f"tcp:127.0.0.1:{tcp_port(tcp)}", rows)):
        async with databases.running(PORT, southbound=remote) as heard:
            own.bind(PORT, "")
            await serves(heard)
            own.bind(PORT, CHASSIS)
            await serves(heard, PORT)


async def test_tls_shows_our_certificate_and_takes_no_server_of_another_authority(
    databases: Databases,
) -> None:
    directory = databases.directory
    authority, stranger = make_authority(directory, "ca"), make_authority(directory, "stranger")
    server, client = authority.issue("server"), authority.issue("client")
    options = (
        f"--private-key={server.key}",
        f"--certificate={server.certificate}",
        f"--ca-cert={authority.ca_file}",
    )
    tls = databases.server("OVN_Southbound", "tls", "pssl:0:127.0.0.1", options=options)
    databases.begin(tls.create().start())
    late, log = directory / "late.key", directory / "tls.log"
    right = {
        "southbound": f"ssl:127.0.0.1:{tcp_port(tls)}",
        "private_key_file": str(late),
        "certificate_file": str(client.certificate),
        "ca_file": str(authority.ca_file),
    }
    # A file that is not there is a reason and no end: it may come.
    async with running(databases.source(**right)) as heard:
        await heard.until(lambda one: "No such file" in str(one.last.problems))
        shutil.copy(client.key, late)
        await serves(heard, PORT)
    own = {
        "certificate_file": str(stranger.own.certificate),
        "private_key_file": str(stranger.own.key),
    }
    for wrong in ({"ca_file": str(stranger.ca_file)}, own):
        refused = log.read_text().count("SSL_accept")
        async with running(databases.source(**{**right, **wrong})) as heard:
            async with asyncio.timeout(DEADLINE_S * patience()):
                while log.read_text().count("SSL_accept") == refused:
                    await asyncio.sleep(0.02)
            assert not any(one.in_sync for one in heard.observations)


async def test_any_member_of_a_cluster_will_do_and_another_takes_over(databases: Databases) -> None:
    address = f"unix:{databases.directory}/raft"
    members = [databases.server("OVN_Southbound", f"member{number}") for number in range(3)]
    leader = members[0].create_member(f"{address}0").start()
    for number, joining in enumerate(members[1:], 1):
        joining.create_member(f"{address}{number}", of=f"{address}0").start()
    until(lambda: takes_writes(leader), what="a leader")
    rows = databases.begin(leader)
    # Neither of the two is the leader, and one of them cannot be reached.
    closed = f"unix:{databases.directory}/closed.sock"
    async with databases.running(PORT, southbound=f"{closed},{members[1].remote}") as heard:
        rows.add_port(OTHER)
        await serves(heard, PORT, OTHER)
    async with databases.running(
        PORT, OTHER, southbound=f"{leader.remote},{members[1].remote},{members[2].remote}"
    ) as heard:
        leader.kill()
        until(lambda: takes_writes(members[2]), what="another leader", within_s=20)
        databases.reopen(rows, members[2])
        rows.bind(OTHER, "")
        await serves(heard, PORT)


async def test_ports_that_go_while_there_is_no_connection_are_gone_after_it(
    databases: Databases,
) -> None:
    databases.rows.add_port(OTHER)
    async with databases.running(PORT, OTHER) as heard:
        copy = databases.server("OVN_Southbound", "copy")
        databases.sb.kill()
        await heard.until(lambda one: not one.last.in_sync)
        assert set(heard.inventory.instances) == {PORT.instance, OTHER.instance}
        # As it was, less a port.
        shutil.copy(databases.sb.file, copy.file)
        databases.reopen(databases.rows, copy.start())
        databases.rows.remove_port(OTHER)
        copy.kill()
        shutil.copy(copy.file, databases.sb.file)
        databases.sb.start()
        await serves(heard, PORT)


async def test_guests_are_known_for_the_grace_after_the_chassis_has_gone_and_no_longer(
    databases: Databases,
) -> None:
    async with databases.running(PORT, grace_s=0.3) as heard:
        databases.rows.remove_chassis(CHASSIS)
        await heard.until(lambda one: not one.last.in_sync)
        assert set(heard.inventory.instances) == {PORT.instance}
        assert "no row of this chassis" in str(heard.last.problems)
        await serves(heard)


async def test_a_port_whose_row_went_while_the_chassis_had_none_goes_once_all_may_be_claimed(
    databases: Databases,
) -> None:
    databases.rows.add_port(OTHER)
    async with databases.running(PORT, OTHER, grace_s=2) as heard:
        databases.rows.remove_chassis(CHASSIS)
        databases.rows.remove_port(OTHER)
        databases.rows.add_chassis(CHASSIS, HOST)
        databases.rows.bind(PORT, CHASSIS)
        await heard.until(lambda one: one.last.in_sync)
        assert set(heard.inventory.instances) == {PORT.instance, OTHER.instance}
        await serves(heard, PORT)


async def test_a_source_that_finds_no_chassis_is_not_in_sync_before_the_grace_is_over(
    databases: Databases,
) -> None:
    databases.rows.remove_chassis(CHASSIS)
    async with databases.running(grace_s=0.3) as heard:
        (first, *_) = (one for one in heard.observations if "no row of" in str(one.problems))
        assert not first.in_sync


async def test_memory_and_rows_are_those_of_this_host_among_20000_foreign_ports(
    databases: Databases,
) -> None:
    cloud = plan_cloud("fffe", 20_200, local=200, networks=50)
    databases.rows.remove_port(PORT)
    databases.rows.fill(cloud)
    source = databases.source()
    tracemalloc.start()
    try:
        async with running(source) as heard:
            await serves(heard, *cloud.local)
            used, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert source.view is not None
    # Each port, and the metadata port of each network.
    assert len(source.view.bindings) == 200 + 50
    # All rows of the cloud would be more than 100 MiB.
    assert used < 12 * MEBIBYTE, used
    assert most < 24 * MEBIBYTE, most


async def test_rows_are_followed_where_the_process_has_thousands_of_descriptors(
    databases: Databases,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(socket.socket())
            async with databases.running(PORT) as heard:
                databases.rows.bind(PORT, "")
                await serves(heard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# A whole daemon, with guests


@pytest.fixture(scope="module")
def world() -> Iterator[SouthboundWorld]:
    with open_southbound() as made:
        ports = [port for number in range(2) for port in made.add_network(number, 2)]
        made.start_daemon()
        for port in ports:
            made.plug(port)
        yield made


@pytest.fixture(autouse=True)
def _whole(request: pytest.FixtureRequest) -> None:
    """Each guest is itself before a test."""
    if "world" in request.fixturenames:
        world: SouthboundWorld = request.getfixturevalue("world")
        for port in world.guests:
            world.wait_asks_as(port, port.instance)


def ask_all(world: SouthboundWorld) -> dict[SbPort, str]:
    return {port: world.asks_as(port) for port in world.guests}


def own(world: SouthboundWorld) -> dict[SbPort, str]:
    return {port: port.instance for port in world.guests}


def unknown(world: SouthboundWorld) -> str:
    """What an address gets that no port has."""
    port = next(iter(world.guests))
    return world.asks_as(port, source=world.spare_address(port))


def test_a_port_that_is_bound_moved_readdressed_or_given_to_another_instance_is_in_force(
    world: SouthboundWorld,
) -> None:
    port = SbPort(world.network(0), 0)
    world.rows.add_chassis("other", "other-host")
    for away in ("", "other"):
        world.rows.bind(port, away)
        world.wait_asks_as(port, "404")
        world.rows.bind(port, CHASSIS)
        world.wait_asks_as(port, port.instance)
    # On its way to this host: here before it is bound here.
    world.rows.bind(port, "other", additional=[CHASSIS])
    world.wait_asks_as(port, port.instance)
    world.rows.bind(port, CHASSIS)
    world.rows.change(port, cidrs="10.0.9.9/16")
    world.wait_asks_as(port, "404")
    world.rows.change(port, cidrs=f"{port.address}/16", device_id="another-instance")
    world.wait_asks_as(port, "another-instance")
    world.rows.change(port, device_id=port.instance)


def test_unknown_addresses_are_taken_from_neutron_and_link_local_ones_from_the_mac(
    world: SouthboundWorld,
) -> None:
    port = SbPort(world.network(1), 0)
    link_local = world.guests[port].link_local

    def wait_link_local(expected: str) -> None:
        until(
            lambda: world.asks_as(port, to="fe80::a9fe:a9fe", source=link_local) == expected,
            what=f"{expected} at the link-local address",
        )

    wait_link_local(port.instance)
    world.rows.change(port, row={"mac": "unknown"})
    try:
        # Without its MAC the link-local address is not known, and is not guessed.
        wait_link_local("404")
        assert world.asks_as(port) == port.instance
    finally:
        world.rows.change(port, row={"mac": f"{port.mac} {port.address}"})
        wait_link_local(port.instance)


def test_two_ports_with_one_address_in_a_network_are_a_conflict(world: SouthboundWorld) -> None:
    first, second = SbPort(world.network(0), 0), SbPort(world.network(0), 1)
    world.rows.change(second, cidrs=f"{first.address}/16")
    try:
        world.wait_asks_as(first, "503")
        assert world.asks_as(SbPort(world.network(1), 0)) == SbPort(world.network(1), 0).instance
        assert world.daemon.status()["conflicts"]
    finally:
        world.rows.change(second, cidrs=f"{second.address}/16")


def test_the_chassis_row_goes_and_comes_and_what_changed_meanwhile_is_true_then(
    world: SouthboundWorld,
) -> None:
    kept = SbPort(world.network(1), 1)
    world.rows.remove_chassis(CHASSIS)
    until(lambda: not world.source()["in_sync"], what="the loss")
    assert ask_all(world) == own(world)
    assert unknown(world) == "503"
    world.rows.change(kept, device_id="another-instance")
    world.rows.add_chassis(CHASSIS, HOST)
    for port in world.guests:
        world.rows.bind(port, CHASSIS)
    world.wait_asks_as(kept, "another-instance")
    until(lambda: world.source()["in_sync"], what="in sync")
    world.rows.change(kept, device_id=kept.instance)


def test_a_server_that_hangs_counts_as_lost_after_twice_the_probe_and_until_it_answers(
    world: SouthboundWorld,
) -> None:
    world.daemon.kill_controller()
    world.start_daemon(probe_s=1)
    assert unknown(world) == "404"
    with hanging(world.sb):
        until(lambda: unknown(world) == "503", what="503", within_s=6)
        assert ask_all(world) == own(world)
        # Another connection, which the kernel has accepted, is no answer.
        until(lambda: "no answer from" in str(world.source()["problems"]), what="the reason")
        assert unknown(world) == "503"
        assert not world.source()["in_sync"]
    until(lambda: world.source()["in_sync"], what="in sync")
    assert unknown(world) == "404"
    port = next(iter(world.guests))
    world.rows.bind(port, "")
    world.wait_asks_as(port, "404")
    world.rows.bind(port, CHASSIS)
    world.wait_asks_as(port, port.instance)
    world.daemon.kill_controller()
    world.start_daemon()


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
def test_a_controller_that_starts_while_the_truth_is_away_serves_on(
    world: SouthboundWorld, *, empty: bool
) -> None:
    world.sb.kill()
    kept = world.sb.file.read_bytes()
    if empty:
        world.sb.create().start()
    world.daemon.kill_controller()
    assert ask_all(world) == own(world)
    world.daemon.start(ready=False)
    until(lambda: not world.source()["in_sync"], what="the loss")
    until(world.daemon.resolver_up, what="the resolver")
    assert ask_all(world) == own(world)
    assert unknown(world) == "503"
    world.sb.kill()
    world.sb.file.write_bytes(kept)
    world.reopen(world.sb.start())
    until(lambda: world.source()["in_sync"], what="in sync", within_s=20)
    assert ask_all(world) == own(world)


def test_another_endpoint_with_other_truth_is_taken_over_where_open_vswitch_names_it(
    world: SouthboundWorld,
) -> None:
    changed, moved = SbPort(world.network(1), 1), SbPort(world.network(0), 1)
    other = world.server("OVN_Southbound", "other", "ptcp:16642:127.0.0.1").create().start()
    rows = world.rows_of(other)
    rows.begin()
    rows.add_networks(world.network(number) for number in range(2))
    rows.add_chassis("other", "other-host")
    for port in world.guests:
        rows.add_port(port, "other" if port == moved else CHASSIS)
    rows.change(changed, device_id="another-instance")
    world.name_southbound("tcp:127.0.0.1:16642")
    world.wait_asks_as(changed, "another-instance")
    world.wait_asks_as(moved, "404")
    world.name_southbound(world.sb.remote)
    until(lambda: ask_all(world) == own(world), what="as before", within_s=20)
    other.kill()


def test_a_device_that_another_program_takes_away_during_a_look_is_not_there(
    world: SouthboundWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_device: str, _command: int) -> int:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(netlink, "ask_ethtool", gone)
    network = NetworkId(world.network(0).id)
    thread, nowhere = NamespaceThread(NamespaceDirectory(DEFAULT_DIRECTORY)), Path("/nowhere")
    with contextlib.closing(thread):
        host = SystemHost(thread, Naming(world.lab.prefix), links=nowhere, journal=nowhere)
        seen = asyncio.run(host.observe((), [ovn_place(network)]))
    assert seen.namespaces[namespace_of(network)].end is None
