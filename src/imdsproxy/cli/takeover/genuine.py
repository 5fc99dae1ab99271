"""Decides which processes are an agent of Neutron's. Pure.

Any user can start a process with an agent's command line. Only root can start one in a unit of the system's, or in a
container of an agent's name.
"""

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

_SYSTEMD: Final = re.compile(r"^\d+:name=systemd:(.*)$", re.MULTILINE)
_UNIFIED: Final = re.compile(r"^0::(.*)$", re.MULTILINE)
_INIT: Final = "/init.scope"
_SLICE: Final = ".slice"
_SERVICE: Final = ".service"
_CONTAINER: Final = re.compile(
    r"(?:(docker)[-/]|(?:libpod_parent/)?(libpod)-)([0-9a-f]{64})(?:\.scope)?(?:/|$)"
)
_UNITS: Final = (
    r"(?:openstack-)?neutron-{agent}|kolla-neutron-{agent}-container|container-neutron-{agent}|"
    r"(?:tripleo|edpm)-(?:neutron-)?{agent}|devstack@(?:q|neutron)-{agent}|snap\.[a-z0-9-]+\.neutron-{agent}"
)
"""Units of packages, kolla-ansible (Docker, Podman), TripleO and its successor, DevStack, and snaps; `_` is `-`."""

_CONTAINERS: Final = r"neutron-{agent}|{agent}"
ENGINES: Final = {"docker": "docker", "libpod": "podman"}
"""Programs of container engines, by how an engine's control groups are named."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A process with the command line of an agent.

    Attributes:
        program: The agent's name, as `neutron-l3-agent`.
        users: Its real, effective, saved and file-system user.
        own_users: It has a user namespace of its own.
        group: Its control group, as `read_group` has it.
        container: The name of its container; empty where its control group is no container's.
        accounts: Users that may run the agent: root, Neutron's account, and the user that the unit names.
    """

    pid: int
    program: str
    users: frozenset[int]
    own_users: bool
    group: str
    container: str
    accounts: AbstractSet[int]


def read_group(text: str, manager: str) -> str:
    """Return the control group out of `/proc/PID/cgroup`, below the slices that it is in.

    What comes first is of the system's manager. A manager of a user's units, a container or a session may make groups
    of any name, but only within its own.

    Args:
        text: Of the process.
        manager: The same of the system's manager, process 1, whose groups may begin within others.
    """
    # Each hierarchy is there on some hosts without being the manager's.
    hierarchies = [(_path_in(manager, one), _path_in(text, one)) for one in (_UNIFIED, _SYSTEMD)]
    root, path = next((both for both in hierarchies if both[0].endswith(_INIT)), hierarchies[0])
    parts = [part for part in path.removeprefix(root.removesuffix(_INIT)).split("/") if part]
    while parts and parts[0].endswith(_SLICE):
        del parts[0]
    return "/".join(parts)


def _path_in(text: str, hierarchy: re.Pattern[str]) -> str:
    found = hierarchy.search(text)
    return "" if found is None else found[1]


def unit_in(group: str) -> str:
    """Return the unit that a control group is of; empty for none, as in most containers."""
    first = group.partition("/")[0]
    return first if first.endswith(_SERVICE) else ""


def container_in(group: str) -> tuple[str, str]:
    """Return the engine and the id of the container that a control group is of; empty for none."""
    found = _CONTAINER.match(group)
    return ("", "") if found is None else (found[1] or found[2], found[3])


def is_unit_of(program: str, unit: str) -> bool:
    """Whether a unit is one of this agent's."""
    name = unit.removesuffix(_SERVICE).replace("_", "-")
    return bool(_pattern(_UNITS, program).fullmatch(name))


def is_container_of(program: str, name: str) -> bool:
    """Whether a container is one of this agent's."""
    return bool(_pattern(_CONTAINERS, program).fullmatch(name.lstrip("/").replace("_", "-")))


def _pattern(names: str, program: str) -> re.Pattern[str]:
    agent = program.removeprefix("neutron-").removesuffix("-agent")
    return re.compile(names.replace("{agent}", f"{agent}(?:-agent)?"))


def explain_doubt(candidate: Candidate, *, named: bool) -> str:
    """Return why a process is not believed to be the agent; empty where it is.

    Args:
        candidate: The process.
        named: The operator says that this process is the agent, whatever it belongs to.
    """
    if candidate.own_users:
        return "it has a user namespace of its own"
    if not (
        named
        or is_unit_of(candidate.program, unit_in(candidate.group))
        or (candidate.container and is_container_of(candidate.program, candidate.container))
    ):
        place = candidate.container or candidate.group.partition("/")[0] or "no control group"
        return f"it belongs to {place}, which is no unit or container of the agent's"
    if strangers := sorted(candidate.users - candidate.accounts):
        return f"it runs as user {strangers[0]}, which is neither root nor Neutron's account"
    return ""
