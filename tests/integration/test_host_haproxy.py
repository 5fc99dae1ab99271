"""What the plan says of a bind is what the real HAProxy finds."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.model import InterfaceListener, Listener, NamespaceListener, Network, NetworkId
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.listeners.binds import plan_binds, plan_links
from imdsproxy.listeners.endpoints import ListenerPlan
from imdsproxy.listeners.host import apply_links, haproxy_name
from imdsproxy.listeners.observe import HostObserver
from imdsproxy.listeners.plan import plan_listeners
from support.hostlab import DEADLINE_S, HostLab, eventually
from support.patience import patience

pytestmark = pytest.mark.root

BLUE = NetworkId("blue")
_HAPROXY = "/usr/sbin/haproxy"
_CONFIGURATION = """
global
    nbthread 1
    stats socket {place}/stats level admin expose-fd listeners
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 1s
frontend guests
{binds}
    http-request return status 200 content-type text/plain string {word}
"""


@pytest.fixture
def place(lab: HostLab) -> Iterator[Path]:
    # Not pytest's own directory: a unix socket's path has 107 bytes.
    with tempfile.TemporaryDirectory(prefix=f"imdst-{lab.token}-") as made:
        yield Path(made)


def _write(place: Path, endpoints: tuple[Endpoint, ...], word: str) -> Path:
    """A configuration that binds these endpoints through links named by name and inode."""
    links = plan_links(endpoints)
    apply_links(place / "links", {n: NamespaceDirectory().path / t for n, t in links.items()})
    binds = []
    for one in plan_binds(endpoints, haproxy_name(place / "links")):
        address = f"[{one.address}]" if one.address.version == 6 else str(one.address)
        device = f" interface {one.device}" if one.device else ""
        binds.append(f"    bind {address}:80{device} namespace {one.namespace} name blue")
    path = place / "haproxy.cfg"
    path.write_text(_CONFIGURATION.format(place=place, binds="\n".join(binds), word=word))
    return path


async def _plan(lab: HostLab, listener: Listener | str) -> ListenerPlan:
    thread = NamespaceThread(NamespaceDirectory())
    if isinstance(listener, str):
        listener = NamespaceListener(listener)
    network = Network(BLUE, listener)
    seen = await HostObserver(thread, lab.naming).observe([network])
    thread.close()
    return plan_listeners({BLUE: network}, seen, lab.naming)


def _blue(lab: HostLab) -> tuple[str, str]:
    name = lab.namespace("blue")
    device = lab.device("d", namespace=name)
    lab.address(name, "169.254.169.254/32", device)
    lab.address(name, "fe80::a9fe:a9fe/64", device, "nodad")
    return name, device


@pytest.mark.parametrize("address", ["169.254.169.254", "0.0.0.0", "::", "fe80::a9fe:a9fe"])
@pytest.mark.parametrize(("reuse_port", "uid"), [(False, 0), (True, 0), (True, 65534)])
async def test_haproxy_binds_exactly_what_the_plan_says_it_can(
    lab: HostLab, place: Path, address: str, *, reuse_port: bool, uid: int
) -> None:
    name, device = _blue(lab)
    every = (await _plan(lab, name)).endpoints
    assert len(every) == 2
    lab.serve(
        name,
        address,
        device=device if address.startswith("fe80") else "",
        reuse_port=reuse_port,
        uid=uid,
    )
    possible = set((await _plan(lab, name)).endpoints)
    for one in every:
        path = _write(place, (one,), "x")
        process = subprocess.Popen(  # noqa: ASYNC220 - polled below
            (_HAPROXY, "-db", "-f", str(path)), stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        bound = _has_bound(process, place)
        process.kill()
        process.wait()
        words = process.stderr.read().decode()
        process.stderr.close()
        assert bound == (one in possible), words


def _say(path: Path, command: str) -> str:
    """What HAProxy answers on a socket of its own; empty while it does not listen there."""
    with socket.socket(socket.AF_UNIX) as channel, contextlib.suppress(OSError):
        channel.settimeout(DEADLINE_S)
        channel.connect(str(path))
        channel.sendall(f"{command}\n".encode())
        return b"".join(iter(lambda: channel.recv(4096), b"")).decode()
    return ""


def _has_bound(process: subprocess.Popen[bytes], place: Path) -> bool:
    """Whether HAProxy comes up; it ends by itself when it cannot bind."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        # Its own socket is bound with the others, and answers only when all are.
        if "Uptime_sec" in _say(place / "stats", "show info"):
            return True
        time.sleep(0.02)
    raise AssertionError("HAProxy neither came up nor ended")


async def test_a_namespace_made_again_is_served_after_a_reload_and_the_old_one_is_freed(
    lab: HostLab, place: Path
) -> None:
    name, _ = _blue(lab)
    first = NamespaceDirectory().identity(name)
    assert first is not None
    path = _write(place, (await _plan(lab, name)).endpoints, "first")
    master = subprocess.Popen(  # noqa: ASYNC220 - reloaded and ended below
        (_HAPROXY, "-W", "-S", f"{place}/master", "-f", str(path)), stderr=subprocess.DEVNULL
    )
    try:
        assert _has_bound(master, place)
        assert "first" in lab.fetch(name)
        # Another process holds the old one, so that its inode is not used again.
        held = NamespaceDirectory().open(name)
        assert held is not None
        lab.delete_namespace(name)
        _blue(lab)
        _write(place, (await _plan(lab, name)).endpoints, "second")
        held.close()

        assert _say(place / "master", "reload").startswith("Success=1")

        assert "second" in lab.fetch(name)
        freed = await eventually(
            lambda: str(first.inode) not in lab.run("/usr/bin/lsns", "-nt", "net")
        )
        assert freed < 1 * patience()
    finally:
        master.send_signal(signal.SIGTERM)
        master.wait()


@pytest.mark.parametrize("own", [True, False])
async def test_a_device_made_again_between_two_looks_is_served_after_a_reload(
    lab: HostLab, place: Path, *, own: bool
) -> None:
    # On a device of the host itself, or on one of a namespace.
    where = None if own else lab.namespace("blue")
    guest = lab.namespace("guest")
    listener = InterfaceListener(lab.link_name("d"))

    def plug() -> None:
        device = lab.device("d", namespace=where)
        lab.address(where, "169.254.169.254/32", device)
        lab.address(where, "fe80::a9fe:a9fe/64", device, "nodad")
        inside = ("-n", where) if where else ()
        lab.ip(*inside, "link", "set", f"{device}p", "netns", guest)
        lab.ip("-n", guest, "link", "set", f"{device}p", "name", "eth0", "up")
        lab.ip("-n", guest, "addr", "add", "10.99.0.5/24", "dev", "eth0")
        lab.ip("-n", guest, "route", "add", "169.254.169.254/32", "dev", "eth0")
        lab.ip(*inside, "route", "add", "10.99.0.5/32", "dev", device)

    plug()
    chosen = listener if where is None else NamespaceListener(where, listener.device)
    first = (await _plan(lab, chosen)).endpoints
    path = _write(place, first, "first")
    master = subprocess.Popen(  # noqa: ASYNC220 - reloaded and ended below
        (_HAPROXY, "-W", "-S", f"{place}/master", "-f", str(path)), stderr=subprocess.DEVNULL
    )
    try:
        assert _has_bound(master, place)
        assert "first" in lab.fetch(guest)
        lab.ip(*(("-n", where) if where else ()), "link", "del", listener.device)
        plug()
        second = (await _plan(lab, chosen)).endpoints
        assert len(second) == 2
        assert second != first
        _write(place, second, "second")
        assert _say(place / "master", "reload").startswith("Success=1")
        assert "second" in lab.fetch(guest)
    finally:
        master.send_signal(signal.SIGTERM)
        master.wait()
