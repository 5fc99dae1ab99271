"""A process that provisions OVN's networks and is killed before a step: each call that changes the host is one."""

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.config.sources import OvnSourceSettings
from imdsproxy.host import namespaces, netlink
from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.model.entities import NetworkId
from imdsproxy.network.listeners.host import SystemHost
from imdsproxy.sources.ovn.source import OvnSource
from support.lab import NETNS
from support.ovn_lab import OvnLab, OvnNetwork
from support.patience import patience

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CLONE_NEWNET: Final = 0x40000000
_CONVERGES_S: Final = 20.0


@dataclass(slots=True)
class _Steps:
    """Ends this process before step `last`, counted from 1."""

    last: int | None
    done: int = 0

    def before(self, owner: object, name: str) -> None:
        """Count each call of a function as a step."""
        original: Callable[..., object] = getattr(owner, name)

        def counted(*arguments: object, **named: object) -> object:
            # Entering a namespace changes nothing that outlives the process.
            if arguments[0] != "setns":
                self.done += 1
                if self.done == self.last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(owner, name, counted)


@dataclass(frozen=True, slots=True)
class _Order:
    host: str
    open_vswitch: str
    prefix: str
    network: str
    wanted: bool
    kill_before: int | None


def provision(
    ovn: OvnLab, network: OvnNetwork, *, wanted: bool, kill_before: int | None = None
) -> bool:
    """Provision until nothing is left to do; whether that came before the process was killed.

    Args:
        wanted: Wait until the network has ports here, or has none.
        kill_before: The step, counted from 1.
    """
    order = _Order(ovn.lab.host, ovn.open_vswitch, ovn.lab.prefix, network.id, wanted, kill_before)
    process = _CONTEXT.Process(target=_run, args=(order,), daemon=True)
    process.start()
    process.join(3 * _CONVERGES_S * patience())
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    process.close()
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def _run(order: _Order) -> None:
    with (NETNS / order.host).open("rb") as opened:
        assert ctypes.CDLL(None).setns(opened.fileno(), _CLONE_NEWNET) == 0
    steps = _Steps(order.kill_before)
    steps.before(NetlinkSocket, "change")
    steps.before(namespaces, "call_libc")
    steps.before(namespaces, "remove_file")
    steps.before(netlink, "ask_ethtool")
    steps.before(OvnSource, "change_vswitch")
    asyncio.run(_converge(order))


async def _converge(order: _Order) -> None:
    source = OvnSource(OvnSourceSettings(enabled=True, open_vswitch=order.open_vswitch))
    thread = NamespaceThread(NamespaceDirectory())
    nowhere = Path("/nowhere")
    naming = Naming(order.prefix)
    host = SystemHost(thread, naming, links=nowhere, journal=nowhere, ovn=source)
    following = asyncio.create_task(source.run(lambda _: None))
    async with asyncio.timeout(_CONVERGES_S * patience()):
        while True:
            source.changed.clear()
            host.touch(None)
            known = NetworkId(order.network) in source.known.ports_by_network()
            ready = source.settled and known is order.wanted
            plan = await host.settle({}, {})
            if ready and not plan.ops and not plan.problems:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(source.changed.wait(), 0.2)
    following.cancel()
    thread.close()
