"""The socket of the listener `unix`: whose it is, who else was there, what it survives; and Neutron's proxies."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from support.agent_socket import AgentWorld, open_agents, squat
from support.daemon import alive, instance
from support.guest import IPV4, IPV6, Guest, Load, Reply
from support.lab import Server, record, until, within
from support.namespace_proxy import PROGRAM
from support.nova_world import nova_instance
from support.openstack.front import L3_PORT, Front, FrontKind, start_fronts
from support.recorder import say_whose
from support.world import own

pytestmark = pytest.mark.root

_WITHIN_S: Final = 3.0
"""A look a second, and a reload or two."""

_CONNECT: Final = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
_NOBODY: Final = 65534
_OTHER: Final = 64999


@pytest.fixture(scope="module")
def shared() -> Iterator[AgentWorld]:
    with open_agents() as one:
        yield one


@pytest.fixture
def world(shared: AgentWorld) -> Iterator[AgentWorld]:
    yield shared
    shared.heal()


def _access(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def _may_connect(path: Path, *, user: int, group: int) -> bool:
    """Whether a process of that user and group can connect."""
    who = ("/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups")
    command = (*who, sys.executable, "-c", _CONNECT, str(path))
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _served(world: AgentWorld) -> None:
    until(world.socket.serves, within_s=_WITHIN_S, what="our own service")
    world.daemon.wait_ready()
    until(lambda: world.metric("imdsproxy_unix_listener_serving") == 1, within_s=_WITHIN_S)


def _not_served(world: AgentWorld, what: str) -> None:
    until(lambda: what in world.problem(), within_s=_WITHIN_S, what=f"the problem {what}")
    assert world.report()["serving"] is False
    until(lambda: not world.daemon.status()["readiness"]["ready"], within_s=_WITHIN_S)
    assert any(what in one for one in world.daemon.status()["readiness"]["reasons"])
    assert world.metric("imdsproxy_unix_listener_serving") == 0


@contextlib.contextmanager
def _others_served(world: AgentWorld) -> Iterator[None]:
    """A network's own listener comes and loses no request meanwhile: nothing keeps it back."""
    network = world.lab.namespace_network("beside")
    guest = world.lab.guest("beside")
    world.daemon.put([network], [instance("beside-5", "beside")])
    try:
        with Load([guest], "/latest/user-data", own) as load:
            load.wait_answers(10)
            yield
            load.wait_answers(10)
        assert load.report.lost == []
    finally:
        world.daemon.remove_instance("beside-5")
        world.daemon.remove_network("beside")
        world.lab.remove_guest(guest)
        world.lab.delete_namespace("beside")


def _log_of(world: AgentWorld, agent: Server) -> list[str]:
    """The names of log entries with the agent's pid."""
    entries = world.daemon.log_entries()
    return [str(one["message"]) for one in entries if f"(pid {agent.pid})" in str(one)]


def _kill_haproxy(world: AgentWorld) -> None:
    master = world.daemon.pids().master
    os.kill(master, signal.SIGKILL)
    until(lambda: world.daemon.status()["haproxy"]["master"] not in (None, master))
    world.wait_serving()


# Mode and owner


@pytest.mark.parametrize(
    ("fields", "access", "member", "stranger"),
    [
        ({}, (0o644, 0, 0), (0, 0), (_NOBODY, 0)),
        ({"mode": "user", "user": "nobody"}, (0o644, _NOBODY, 0), (_NOBODY, _OTHER), (_OTHER, 0)),
        ({"mode": "group", "group": "nogroup"}, (0o664, 0, _NOBODY), (_OTHER, _NOBODY), (_OTHER, _OTHER)),
        ({"mode": "all"}, (0o666, 0, 0), (_OTHER, _OTHER), None),
        ({"proxy_user": "nobody"}, (0o664, 0, 0), (_NOBODY, 0), (_NOBODY, _OTHER)),
    ],
    ids=str,
)  # fmt: skip
def test_who_may_connect_is_as_the_settings_say(
    world: AgentWorld,
    fields: dict[str, object],
    access: tuple[int, int, int],
    member: tuple[int, int],
    stranger: tuple[int, int] | None,
) -> None:
    # HAProxy hands its socket on with the mode and owner of before.
    world.take_over(**fields)
    assert _access(world.path) == access
    assert _may_connect(world.path, user=member[0], group=member[1])
    assert stranger is None or not _may_connect(world.path, user=stranger[0], group=stranger[1])
    mode, user, group = access
    report = world.report()
    assert (report["mode"], report["user"], report["group"]) == (f"{mode:04o}", user, group)
    assert world.socket.serves()


def test_mode_and_owner_survive_reload_restart_and_kill_and_are_mended(world: AgentWorld) -> None:
    expected = (0o664, _NOBODY, _NOBODY)
    world.take_over(mode="group", user="nobody", group="nogroup")
    assert _access(world.path) == expected
    world.daemon.put([world.lab.namespace_network("more")])
    world.daemon.remove_network("more")
    assert _access(world.path) == expected
    _kill_haproxy(world)
    assert _access(world.path) == expected
    world.daemon.kill_controller()
    world.daemon.start()
    assert _access(world.path) == expected
    world.wait_serving()
    world.daemon.stop()
    assert not world.path.exists()
    world.daemon.start(ready=False)
    world.wait_serving()
    assert _access(world.path) == expected
    world.path.chmod(0o600)
    os.chown(world.path, 0, 0)
    until(lambda: _access(world.path) == expected, within_s=_WITHIN_S)
    assert world.problem() == ""


def test_it_comes_and_goes_with_its_settings_in_a_directory_that_is_made_and_costs_others_nothing(
    world: AgentWorld,
) -> None:
    path = world.daemon.directory / "deep" / "down" / "metadata_proxy"
    fields = {"user": "nobody", "group": "nogroup", "directory_mode": "0750"}
    with _others_served(world):
        world.take_over(enabled=False)
        assert not world.path.exists()
        assert world.daemon.status()["unix_listener"] is None
        world.take_over()
        assert world.socket.serves()
        world.take_over(path=str(path), **fields)
        assert _access(path.parent) == (0o750, _NOBODY, _NOBODY)
        assert _access(path.parent.parent) == (0o755, 0, 0)
        assert not world.path.exists()
        path.parent.chmod(0o711)
        os.chown(path.parent, _OTHER, _OTHER)
        world.take_over()
        assert not path.exists()
    # One that is there is left alone. Without a setting the owner is its: the account of Neutron's agents.
    world.take_over(path=str(path), directory_mode="0700")
    assert _access(path.parent) == (0o711, _OTHER, _OTHER)
    assert _access(path) == (0o644, _OTHER, _OTHER)
    assert _may_connect(path, user=_OTHER, group=0)


# Another process has it


@pytest.mark.parametrize(
    "when", ["it is off", "it is off, in another namespace", "it serves", "no controller runs"]
)
def test_a_process_that_has_bound_the_path_keeps_it_until_it_ends(
    world: AgentWorld, when: str
) -> None:
    if when.startswith("it is off"):
        world.take_over(enabled=False)
        assert not world.path.exists()
    elif when == "no controller runs":
        world.daemon.kill_controller()
    # Of sockets in another network namespace the kernel does not tell; a path leads to them all the same.
    elsewhere = when.endswith("another namespace")
    namespace = world.lab.namespace("away") if elsewhere else world.lab.host
    with squat(world.path, namespace=namespace) as agent:
        if when.startswith("it is off"):
            world.take_over()
        elif when == "no controller runs":
            world.daemon.start(ready=False)
        _not_served(world, f"pid {agent.pid}")
        assert world.socket.ask().body == b"foreign"
        if when == "it is off":
            with _others_served(world):
                assert world.socket.ask().body == b"foreign"
            assert len(_log_of(world, agent)) == 1
            # Nor is what has become another's removed.
            world.take_over(enabled=False)
            assert world.socket.ask().body == b"foreign"
            world.take_over()
    # The file of a process that has ended is no obstacle.
    _served(world)
    assert _access(world.path) == (0o644, 0, 0)
    if elsewhere:
        world.lab.delete_namespace("away")


def test_a_socket_or_directory_that_is_removed_is_made_again(world: AgentWorld) -> None:
    with world.socket.connect() as held:
        assert held.request("/").status == 400
        for _ in range(2):
            world.path.unlink()
            until(world.socket.serves, within_s=_WITHIN_S, what="our own service")
            assert _access(world.path) == (0o644, 0, 0)
        assert held.request("/").status == 400
    world.path.unlink()
    world.path.parent.rmdir()
    _served(world)


def test_a_haproxy_that_ends_after_its_directory_does_not_stay_away(world: AgentWorld) -> None:
    pids = world.daemon.pids()
    os.kill(pids.controller, signal.SIGSTOP)
    try:
        world.path.unlink()
        world.path.parent.rmdir()
        for pid in (pids.master, pids.worker):
            os.kill(pid, signal.SIGKILL)
    finally:
        os.kill(pids.controller, signal.SIGCONT)
    until(world.socket.serves, within_s=5, what="our own service")
    with _others_served(world):
        assert world.problem() == ""


# What is wrong with it leaves out nothing else


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"path": "{directory}/precious"}, "is not a socket"),
        ({"user": "imdst-none"}, "there is no user imdst-none"),
        ({"path": "/proc/sys/imdst"}, "/proc/sys/imdst"),
    ],
    ids=str,
)
def test_a_setting_that_this_host_cannot_follow_disables_this_listener_only(
    world: AgentWorld, fields: dict[str, object], reason: str
) -> None:
    precious = world.daemon.directory / "precious"
    precious.write_text("precious")
    world.daemon.configure(world.choose(**fields))
    done = world.daemon.command("reload")
    assert done.status == 0, done.err
    _not_served(world, reason)
    assert not world.path.exists()
    with _others_served(world):
        assert reason in world.problem()
    # Nor does it keep a daemon from starting.
    world.daemon.stop()
    world.daemon.start(ready=False)
    _not_served(world, reason)
    world.take_over()
    world.wait_serving()
    assert precious.read_text() == "precious"


# Requests that HAProxy alone does not decide


@pytest.mark.parametrize("spelled", ["2002:a00:5::b", "2002:0A00:0005:0::B"])
def test_an_address_of_6to4_is_not_the_ipv4_one_in_it(world: AgentWorld, spelled: str) -> None:
    port = {"network": "red", "mac": "fa:16:3e:00:00:0b", "addresses": ["2002:a00:5::b"]}
    world.daemon.put(instances=[{**nova_instance("red", "by-6to4"), "ports": [port]}])
    assert world.socket.ask(address=spelled).status == 200
    assert world.nova.only().values("x-instance-id") == (b"by-6to4",)
    world.daemon.remove_instance("by-6to4")
    world.nova.forget()
    assert world.socket.ask(address=spelled).status == 404
    assert world.nova.requests == []


# Behind the HAProxies that Neutron's own code configures: whose guest it is, whatever the guest says


_KINDS: Final[Mapping[str, FrontKind]] = {
    "isolated": "network",
    "isolated-too": "network",
    "routed": "router",
    "ovn": "ovn",
}
"""By the network's or router's id; the addresses in all of them are the same."""

_PROXY: Final = "00000005-0000-4000-8000-000000000000"
"""The network of imdsproxy's own proxy in front of the socket; `own` has a listener in its namespace."""


@pytest.fixture(scope="module")
def guests(shared: AgentWorld, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Guest]:
    """Guests behind proxies of all kinds, whose accounts are not that of the socket."""
    lab, state = shared.lab, tmp_path_factory.mktemp("state")
    behind = (*_KINDS, _PROXY)
    for name in behind:
        lab.furnish(name)
    fronts = [
        Front(kind, name, lab.name(name), account=("nobody", "nogroup"))
        for name, kind in _KINDS.items()
    ]
    start_fronts(fronts, socket=shared.path, state=state)
    words = (
        f"--network-id={_PROXY}",
        "--metadata-port=80",
        f"--metadata-proxy-socket={shared.path}",
        "--metadata-proxy-user=nobody",
        "--metadata-proxy-group=nogroup",
        f"--state-path={state}",
    )
    subprocess.run((*within(lab.name(_PROXY)), PROGRAM, *words), check=True)
    networks = [record(name, {"namespace": lab.name(f"nowhere-{name}")}) for name in behind]
    networks.append(lab.namespace_network("own"))
    shared.daemon.put(networks, [nova_instance(name, f"i-{name}") for name in (*behind, "own")])
    found = {name: lab.guest(name) for name in (*behind, "own")}
    return {**found, "routed": replace(found["routed"], port=L3_PORT)}


@pytest.fixture
def agents(world: AgentWorld, guests: Mapping[str, Guest]) -> AgentWorld:
    assert guests
    world.take_over(proxy_user="nobody", proxy_group="nogroup")
    world.nova.default = say_whose
    return world


def _own(guest: Guest, answer: Reply) -> str | None:
    if (answer.status, answer.text) == (200, f"i-{guest.network}"):
        return None
    return f"{guest.name} got {answer.status} {answer.body[:80]!r}"


@pytest.mark.parametrize("name", [*_KINDS, _PROXY])
def test_each_guest_is_known_by_its_network_or_router(
    agents: AgentWorld, guests: Mapping[str, Guest], name: str
) -> None:
    guest = guests[name]
    for to, source in ((IPV4, "10.0.0.5"), (IPV6, "2001:db8::5"), (IPV6, guest.link_local)):
        agents.nova.requests.clear()
        assert _own(guest, guest.ask("/openstack", to=to, source=source)) is None
        assert agents.nova.only().values("x-forwarded-for") == (source.encode(),)


_NETWORK: Final = "X-Neutron-Network-ID: isolated-too"
_ROUTER: Final = "X-Neutron-Router-ID: routed"
_REPLACED: Final = {"isolated": (_NETWORK, _ROUTER), "routed": (_NETWORK, _ROUTER), "ovn": ()}
"""Neutron's proxies replace or delete what is theirs; whatever else a guest forges comes beside their own word."""


@pytest.mark.parametrize("name", _REPLACED)
def test_what_a_guest_forges_is_replaced_by_the_proxy_refused_or_nothing(
    agents: AgentWorld, guests: Mapping[str, Guest], name: str
) -> None:
    guest = guests[name]
    for forged in (_NETWORK, _ROUTER, "X-OVN-Network-ID: ovn", "X-Forwarded-For: 10.0.0.6"):
        for lines in (
            (forged,),
            (forged.lower(),),
            (forged.upper().replace("ROUTED", "routed"),),
            (forged, forged),
            ("Connection: " + forged.partition(":")[0], forged),
        ):
            answer = guest.ask("/openstack", headers=lines)
            if forged in _REPLACED[name]:
                assert _own(guest, answer) is None
            else:
                assert answer.status == 400, lines
                assert b"exactly one" in answer.body
    agents.nova.requests.clear()
    nothing = (
        "X_Neutron_Network_ID: isolated-too",
        "X_OVN_Network_ID: ovn",
        "X_Forwarded_For: 10.0.0.6",
        "X-Instance-ID: i-isolated-too",
        "X-Tenant-ID: x",
        "X-Instance-ID-Signature: x",
        "X-Metadata-Provider: x",
        "Forwarded: for=10.0.0.6",
        "X-Real-IP: 10.0.0.6",
    )
    assert _own(guest, guest.ask("/openstack", headers=nothing)) is None
    assert {name.lower() for name, _ in agents.nova.only().headers} == {
        *(b"host", b"x-forwarded-for", b"x-instance-id", b"x-instance-id-signature"),
        b"x-tenant-id",
    }


def test_what_was_forwarded_is_refused_by_each_way(
    agents: AgentWorld, guests: Mapping[str, Guest]
) -> None:
    ways = [guests[name] for name in ("own", "isolated", "routed", "ovn", _PROXY)]
    token, ttl = "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60"

    def put(*lines: str) -> list[int]:
        found = [guest.ask(token, method="PUT", headers=(*lines, ttl)) for guest in ways]
        # Some clients take an error's text for a token.
        assert not any(one.body for one in found if one.status == 403)
        return [one.status for one in found]

    def get(*lines: str) -> list[int]:
        return [guest.ask("/openstack", headers=lines).status for guest in ways]

    by_address = (
        ("X-Forwarded-For: 1.2.3.4",),
        ("x-forwarded-for:",),
        ("Connection: X-Forwarded-For", "X-Forwarded-For: 1.2.3.4"),
    )
    others = ("Forwarded: for=1.2.3.4", "Via: 1.1 a", "X-Forwarded-Host: a", "Origin: http://a")
    for lines in by_address:
        assert put(*lines) == [403] * 5, lines
    for one in ("X_Forwarded_For: 1.2.3.4", "X-Real-IP: 1.2.3.4", *others):
        assert put(one) == get(one) == [200] * 5, one
    settings = agents.daemon.settings
    agents.daemon.reconfigure({**settings, "policy": {"host": {"refuse_forwarded": True}}})
    assert get() == [200] * 5
    for one in others:
        assert put(one) == get(one) == [403] * 5, one
    for lines in by_address:
        # Neutron's proxies add their own: whose the request is can't be known from two.
        assert get(*lines) == [403, 400, 400, 400, 403], lines


def test_reloads_and_another_controller_lose_no_request(
    agents: AgentWorld, guests: Mapping[str, Guest]
) -> None:
    daemon = agents.daemon
    spare = agents.lab.namespace_network("spare")
    with Load([*guests.values()], "/openstack", _own, pause_s=0.01) as load:
        for _ in range(3):
            load.wait_answers(40)
            daemon.put([spare])
            load.wait_answers(40)
            daemon.remove_network("spare")
        agents.take_over(proxy_user="nobody", proxy_group="nogroup", maxconn=500)
        load.wait_answers(40)
        daemon.kill_controller()
        load.wait_answers(40)
        daemon.start()
        load.wait_answers(40)
    assert load.report.lost == []


# The path of OVN's agent, which lives on: taken over, taken back when it is started again, and given back


@pytest.fixture
def taking(world: AgentWorld) -> AgentWorld:
    """A daemon that was just started, and takes the path over."""
    world.take_over(take_over=True)
    world.daemon.kill_controller()
    world.daemon.start()
    world.wait_serving()
    return world


def _taken(world: AgentWorld, times: int) -> None:
    """HAProxy has the path, and had to take it so often."""
    _served(world)
    until(lambda: world.report()["taken_over"] == times, within_s=_WITHIN_S)
    assert world.metric("imdsproxy_unix_listener_taken_over_total") == times


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True], ids=["host", "other-namespace"])
def test_a_living_agent_loses_its_place_once_it_is_to_be_taken_over(
    taking: AgentWorld, *, elsewhere: bool
) -> None:
    world = taking
    world.take_over(enabled=False)
    namespace = world.lab.namespace("away") if elsewhere else world.lab.host
    with squat(world.path, namespace=namespace) as agent:
        world.take_over(take_over=False)
        assert f"(pid {agent.pid}) listens on" in world.problem()
        with world.socket.connect() as held:
            world.take_over(take_over=True)
            _taken(world, 1)
            # What it had taken up is the agent's still.
            assert held.request("/").body == b"foreign"
        assert alive(agent.pid)
        assert str(world.report()["taken_from"]).endswith(f"(pid {agent.pid})")
        assert _log_of(world, agent) == ["host refused", "unix listener taken over"]
        assert f"(pid {agent.pid})" in world.daemon.command("status").out
        _kill_haproxy(world)
        assert world.report()["taken_over"] == 1
    assert world.socket.serves()
    if elsewhere:
        world.lab.delete_namespace("away")


# An agent has a gap of its own between removing the socket and listening, which is long on a busy machine.
@pytest.mark.slow
@pytest.mark.alone
def test_no_guest_loses_a_request_while_the_agent_is_started_again_and_again(
    taking: AgentWorld, guests: Mapping[str, Guest]
) -> None:
    answers: Counter[str] = Counter()

    def judge(guest: Guest, answer: Reply) -> str | None:
        """Counts who has answered; any other answer is none."""
        text = answer.text if answer.status == 200 else ""
        answers[text] += 1
        return None if text in {"foreign", "i-ovn"} else f"{guest.name} got {answer.status} {text}"

    world = taking
    world.take_over(take_over=True, proxy_user="nobody", proxy_group="nogroup")
    world.nova.default = say_whose
    with Load([guests["ovn"]], "/openstack", judge, connections=3, pause_s=0.01) as load:
        load.wait_answers(20)
        for times in (1, 2):
            before = answers["foreign"]
            with squat(world.path, namespace=world.lab.host):
                until(lambda before=before: answers["foreign"] > before)  # type: ignore[misc]  # a default
                _taken(world, times)
                ours = answers["i-ovn"]
                until(lambda ours=ours: answers["i-ovn"] > ours + 20)  # type: ignore[misc]  # as above
            load.wait_answers(20)
    assert load.report.lost == []


@pytest.mark.slow
def test_what_is_left_to_an_agent_is_its_own_and_taken_again_at_the_next_start(
    taking: AgentWorld,
) -> None:
    world = taking
    with squat(world.path, namespace=world.lab.host) as agent:
        _taken(world, 1)
        world.daemon.stop()
        # None listens there: the agent does not make its file again by itself.
        assert not world.path.exists()
        assert alive(agent.pid)
    with squat(world.path, namespace=world.lab.host) as agent:
        assert world.socket.ask().body == b"foreign"
        world.daemon.start()
        _taken(world, 1)
        assert alive(agent.pid)
    world.daemon.kill_controller()
    with squat(world.path, namespace=world.lab.host) as agent:
        # It has bound the path meanwhile.
        world.daemon.stop()
        assert world.socket.ask().body == b"foreign"
        assert alive(agent.pid)
    world.daemon.start()
