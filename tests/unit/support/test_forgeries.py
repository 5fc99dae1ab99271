"""The corpus of forgeries says what it promises to."""

from __future__ import annotations

import re

from support.forgeries import (
    ENCODED_PATHS,
    FORGERIES,
    IDENTITY_HEADERS,
    OTHER_INSTANCE,
    SPELLINGS,
)


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in (FORGERIES, ENCODED_PATHS):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)


def test_every_identity_header_comes_in_every_spelling() -> None:
    names = {case.name for case in FORGERIES}
    assert len(SPELLINGS) > 20
    for name in [name for name in IDENTITY_HEADERS if "-" in name]:
        assert {f"{name} {spelling}" for spelling in SPELLINGS} <= names
        marks = re.compile(re.escape(name.encode()).replace(rb"\-", b"[-_]"), re.IGNORECASE)
        for spelling in SPELLINGS:
            case = next(case for case in FORGERIES if case.name == f"{name} {spelling}")
            assert marks.search(case.data), case.name


def test_nova_may_see_nothing_of_an_identity_that_a_guest_made_up() -> None:
    forbidden = {name.lower() for name in IDENTITY_HEADERS}
    for case in FORGERIES:
        for name, value in (pair for seen in case.seen for pair in seen.headers):
            assert name == name.lower(), case.name
            assert name.decode() not in forbidden, case.name
            assert OTHER_INSTANCE.encode() not in value or name == b"accept", case.name


def test_a_path_arrives_as_it_is_or_without_what_stood_before_it() -> None:
    for case in ENCODED_PATHS:
        if case.arrives is not None:
            assert case.target.endswith(case.arrives) or case.target == b"http://other"
            assert case.arrives.startswith(b"/") or case.arrives == b"*"
