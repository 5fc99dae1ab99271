"""Parse an instance's public SSH keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from imdsproxy.core.model import SshKey
from imdsproxy.core.records.fields import quoted

if TYPE_CHECKING:
    from imdsproxy.core.records.fields import Field

__all__ = ["parse_ssh_keys"]

_KEY: Final = re.compile(
    r"(?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@._-]+ [A-Za-z0-9+/]+={0,3}(?: (?P<comment>.+))?"
)
_WANTED: Final = "one line as in a .pub file: ssh-ed25519 AAAA… COMMENT"
_LONGEST: Final = 16384
# public-keys/ lists INDEX=NAME, which clients split at "=", and a name is a step of a path.
_NAME: Final = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff=/]{1,255}")
_NOT_IN_DERIVED: Final = re.compile(r"[^A-Za-z0-9@._+-]+")


def parse_ssh_keys(field: Field) -> tuple[SshKey, ...]:
    """The keys in their order, each under a name of its own.

    A key given as a bare line is named by its comment (`key-N` without one; `-2`, `-3` … is added
    to a name that is taken).
    """
    found: list[tuple[str | None, str, int]] = []
    named: set[str] = set()
    for index, item in enumerate(field.items()):
        if isinstance(item.value, str):
            key = _parse_key(item)
            name = None
        else:
            name, key = _parse_named(item, named)
        if key is not None:
            found.append((name, key, index))
    return tuple(
        SshKey(_derived(key, index, named) if name is None else name, key)
        for name, key, index in found
    )


def _parse_key(field: Field) -> str | None:
    text = field.text(longest=_LONGEST)
    if text is None:
        return None
    return field.matched(_KEY, _WANTED)


def _parse_named(field: Field, named: set[str]) -> tuple[str | None, str | None]:
    entries = field.mapping(("name", "key"), required=("name", "key"))
    if entries is None or not {"name", "key"} <= entries.keys():
        return None, None
    key = _parse_key(entries["key"])
    name = entries["name"].matched(_NAME, "1 to 255 printable characters without = and /")
    if name is None:
        return None, None
    if name in named:
        entries["name"].refuse(f"the name {quoted(name)} is there twice")
    named.add(name)
    return name, key


def _derived(key: str, index: int, taken: set[str]) -> str:
    match = _KEY.fullmatch(key)
    comment = "" if match is None else match["comment"] or ""
    stem = _NOT_IN_DERIVED.sub("-", comment).strip("-")[:200] or f"key-{index + 1}"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name
