"""script/openstack-lab: genuine Nova and Neutron to try things on.

`up` leaves a process behind that holds the lab; each other command is sent to it, and it answers.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from support.openstack.install import REPOSITORY
from support.openstack.lab import OpenStack, open_openstack
from support.openstack.servers import NotUp, Server
from support.openstack.table import INSTANCES, Lookup

_DIRECTORY: Final = REPOSITORY / ".cache" / "openstack" / "up"
_SERVERS: Final = ("neutron", "nova", "agent")
_CONTROL: Final = "control"
_CACHE_S: Final = 600
"""Once its cache is over Nova asks Neutron for security groups, and answers 500 while that is stopped."""


class NotBroughtUp(Exception):
    """There is no lab in that directory, or it cannot do that."""


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    options = vars(_parser().parse_args(argv))
    directory = Path(options["directory"]).resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    if options["command"] == "hold":
        _hold(directory)
        return 0
    try:
        with directory.with_name(f"{directory.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if options["command"] == "up" and _connect(directory) is None:
                directory.mkdir(exist_ok=True)
                _bring_up(directory)
            answer = _ask(directory, options)
            if options["command"] == "down":
                shutil.rmtree(directory)
    except (NotBroughtUp, NotUp) as error:
        sys.stderr.write(f"script/openstack-lab: {error}\n")
        return 1
    sys.stdout.write(answer)
    return 0


def _bring_up(directory: Path) -> None:
    log = directory / "holder.log"
    command = [
        sys.executable,
        "-P",
        "-m",
        "support.openstack",
        "--directory",
        str(directory),
        "hold",
    ]
    with log.open("w") as out:
        holder = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    while _connect(directory) is None:
        if holder.poll() is not None:
            raise NotBroughtUp(f"the lab did not come up:\n{log.read_text()}")
        time.sleep(0.1)


def _connect(directory: Path) -> socket.socket | None:
    control = socket.socket(socket.AF_UNIX)
    if control.connect_ex(str(directory / _CONTROL)) == 0:
        return control
    control.close()
    return None


def _ask(directory: Path, options: Mapping[str, object]) -> str:
    control = _connect(directory)
    if control is None:
        raise NotBroughtUp(f"there is no lab in {directory}")
    with control, control.makefile("rw") as stream:
        stream.write(json.dumps(options, default=str) + "\n")
        stream.flush()
        # The holder of a lab that is brought down closes this when all has ended.
        answer, error = json.loads(stream.read())
    if error:
        raise NotBroughtUp(error)
    return str(answer)


def _hold(directory: Path) -> None:
    """Hold a lab and do what is asked at its socket, until it is brought down."""
    path = directory / _CONTROL
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(open_openstack(directory, nova_cache_s=_CACHE_S))
        lab.start_agent()
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen()
        while True:
            asker, _ = listener.accept()
            with contextlib.suppress(OSError, ValueError), asker, asker.makefile("rw") as stream:
                options = json.loads(stream.readline())
                if options["command"] == "down":
                    stack.close()
                stream.write(json.dumps(_answer(lab, options)))
                if options["command"] == "down":
                    break


def _answer(lab: OpenStack, options: Mapping[str, Any]) -> tuple[str, str]:
    """What to write, and why the command failed, if so."""
    servers = _servers(lab)
    try:
        match options["command"]:
            case "up":
                for name in _SERVERS:
                    _start(lab, servers[name])
                return _text(lab), ""
            case "status":
                return (
                    json.dumps(_shape(lab), indent=2) + "\n" if options["json"] else _text(lab)
                ), ""
            case "front":
                return _front(lab, options), ""
            case "start":
                _start(lab, servers[options["server"]])
            case "stop":
                servers[options["server"]].stop()
            case _:
                return "the lab is gone\n", ""
    except (NotBroughtUp, NotUp) as error:
        return "", str(error)
    return "", ""


def _servers(lab: OpenStack) -> dict[str, Server]:
    return dict(zip(_SERVERS, (lab.neutron, lab.nova.server, lab.agent), strict=True))


def _start(lab: OpenStack, server: Server) -> None:
    if server is lab.agent:
        lab.start_agent()
    elif not server.running:
        server.start()


def _where(lab: OpenStack) -> dict[str, tuple[str, int | None]]:
    """The address and pid of each server."""
    places = lab.neutron_url, lab.nova_url, f"unix:{lab.place.agent_socket}"
    pids = (each.pid if each.running else None for each in _servers(lab).values())
    return dict(zip(_SERVERS, zip(places, pids, strict=True), strict=True))


def _front(lab: OpenStack, options: Mapping[str, Any]) -> str:
    kind, name = options["kind"], options["name"]
    ids = lab.seed.routers if kind == "router" else lab.seed.networks
    if name not in ids:
        raise NotBroughtUp(f"there is no {name}, but: {', '.join(ids)}")
    return lab.front.config(
        kind,
        ids[name],
        socket=Path(options["socket"] or lab.place.agent_socket),
        bind_address=options["bind_address"],
        port=options["port"],
    )


def _text(lab: OpenStack) -> str:
    place = lab.place
    running = [(name, at, f"pid {pid or '-'}") for name, (at, pid) in _where(lab).items()]
    files = [
        ("secret", lab.secret),
        ("secret file", str(place.path / "secret")),
        ("openstacksdk", f"OS_CLIENT_CONFIG_FILE={place.path / 'clouds.yaml'} OS_CLOUD=lab"),
        ("agent's files", f"{place.etc / 'neutron.conf'} {place.etc / 'metadata_agent.ini'}"),
        ("logs", str(place.log)),
    ]
    networks = [(name, ident) for name, ident in lab.seed.networks.items()]
    routers = [(name, ident) for name, ident in lab.seed.routers.items()]
    instances = [(one.name, one.uuid, one.project_id) for one in INSTANCES]
    rows = [
        (row.scope, row.address, row.instance.name if row.instance else "-") for row in lab.lookups
    ]
    parts = (
        _table(("SERVER", "ADDRESS", ""), running),
        _table(("WHAT", ""), files),
        _table(("NETWORK", "ID"), networks),
        _table(("ROUTER", "ID"), routers),
        _table(("INSTANCE", "UUID", "PROJECT"), instances),
        _table(("NETWORK OR ROUTER", "ADDRESS", "INSTANCE"), rows),
    )
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def _shape(lab: OpenStack) -> dict[str, object]:
    return {
        "servers": {name: {"at": at, "pid": pid} for name, (at, pid) in _where(lab).items()},
        "directory": str(lab.place.path),
        "secret": lab.secret,
        "networks": dict(lab.seed.networks),
        "routers": dict(lab.seed.routers),
        "lookups": [_row(row) for row in lab.lookups],
    }


def _row(row: Lookup) -> dict[str, object]:
    return {
        "network_id": row.network_id,
        "router_id": row.router_id,
        "address": row.address,
        "instance": row.instance.name if row.instance else None,
        "uuid": row.instance.uuid if row.instance else None,
        "project_id": row.project_id or None,
    }


def _absolute(text: str) -> Path:
    return Path(text).absolute()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="script/openstack-lab", description=__doc__)
    parser.add_argument(
        "--directory", type=Path, default=_DIRECTORY, help="where the lab lives (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "up", help="start Nova, Neutron and Neutron's metadata agent, and tell where"
    )
    commands.add_parser("down", help="end all of it and forget it")
    commands.add_parser("hold")
    status = commands.add_parser("status", help="tell where everything is and who must get what")
    status.add_argument("--json", action="store_true", help="for programs")
    for verb in ("start", "stop"):
        one = commands.add_parser(verb, help=f"{verb} one server")
        one.add_argument("server", choices=_SERVERS)
    front = commands.add_parser(
        "front", help="print the HAProxy configuration that Neutron's agents write"
    )
    front.add_argument("kind", choices=("network", "router", "ovn"))
    front.add_argument("name", help="of the network or router")
    front.add_argument("--socket", type=_absolute, help="of the metadata agent (the lab's own)")
    front.add_argument("--bind-address", default="169.254.169.254")
    front.add_argument("--port", type=int, default=80)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
