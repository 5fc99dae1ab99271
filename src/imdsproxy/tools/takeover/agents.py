"""Running Neutron agents and their settings files."""

import contextlib
import os
import pwd
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from imdsproxy.config.neutron_ini import IniOption, decode_ini, parse_ini
from imdsproxy.errors import ConfigUnreadable, RequestRefused
from imdsproxy.host.files import write_atomic
from imdsproxy.host.owned_files import list_owned, open_owned
from imdsproxy.host.process import PROC, read_arguments, read_stat
from imdsproxy.tools.takeover.genuine import (
    ENGINES,
    Candidate,
    container_in,
    explain_doubt,
    is_unit_of,
    read_group,
    unit_in,
)
from imdsproxy.tools.takeover.seen import Agent, Reach, Suspect

_BETWEEN_WORDS: Final = re.compile(r"[()\[\]]")
_IDS: Final = re.compile(r"^(Uid|Gid):\t(.*)$", re.MULTILINE)
_ACCOUNT: Final = "neutron"
_ASK_S: Final = 10.0
_MODE: Final = 0o777


def pids() -> list[int]:
    return sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())


def unit_of(pid: int) -> str:
    """Return the systemd unit of a process; empty without one, as in most containers."""
    return unit_in(_group_of(pid))


def find_agents(
    programs: Sequence[str], named: int | None = None
) -> tuple[tuple[Agent, ...], tuple[Suspect, ...]]:
    """Find running agents of these names, and processes that only look like agents.

    An agent with several processes is found by its main process.

    `named`: pid from the operator; all other processes are then ignored. Raises `RequestRefused`: the named process
    does not have an agent's command line; `FileUntrusted`: another user may change a settings file of the agent.
    """
    found = dict(_candidates(programs))
    if named is not None:
        if named not in found:
            raise RequestRefused(
                f"process {named} is not {' or '.join(programs)}",
                hint="see `ps -ef | grep neutron-`",
            )
        found = {named: found[named]}
    candidates = {pid: _look_at(pid, program) for pid, (program, _, _) in found.items()}
    doubts = {
        pid: explain_doubt(candidate, named=named is not None)
        for pid, candidate in candidates.items()
    }
    believed = {pid for pid, doubt in doubts.items() if not doubt}
    agents = tuple(
        _agent_of(candidates[pid], words)
        for pid, (_, words, parent) in found.items()
        if pid in believed and parent not in believed
    )
    suspects = tuple(
        Suspect(pid, program, doubts[pid])
        for pid, (program, _, parent) in found.items()
        if pid not in believed and parent not in found
    )
    return agents, suspects


def _candidates(programs: Sequence[str]) -> Iterator[tuple[int, tuple[str, list[str], int]]]:
    """Yield processes with an agent's command line: pid, then program, all words and parent."""
    for pid in pids():
        # An agent's process title contains its command line: `NAME (python3 /usr/bin/NAME --opt …)`. Agents that run
        # services put a second title around the first, in brackets.
        words = _BETWEEN_WORDS.sub(" ", " ".join(read_arguments(pid))).split()
        names = [Path(word).name for word in words[:6]]
        program = next((name for name in names if name in programs), None)
        if program is not None and (stat := read_stat(pid)) is not None:
            yield pid, (program, words, stat.parent)


def _look_at(pid: int, program: str) -> Candidate:
    group = _group_of(pid)
    engine, container = container_in(group)
    name = _name_of_container(engine, container) if engine else ""
    accounts = {0, *_account_in(root_of(pid))}
    if is_unit_of(program, unit := unit_in(group)):
        accounts |= _user_of_unit(unit)
    return Candidate(
        pid=pid,
        program=program,
        users=frozenset(_ids(pid)["Uid"]),
        own_users=not _same(PROC / str(pid) / "ns" / "user", PROC / "self" / "ns" / "user"),
        group=group,
        container=name,
        accounts=accounts,
    )


def _agent_of(candidate: Candidate, words: Sequence[str]) -> Agent:
    pid = candidate.pid
    ids, stat = _ids(pid), read_stat(pid)
    reach = Reach(str(root_of(pid)), ids["Uid"][1], ids["Gid"][1])
    return Agent(
        pid,
        candidate.program,
        unit_in(candidate.group),
        tuple(_files(words, reach)),
        reach,
        account=_name_of(reach.user),
        place=candidate.container or candidate.group or "no control group",
        started=0 if stat is None else stat.started,
    )


def _group_of(pid: int) -> str:
    texts = []
    for process in (pid, 1):
        try:
            texts.append((PROC / str(process) / "cgroup").read_text(errors="replace"))
        except OSError:
            return ""
    return read_group(*texts)


def _ids(pid: int) -> Mapping[str, tuple[int, ...]]:
    """Return users and groups of a process, real and effective first; -1 for each if the process ended."""
    try:
        text = (PROC / str(pid) / "status").read_text(errors="replace")
    except OSError:
        text = ""
    found = {name: tuple(map(int, ids.split())) for name, ids in _IDS.findall(text)}
    return {"Uid": (-1, -1), "Gid": (-1, -1), **found}


def root_of(pid: int) -> Path:
    """Return the root directory of a process, as seen from the host."""
    root = PROC / str(pid) / "root"
    return Path("/") if _same(root, Path("/")) else root


def _same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False


def _account_in(root: Path) -> set[int]:
    """Return the id of Neutron's account from the host's or container's `/etc/passwd`, if there is one."""
    try:
        with open_owned(Path("/etc/passwd"), (0, 0), root) as file:
            lines = file.read().decode(errors="replace").splitlines()
    except (ConfigUnreadable, OSError):
        return set()
    return {
        int(user)
        for name, _, user, *_ in (line.split(":") for line in lines if line.count(":") > 1)
        if name == _ACCOUNT and user.isdecimal()
    }


def _user_of_unit(unit: str) -> set[int]:
    name = _ask("systemctl", "show", "--property=User", "--value", unit)
    if name.isdecimal():
        return {int(name)}
    with contextlib.suppress(KeyError):
        return {pwd.getpwnam(name).pw_uid} if name else set()
    return set()


def _name_of_container(engine: str, container: str) -> str:
    return _ask(ENGINES[engine], "inspect", "--format", "{{.Name}}", container)


def _ask(*words: str) -> str:
    """Return the output of a program on the host; empty if the program is missing, fails or times out."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _files(words: Sequence[str], reach: Reach) -> Iterator[str]:
    """Yield the files of `--config-file` and `--config-dir`, as paths on the host.

    Raises `ConfigUnreadable`: a path is relative, or a directory does not exist; `FileUntrusted`: another user may
    change a directory.
    """
    options = iter(words)
    for word in options:
        option, equals, value = word.partition("=")
        if option not in {"--config-file", "--config-dir"}:
            continue
        path = Path(value if equals else next(options, ""))
        if not path.is_absolute():
            raise ConfigUnreadable(
                f"the agent was started with {option} {path}, which is relative to its working directory",
                hint="start the agent with absolute paths",
            )
        shown = Path(reach.root) / path.relative_to("/")
        if option.endswith("dir"):
            names = list_owned(path, (reach.user, reach.group), Path(reach.root))
            yield from (str(shown / name) for name in names if name.endswith(".conf"))
        else:
            yield str(shown)


def read_file(path: str, reach: Reach) -> bytes:
    """Read a settings file of the agent.

    Raises `ConfigUnreadable`: the file does not exist; `FileUntrusted`: a user other than root and the agent's may
    change the file.
    """
    with open_owned(_inside(path, reach), (reach.user, reach.group), Path(reach.root)) as file:
        return file.read()


def edit_file(path: str, reach: Reach, edit: Callable[[str], str]) -> None:
    """Change a settings file of the agent; keep mode and owner.

    Raises:
        ConfigUnreadable: The file does not exist.
        FileUntrusted: A user other than root and the agent's may change the file.
        HostRefused: The file cannot be written.
    """
    with open_owned(_inside(path, reach), (reach.user, reach.group), Path(reach.root)) as file:
        data = edit(file.read().decode()).encode()
        status = os.fstat(file.itself)
        owner = (status.st_uid, status.st_gid)
        write_atomic(file.path, data, mode=status.st_mode & _MODE, owner=owner, durable=True)


def _inside(path: str, reach: Reach) -> Path:
    return Path("/") / Path(path).relative_to(reach.root)


def read_options(path: str, reach: Reach) -> tuple[IniOption, ...]:
    """Read the options of an agent's settings file.

    Raises `ConfigError`: the file is unreadable or invalid, or another user may change it.
    """
    return parse_ini(decode_ini(read_file(path, reach), path), path)
