"""Observer of this host's Neutron agents, their HAProxies and namespaces, and imdsproxy."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from imdsproxy.api.client import AdminClient
from imdsproxy.config.load import Loaded
from imdsproxy.config.neutron_agents import DEFAULT_STATE_PATH
from imdsproxy.config.neutron_ini import decode_ini, parse_ini
from imdsproxy.errors import ConfigUnreadable, LibraryMissing, optional_library
from imdsproxy.host.files import write_atomic
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.owned_files import list_owned
from imdsproxy.host.process import PROC, command_name, read_arguments, read_stat
from imdsproxy.sources.neutron_namespaces.records import ROUTER_PREFIX
from imdsproxy.tools.takeover.agents import find_agents, pids, read_file, root_of, unit_of
from imdsproxy.tools.takeover.seen import (
    STAND_IN,
    Commands,
    Kind,
    Proxy,
    Reach,
    Seen,
    find_option,
    is_stand_in,
)

_HAPROXY: Final = "haproxy"
_PAGE: Final = 4096
_ROUTES: Final = Path("/proc/thread-self/net/route")
_REMEMBERED: Final = "takeover.json"
_IPV4_OPTION: Final = ",option:"
_ROUTE: Final = "169.254.169.254/32,"


def find_haproxy(prefix: str) -> tuple[str, str]:
    """Return HAProxy's path for the agent of these namespaces, and a stand-in's path earlier in PATH.

    PATH comes from a process that already runs in such a namespace. In a container, the first path is relative to the
    container's root, and the second is a path on the host. Both are empty if HAProxy is not found. Raises
    `FileUntrusted`: a user other than root may change a directory in PATH.
    """
    for pid, _ in _processes_in(prefix):
        try:
            variables = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for one in variables:
            if one.startswith(b"PATH="):
                directories = os.fsdecode(one.removeprefix(b"PATH=")).split(":")
                return _look_up(root_of(pid), [each for each in directories if each[:1] == "/"])
    return "", ""


def _look_up(root: Path, directories: Sequence[str]) -> tuple[str, str]:
    base, before = "" if root == Path("/") else str(root), ""
    for directory in directories:
        place = f"{base}{directory}/{_HAPROXY}"
        try:
            # The takeover writes and runs files in this directory as root, so no other account may replace them.
            names = list_owned(Path(directory), (0, 0), root)
        except ConfigUnreadable:
            continue
        if _HAPROXY not in names:
            before = before or place
        elif is_stand_in(_text_of(place) or ""):
            before = place
        else:
            return f"{directory}/{_HAPROXY}", before
    return "", ""


def _text_of(path: str, limit: int = _PAGE) -> str | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - an empty path is no directory
            return file.read(limit).decode(errors="replace")
    except OSError:
        return None


def find_stand_ins(prefix: str) -> tuple[Proxy, ...]:
    return tuple(
        Proxy(pid, name)
        for pid, name in _processes_in(prefix)
        if next(iter(read_arguments(pid)), "").startswith(STAND_IN)
    )


def find_unrouted(prefix: str, state_path: Path) -> tuple[str, ...]:
    """Return namespaces whose DHCP options, written by the agent, lack the route to 169.254.169.254."""
    found = []
    for name in sorted(NamespaceDirectory().namespaces()):
        network = name.removeprefix(prefix)
        if (
            network != name
            and (text := _text_of(f"{state_path}/dhcp/{network}/opts", -1)) is not None
        ):
            # IPv6 subnets have no such option.
            found += [name] if _IPV4_OPTION in text and _ROUTE not in text else []
    return tuple(found)


def is_idle_router(namespace: str) -> bool:
    """Return whether a router has no IPv4 route to guests on this node, so it needs no proxy.

    For example, another node is the router's primary.
    """
    if not namespace.startswith(ROUTER_PREFIX):
        return False
    thread = NamespaceThread(NamespaceDirectory())
    gone = contextlib.suppress(FileNotFoundError)
    with contextlib.closing(thread), gone, thread.inside(namespace):
        return "\nqr-" not in _ROUTES.read_text()
    return True


def find_proxies(prefix: str) -> tuple[Proxy, ...]:
    return tuple(
        Proxy(pid, name) for pid, name in _processes_in(prefix) if command_name(pid) == _HAPROXY
    )


def _processes_in(prefix: str) -> Iterator[tuple[int, str]]:
    directory = NamespaceDirectory()
    names = {
        ref.inode: name for name, ref in directory.namespaces().items() if name.startswith(prefix)
    }
    for pid in pids() if names else ():
        try:
            inode = (PROC / str(pid) / "ns" / "net").stat().st_ino
        except OSError:
            continue
        if inode in names and read_stat(pid) is not None:
            yield pid, names[inode]


def observe(
    kind: Kind,
    daemon: AdminClient,
    loaded: Loaded,
    *,
    directory: Path,
    given: Commands,
    named: int | None = None,
) -> Seen:
    """Collect the state that a plan is based on.

    Args:
        directory: Settings directory, which contains `conf.d/`.

    Raises:
        ConfigUnreadable: A settings file of the agent is unreadable.
        ConfigInvalid: A settings file of the agent is not an ini file.
        FileUntrusted: A user other than root and the agent's may change a settings file of the agent, or a directory
            in the agent's PATH.
        AdminError: The daemon does not answer, or refuses.
    """
    status = daemon.get("/v1/status")
    agents, suspects = find_agents(kind.programs, named)
    drop_in = directory / "conf.d" / f"{kind.name}.yaml"
    own = unit_of(status["controller"])
    unit = next((one.unit for one in agents if one.unit), "")
    haproxy = find_haproxy(kind.prefix) if kind.runs_on else ("", "")
    before = recall(loaded.settings.paths.state_dir).get(kind.name, {})
    files = agents[0].files if agents else _existing(before.get("files", ()))
    reach = agents[0].reach if agents else Reach("/", *before.get("owner", (0, 0)))
    texts = {path: read_file(path, reach) for path in files}
    options = tuple(parse_ini(decode_ini(data, path), path) for path, data in texts.items())
    state_path = find_option(options, "DEFAULT", "state_path") or DEFAULT_STATE_PATH
    return Seen(
        agents=agents,
        suspects=suspects,
        proxies=find_proxies(kind.prefix),
        files=files,
        reach=reach,
        options=options,
        state_path=state_path,
        marked=any(kind.mark.encode() in data for data in texts.values()),
        commands=Commands(
            stop=given.stop
            or (unit and f"systemctl disable --now {unit}")
            or before.get("stop", ""),
            start=given.start
            or (unit and f"systemctl enable --now {unit}")
            or before.get("start", ""),
            restart=given.restart or (own and f"systemctl restart {own}"),
        ),
        drop_in=str(drop_in),
        present=drop_in.read_text() if drop_in.exists() else None,
        source=any(one["name"] == kind.source for one in status["sources"]),
        nova=bool(loaded.settings.nova.endpoint_sets),
        imported=(
            str(directory / "conf.d" / "openstack.yaml"),
            str(directory / "nova.secret"),
        ),
        networks=frozenset(one["record"]["id"] for one in daemon.get("/v1/networks")),
        import_error=_lacks_library() if kind.source == "ovn" else "",
        sources=frozenset(one["name"] for one in status["sources"]),
        haproxy=haproxy,
        stand_in=_text_of(haproxy[1]),
        unrouted=find_unrouted(kind.prefix, Path(state_path)),
    )


def _existing(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if Path(path).exists())


def _lacks_library() -> str:
    import importlib

    try:
        with optional_library("python-ovs", "apt install python3-openvswitch"):
            importlib.import_module("ovs.db.idl")
    except LibraryMissing as error:
        return str(error)
    return ""


def recall(state: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return commands and settings files that `remember` saved, by kind; a stopped agent does not show them."""
    try:
        found: Mapping[str, Mapping[str, Any]] = json.loads((state / _REMEMBERED).read_text())
    except FileNotFoundError:
        return {}
    return found


def remember(state: Path, kind: str, seen: Seen | None) -> None:
    """Save an agent's commands and files for a handback; `None` removes them."""
    known = {name: value for name, value in recall(state).items() if name != kind}
    if seen is not None:
        commands = seen.commands
        # A container's files are reached by pid, which another process may have after the container ended.
        files = [] if seen.reach.root != "/" else seen.files
        owner = [seen.reach.user, seen.reach.group]
        known[kind] = {
            "stop": commands.stop,
            "start": commands.start,
            "files": files,
            "owner": owner,
            # The package's removal script deletes this file.
            "stand_in": "" if seen.haproxy[1].startswith("/proc/") else seen.haproxy[1],
        }
    if known:
        write_atomic(state / _REMEMBERED, json.dumps(known, indent=2).encode(), mode=0o600)
    elif (state / _REMEMBERED).exists():
        os.unlink(state / _REMEMBERED)  # noqa: PTH108 - as written
