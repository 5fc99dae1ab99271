"""A daemon in front of the stand-in for Nova, with a guest in each of several networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.guest import Guest
from bench.lab import network_name
from bench.nova import PATH, names_itself, nova_guest, nova_settings
from bench.place import BenchError

__all__ = ["agent_socket", "in_front", "render_agents_proxy", "unanswered"]

_AT_ONCE: Final = 50


def agent_socket(daemon: Daemon) -> Path:
    """Return the path of the daemon's listener `unix`."""
    return daemon.directory / "metadata_proxy"


@contextlib.contextmanager
def in_front(
    bench: Bench,
    name: str,
    port: int,
    networks: int,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
) -> Iterator[Daemon]:
    """Run a daemon for the time of the context; every guest has been answered as itself once.

    Args:
        bench: The measurement's context.
        name: Name of the daemon's directory.
        port: Nova's port on 127.0.0.1.
        networks: Number of networks, from the first on.
        overrides: Settings beside those for Nova.

    Raises:
        BenchError: The daemon does not start, or a guest is not answered as itself.
    """
    bench.lab.grow(networks)
    directory = bench.directory / name
    directory.mkdir(exist_ok=True)
    unix = {"enabled": True, "path": str(directory / "metadata_proxy"), "mode": "all"}
    settings = {**nova_settings(directory, port), "unix_listener": unix, **(overrides or {})}
    daemon = Daemon(directory, settings)
    try:
        daemon.start()
        names = [network_name(number) for number in range(networks)]
        daemon.put([bench.network(one) for one in names], [nova_guest(one) for one in names])
        daemon.wait_serving(networks)
        daemon.wait_settled()
        if left := unanswered(bench, names):
            raise BenchError(f"{len(left)} of {networks} guests are not answered as themselves")
        yield daemon
    finally:
        daemon.stop()


def unanswered(bench: Bench, names: Sequence[str]) -> list[str]:
    """Send requests in all these networks, many at once; return networks whose guest Nova does not answer as itself."""
    left: list[str] = []
    for start in range(0, len(names), _AT_ONCE):
        asked = [Guest(bench.lab, name) for name in names[start : start + _AT_ONCE]]
        sent = [one for one in asked if one.try_send(PATH)]
        good = {
            one.network
            for one in sent
            if (got := one.try_receive()) is not None and names_itself(one.network, got)
        }
        for one in asked:
            one.close()
        left += [one.network for one in asked if one.network not in good]
    return left


def render_agents_proxy(network: str, port: int, socket: Path) -> str:
    """Render the configuration of the HAProxy that Neutron's agents start in a network's namespace.

    Options and timeouts are those of neutron/agent/metadata/driver_base.py (Neutron 29), without the log and the
    account.
    """
    lines = [
        "global",
        "  maxconn 1024",
        "defaults",
        "  mode http",
        "  option dontlognull",
        "  option http-server-close",
        "  option forwardfor",
        "  retries 3",
        "  timeout http-request 30s",
        "  timeout connect 30s",
        "  timeout client 32s",
        "  timeout server 32s",
        "  timeout http-keep-alive 30s",
        "listen listener",
        f"  bind 169.254.169.254:{port} namespace {network}",
        f"  server metadata {socket}",
        "  http-request del-header X-Neutron-Router-ID",
        f"  http-request set-header X-Neutron-Network-ID {network}",
    ]
    return "\n".join(lines) + "\n"
