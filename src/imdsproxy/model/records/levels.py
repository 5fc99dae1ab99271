"""Levels of records: each key has the level that introduced it, so that older hosts can read newer records. Pure.

A host reports the level that it reads. A hub omits a later key that only adds a feature. It refuses to write a later
key that limits something if a host that must observe the limit has a lower level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

from imdsproxy.model.records.instance import INSTANCE
from imdsproxy.model.records.network import NETWORK, POLICY
from imdsproxy.model.records.schema import Key, Kind, Table

_Drops: TypeAlias = Callable[[Key], bool]


@dataclass(frozen=True)
class Schema:
    """Tables of one version, by kind of item."""

    tables: Mapping[str, Table[Any]]

    @cached_property
    def level(self) -> int:
        """Highest level of any key."""
        keys = (key for table in self.tables.values() for key in _every_key(table))
        return max((key.since for key in keys), default=1)

    def needed(self, kind: str, record: Any) -> int:
        """Return the level that a host must read to observe all limits in a record."""
        if kind not in self.tables:
            return 1
        return max((key.since for key in _used(self.tables[kind], record) if key.limits), default=1)

    def fit(self, kind: str, record: Any, level: int) -> Any:
        """Return a record without keys above a level that only add a feature."""
        if kind not in self.tables or level >= self.level:
            return record
        return _fit(self.tables[kind], record, lambda key: key.since > level and not key.limits)


def _tables_of(kind: Kind) -> Iterator[Table[Any]]:
    yield from kind.tables
    if kind.item is not None:
        yield from _tables_of(kind.item)


def _every_key(table: Table[Any]) -> Iterator[Key]:
    for key in table.keys:
        yield key
        for inner in _tables_of(key.kind):
            yield from _every_key(inner)


def _used(table: Table[Any], record: object) -> Iterator[Key]:
    if isinstance(record, list | tuple):
        for one in record:
            yield from _used(table, one)
    elif isinstance(record, Mapping):
        for key in table.keys:
            if record.get(key.name) is not None:
                yield key
                for inner in _tables_of(key.kind):
                    yield from _used(inner, record[key.name])


def _fit(table: Table[Any], record: object, drops: _Drops) -> object:
    if isinstance(record, list | tuple):
        return [_fit(table, one, drops) for one in record]
    if not isinstance(record, Mapping):
        return record
    keys = {key.name: key for key in table.keys}
    fitted: dict[str, object] = {}
    for name, value in record.items():
        if name in keys and drops(keys[name]):
            continue
        fitted[name] = value
        for inner in _tables_of(keys[name].kind) if name in keys else ():
            fitted[name] = _fit(inner, fitted[name], drops)
    return fitted


SCHEMA: Final = Schema({"network": NETWORK, "instance": INSTANCE, "policy": POLICY})
"""Schema of this version."""
