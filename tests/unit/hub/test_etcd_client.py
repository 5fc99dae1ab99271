"""The client of etcd against answers that a genuine etcd cannot be brought to at will."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from typing import Any

import pytest

from imdsproxy.errors import EtcdFull, EtcdUnavailable, ImdsproxyError, WriteUnknown
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import (
    Behind,
    Changes,
    Committed,
    Compacted,
    Deleted,
    KeyValue,
    Snapshot,
)
from support.fake_etcd import (
    Answer,
    Handler,
    Json,
    answer,
    client_of,
    header,
    lines,
    put,
    text,
    watched,
)

OUTAGES = [
    {
        "error": "etcdserver: not a primary lessor",
        "code": 2,
        "message": "etcdserver: not a primary lessor",
    },
    {"error": "etcdserver: something new", "code": 99, "message": "etcdserver: something new"},
    {"code": 14, "message": "etcdserver: leader changed", "details": []},
    {"code": "rubbish"},
    {},
]
ALWAYS_OK = answer(header(5))


def range_of(*events: Json, revision: int = 5, term: int = 2) -> Answer:
    return answer({**header(revision, term), "kvs": [one["kv"] for one in events]})


def by_path(**answers: Answer) -> Handler:
    """Answers by the last word of the path."""
    return lambda path, _: answers[path.rpartition("/")[2]]


def in_turn(*answers: Answer) -> Handler:
    """One after the other, the last for ever."""
    rest = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda _path, _body: next(rest)


async def changes_of(etcd: Etcd, start: int = 1, *, count: int = 1) -> list[Changes]:
    found: list[Changes] = []
    async with contextlib.aclosing(etcd.follow("/imds/", start)) as follow:
        async for one in follow:
            found.append(one)
            if len(found) == count:
                return found
    raise AssertionError


def revisions(changes: list[Changes]) -> list[int]:
    return [one.revision for one in changes]


@pytest.mark.parametrize("error", OUTAGES)
async def test_an_error_that_is_not_known_is_an_outage_and_the_next_member_is_asked(
    error: Json,
) -> None:
    refusing = by_path(range=answer(error, 500))
    async with client_of(refusing, by_path(range=range_of(put("/imds/a", 3)))) as (etcd, members):
        assert [one.key for one in (await etcd.read("/imds/a")).kvs] == ["/imds/a"]
        assert [len(one.requests) for one in members] == [1, 1]
    async with client_of(refusing, timeout_s=0.2) as (etcd, _):
        with pytest.raises(EtcdUnavailable):
            await etcd.read("/imds/a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"[]",
        b'"text"',
        b"{",
        b"{}",
        b'{"header":7}',
        b'{"header":{"revision":"x"}}',
    ],
)
async def test_what_is_not_etcds_is_an_outage(content: bytes) -> None:
    async with client_of(by_path(range=Answer([content])), timeout_s=0.2) as (etcd, _):
        with pytest.raises(EtcdUnavailable):
            await etcd.read("/imds/a")


@pytest.mark.parametrize(
    "kvs", [[{}], [7], [{"key": "***"}], [{"key": text("a"), "mod_revision": "x"}]]
)
async def test_keys_that_cannot_be_read_are_an_outage(kvs: list[Any]) -> None:
    async with client_of(by_path(range=answer({**header(5), "kvs": kvs})), timeout_s=0.2) as (
        etcd,
        _,
    ):
        with pytest.raises(EtcdUnavailable):
            await etcd.read("/imds/a")


async def test_an_answer_older_than_one_before_is_never_given() -> None:
    current = by_path(range=range_of(put("/imds/a", 9), revision=9, term=3))
    for old in ({"revision": 8, "term": 3}, {"revision": 9, "term": 2}):
        stale = in_turn(range_of(revision=9, term=3), range_of(**old))
        async with client_of(stale, current) as (etcd, _):
            await etcd.read("/imds/a")
            assert (await etcd.read("/imds/a")).kvs
        async with client_of(stale) as (etcd, _):
            await etcd.read("/imds/a")
            with contextlib.suppress(Behind):
                await etcd.read("/imds/a")
                await etcd.read("/imds/a")


async def test_a_store_that_went_back_is_behind_until_that_is_accepted() -> None:
    restored = in_turn(range_of(revision=9, term=3), range_of(revision=4, term=2))
    async with client_of(restored, timeout_s=0.5) as (etcd, _):
        await etcd.read("/imds/a")
        with pytest.raises(Behind, match="revision 4 of raft term 2, after revision 9 of term 3"):
            await etcd.read("/imds/a")
        etcd.accept_older()
        assert (await etcd.read("/imds/a")).revision == 4


async def test_one_member_that_is_old_does_not_mean_that_etcd_went_back() -> None:
    old = in_turn(range_of(revision=9), range_of(revision=8))
    stopped = by_path(range=answer({"code": 14, "message": "etcdserver: stopped"}, 503))
    async with client_of(old, stopped, stopped, timeout_s=0.5) as (etcd, _):
        await etcd.read("/imds/a")
        with pytest.raises(EtcdUnavailable) as caught:
            await etcd.read("/imds/a")
        assert not isinstance(caught.value, Behind)


async def test_requests_that_overtake_each_other_are_not_old() -> None:
    async with client_of(
        by_path(range=range_of(revision=9), txn=answer({**header(8), "succeeded": True}))
    ) as (etcd, _):
        reading = asyncio.gather(*(etcd.read("/imds/a") for _ in range(3)))
        assert isinstance(await etcd.commit(puts={"/imds/a": b""}), Committed)
        await reading


async def test_lines_count_however_they_are_cut() -> None:
    whole = b"".join(
        lines(
            watched(1, created=True), watched(2, put("/imds/é", 2)), watched(3, put("/imds/b", 3))
        ).chunks
    )
    for size in (1, 7, len(whole)):
        cut = [whole[start : start + size] for start in range(0, len(whole), size)]
        async with client_of(by_path(watch=Answer(cut, ends=False))) as (etcd, _):
            found = await changes_of(etcd, count=2)
        assert revisions(found) == [2, 3]
        assert [one.events[0].key for one in found] == ["/imds/é", "/imds/b"]


async def test_a_watch_asks_for_fragments_and_a_leader_from_a_revision_on() -> None:
    async with client_of(
        by_path(watch=lines(watched(9, created=True), watched(9, put("/imds/a", 9))))
    ) as (etcd, members):
        await changes_of(etcd, 5)
    ((_, body),) = members[0].requests
    assert body == {
        "create_request": {
            "key": text("/imds/"),
            "range_end": text("/imds0"),
            "start_revision": "5",
            "fragment": True,
        }
    }
    assert b"grpc-metadata-hasleader: true" in members[0].headers[0].lower()


async def test_a_revision_is_given_with_its_last_fragment() -> None:
    parts = [
        watched(7, put("/imds/a", 6), put("/imds/b", 7), fragment=True),
        watched(7, put("/imds/c", 7), fragment=True),
        watched(7, {"type": "DELETE", "kv": {"key": text("/imds/d"), "mod_revision": "7"}}),
    ]
    async with client_of(by_path(watch=lines(watched(7, created=True), *parts))) as (etcd, _):
        (found,) = await changes_of(etcd)
    assert found.revision == 7
    assert [one.key for one in found.events] == ["/imds/a", "/imds/b", "/imds/c", "/imds/d"]
    assert found.events[-1] == Deleted("/imds/d", 7)
    async with client_of(by_path(watch=lines(watched(7, created=True), *parts[:2], ends=True))) as (
        etcd,
        _,
    ):
        with pytest.raises(EtcdUnavailable, match="ended without a reason"):
            await changes_of(etcd)


@pytest.mark.parametrize(
    "end",
    [
        watched(9, canceled=True, compact_revision="7"),
        watched(9, compact_revision="7"),
        {
            "error": {
                "grpc_code": 11,
                "http_code": 400,
                "message": "etcdserver: mvcc: required revision has been compacted",
            }
        },
    ],
)
async def test_compaction_ends_a_watch_after_what_came_before(end: Json) -> None:
    async with client_of(
        by_path(watch=lines(watched(9, created=True), watched(9, put("/imds/a", 3)), end))
    ) as (etcd, _):
        follow = etcd.follow("/imds/", 1)
        assert (await anext(follow)).revision == 3
        with pytest.raises(Compacted):
            await anext(follow)


@pytest.mark.parametrize(
    "end",
    [
        watched(9, canceled=True),
        watched(9, canceled=True, cancel_reason="etcdserver: no leader"),
        {"error": {"grpc_code": 14, "http_code": 503, "message": "etcdserver: no leader"}},
        {"error": {"code": 14, "message": "etcdserver: no leader", "details": []}},
        {"result": 7},
        watched(9, {"kv": {}}),
        watched(9, put("/imds/a", 9), term=1),
    ],
)
async def test_whatever_else_ends_a_watch_is_an_outage(end: Json) -> None:
    current = range_of(revision=9, term=2)
    async with client_of(by_path(range=current, watch=lines(watched(9, created=True), end))) as (
        etcd,
        _,
    ):
        await etcd.read("/imds/a")
        with pytest.raises(EtcdUnavailable):
            await changes_of(etcd)


async def test_no_event_for_long_is_an_outage_and_another_member_is_taken() -> None:
    status = answer({**header(9), "leader": "1"})
    silent = by_path(watch=lines(watched(9, created=True)), status=status, metrics=Answer([b""]))
    speaking = by_path(watch=lines(watched(9, created=True), watched(9, put("/imds/a", 9))))
    async with client_of(silent, speaking, silence_s=0.2) as (etcd, members):
        with pytest.raises(EtcdUnavailable, match="no answer in time"):
            await changes_of(etcd)
        assert revisions(await changes_of(etcd)) == [9]
        assert len(members[1].requests) == 1


async def test_a_full_store_explains_silence_and_the_member_stays() -> None:
    status = answer({**header(9), "leader": "1", "errors": ["memberID:1 alarm:NOSPACE "]})
    full = by_path(watch=lines(watched(9, created=True)), status=status, metrics=Answer([b""]))
    async with client_of(full, by_path(), silence_s=0.2) as (etcd, members):
        for _ in range(2):
            with pytest.raises(EtcdFull):
                await changes_of(etcd)
        assert members[1].requests == []


async def test_events_from_before_the_start_are_dropped() -> None:
    early = [watched(9, put("/imds/a", 4)), watched(9, put("/imds/a", 5), put("/imds/b", 6))]
    async with client_of(by_path(watch=lines(watched(9, created=True), *early))) as (etcd, _):
        (found,) = await changes_of(etcd, 6)
    assert [one.key for one in found.events] == ["/imds/b"]


async def test_a_member_that_lags_is_left_and_does_not_mean_that_etcd_went_back() -> None:
    lagging = by_path(watch=lines(watched(7, created=True)), range=range_of(revision=9))
    events = lines(watched(8, created=True), watched(9, put("/imds/a", 9)))
    current = by_path(watch=events, range=range_of(revision=9))
    async with client_of(lagging, current) as (etcd, _):
        with pytest.raises(EtcdUnavailable, match="at revision 7") as caught:
            await changes_of(etcd, 9)
        assert not isinstance(caught.value, Behind)
        assert revisions(await changes_of(etcd, 9)) == [9]


async def test_a_watch_of_an_etcd_that_went_back_says_so() -> None:
    for old in ({"revision": 7, "term": 2}, {"revision": 900, "term": 1}):
        restored = range_of(**old)
        watch = lines(watched(old["revision"], created=True, term=old["term"]))
        ranges = in_turn(range_of(revision=9), restored)

        def handle(
            path: str, body: Json, ranges: Handler = ranges, watch: Answer = watch
        ) -> Answer:
            return watch if path.endswith("watch") else ranges(path, body)

        async with client_of(handle, timeout_s=0.5) as (etcd, _):
            await etcd.read("/imds/a")
            with pytest.raises(Behind):
                await changes_of(etcd, 10)


async def test_what_a_watch_begins_with_is_no_change() -> None:
    begun = lines(watched(90, created=True), watched(95), ends=True)
    async with client_of(by_path(watch=begun)) as (etcd, _):
        with pytest.raises(EtcdUnavailable, match="ended without a reason"):
            await changes_of(etcd, 5)


async def test_pages_whose_revision_was_compacted_meanwhile_are_read_again() -> None:
    asked: list[str] = []

    def handle(_path: str, body: Json) -> Answer:
        asked.append(body["revision"])
        match asked:
            case ["0"]:
                return answer({**header(5), "kvs": [put("/imds/a", 5)["kv"]], "more": True})
            case ["0", "5"]:
                words = "etcdserver: mvcc: required revision has been compacted"
                return answer({"error": words, "code": 11, "message": words}, 400)
            case _:
                return range_of(put("/imds/b", 6), revision=6)

    async with client_of(handle) as (etcd, _):
        found = await etcd.read("/imds/", "/imds0")
    assert asked == ["0", "5", "0"]
    assert found == Snapshot(6, [KeyValue("/imds/b", b"x", 6, 6)])


@pytest.mark.parametrize("code", [2, 4, 13, 14])
async def test_a_write_that_may_be_done_is_unknown_and_not_sent_again(code: int) -> None:
    failing = by_path(txn=answer({"code": code, "message": "etcdserver: request timed out"}, 503))
    async with client_of(failing, by_path(txn=answer({**header(5), "succeeded": True}))) as (
        etcd,
        members,
    ):
        with pytest.raises(WriteUnknown):
            await etcd.commit(puts={"/imds/a": b""})
        assert members[1].requests == []


async def test_a_write_that_a_member_without_leader_refused_goes_to_the_next() -> None:
    failing = by_path(txn=answer({"code": 14, "message": "etcdserver: no leader"}, 503))
    async with client_of(failing, by_path(txn=answer({**header(5), "succeeded": True}))) as (
        etcd,
        _,
    ):
        assert await etcd.commit(puts={"/imds/a": b""}) == Committed(5)


async def test_a_connection_that_breaks_after_a_write_leaves_it_unknown() -> None:
    async with client_of(by_path(txn=Answer([b"{"]))) as (etcd, _):
        with pytest.raises(WriteUnknown):
            await etcd.commit(puts={"/imds/a": b""})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (16, "etcdserver: invalid auth token"),
        (3, "etcdserver: revision of auth store is old"),
        (3, "etcdserver: user name is empty"),
        (7, "etcdserver: permission denied"),
    ],
)
async def test_the_client_logs_in_again_once(code: int, message: str) -> None:
    refused = answer({"error": message, "code": code, "message": message}, 401)
    tokens = in_turn(*(answer({**header(1), "token": f"token-{number}"}) for number in range(9)))
    ranges = in_turn(ALWAYS_OK, refused, ALWAYS_OK, refused, refused)

    def handle(path: str, body: Json) -> Answer:
        return (tokens if path.endswith("authenticate") else ranges)(path, body)

    async with client_of(handle, user="hub", password="secret-password") as (etcd, members):
        await etcd.read("/imds/a")
        await etcd.read("/imds/a")
        assert b"authorization: token-1" in members[0].headers[-1].lower()
        with pytest.raises(EtcdUnavailable, match="check the user") as caught:
            await etcd.read("/imds/a")
    assert "secret" not in repr(caught.value)
    assert [path for path, _ in members[0].requests].count("/v3/auth/authenticate") == 3


async def test_a_watch_that_is_denied_is_tried_with_a_new_token() -> None:
    denied = watched(
        9,
        created=True,
        canceled=True,
        cancel_reason="rpc error: code = PermissionDenied desc = etcdserver: permission denied",
    )
    allowed = lines(watched(9, created=True), watched(9, put("/imds/a", 9)))
    watches = in_turn(lines(denied), lines(denied), allowed)
    tokens = in_turn(*(answer({**header(1), "token": f"token-{number}"}) for number in range(9)))

    def handle(path: str, body: Json) -> Answer:
        return (tokens if path.endswith("authenticate") else watches)(path, body)

    async with client_of(handle, user="hub", password="secret-password") as (etcd, members):
        for _ in range(2):
            with pytest.raises(EtcdUnavailable):
                await changes_of(etcd)
        assert revisions(await changes_of(etcd)) == [9]
        assert b"authorization: token-1" in members[0].headers[-1].lower()


async def test_no_message_has_a_secret() -> None:
    async with client_of(
        by_path(authenticate=answer({"code": 2, "message": "no"}, 500)),
        user="hub",
        password="secret-password",
        timeout_s=0.5,
    ) as (etcd, _):
        with pytest.raises(ImdsproxyError) as caught:
            await etcd.read("/imds/a")
        seen = f"{caught.value!r}{caught.value}{etcd!r}{json.dumps(caught.value.hint)}"
    assert "secret" not in seen


async def test_a_member_that_failed_rests_and_the_others_are_asked() -> None:
    failing = by_path(range=answer({"code": 14, "message": "etcdserver: stopped"}, 503))
    async with client_of(failing, by_path(range=ALWAYS_OK)) as (etcd, members):
        for _ in range(20):
            await etcd.read("/imds/a")
        assert [len(one.requests) for one in members] == [1, 20]
    async with client_of(failing, failing, timeout_s=1.0) as (etcd, members):
        with pytest.raises(EtcdUnavailable, match=r"stopped.*stopped"):
            await etcd.read("/imds/a")
        # Without pauses there would be hundreds.
        assert sum(len(one.requests) for one in members) < 20
