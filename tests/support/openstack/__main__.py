"""script/openstack-lab: genuine Nova and Neutron to try things on.

`up` leaves a process behind that holds the lab; each other command is sent to it, and it answers.
"""

import argparse
import contextlib
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Final

import yaml

from support.lab import until
from support.openstack.front import Front, front_configs
from support.openstack.install import REPOSITORY
from support.openstack.lab import OpenStack, open_openstack
from support.openstack.servers import NotUp

_DIRECTORY: Final = REPOSITORY / ".cache" / "openstack" / "up"
_UP_S: Final = 600.0
_SERVERS: Final = ("neutron", "nova", "agent")


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(argv)
    directory: Path = options.directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    if options.command == "hold":
        _hold(directory)
        return 0
    try:
        with directory.with_name(f"{directory.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if options.command == "up" and _connect(directory) is None:
                directory.mkdir(exist_ok=True)
                _bring_up(directory)
            answer = _ask(directory, options)
            if options.command == "down":
                shutil.rmtree(directory)
    except NotUp as error:
        sys.stderr.write(f"script/openstack-lab: {error}\n")
        return 1
    sys.stdout.write(answer)
    return 0


def _bring_up(directory: Path) -> None:
    log = directory / "holder.log"
    words = ("-P", "-m", "support.openstack", "--directory", str(directory), "hold")
    with log.open("w") as out:
        holder = subprocess.Popen(
            (sys.executable, *words),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    until(lambda: _connect(directory) or holder.poll() is not None, within_s=_UP_S, pause_s=0.1)
    if holder.poll() is not None:
        raise NotUp(f"the lab did not come up:\n{log.read_text()}")


def _connect(directory: Path) -> Connection | None:
    with contextlib.suppress(OSError):
        return Client(str(directory / "control"))
    return None


def _ask(directory: Path, options: argparse.Namespace) -> str:
    connection = _connect(directory)
    if connection is None:
        raise NotUp(f"there is no lab in {directory}")
    with connection:
        connection.send(options)
        try:
            answer: str | NotUp = connection.recv()
        except EOFError as error:
            log = (directory / "holder.log").read_text()
            raise NotUp(f"the lab ended:\n{log}") from error
    if isinstance(answer, NotUp):
        raise answer
    return answer


def _hold(directory: Path) -> None:
    """Hold a lab and do what is asked at its socket, until it is brought down."""
    path = directory / "control"
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(open_openstack(directory))
        path.unlink(missing_ok=True)
        listener = stack.enter_context(Listener(str(path)))
        while True:
            # Whoever waits for the lab to come up connects and asks nothing.
            with contextlib.suppress(OSError, EOFError), listener.accept() as asker:
                options = asker.recv()
                if options.command == "down":
                    stack.close()
                    asker.send("the lab is gone\n")
                    return
                asker.send(_answer(lab, options))


def _answer(lab: OpenStack, options: argparse.Namespace) -> str | NotUp:
    """What to write, or why the command failed."""
    servers = lab.servers
    try:
        match options.command:
            case "up":
                for name in _SERVERS:
                    servers[name].start()
            case "start":
                servers[options.server].start()
            case "stop":
                servers[options.server].stop()
            case "front":
                ids = lab.seed.routers if options.kind == "router" else lab.seed.networks
                if options.name not in ids:
                    return NotUp(f"there is no {options.name}, but: {', '.join(ids)}")
                place = lab.place
                front = Front(options.kind, ids[options.name], "front", device=None)
                (text,) = front_configs([front], socket=place.agent_socket, state=place.path)
                return text
            case _:
                pass
    except NotUp as error:
        return error
    return _status(lab) if options.command in {"up", "status"} else ""


def _status(lab: OpenStack) -> str:
    """Where everything is and who must get what, for people and programs."""
    place = lab.place
    at = {"neutron": lab.neutron_url, "nova": lab.nova_url, "agent": f"unix:{place.agent_socket}"}
    shape = {
        "servers": {
            name: {
                "at": at[name],
                "pid": lab.servers[name].pid if lab.servers[name].running else None,
            }
            for name in _SERVERS
        },
        "secret": lab.secret,
        "openstacksdk": f"OS_CLIENT_CONFIG_FILE={lab.clouds_yaml} OS_CLOUD=lab",
        "agent's files": [f"{place.etc}/neutron.conf", f"{place.etc}/metadata_agent.ini"],
        "networks": dict(lab.seed.networks),
        "routers": dict(lab.seed.routers),
        "instances": {
            one.name: {"uuid": one.uuid, "project": one.project_id}
            for one in lab.instances.values()
        },
        "answers": [
            {
                "at": row.scope,
                "address": row.address,
                "instance": row.instance.name if row.instance else None,
            }
            for row in lab.lookups
        ],
    }
    return yaml.safe_dump(shape, sort_keys=False, default_flow_style=None, width=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="script/openstack-lab", description=__doc__)
    parser.add_argument(
        "--directory", type=Path, default=_DIRECTORY, help="where the lab lives (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start Nova, Neutron and Neutron's metadata agent")
    commands.add_parser("status", help="print where everything is and who must get what")
    commands.add_parser("down", help="end all of it and forget it")
    commands.add_parser("hold")
    for verb in ("start", "stop"):
        one = commands.add_parser(verb, help=f"{verb} one server")
        one.add_argument("server", choices=_SERVERS)
    front = commands.add_parser(
        "front", help="print the HAProxy configuration that Neutron's agents write"
    )
    front.add_argument("kind", choices=("network", "router", "ovn"))
    front.add_argument("name", help="of the network or router")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
