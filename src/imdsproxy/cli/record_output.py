"""Networks and instances as tables and as YAML that `--file` takes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, cast

from imdsproxy.cli.output import MOST_SHOWN, Column, Output, clean

if TYPE_CHECKING:
    from collections.abc import Iterator

_Shape = Mapping[str, object]
_ADDRESSES_SHOWN: Final = 3
_REASONS_SHOWN: Final = 20


def show_networks(output: Output, shapes: Sequence[_Shape]) -> None:
    """A row each, and why a network is not served."""
    columns = (
        Column("NETWORK", keep=True),
        Column("NAME", spare=True),
        Column("LISTENER"),
        Column("INSTANCES", right=True, keep=True, spare=True),
        Column("SOURCE", keep=True, spare=True),
        Column("STATE", keep=True),
    )
    rows = [
        (
            clean(_record(shape)["id"]),
            clean(_record(shape).get("name", "")),
            clean(_listener(_record(shape))),
            str(shape["instances"]),
            clean(shape["source"]),
            _serving(shape),
        )
        for shape in shapes
    ]
    output.table(columns, rows, empty="no networks: `imdsproxy network add` makes one")


def show_instances(output: Output, shapes: Sequence[_Shape]) -> None:
    """A row each; further ports and addresses are counted."""
    columns = (
        Column("INSTANCE", keep=True),
        Column("NAME", spare=True),
        Column("PORTS"),
        Column("USER DATA", right=True, keep=True, spare=True),
        Column("SOURCE", keep=True, spare=True),
        Column("STATE", keep=True),
    )
    rows = [
        (
            clean(_record(shape)["id"]),
            clean(_record(shape)["name"]),
            clean(_ports(_record(shape))),
            _size(shape["user_data_bytes"]),
            clean(shape["source"]),
            _in_force(shape),
        )
        for shape in shapes
    ]
    output.table(columns, rows, empty="no instances: `imdsproxy instance add` makes one")


def show_network(output: Output, shape: _Shape) -> None:
    """The record as YAML, its state as comments."""
    left_out = shape["left_out"]
    state = "serving"
    if isinstance(left_out, dict):
        state = f"not served: {left_out['reason']} ({left_out['code']})"
    notes = {"source": shape["source"], "state": state, "instances": shape["instances"]}
    output.text(_yaml("networks", _record(shape), notes))


def show_instance(output: Output, shape: _Shape) -> None:
    """The record as YAML, its ids and conflicts as comments."""
    notes: dict[str, object] = {
        "source": shape["source"],
        "uuid": shape["uuid"],
        "ec2 id": shape["ec2_id"],
        "revision": shape["revision"] or "not compiled yet",
    }
    created_at = _record(shape).get("created_at")
    if isinstance(created_at, int):
        notes["created"] = datetime.fromtimestamp(created_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    conflicts = cast("Sequence[_Shape]", shape["conflicts"])
    for index, conflict in enumerate(conflicts, 1):
        notes[f"conflict {index}"] = f"{conflict['kind']} {conflict['subject']}"
    for index, reason in enumerate(cast("Sequence[str]", shape["pending"]), 1):
        notes[f"not in force {index}"] = reason
    output.text(_yaml("instances", _record(shape), notes))


def say_written(output: Output, what: str, written: _Shape) -> None:
    """That a change is in force, or why it is not yet."""
    if output.as_json:
        output.json(written)
        return
    pending = cast("Sequence[str]", written["pending"])
    if written["applied"]:
        output.styled(f"[green]done:[/] {clean(what)}")
    else:
        output.styled(f"[yellow]stored:[/] {clean(what)}; not in force yet:")
        for reason in pending[:MOST_SHOWN]:
            output.styled(f"  {clean(reason)}")
        if len(pending) > MOST_SHOWN:
            output.styled(f"  and {len(pending) - MOST_SHOWN:,} more: imdsproxy status")
    for warning in cast("Sequence[str]", written.get("warnings", ())):
        output.styled(f"[yellow]warning:[/] {clean(warning)}")
    shared = written.get("shared")
    if shared is not None:
        output.styled(
            "[yellow]warning:[/] on this host only: its tokens go on being good on every other host that has the keys "
            f"of {clean(shared)}",
            "[dim]hint:[/] revoke there too, where it may run within the six hours that a token can live",
        )


def _record(shape: _Shape) -> _Shape:
    return cast("_Shape", shape["record"])


def _listener(record: _Shape) -> str:
    listener = cast("Mapping[str, object]", record["listener"])
    kind, value = next(iter(listener.items()))
    return f"{kind} {value}"


def _serving(shape: _Shape) -> str:
    left_out = shape["left_out"]
    if isinstance(left_out, dict):
        return f"[red]{clean(left_out['code'])}[/]"
    return "[green]serving[/]"


def _in_force(shape: _Shape) -> str:
    if shape["conflicts"]:
        return "[red]conflict[/]"
    return "[red]not in force[/]" if shape["pending"] else "[green]ok[/]"


def _ports(record: _Shape) -> str:
    ports = cast("Sequence[_Shape]", record.get("ports", ()))
    return "\n".join(f"{port['network']} {_addresses(port)}".rstrip() for port in ports)


def _addresses(port: _Shape) -> str:
    addresses = list(_strings(port.get("addresses", ())))
    more = len(addresses) - _ADDRESSES_SHOWN
    shown = " ".join(addresses[:_ADDRESSES_SHOWN]) or str(port.get("mac", ""))
    return f"{shown} +{more}" if more > 0 else shown


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, list | tuple):
        yield from (str(item) for item in value)


def _size(count: object) -> str:
    number = int(str(count))
    if number == 0:
        return "-"
    for unit in ("B", "KiB"):
        if number < 1024:  # noqa: PLR2004 - binary units
            return f"{number} {unit}"
        number = round(number / 1024)
    return f"{number} MiB"


def _yaml(kind: str, record: _Shape, notes: Mapping[str, object]) -> str:
    import yaml  # noqa: PLC0415 - `--help` need not load it

    class Dumper(yaml.SafeDumper):
        """Block style, with texts of several lines as such."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value.rstrip("\n") or value.endswith("\n") else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    comments = "".join(f"# {name}: {_one_line(value)}\n" for name, value in notes.items())
    body = yaml.dump(
        {kind: [dict(record)]},
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=100,
    )
    return comments + body


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
