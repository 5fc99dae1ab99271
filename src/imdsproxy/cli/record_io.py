"""Records in commands: table rows, YAML, record files, and results of changes."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import typer

from imdsproxy.api.client import Client
from imdsproxy.cli.options import NOT_IN_FORCE
from imdsproxy.cli.output import Note, Output, Shape, clean, first_lines
from imdsproxy.cli.record_flags import STDIN, read_bytes
from imdsproxy.errors import RequestRefused, spell_count
from imdsproxy.model.entities import Instance, Network
from imdsproxy.model.records import PLACED, TABLES, PlacedInstance, Records, Tables, render_record

_ADDRESSES_SHOWN: Final = 3
_LINES: Final = 100


def show_rows(output: Output, kind: str, shapes: Iterable[Shape]) -> None:
    """Print a table of networks or instances."""
    output.table(
        map(_network_row if kind == "network" else _instance_row, shapes),
        empty=f"no {kind}s: add one with `imdsproxy {kind} add`",
        keep=(kind.upper(), "INSTANCES", "USER DATA", "SOURCE", "STATE"),
        right=("INSTANCES", "USER DATA"),
        spare=("NAME", "INSTANCES", "USER DATA", "SOURCE"),
    )


def _network_row(shape: Shape) -> dict[str, str]:
    record, not_served = shape["record"], shape["not_served"]
    kind, value = next(iter(record["listener"].items()))
    return {
        "NETWORK": clean(record["id"]),
        "NAME": clean(record.get("name", "")),
        "LISTENER": clean(f"{kind} {value}"),
        "INSTANCES": str(shape["instances"]),
        **_where(shape),
        "STATE": f"[red]{clean(not_served['code'])}[/]" if not_served else _served(shape),
    }


def _served(shape: Shape) -> str:
    # A fleet's network without instances on any host has no listener.
    return "on no host" if shape.get("hosts") == [] else "[green]serving[/]"


def _instance_row(shape: Shape) -> dict[str, str]:
    """Return an instance's row; addresses beyond the first few of a port are only counted."""
    record, state = shape["record"], "[green]ok[/]"
    if shape["conflicts"]:
        state = "[red]conflict[/]"
    elif shape["pending"]:
        state = "[red]not in force[/]"
    return {
        "INSTANCE": clean(record["id"]),
        "NAME": clean(record["name"]),
        "PORTS": clean("\n".join(map(_port, record.get("ports", ())))),
        "USER DATA": _size(shape["user_data_bytes"]),
        **_where(shape),
        "STATE": state,
    }


def _where(shape: Shape) -> dict[str, str]:
    if "hosts" not in shape:
        return {"SOURCE": clean(shape["source"])}
    return {"HOSTS": clean(" ".join(shape["hosts"]))}


def _port(port: Shape) -> str:
    addresses = port.get("addresses", ())
    shown = " ".join(addresses[:_ADDRESSES_SHOWN]) or port.get("mac", "")
    more = len(addresses) - _ADDRESSES_SHOWN
    return f"{port['network']} {shown}{f' +{more}' if more > 0 else ''}".rstrip()


def _size(number: int) -> str:
    if number == 0:
        return "-"
    for unit in ("B", "KiB"):
        if number < 1024:  # noqa: PLR2004 - binary units
            return f"{number} {unit}"
        number = round(number / 1024)
    return f"{number} MiB"


def render_yaml(kind: str, shape: Shape) -> str:
    """Return a record as the YAML of a record file, below comments with its state."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """YAML dumper that writes multi-line texts in block style."""

        def represent_scalar(
            self, tag: str, value: str, style: str | None = None
        ) -> yaml.ScalarNode:
            return super().represent_scalar(tag, value, "|" if "\n" in value else style)

    notes = _network_notes(shape) if kind == "network" else _instance_notes(shape)
    comments = [f"# {name}: {' '.join(str(value).split())}\n" for name, value in notes]
    return "".join(comments) + yaml.dump(
        {f"{kind}s": [dict(shape["record"]) | _placed(kind, shape)]},
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )


def _placed(kind: str, shape: Shape) -> dict[str, Any]:
    return {"hosts": shape["hosts"]} if kind == "instance" and "hosts" in shape else {}


def _network_notes(shape: Shape) -> Iterator[tuple[str, object]]:
    not_served = shape["not_served"]
    state = "on no host" if shape.get("hosts") == [] else "serving"
    if not_served:
        state = f"not served: {not_served['reason']} ({not_served['code']})"
    yield from {"source": shape["source"], "state": state, "instances": shape["instances"]}.items()
    if "hosts" in shape:  # only a fleet's records have hosts
        yield from {"hosts": " ".join(shape["hosts"]), "revision": shape["revision"]}.items()


def _instance_notes(shape: Shape) -> Iterator[tuple[str, object]]:
    yield "source", shape["source"]
    yield "uuid", shape["uuid"]
    yield "ec2 id", shape["ec2_id"]
    yield "revision", shape["revision"] or "not compiled yet"
    created_at = shape["record"].get("created_at")
    if created_at is not None:
        yield "created", f"{datetime.fromtimestamp(created_at, UTC):%Y-%m-%dT%H:%M:%SZ}"
    for number, conflict in enumerate(shape["conflicts"], 1):
        yield f"conflict {number}", f"{conflict['kind']} {conflict['subject']}"
    for number, reason in enumerate(shape["pending"], 1):
        yield f"not in force {number}", reason


def show_written(output: Output, what: str, written: Shape, *, waiting: str | None = None) -> None:
    """Print the result of a change; exit with `NOT_IN_FORCE` if the change is pending.

    `waiting`: description of the pending state; `None` if the change is already stored.
    """
    output.answer(written, lambda _, answer: say_written(output, what, answer, waiting=waiting))
    if not written["applied"]:
        raise typer.Exit(NOT_IN_FORCE)


def say_written(output: Output, what: str, written: Shape, *, waiting: str | None = None) -> None:
    """Print the result of a change for people, without ending the command."""
    rest = "imdsproxy fleet hosts" if "hosts" in written else "imdsproxy status"
    lines = first_lines(written.get("pending", ()), rest)
    if written["applied"]:
        output.styled(f"[green]done:[/] {clean(what)}{'; later:' if lines else ''}")
    elif waiting is not None:
        output.styled(f"[yellow]not yet:[/] {clean(waiting)}:")
    else:
        output.styled(f"[yellow]stored:[/] {clean(what)}; not in force yet:")
    output.styled(*(f"  {clean(line)}" for line in lines))
    output.styled(*(f"[yellow]warning:[/] {clean(one)}" for one in written.get("warnings", ())))
    if (shared := written.get("shared")) is not None:
        output.styled(
            f"[yellow]warning:[/] the tokens stay valid on other hosts with the keys of {clean(shared)}",
            "[dim]hint:[/] also revoke them where the instance may run within six hours, the lifetime of a token",
        )
    if of_fleet := written.get("of_fleet"):
        number = spell_count(of_fleet, "instance")
        output.styled(
            f"[yellow]warning:[/] the fleet's keys still sign the tokens of {number} of the fleet",
            "[dim]hint:[/] run the same command with --fleet URL of a hub",
        )


def read_record_file(path: Path, note: Note, tables: Tables = TABLES) -> Records:
    """Read all records of a file; raise `RequestRefused` with all problems.

    The command itself reads each `user_data_file`, relative to the record file: the daemon reads no file for a caller.
    """
    from imdsproxy.sources.file.record_file import decode_records, payload_reader

    name = "standard input" if path == STDIN else str(path)
    note(f"reading {name}", 0, 0)
    records = decode_records(
        read_bytes(path),
        file=name,
        read_file=payload_reader(Path.cwd() if path == STDIN else path.parent),
        note=lambda done, of: note(f"checking {name}", done, of),
        tables=tables,
    )
    if records.all_problems:
        raise RequestRefused(f"{name} has invalid records", problems=records.all_problems)
    if not records.networks and not records.instances:
        raise RequestRefused(
            f"{name} contains no records", hint="add a list `networks:` or `instances:`"
        )
    return records


@dataclass(frozen=True, slots=True)
class RecordLines:
    """Repeatable body of a bulk request: one record per line, in chunks of `_LINES` records."""

    records: Records
    note: Note

    def __iter__(self) -> Iterator[bytes]:
        found: list[Network | Instance] = [*self.records.networks, *self.records.instances]
        for begin in range(0, len(found), _LINES):
            part = found[begin : begin + _LINES]
            self.note("sending records", begin + len(part), len(found))
            kinds = ("network" if isinstance(one, Network) else "instance" for one in part)
            lines = ({kind: _render(one)} for kind, one in zip(kinds, part, strict=True))
            yield "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def _render(record: Network | Instance) -> dict[str, Any]:
    return PLACED.render(record) if isinstance(record, PlacedInstance) else render_record(record)


def import_domain(daemon: Client, uri: str, name: str, network: str | None) -> dict[str, Any]:
    """Return the keys of an instance's record, including `id`, as the source `libvirt` reports them.

    `network`: network of the domain's only NIC; `None` to find each NIC's network by its bridge. Raises
    `RequestRefused`: the domain's metadata is invalid, or a NIC's network is not known.
    """
    from imdsproxy.sources.libvirt.source import read_domain

    domain, networks = read_domain(uri, name)
    if domain.problems:
        raise RequestRefused(
            f"the metadata of domain {domain.name} is invalid", problems=domain.problems
        )
    if not domain.interfaces:
        raise RequestRefused(
            f"domain {domain.name} has no NIC on a bridge of this host",
            hint="the guest cannot reach the host; macvtap and user-mode networks cannot be used either",
        )
    if network is not None and len(domain.interfaces) > 1:
        raise RequestRefused(
            f"domain {domain.name} has {len(domain.interfaces)} NICs, but --network names one network",
            hint="omit --network, or describe each NIC with --port network=NET,mac=MAC",
        )
    records = [shape["record"] for shape in daemon.get("/v1/networks")]
    by_id = {record["id"]: record["id"] for record in records}
    by_device = {
        device: record["id"]
        for record in records
        for kind, device in record["listener"].items()
        if kind in {"interface", "bridge"}
    }
    ports = []
    for interface in domain.interfaces:
        plugged = networks.get(interface.network or "")
        device = interface.bridge if plugged is None else plugged.bridge
        where = network or by_device.get(device) or by_id.get(interface.network)
        if where is None:
            hint = "name its network with --network NET"
            if device is not None:
                hint = f"add it with `imdsproxy network add --bridge {device}`, or {hint}"
            raise RequestRefused(
                f"no network has the listener {device or interface.network}, "
                f"to which NIC {interface.mac} of {domain.name} is attached",
                hint=hint,
            )
        hosts = () if plugged is None else plugged.hosts
        addresses = [at for mac, at in hosts if mac == interface.mac.lower()]
        port: dict[str, Any] = {"network": where, "mac": interface.mac}
        ports.append(port | {"addresses": addresses} if addresses else port)
    return {"id": domain.uuid, "name": domain.name, **domain.keys, "ports": ports}
