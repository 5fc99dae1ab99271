"""Parse what a record says of how its guests may read."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from imdsproxy.core.path_rules import (
    MOST_PATH_RULES,
    PathRules,
    PathWord,
    find_path_fault,
    sort_paths,
)
from imdsproxy.core.policy import (
    BOUNDS,
    NOTHING_SAID,
    PolicyRules,
    TokenMode,
)
from imdsproxy.core.records.fields import Field, optional

__all__ = ["POLICY_KEYS", "parse_policy"]

POLICY_KEYS: Final = tuple(one.name for one in fields(PolicyRules))
"""The keys of the mapping, which are those of the settings too."""

_MODES: Final = tuple(mode.value for mode in TokenMode)
_WORDS: Final = tuple(word.value for word in PathWord)


def parse_policy(field: Field) -> PolicyRules:
    """The rules of a mapping, each of which may be left out; what is refused says nothing."""
    entries = field.mapping(POLICY_KEYS)
    if not entries:
        return NOTHING_SAID
    return PolicyRules(
        endpoint=optional(entries, "endpoint", Field.boolean),
        tokens=optional(entries, "tokens", _parse_mode),
        openstack_tokens=optional(entries, "openstack_tokens", _parse_mode),
        nocloud_tokens=optional(entries, "nocloud_tokens", _parse_mode),
        seal_user_data=optional(entries, "seal_user_data", Field.boolean),
        refuse_forwarded=optional(entries, "refuse_forwarded", Field.boolean),
        paths=optional(entries, "paths", _parse_paths),
        **{
            name: entries[name].whole_number(*bounds)
            for name, bounds in BOUNDS.items()
            if name in entries
        },
    )


def _parse_mode(field: Field) -> TokenMode | None:
    if field.value is False:
        # `off` without quotes, as many a writer of YAML gives it on.
        return TokenMode.OFF
    if not isinstance(field.value, str):
        field.refuse("is no mode of tokens", f"one of {', '.join(_MODES)}")
        return None
    word = field.one_of(_MODES)
    return None if word is None else TokenMode(word)


def _parse_paths(field: Field) -> PathRules | None:
    entries = field.mapping() or {}
    if len(entries) > MOST_PATH_RULES:
        field.refuse(f"has {len(entries)} paths", f"at most {MOST_PATH_RULES}")
        return None
    said: list[tuple[str, PathWord]] = []
    for path, entry in entries.items():
        fault = find_path_fault(path)
        if fault is not None:
            entry.refuse(fault.reason, fault.hint)
        elif (word := entry.one_of(_WORDS)) is not None:
            said.append((path, PathWord(word)))
    return sort_paths(said) or None
