"""Removal of our objects for OVN's networks, for `imdsproxy stop --data-plane`."""

import asyncio
from collections.abc import Collection
from contextlib import aclosing
from functools import partial
from typing import Final

from imdsproxy.errors import HostRefused, SourceUnavailable
from imdsproxy.host.ovsdb import Ovsdb
from imdsproxy.network.listeners.host import SystemHost
from imdsproxy.network.operations import DetachOvn
from imdsproxy.network.ovn.host import sweep_ports
from imdsproxy.network.ovn.plan import is_listened, is_ours, network_of
from imdsproxy.sources.ovn.source import OPEN_VSWITCH, read_chassis

_ANSWER_S: Final = 10.0


async def sweep_ovn(open_vswitch: str, host: SystemHost) -> None:
    """Remove our namespaces and their ports, after HAProxy has ended.

    Objects of an agent stay. A namespace in which another process listens stays too: that process serves the guests.

    Args:
        open_vswitch: Open vSwitch's database.
        host: This host.

    Raises:
        DataplaneError: The host refuses.
        SourceUnavailable: Open vSwitch's database cannot be reached, or refuses. The namespaces are removed anyway.
    """
    seen = await host.observe((), host.ovn_places())
    of_ovn = {name: network for name in seen.namespaces if (network := network_of(name))}
    remove = [
        name
        for name, network in of_ovn.items()
        if is_ours(seen.namespaces[name], network, host.naming)
        and not is_listened(seen.namespaces[name])
    ]
    try:
        await _sweep_ports(open_vswitch, of_ovn.keys() - remove)
    finally:
        left = await host.apply(DetachOvn(of_ovn[name], host.naming) for name in remove)
    if left:
        problems = tuple(left.values())
        raise HostRefused("not everything of OVN's networks could be taken away", problems=problems)


async def _sweep_ports(open_vswitch: str, staying: Collection[str]) -> None:
    database = Ovsdb(open_vswitch, OPEN_VSWITCH, read_chassis)
    try:
        async with asyncio.timeout(_ANSWER_S), aclosing(database.follow()) as readings:
            async for reading in readings:
                if reading.view is not None and reading.lost is None:
                    await database.transact(partial(sweep_ports, staying))
                    return
    except TimeoutError as error:
        raise SourceUnavailable(
            f"no answer from {open_vswitch} within {_ANSWER_S:g} s",
            hint="the ports tap... of OVN's networks are still on the integration bridge: `ovs-vsctl del-port`",
        ) from error
