"""What FastAPI does not make of a route's return type: records in their own form, and bytes as text or base64."""

from __future__ import annotations

import base64
from collections.abc import Sized
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypeAlias

from imdsproxy.core.records import Json, render_record

if TYPE_CHECKING:
    from imdsproxy.admin.guests import DocumentAnswer
    from imdsproxy.admin.record_reports import InstanceReport, NetworkReport

JsonObject: TypeAlias = "dict[str, Json]"


def bytes_shape(value: bytes) -> JsonObject:
    """`{"text": …}` where they are UTF-8, else `{"base64": …}`."""
    try:
        return {"text": value.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def document_shape(answer: DocumentAnswer) -> JsonObject:
    """An answer to a guest."""
    headers: list[Json] = [[name, value] for name, value in answer.headers]
    return {"status": answer.status, "headers": headers, "body": bytes_shape(answer.body)}


def network_shape(report: NetworkReport) -> JsonObject:
    """A network's record, where it comes from, and whether it is served."""
    return {
        "record": render_record(report.network),
        "source": report.source,
        "instances": report.instances,
        "serving": report.left_out is None,
        "left_out": None if report.left_out is None else asdict(report.left_out),
    }


def instance_shape(report: InstanceReport) -> JsonObject:
    """An instance's whole record, where it comes from, and what contests it."""
    return {
        "record": render_record(report.instance),
        "ec2_id": report.instance.ec2_id,
        "uuid": report.instance.uuid,
        "source": report.source,
        "revision": report.revision,
        "conflicts": [asdict(one) for one in report.conflicts],
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
