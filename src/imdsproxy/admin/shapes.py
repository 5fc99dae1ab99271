"""Values as the admin API writes them in JSON: one rule for all, so that shapes are stable.

Fields of a dataclass keep their names, addresses and paths become text, sets sorted lists, networks
and instances their records (`imdsproxy.core.records`), and bytes `{"text": …}` or `{"base64": …}`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sized
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records import Json, render_record

if TYPE_CHECKING:
    from imdsproxy.admin.record_reports import InstanceReport, NetworkReport

JsonObject: TypeAlias = "dict[str, Json]"


def to_json(value: object) -> Json:
    """Any value of a report as JSON carries it."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, Network | Instance):
        return render_record(value)
    return _structure(value)


def _structure(value: object) -> Json:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted((to_json(item) for item in value), key=str)
    return str(value)


def _bytes(value: bytes) -> JsonObject:
    try:
        return {"text": value.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def network_shape(report: NetworkReport) -> JsonObject:
    """A network's record, where it comes from, and whether it is served."""
    return {
        "record": render_record(report.network),
        "source": report.source,
        "instances": report.instances,
        "serving": report.left_out is None,
        "left_out": to_json(report.left_out),
    }


def instance_shape(report: InstanceReport) -> JsonObject:
    """An instance's whole record, where it comes from, and what contests it."""
    return {
        "record": render_record(report.instance),
        "ec2_id": report.instance.ec2_id,
        "uuid": report.instance.uuid,
        "source": report.source,
        "revision": report.revision,
        "conflicts": to_json(report.conflicts),
        "pending": list(report.pending),
    }


def instance_summary(report: InstanceReport) -> JsonObject:
    """The same without its payloads, of which a list says only the size in bytes."""
    instance = report.instance
    bare = replace(instance, user_data=None, vendor_data=None)
    shape = instance_shape(replace(report, instance=bare))
    shape["user_data_bytes"] = _size(instance.user_data)
    shape["vendor_data_bytes"] = _size(instance.vendor_data)
    return shape


def _size(payload: Sized | None) -> int:
    return 0 if payload is None else len(payload)
