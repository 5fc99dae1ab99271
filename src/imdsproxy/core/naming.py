"""Networks and instances by id or by name, as operators write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId
from imdsproxy.errors import RequestRefused

_Id = TypeVar("_Id", NetworkId, InstanceId)
_SHOWN: Final = 5


def find_id(text: _Id, records: Mapping[_Id, Network] | Mapping[_Id, Instance]) -> _Id:
    """The id of the record that has this id or, where none has, this name; the text itself where none has either.

    Raises:
        RequestRefused: Several have the name.
    """
    if text in records:
        return text
    found = sorted(one for one, record in records.items() if record.name == text)
    if len(found) > 1:
        shown = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise RequestRefused(f"{len(found)} have the name {text}", hint=f"use an id: {shown}")
    return found[0] if found else text
