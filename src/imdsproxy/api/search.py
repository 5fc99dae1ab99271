"""Search of instances by an operator's words."""

from collections.abc import Sequence

from imdsproxy.api.records import find_record, list_ids
from imdsproxy.host.turns import in_turns
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.matching import matcher


async def find_instances(
    inventory: Inventory, text: str, network: NetworkId | None, project: str | None = None
) -> Sequence[InstanceId]:
    """Return the ids of all matching instances, in order.

    Args:
        inventory: The inventory to search.
        text: Words that must each be in an id, name, host name, project, MAC, address or tag, in any case.
        network: Only instances with a port in this network.
        project: Only instances of this project.
    """
    every, matches = list_ids(inventory, network), matcher(text, project)
    if matches is None:
        return every
    found: list[InstanceId] = []
    async for one in in_turns(every):
        record = find_record(inventory, one)
        if record is not None and matches(record):
            found.append(one)
    return found
