from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.model import InstanceId
from imdsproxy.core.nova import EndpointSet, sign_instance
from imdsproxy.core.wire import (
    MAP_CONFLICT,
    MAP_TOMBSTONE,
    EmbeddedRecord,
    NovaRecord,
    hide_signatures,
    parse_map_value,
    render_map_value,
)
from support.record_strategies import ids

_signatures = st.from_regex(r"\A[0-9a-f]{64}\Z")
_nova = st.builds(
    NovaRecord,
    st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,31}\Z"),
    ids.map(InstanceId),
    ids,
    st.lists(_signatures, min_size=1, max_size=2).map(tuple),
)
_embedded = st.builds(EmbeddedRecord, ids.map(InstanceId), st.from_regex(r"\A[0-9a-f]{16}\Z"))


@given(_nova | _embedded)
def test_a_record_is_one_word_of_a_map_and_comes_back(record: NovaRecord | EmbeddedRecord) -> None:
    word = render_map_value(record)
    assert not set(word) & set(" \t\r\n\\\"'#")
    assert parse_map_value(word) == record


@pytest.mark.parametrize(
    "word", [MAP_TOMBSTONE, MAP_CONFLICT, "", "|", "a|", "|r", "@default", "@d|i|p|x"]
)
def test_what_is_no_record_is_none(word: str) -> None:
    assert parse_map_value(word) is None


def test_the_signature_is_nova_s() -> None:
    instance = InstanceId("aaaaaaaa-0001-4000-8000-000000000001")
    expected = hmac.new(b"s3cret", instance.encode(), hashlib.sha256).hexdigest()
    assert sign_instance(b"s3cret", instance) == expected


@given(_nova | _embedded)
def test_what_is_shown_of_a_record_has_no_signature(record: NovaRecord | EmbeddedRecord) -> None:
    shown = hide_signatures(render_map_value(record))
    assert record.instance in shown
    if isinstance(record, NovaRecord):
        assert not any(signature in shown for signature in record.signatures)


def test_an_empty_secret_signs_nothing() -> None:
    with pytest.raises(ValueError, match="empty"):
        sign_instance(b"", InstanceId("a"))


def test_a_secret_is_in_no_representation() -> None:
    assert "s3cret" not in repr(EndpointSet("default", b"s3cret", b"s3cret-next"))
