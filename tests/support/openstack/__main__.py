"""script/openstack-lab: genuine Nova and Neutron to try things on."""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from support.openstack.install import REPOSITORY
from support.openstack.servers import NotUp
from support.openstack.standing import SERVERS, NotBroughtUp, Standing, bring_down, bring_up, find
from support.openstack.table import INSTANCES, Lookup

_DIRECTORY = REPOSITORY / ".cache" / "openstack" / "up"


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(argv)
    directory: Path = options.directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with directory.with_name(f"{directory.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            said = _run(options, directory)
    except (NotBroughtUp, NotUp) as error:
        sys.stderr.write(f"script/openstack-lab: {error}\n")
        return 1
    sys.stdout.write(said)
    return 0


def _run(options: argparse.Namespace, directory: Path) -> str:
    match options.command:
        case "up":
            return _told(bring_up(directory))
        case "down":
            bring_down(directory)
            return "the lab is gone\n"
        case "status":
            lab = find(directory)
            return json.dumps(_shape(lab), indent=2) + "\n" if options.json else _told(lab)
        case "front":
            return _front(find(directory), options)
        case "start":
            find(directory).start(options.server)
            return ""
        case _:
            find(directory).stop(options.server)
            return ""


def _front(lab: Standing, options: argparse.Namespace) -> str:
    ids = lab.seed.routers if options.kind == "router" else lab.seed.networks
    if options.name not in ids:
        raise NotBroughtUp(f"there is no {options.name}, but: {', '.join(ids)}")
    front = lab.front
    try:
        return front.config(
            options.kind,
            ids[options.name],
            socket=options.socket or lab.place.agent_socket,
            bind_address=options.bind_address,
            port=options.port,
        )
    finally:
        front.close()


def _told(lab: Standing) -> str:
    place = lab.place
    running = [(name, lab.where(name), f"pid {lab.pid(name) or '-'}") for name in SERVERS]
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


def _shape(lab: Standing) -> dict[str, object]:
    return {
        "servers": {name: {"at": lab.where(name), "pid": lab.pid(name)} for name in SERVERS},
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
    status = commands.add_parser("status", help="tell where everything is and who must get what")
    status.add_argument("--json", action="store_true", help="for programs")
    for verb in ("start", "stop"):
        one = commands.add_parser(verb, help=f"{verb} one server")
        one.add_argument("server", choices=SERVERS)
    front = commands.add_parser(
        "front", help="print the HAProxy configuration that Neutron's agents write"
    )
    front.add_argument("kind", choices=("network", "router", "ovn"))
    front.add_argument("name", help="of the network or router")
    front.add_argument("--socket", type=Path, help="of the metadata agent (the lab's own)")
    front.add_argument("--bind-address", default="169.254.169.254")
    front.add_argument("--port", type=int, default=80)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
