"""What there is on this host of Neutron's agents: processes, their namespaces, units and settings files."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from imdsproxy.admin_client import AdminClient
from imdsproxy.cli.takeover.plan import Agent, Commands, Kind, Proxy, Seen, find_option
from imdsproxy.cli.takeover.stand_in import STAND_IN, is_stand_in
from imdsproxy.config.load import Loaded
from imdsproxy.core.haproxy.namespace_proxy import DEFAULT_STATE_PATH
from imdsproxy.core.neutron_ini import IniOption, decode_ini, parse_ini
from imdsproxy.errors import ConfigUnreadable, LibraryMissing, optional_library
from imdsproxy.host.files import write_atomic
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.process import PROC, command_name, read_arguments, read_stat
from imdsproxy.sources.neutron_namespaces.records import ROUTER_PREFIX

_UNIT: Final = re.compile(r"/([^/]+\.service)$", re.MULTILINE)
_BETWEEN_WORDS: Final = re.compile(r"[()\[\]]")
_HAPROXY: Final = "haproxy"
_PAGE: Final = 4096
_ROUTES: Final = Path("/proc/thread-self/net/route")
_REMEMBERED: Final = "takeover.json"
_IPV4_OPTION: Final = ",option:"
_ROUTE: Final = "169.254.169.254/32,"


def _pids() -> list[int]:
    return sorted(int(one.name) for one in PROC.iterdir() if one.name.isdecimal())


def unit_of(pid: int) -> str:
    """The unit of systemd's that a process belongs to; empty for none, as in most containers."""
    try:
        groups = (PROC / str(pid) / "cgroup").read_text()
    except OSError:
        return ""
    found = _UNIT.search(groups.strip())
    return "" if found is None else found[1]


def find_agents(programs: Sequence[str]) -> Iterator[Agent]:
    """The running agents of these names; of an agent's processes the one that the others come from."""
    found: dict[int, tuple[str, list[str]]] = {}
    for pid in _pids():
        # An agent gives its process a title, which holds its command line: `NAME (python3 /usr/bin/NAME --opt …)`, and
        # one that runs services a second one around it, in brackets.
        words = _BETWEEN_WORDS.sub(" ", " ".join(read_arguments(pid))).split()
        names = [Path(word).name for word in words[:6]]
        program = next((name for name in names if name in programs), None)
        if program is not None and read_stat(pid) is not None:
            found[pid] = program, words
    for pid, (program, words) in found.items():
        stat = read_stat(pid)
        if stat is not None and stat.parent not in found:
            yield Agent(pid, program, unit_of(pid), tuple(_files(pid, words)))


def _files(pid: int, words: Sequence[str]) -> Iterator[str]:
    """Files of `--config-file` and `--config-dir`; in a container they are below its root."""
    root = PROC / str(pid) / "root"
    here = _same(root, Path("/"))
    options = iter(words)
    for word in options:
        name, equals, value = word.partition("=")
        if name not in {"--config-file", "--config-dir"}:
            continue
        path = Path(value if equals else next(options, ""))
        reached = path if here else root / path.relative_to("/")
        yield from map(str, sorted(reached.glob("*.conf")) if name.endswith("dir") else [reached])


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def find_haproxy(prefix: str) -> tuple[str, str]:
    """Where the agent of these namespaces finds HAProxy, and the place before it where it would find another.

    Its other programs there were looked for in the same directories. In a container they are below its root.
    """
    for pid, _ in _processes_in(prefix):
        try:
            variables = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for one in variables:
            if one.startswith(b"PATH="):
                root = PROC / str(pid) / "root"
                base = "" if _same(root, Path("/")) else str(root)
                return _look_up(base, os.fsdecode(one.removeprefix(b"PATH=")).split(":"))
    return "", ""


def _look_up(base: str, directories: Sequence[str]) -> tuple[str, str]:
    before = ""
    for directory in directories:
        place = f"{base}{directory}/{_HAPROXY}"
        if (text := _text_of(place)) is None:
            before = before or (place if Path(place).parent.is_dir() else "")
        elif is_stand_in(text):
            before = place
        else:
            return f"{directory}/{_HAPROXY}", before
    return "", ""


def _text_of(path: str, limit: int = _PAGE) -> str | None:
    """How a file begins, as text; `None` where there is none."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - an empty path is no directory
            return file.read(limit).decode(errors="replace")
    except OSError:
        return None


def find_stand_ins(prefix: str) -> tuple[Proxy, ...]:
    """Processes that stand in for HAProxies in namespaces whose names begin so."""
    return tuple(
        Proxy(pid, name)
        for pid, name in _processes_in(prefix)
        if next(iter(read_arguments(pid)), "").startswith(STAND_IN)
    )


def find_unrouted(prefix: str, state_path: Path) -> tuple[str, ...]:
    """Namespaces whose DHCP server names no route to 169.254.169.254, by what the agent has written for it."""
    found = []
    for name in sorted(NamespaceDirectory().namespaces()):
        network = name.removeprefix(prefix)
        if (
            network != name
            and (text := _text_of(f"{state_path}/dhcp/{network}/opts", -1)) is not None
        ):
            # Those of IPv6 have no such option.
            found += [name] if _IPV4_OPTION in text and _ROUTE not in text else []
    return tuple(found)


def is_idle_router(namespace: str) -> bool:
    """Whether a router has no IPv4 address for guests here, as where another node is the primary: it needs no proxy."""
    if not namespace.startswith(ROUTER_PREFIX):
        return False
    thread = NamespaceThread(NamespaceDirectory())
    gone = contextlib.suppress(FileNotFoundError)
    with contextlib.closing(thread), gone, thread.inside(namespace):
        return "\nqr-" not in _ROUTES.read_text()
    return True


def find_proxies(prefix: str) -> tuple[Proxy, ...]:
    """HAProxies in namespaces whose names begin so."""
    return tuple(
        Proxy(pid, name) for pid, name in _processes_in(prefix) if command_name(pid) == _HAPROXY
    )


def _processes_in(prefix: str) -> Iterator[tuple[int, str]]:
    directory = NamespaceDirectory()
    names = {
        ref.inode: name for name, ref in directory.namespaces().items() if name.startswith(prefix)
    }
    for pid in _pids() if names else ():
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
) -> Seen:
    """All that a plan is made of.

    Args:
        kind: Whose agents.
        daemon: That runs.
        loaded: The settings as their files are now.
        directory: Of the settings; `conf.d/` is in it.
        given: Commands that the operator has given.

    Raises:
        AdminUnavailable: No daemon answers.
        ConfigUnreadable: A settings file of the agent's cannot be read.
    """
    status = daemon.get("/v1/status")
    agents = tuple(find_agents(kind.programs))
    drop_in = directory / "conf.d" / f"{kind.name}.yaml"
    own = unit_of(status["controller"])
    unit = next((one.unit for one in agents if one.unit), "")
    haproxy = find_haproxy(kind.prefix) if kind.runs_on else ("", "")
    before = recall(loaded.settings.paths.state_dir).get(kind.name, {})
    files = agents[0].files if agents else _existing(before.get("files", ()))
    options = tuple(read_options(path) for path in files)
    state_path = find_option(options, "DEFAULT", "state_path") or DEFAULT_STATE_PATH
    return Seen(
        agents=agents,
        proxies=find_proxies(kind.prefix),
        files=files,
        options=options,
        state_path=state_path,
        marked=any(kind.mark in (_text_of(path, -1) or "") for path in files),
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
    # Those of a container that has ended are out of reach.
    return tuple(path for path in paths if Path(path).exists())


def _lacks_library() -> str:
    import importlib  # noqa: PLC0415 - only here

    try:
        with optional_library("python-ovs", "apt install python3-openvswitch"):
            importlib.import_module("ovs.db.idl")
    except LibraryMissing as error:
        return str(error)
    return ""


def read_options(path: str) -> tuple[IniOption, ...]:
    """What a settings file of the agent's holds.

    Raises:
        ConfigError: It cannot be read, or is no such file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {path}: {error.strerror}") from error
    return parse_ini(decode_ini(data, path), path)


def recall(state: Path) -> Mapping[str, Mapping[str, Any]]:
    """By which commands agents were stopped, and their settings files, by kind: no process shows it once they are."""
    try:
        found: Mapping[str, Mapping[str, Any]] = json.loads((state / _REMEMBERED).read_text())
    except FileNotFoundError:
        return {}
    return found


def remember(state: Path, kind: str, seen: Seen | None) -> None:
    """Keep an agent's commands and files for the way back; `None` forgets them."""
    known = {name: value for name, value in recall(state).items() if name != kind}
    if seen is not None:
        commands = seen.commands
        known[kind] = {"stop": commands.stop, "start": commands.start, "files": seen.files}
    if known:
        write_atomic(state / _REMEMBERED, json.dumps(known, indent=2).encode(), mode=0o600)
    elif (state / _REMEMBERED).exists():
        os.unlink(state / _REMEMBERED)  # noqa: PTH108 - as written
