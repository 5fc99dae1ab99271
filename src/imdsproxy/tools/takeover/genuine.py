"""Check whether a process is a genuine Neutron agent. Pure.

Any user can start a process with an agent's command line. Only root can start a process in a system unit, or in a
container with an agent's name.
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
"""Units of packages, kolla-ansible (Docker, Podman), TripleO and its successor, DevStack and snaps; `-` for `_`."""

_CONTAINERS: Final = r"neutron-{agent}|{agent}"
ENGINES: Final = {"docker": "docker", "libpod": "podman"}
"""Programs of container engines, by prefix of the engine's control groups."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Process with an agent's command line.

    Attributes:
        users: Real, effective, saved and file-system user ids.
        own_users: The process has its own user namespace.
        accounts: Ids of users that may run the agent: root, Neutron's account, and the unit's `User`.
    """

    pid: int
    program: str
    users: frozenset[int]
    own_users: bool
    group: str
    container: str
    accounts: AbstractSet[int]


def read_group(text: str, manager: str) -> str:
    """Return the control group from `/proc/PID/cgroup` without its leading slices.

    The system manager (process 1) names the first part of the result. Managers of user units, containers and sessions
    may create groups of any name, but only below their own group.

    `manager`: `/proc/1/cgroup`; the manager's own groups may be nested in others.
    """
    # A host may have either hierarchy without the manager using it.
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
    """Return the systemd unit of a control group; empty without one, as in most containers."""
    first = group.partition("/")[0]
    return first if first.endswith(_SERVICE) else ""


def container_in(group: str) -> tuple[str, str]:
    """Return engine and container id of a control group; both empty outside a container."""
    found = _CONTAINER.match(group)
    return ("", "") if found is None else (found[1] or found[2], found[3])


def is_unit_of(program: str, unit: str) -> bool:
    name = unit.removesuffix(_SERVICE).replace("_", "-")
    return bool(_pattern(_UNITS, program).fullmatch(name))


def is_container_of(program: str, name: str) -> bool:
    return bool(_pattern(_CONTAINERS, program).fullmatch(name.lstrip("/").replace("_", "-")))


def _pattern(names: str, program: str) -> re.Pattern[str]:
    agent = program.removeprefix("neutron-").removesuffix("-agent")
    return re.compile(names.replace("{agent}", f"{agent}(?:-agent)?"))


def explain_doubt(candidate: Candidate, *, named: bool) -> str:
    """Return why a process is not trusted as the agent; empty if it is trusted.

    `named`: the operator named this process, so its unit or container is not checked.
    """
    if candidate.own_users:
        return "it has its own user namespace"
    if not (
        named
        or is_unit_of(candidate.program, unit_in(candidate.group))
        or (candidate.container and is_container_of(candidate.program, candidate.container))
    ):
        place = candidate.container or candidate.group.partition("/")[0] or "no control group"
        return f"it belongs to {place}, which is not a unit or container of the agent"
    if others := sorted(candidate.users - candidate.accounts):
        return f"it runs as user {others[0]}, which is neither root nor Neutron's account"
    return ""
