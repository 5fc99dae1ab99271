"""The flags of `network add|set` and `instance add|set`, out of the tables of records, and back into a record's keys.

Most keys have a flag of their own name and kind, also those of mappings inside a record (`listener`, `policy`,
`dialects`). Keys that hold lists, payloads or free mappings have the flags of `_SPECIAL`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from imdsproxy.cli import completers
from imdsproxy.cli.options import flag
from imdsproxy.cli.record_files import read_bytes
from imdsproxy.core.path_rules import PathWord
from imdsproxy.core.records import Json
from imdsproxy.core.records.network import LISTENER_KEYS
from imdsproxy.core.records.schema import Key, Table
from imdsproxy.errors import Problem, RequestRefused

_OFF: Final = {"manage_addresses": "leave-addresses"}
"""Names of flags that switch a key off, where they are not `--no-…`."""

_METAVARS: Final = {
    **dict.fromkeys(("name", "hostname", "namespace"), "NAME"),
    **dict.fromkeys(("device", "interface", "bridge"), "DEV"),
    "project": "ID",
}

_KEY_TYPES: Final = ("ssh-", "ecdsa-", "sk-")
_PRIVATE: Final = "PRIVATE KEY-----"


def flags_of(table: Table[Any]) -> Iterator[tuple[str, object]]:
    """Each flag's name as a parameter, and its annotation for typer."""
    for key in table.keys:
        if key.name in _SPECIAL:
            yield from _SPECIAL[key.name].flags.items()
        elif key.kind.tables:
            for inner in key.kind.tables:
                yield from flags_of(inner)
        elif key.name != "id" and not key.only_in_files:
            annotation = _annotation(key)
            if annotation is not None:
                yield key.name, annotation


def _annotation(key: Key) -> object:
    name, schema = key.name.replace("_", "-"), key.kind.schema or {}
    text = key.summary.replace("`", "")
    match schema.get("type"):
        case "boolean":
            off = _OFF.get(key.name, f"no-{name}")
            option = typer.Option(f"--{name}/--{off}", help=text, show_default=False)
            return Annotated[bool | None, option]
        case "integer":
            between = f"{schema['minimum']}..{schema['maximum']}"
            return Annotated[int | None, flag(f"--{name}", between, text)]
        case "string":
            words = cast(
                "list[str]",
                schema.get("enum", [_METAVARS.get(name, name.rpartition("-")[2].upper())]),
            )
            return Annotated[str | None, flag(f"--{name}", "|".join(words), text)]
        case _:
            return None


def keys_of(table: Table[Any], values: Mapping[str, Any], *, changing: bool) -> dict[str, Json]:
    """The keys that flags gave.

    Args:
        table: The record's.
        values: Of the parameters that `flags_of` has.
        changing: A record that is there is changed.
    """
    keys: dict[str, Json] = {}
    for key in table.keys:
        special = _SPECIAL.get(key.name)
        if special is not None:
            value = special.read(*(values.get(name) or special.empty for name in special.flags))
        elif key.kind.tables:
            inner: dict[str, Json] = {}
            for one in key.kind.tables:
                inner |= keys_of(one, values, changing=changing)
            value = inner or None
            if key.name == "listener" and inner:
                value = _check_listener(inner, changing=changing)
        else:
            value = values.get(key.name)
        if value is not None:
            keys[key.name] = value
    return keys


def _check_listener(kinds: Mapping[str, Json], *, changing: bool) -> Json:
    """The listener that the flags name.

    When `changing`, a new kind takes the old one's keys away (RFC 7396), and `--device` and `--manage-addresses` may
    stand alone.
    """
    named = [kind for kind in ("namespace", "interface", "bridge") if kind in kinds]
    alone = "namespace" not in kinds and kinds.keys() & {"device", "manage_addresses"}
    if len(named) > 1 or (alone and (named or not changing)):
        raise _usage(
            "listener",
            "needs exactly one kind",
            "--namespace NAME (with --device, --manage-addresses), --interface DEV or --bridge DEV",
        )
    return {**dict.fromkeys(LISTENER_KEYS if named and changing else ()), **kinds}


def _subnets_of(texts: Sequence[str]) -> Json:
    subnets: list[Json] = []
    for text in texts:
        cidr, *rest = text.split(",")
        subnet: dict[str, Json] = {"cidr": cidr}
        servers: list[Json] = []
        for key, value in _pairs(rest, "--subnet", ("gateway", "dns")):
            if key == "gateway":
                subnet["gateway"] = value
            else:
                servers.append(value)
        subnets.append({**subnet, "dns": servers} if servers else subnet)
    return subnets or None


def _ports_of(
    network: str | None, mac: str | None, addresses: Sequence[str], more: Sequence[str]
) -> Json:
    ports: list[Json] = []
    if network is not None:
        ports.append(_port(network, mac, addresses))
    elif mac is not None or addresses:
        raise _usage("ports", "--mac and --address need a --network", "--network NET")
    for text in more:
        pairs = list(_pairs(text.split(","), "--port", ("network", "mac", "address")))
        named = dict(pairs)
        if "network" not in named:
            raise _usage("ports", f"{text} has no network", "--port network=NET,mac=…,address=…")
        inside = [value for key, value in pairs if key == "address"]
        ports.append(_port(named["network"], named.get("mac"), inside))
    return ports or None


def _port(network: str, mac: str | None, addresses: Sequence[str]) -> dict[str, Json]:
    port: dict[str, Json] = {"network": network}
    if mac is not None:
        port["mac"] = mac
    return {**port, "addresses": list(addresses)} if addresses else port


def _ssh_keys_of(given: Sequence[str]) -> Json:
    keys: list[Json] = []
    for text in given:
        if text.startswith(_KEY_TYPES):
            keys.append(text)
            continue
        content = read_bytes(Path(text)).decode(errors="replace")
        if _PRIVATE in content:
            hint = f"its public half is mostly {text}.pub"
            raise _usage("ssh_keys", f"{text} is a private key, which no guest is to see", hint)
        lines = content.splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise _usage("ssh_keys", f"{text} holds no key", "a .pub file, or the key itself")
        keys.extend(found)
    return keys or None


def _payload_of(path: Path | None) -> Json:
    if path is None:
        return None
    raw = read_bytes(path)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def _text_of(path: Path | None) -> Json:
    payload = _payload_of(path)
    if isinstance(payload, dict):
        raise _usage("vendor_data", f"{path} is not UTF-8 text", "YAML, JSON or plain text")
    return payload


def _tags_of(texts: Sequence[str]) -> Json:
    tags: dict[str, Json] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise _usage("tags", f"{text} has no value", "--tag NAME=VALUE")
        tags[name] = value
    return tags or None


def _paths_of(added: Sequence[str], removed: Sequence[str]) -> Json:
    paths: dict[str, Json] = dict.fromkeys(removed)
    for text in added:
        path, equals, word = text.rpartition("=")
        if not equals:
            raise _usage(
                "policy.paths",
                f"{text} has no rule for the path",
                "--path-rule /latest/user-data=deny",
            )
        paths[path] = word
    return paths or None


def _pairs(texts: Iterable[str], flag: str, known: Sequence[str]) -> Iterable[tuple[str, str]]:
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            words = ",".join(f"{name}=…" for name in known)
            raise _usage(flag.strip("-"), f"{text} is not understood", f"{flag} …,{words}")
        yield key, value


def _usage(field: str, reason: str, hint: str) -> RequestRefused:
    problem = Problem(field, reason, hint=hint)
    return RequestRefused(f"{field}: {reason}", hint=hint, problems=[problem])


@dataclass(frozen=True, slots=True)
class _Special:
    """A key with flags of its own.

    Attributes:
        flags: Annotations by the parameter's name; `read` takes the values in the same order.
        read: Gives the key's value, or `None` without any of the flags.
        empty: What `read` gets for a flag that is not there.
    """

    flags: Mapping[str, object]
    read: Callable[..., Json]
    empty: object = None


def _many(name: str, metavar: str, text: str) -> object:
    return Annotated[list[str] | None, flag(name, metavar, f"{text}; may be repeated.")]


_SPECIAL: Final[Mapping[str, _Special]] = {
    "subnets": _Special(
        {"subnet": _many("--subnet", "CIDR[,gateway=A][,dns=A]...", "An address range of guests")},
        _subnets_of,
        (),
    ),
    "ports": _Special(
        {
            "network": Annotated[
                str | None,
                flag(
                    "--network",
                    "NET",
                    "The network of its port, by id or name; with --mac and --address it replaces all ports.",
                    completers.networks,
                    "-n",
                ),
            ],
            "mac": Annotated[str | None, flag("--mac", "MAC", "The port's MAC.")],
            "address": _many("--address", "ADDRESS", "An address of the port"),
            "port": _many("--port", "network=NET[,mac=M][,address=A]...", "A further port"),
        },
        lambda network, mac, addresses, more: _ports_of(network, mac, addresses or (), more or ()),
    ),
    "ssh_keys": _Special(
        {"ssh_key": _many("--ssh-key", "FILE|KEY", "Public key, or a file of them")},
        _ssh_keys_of,
        (),
    ),
    "tags": _Special({"tag": _many("--tag", "NAME=VALUE", "A tag")}, _tags_of, ()),
    "user_data": _Special(
        {
            "user_data": Annotated[
                Path | None,
                flag("--user-data", "FILE", "Its bytes as they are; - is standard input."),
            ]
        },
        _payload_of,
    ),
    "vendor_data": _Special(
        {
            "vendor_data": Annotated[
                Path | None, flag("--vendor-data", "FILE", "Text; - is standard input.")
            ]
        },
        _text_of,
    ),
    "paths": _Special(
        {
            "path_rule": _many(
                "--path-rule",
                f"PATH={'|'.join(PathWord)}",
                "Set a rule for a path and what is beneath it, as /latest/user-data=deny",
            ),
            "no_path_rule": _many("--no-path-rule", "PATH", "Remove the rule for a path"),
        },
        _paths_of,
        (),
    ),
}
