"""Flags of `network add|set` and `instance add|set`, derived from record tables, and converted back to record keys.

Most keys have a flag of the same name and kind, including keys of mappings in a record (`listener`, `policy`,
`dialects`). Keys with lists, payloads or free mappings have the flags of `_SPECIAL`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias, cast

from imdsproxy.cli.options import flag, network_flag
from imdsproxy.errors import Problem, RequestRefused
from imdsproxy.model.path_rules import PathWord
from imdsproxy.model.records import Json
from imdsproxy.model.records.schema import Key, Table
from imdsproxy.model.records.values import render_payload

_Split: TypeAlias = Callable[[str, str], tuple[str, str, str]]

STDIN: Final = Path("-")

_OFF: Final = {"manage_addresses": "leave-addresses"}
"""Names of flags that switch a key off, if not `--no-…`."""

_METAVARS: Final = {
    **dict.fromkeys(("name", "hostname", "namespace"), "NAME"),
    **dict.fromkeys(("device", "interface", "bridge"), "DEV"),
    "project": "ID",
}

_KEY_TYPES: Final = ("ssh-", "ecdsa-", "sk-")
_PRIVATE: Final = "PRIVATE KEY-----"


def flags_of(table: Table[Any], *, new: bool = False) -> Iterator[tuple[str, object]]:
    """Yield each flag's parameter name and its annotation for typer.

    `new`: the flags are for a new record, so their help shows default values.
    """
    for key in table.keys:
        if key.name in _SPECIAL:
            yield from _SPECIAL[key.name][1].items()
        elif key.kind.tables:
            for inner in key.kind.tables:
                yield from flags_of(inner, new=new)
        elif key.name != "id" and not key.only_in_files:
            annotation = _annotation(key, table.default(key) if new else None)
            if annotation is not None:
                yield key.name, annotation


def _annotation(key: Key, default: Any) -> object:
    name, schema = key.name.replace("_", "-"), key.kind.schema or {}
    text = key.summary.replace("`", "")
    if default not in (None, ""):
        switch = {True: "on", False: "off"}
        spelled = switch[default] if isinstance(default, bool) else key.kind.render(default)
        text = f"{text.removesuffix('.')} (default: {spelled})."
    match schema:
        case {"type": "boolean"}:
            off = _OFF.get(key.name, f"no-{name}")
            return Annotated[bool | None, flag(f"--{name}/--{off}", text)]
        case {"type": "integer", "minimum": lowest, "maximum": highest}:
            between = f"{lowest}..{highest}"
            return Annotated[int | None, flag(f"--{name} {between}", text)]
        case {"enum": [*words]}:
            choices = "|".join(word for word in words if isinstance(word, str))
            return Annotated[str | None, flag(f"--{name} {choices}", text)]
        case {"type": "string"}:
            metavar = _METAVARS.get(name, name.rpartition("-")[2].upper())
            return Annotated[str | None, flag(f"--{name} {metavar}", text)]
        case _:
            return None


def keys_of(table: Table[Any], values: Mapping[str, Any]) -> dict[str, Json]:
    """Return the record keys set by flags."""
    keys: dict[str, Json] = {}
    for key in table.keys:
        value: Json = values.get(key.name)
        if key.name in _SPECIAL:
            read, flags = _SPECIAL[key.name]
            given = [values.get(name) or None for name in flags]
            value = read(*given) if any(given) else None
        elif key.kind.tables:
            inner = (keys_of(one, values).items() for one in key.kind.tables)
            value = dict(chain.from_iterable(inner)) or None
        if value is not None:
            keys[key.name] = value
    return keys


def read_bytes(path: Path) -> bytes:
    """Read a file, or standard input for `-`; raise `RequestRefused` on failure."""
    try:
        return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
    except OSError as error:
        raise RequestRefused(f"cannot read {path}: {error.strerror}") from error


def _subnets_of(texts: Sequence[str]) -> Json:
    split = (text.split(",") for text in texts)
    return [{"cidr": cidr, **_parts("--subnet", rest)} for cidr, *rest in split]


def _ports_of(
    network: str | None,
    mac: str | None,
    addresses: Sequence[str] | None,
    more: Sequence[str] | None,
) -> Json:
    ports: list[Json] = []
    if network is not None:
        port: dict[str, Json] = {"network": network, "mac": mac, "addresses": [*(addresses or ())]}
        ports.append({key: value for key, value in port.items() if value})
    elif mac is not None or addresses:
        raise wrong_flag("ports", "--mac and --address need a --network", "add --network NET")
    for text in more or ():
        port = _parts("--port", text.split(","))
        if "network" not in port:
            hint = "use --port network=NET,mac=…,address=…"
            raise wrong_flag("ports", f"{text} has no network", hint)
        ports.append(port)
    return ports


_PARTS: Final = {
    "--subnet": {"gateway": "gateway", "dns": "dns"},
    "--port": {"network": "network", "mac": "mac", "address": "addresses"},
}
"""Keys of a subnet or port, by flag and name of the flag's part."""


def _parts(flag: str, texts: Sequence[str]) -> dict[str, Json]:
    """Parse a flag's parts `NAME=VALUE`; the last value counts, except that list keys collect all values."""
    known, found = _PARTS[flag], dict[str, Json]()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            words = ",".join(f"{name}=…" for name in known)
            raise wrong_flag(flag.strip("-"), f"{text} is not understood", f"use {flag} …,{words}")
        if known[name] in ("dns", "addresses"):
            cast("list[Json]", found.setdefault(known[name], [])).append(value)
        else:
            found[name] = value
    return found


def _pairs(
    texts: Iterable[str], field: str, lacks: str, hint: str, split: _Split = str.partition
) -> dict[str, Json]:
    """Parse texts `NAME=VALUE`; `lacks` is the error text for a missing value."""
    pairs: dict[str, Json] = {}
    for text in texts:
        name, equals, pairs[name] = split(text, "=")
        if not equals:
            raise wrong_flag(field, f"{text} {lacks}", hint)
    return pairs


def _ssh_keys_of(given: Sequence[str]) -> Json:
    keys: list[Json] = []
    for text in given:
        if text.startswith(_KEY_TYPES):
            keys.append(text)
            continue
        content = read_bytes(Path(text)).decode(errors="replace")
        if _PRIVATE in content:
            hint = f"the public key is usually {text}.pub"
            raise wrong_flag("ssh_keys", f"{text} is a private key, which no guest may see", hint)
        lines = content.splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise wrong_flag(
                "ssh_keys", f"{text} contains no key", "use a .pub file, or the key itself"
            )
        keys.extend(found)
    return keys


def _payload_of(path: Path) -> Json:
    return render_payload(read_bytes(path))


def _text_of(path: Path) -> Json:
    payload = _payload_of(path)
    if isinstance(payload, dict):
        raise wrong_flag("vendor_data", f"{path} is not UTF-8 text", "use YAML, JSON or plain text")
    return payload


def _tags_of(texts: Sequence[str]) -> Json:
    return _pairs(texts, "tags", "has no value", "use --tag NAME=VALUE")


def _paths_of(added: Sequence[str] | None, removed: Sequence[str] | None) -> Json:
    lacks, hint = "has no rule for the path", "use --path-rule /latest/user-data=deny"
    paths = _pairs(added or (), "policy.paths", lacks, hint, str.rpartition)
    return {**dict.fromkeys(removed or ()), **paths}


def wrong_flag(field: str, reason: str, hint: str) -> RequestRefused:
    """Return the error for an invalid flag value, with the record key as its field."""
    problem = Problem(field, reason, hint=hint)
    return RequestRefused(f"{field}: {reason}", hint=hint, problems=[problem])


def _many(usage: str, text: str) -> object:
    return Annotated[list[str] | None, flag(usage, f"{text}; may be repeated.")]


def _file(name: str, text: str) -> object:
    return Annotated[Path | None, flag(f"{name} FILE", f"{text}; - is standard input.")]


_SPECIAL: Final[Mapping[str, tuple[Callable[..., Json], Mapping[str, object]]]] = {
    "subnets": (
        _subnets_of,
        {"subnet": _many("--subnet CIDR[,gateway=A][,dns=A]...", "An address range of guests")},
    ),
    "ports": (
        _ports_of,
        {
            "network": Annotated[
                str | None,
                network_flag(
                    "The network of the port, by id or name; with --mac and --address, this port replaces all ports."
                ),
            ],
            "mac": Annotated[str | None, flag("--mac MAC", "The port's MAC.")],
            "address": _many("--address ADDRESS", "An address of the port"),
            "port": _many("--port network=NET[,mac=M][,address=A]...", "Another port"),
        },
    ),
    "ssh_keys": (
        _ssh_keys_of,
        {"ssh_key": _many("--ssh-key FILE|KEY", "A public key, or a file of public keys")},
    ),
    "tags": (_tags_of, {"tag": _many("--tag NAME=VALUE", "A tag")}),
    "user_data": (_payload_of, {"user_data": _file("--user-data", "User-data, sent unchanged")}),
    "vendor_data": (_text_of, {"vendor_data": _file("--vendor-data", "Vendor-data, a text")}),
    "paths": (
        _paths_of,
        {
            "path_rule": _many(
                f"--path-rule PATH={'|'.join(PathWord)}",
                "Set the rule for a path and all paths below it, as /latest/user-data=deny",
            ),
            "no_path_rule": _many("--no-path-rule PATH", "Remove the rule for a path"),
        },
    ),
    "audiences": (
        list,
        {"audience": _many("--audience NAME", "An audience of identity tokens; * allows any")},
    ),
    "identity_tags": (
        list,
        {"identity_tag": _many("--identity-tag NAME", "A tag that identity tokens hold")},
    ),
}
"""Keys with special flags: parser of the flags' values, and annotations by parameter name."""
