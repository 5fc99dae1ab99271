"""Removal of our objects for OVN's networks, for `imdsproxy stop --data-plane`."""

import asyncio
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from functools import partial
from typing import Final

from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.ovsdb import Ovsdb
from imdsproxy.network.names import Naming
from imdsproxy.network.ovn.bridge_ports import sweep_ports
from imdsproxy.network.ovn.places import look_at_places, remove_place
from imdsproxy.sources.ovn.source import OPEN_VSWITCH, read_chassis

_ANSWER_S: Final = 10.0


async def sweep_places(open_vswitch: str, thread: NamespaceThread, naming: Naming) -> None:
    """Remove our namespaces and their ports, after HAProxy has ended.

    Objects of an agent stay. A namespace in which another process listens stays too: that process serves the guests.

    Args:
        open_vswitch: Open vSwitch's database.
        thread: Thread that enters namespaces.
        naming: Names and marks of our own objects.

    Raises:
        DataplaneError: The host refuses.
        SourceUnavailable: Open vSwitch's database cannot be reached, or refuses. The namespaces are removed anyway.
    """
    seen = await thread.run(lambda: look_at_places(thread, naming))
    remove = [name for name, one in seen.items() if one.is_ours and not one.is_listened]
    try:
        await _sweep_ports(open_vswitch, seen.keys() - set(remove))
    finally:
        await thread.run(lambda: _remove(thread, naming, remove))


def _remove(thread: NamespaceThread, naming: Naming, names: Iterable[str]) -> None:
    for name in names:
        remove_place(thread, naming, name)


async def _sweep_ports(open_vswitch: str, staying: AbstractSet[str]) -> None:
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
