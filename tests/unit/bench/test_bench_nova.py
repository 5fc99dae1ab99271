from __future__ import annotations

import json

import pytest

from bench.guest import Answer
from bench.nova import identity, names_itself


@pytest.mark.parametrize(
    ("status", "body", "right"),
    [
        (200, json.dumps({"uuid": identity("a").instance}), True),
        (200, json.dumps({"uuid": identity("b").instance}), False),
        (503, json.dumps({"uuid": identity("a").instance}), False),
        (200, "<html>", False),
        (200, "[]", False),
    ],
)
def test_a_guest_is_answered_as_itself_or_it_does_not_count(
    status: int, body: str, *, right: bool
) -> None:
    assert names_itself("a", Answer(status, body.encode(), closes=True)) is right
