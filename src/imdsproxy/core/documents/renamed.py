"""Names in a record that its documents change or lack, for the operator who chose them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

from imdsproxy.core.documents.ec2 import is_listed_tag, permitted_tags, unique_names
from imdsproxy.core.model import Dialect, Instance, Upstream
from imdsproxy.core.records.fields import quoted
from imdsproxy.errors import Problem

_SHOWN: Final = 20
_TAG_HINT: Final = (
    "keys there have letters, digits and +-=.,_:@ only, and are not `.`, `..` or `_index`"
)


def warn_of_names(instance: Instance) -> tuple[Problem, ...]:
    """A warning for each ssh key that guests see under another name, and each tag that EC2's documents lack."""
    if instance.upstream is Upstream.NOVA:
        return ()
    names = tuple(key.name for key in instance.ssh_keys)
    if _are_kept(names, tuple(name for name, _ in instance.tags)):
        return ()
    return (*_keys(instance), *_tags(instance))


@lru_cache(1024)
def _are_kept(keys: tuple[str, ...], tags: tuple[str, ...]) -> bool:
    """Whether guests see all of these names as they are: many instances have the same ones."""
    permitted = permitted_tags((name, "") for name in tags)
    kept = all(name in permitted and is_listed_tag(name) for name in tags)
    return kept and unique_names(keys) == keys


def _keys(instance: Instance) -> Iterator[Problem]:
    names = [key.name for key in instance.ssh_keys]
    for name, seen in zip(names, unique_names(names), strict=True):
        if name != seen:
            yield Problem(
                f"instances.{instance.id}.ssh_keys[{quoted(name)}]",
                f"guests see this key as {quoted(seen)}",
                "names in documents have no blanks, = or /, and each is there once",
            )


def _tags(instance: Instance) -> Iterator[Problem]:
    if Dialect.EC2 not in instance.dialects:
        return
    permitted = permitted_tags(instance.tags)
    for name, _ in instance.tags:
        if name in permitted and is_listed_tag(name):
            continue
        field = f"instances.{instance.id}.tags[{quoted(name)}]"
        if name in permitted:
            reason = "EC2's tags/instance does not list this tag"
            yield Problem(field, reason, "clients take a name with = for an ssh key")
        else:
            yield Problem(field, "EC2's tags/instance does not have this tag", _TAG_HINT)


def list_warnings(warnings: Iterable[Problem]) -> tuple[str, ...]:
    """A line for each, up to twenty; the others are counted."""
    found = list(warnings)
    more = len(found) - _SHOWN
    lines = [str(one) for one in found[:_SHOWN]]
    return (*lines, f"and {more} more") if more > 0 else tuple(lines)
