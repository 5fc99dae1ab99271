"""The codec of what a fleet exchanges: fields are checked one by one, and the error names the field."""

from dataclasses import dataclass

import pytest

from imdsproxy.fleet.codec import ANY_TEXT, COUNT, ID, NUMBER, Codec, Unreadable, omissible, row_of


@dataclass(frozen=True, slots=True)
class _Span:
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Lease:
    owner: str
    span: _Span
    note: str = ""


def _ordered(lease: _Lease) -> str | None:
    return "it ends before it begins" if lease.span.last < lease.span.first else None


_LEASE = Codec(
    _Lease,
    _ordered,
    sparse=True,
    id=ID,
    span=row_of(_Span, NUMBER, COUNT),
    note=omissible(ANY_TEXT),
)


def test_keys_of_a_newer_version_are_ignored_and_empty_ones_are_not_written() -> None:
    lease = _LEASE.parse(b'{"id": "web", "span": [1, 2], "new": [{}]}')
    assert lease == _Lease("web", _Span(1, 2))
    assert _LEASE.render(lease) == b'{"id":"web","span":[1,2]}'


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"{", "the value is no JSON"),
        (b"[]", "the value is no object"),
        (b'{"id": "web"}', "`span` is missing"),
        (b'{"id": "a b", "span": [1, 2]}', "`id` is no id"),
        (b'{"id": "web", "span": [1]}', "`span` has not 2 items"),
        (b'{"id": "web", "span": [true, 2]}', "`span` is no whole number"),
        (b'{"id": "web", "span": [1, 9223372036854775807]}', "`span` is no counter"),
        (b'{"id": "web", "span": [1, 2], "note": null}', "`note` is no text"),
        (b'{"id": "web", "span": [2, 1]}', "it ends before it begins"),
    ],
)
def test_a_value_that_no_program_of_the_fleet_writes_is_refused_by_field(
    value: bytes, why: str
) -> None:
    with pytest.raises(Unreadable, match=why):
        _LEASE.parse(value)
