"""A record's keys out of the flags of `network add|set` and `instance add|set`."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from imdsproxy.cli.record_files import read_bytes
from imdsproxy.errors import Problem, RequestRefused

if TYPE_CHECKING:
    from imdsproxy.core.records import Json

__all__ = [
    "dialects_of",
    "id_of_name",
    "listener_of",
    "payload_of",
    "policy_of",
    "ports_of",
    "ssh_keys_of",
    "subnets_of",
    "tags_of",
    "text_of",
    "without_missing",
]

_LISTENER_KEYS: Final = ("namespace", "device", "manage_addresses", "interface", "bridge")
_KEY_TYPES: Final = ("ssh-", "ecdsa-", "sk-")
_PRIVATE: Final = "PRIVATE KEY-----"
_NOT_IN_ID: Final = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_ID: Final = 64


def without_missing(keys: Mapping[str, Json]) -> dict[str, Json]:
    """Only the keys that flags gave."""
    return {key: value for key, value in keys.items() if value is not None}


def id_of_name(name: str) -> str | None:
    """The id of an instance for which only a name is given, other characters as `-`; `None` if that is none."""
    return _NOT_IN_ID.sub("-", name)[:_LONGEST_ID].strip("._-") or None


def listener_of(
    *,
    namespace: str | None,
    interface: str | None,
    bridge: str | None,
    device: str | None,
    manage_addresses: bool | None,
    changing: bool,
) -> Json:
    """The listener that the flags say; `None` without any.

    When `changing`, a new kind takes the old one's keys away (RFC 7396), and `--device` and
    `--manage-addresses` may stand alone.
    """
    kinds = without_missing({"namespace": namespace, "interface": interface, "bridge": bridge})
    inside = without_missing({"device": device, "manage_addresses": manage_addresses})
    alone = inside and "namespace" not in kinds
    if len(kinds) > 1 or (alone and (kinds or not changing)):
        raise _usage(
            "listener",
            "needs exactly one kind",
            "--namespace NAME (with --device, --manage-addresses), --interface DEV or --bridge DEV",
        )
    if kinds and changing:
        return {**dict.fromkeys(_LISTENER_KEYS), **kinds, **inside}
    return {**kinds, **inside} or None


def subnets_of(texts: Sequence[str]) -> Json:
    """`CIDR[,gateway=ADDRESS][,dns=ADDRESS]…`, each; `None` without any."""
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


def ports_of(
    *, network: str | None, mac: str | None, addresses: Sequence[str], more: Sequence[str]
) -> Json:
    """The port of `--network`, `--mac` and `--address`, and those of `--port`; `None` without any."""
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
    port = without_missing({"network": network, "mac": mac})
    return {**port, "addresses": list(addresses)} if addresses else port


def ssh_keys_of(given: Sequence[str]) -> Json:
    """Each a key's text or a file of keys (`.pub`, `authorized_keys`); `None` without any."""
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


def payload_of(path: Path | None) -> Json:
    """A file's bytes as records carry them: text, or base64 where they are no UTF-8."""
    if path is None:
        return None
    raw = read_bytes(path)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def text_of(path: Path | None) -> Json:
    """A file's text; `RequestRefused` where it is no UTF-8."""
    payload = payload_of(path)
    if isinstance(payload, dict):
        raise _usage("vendor_data", f"{path} is not UTF-8 text", "YAML, JSON or plain text")
    return payload


def tags_of(texts: Sequence[str]) -> Json:
    """`NAME=VALUE`, each; `None` without any."""
    tags: dict[str, Json] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise _usage("tags", f"{text} has no value", "--tag NAME=VALUE")
        tags[name] = value
    return tags or None


def dialects_of(chosen: Mapping[str, bool | None]) -> Json:
    """The dialects that were switched on or off; `None` without any."""
    return {name: on for name, on in chosen.items() if on is not None} or None


def policy_of(flags: Mapping[str, object]) -> Json:
    """The rules of a policy that the flags set; `None` without any.

    Args:
        flags: By the rule's name; `path_rule` holds texts `PATH=WORD`, `no_path_rule` paths whose rule is removed
            (null, RFC 7396).
    """
    given = cast("dict[str, Json]", dict(flags))
    added = cast("Sequence[str]", given.pop("path_rule", None) or ())
    removed = cast("Sequence[str]", given.pop("no_path_rule", None) or ())
    paths: dict[str, Json] = dict.fromkeys(removed)
    for text in added:
        path, equals, word = text.rpartition("=")
        if not equals:
            raise _usage(
                "policy.paths", f"{text} says nothing of it", "--path-rule /latest/user-data=deny"
            )
        paths[path] = word
    return without_missing({**given, "paths": paths or None}) or None


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
