"""Versions of imdsproxy that differ in what they know of records."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Final

from imdsproxy.model.records.levels import SCHEMA, Schema
from imdsproxy.model.records.network import POLICY
from imdsproxy.model.records.schema import Key, Table

LATER: Final = "hop_limit"
"""A rule that came with the second level."""

ADDED: Final = "burst"
"""The same, and nothing is open without it."""


def _policy(*keys: Key) -> Table[Any]:
    table = copy.copy(POLICY)
    table.keys, table.names = keys, tuple(key.name for key in keys)
    return table


def _later(key: Key) -> Key:
    return replace(key, since=2, limits=key.name != ADDED) if key.name in {LATER, ADDED} else key


NEWER: Final = Schema({**SCHEMA.tables, "policy": _policy(*map(_later, POLICY.keys))})
OLDER: Final = Schema(
    {
        **SCHEMA.tables,
        "policy": _policy(*(key for key in POLICY.keys if key.name not in {LATER, ADDED})),
    }
)
