"""The client of etcd against Debian's etcd: three members with TLS, and single ones: full, with users, restored."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import pytest

from imdsproxy.errors import EtcdFull, EtcdUnavailable, SourceRefused, WriteUnknown
from imdsproxy.hub.store.etcd import Etcd, open_tls
from imdsproxy.hub.store.etcd_messages import (
    Behind,
    Changes,
    Committed,
    Compacted,
    Conflict,
    Deleted,
    KeyValue,
    LeaseGone,
    MemberSilent,
    MemberStatus,
    Snapshot,
    absent,
    encode,
    none_below,
    prefix_end,
    unchanged,
)
from support.etcd_lab import EtcdLab, etcd_lab
from support.patience import patience

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdLab]:
    with etcd_lab() as lab:
        yield lab


@pytest.fixture
async def etcd(cluster: EtcdLab) -> AsyncIterator[Etcd]:
    async with opened(cluster) as client:
        yield client


@pytest.fixture
def below(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    return f"/{request.node.name}/"


@contextlib.asynccontextmanager
async def opened(lab: EtcdLab, *numbers: int, **options: object) -> AsyncIterator[Etcd]:
    """A client of the members with these numbers, in the order of a dice that always falls the same."""
    with lab.entered():
        client = lab.client(*(lab.members[one - 1] for one in numbers), **options)
        try:
            yield client
        finally:
            await client.close()


async def commit(etcd: Etcd, puts: dict[str, bytes]) -> int:
    done = await etcd.commit(puts=puts)
    assert isinstance(done, Committed)
    return done.revision


class Mirror:
    """All keys below a prefix, kept up to date in the background as a hub does it."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self.given: list[Snapshot | Changes | EtcdUnavailable] = []
        self._task = asyncio.create_task(self._run(etcd, prefix))

    async def _run(self, etcd: Etcd, prefix: str) -> None:
        revision = 0
        while True:
            try:
                if not revision:
                    self.given.append(found := await etcd.read(prefix, prefix_end(prefix)))
                    revision = found.revision
                async with contextlib.aclosing(etcd.follow(prefix, revision + 1)) as follow:
                    async for changes in follow:
                        self.given.append(changes)
                        revision = changes.revision
            except Compacted:
                revision = 0
            except EtcdUnavailable as error:
                self.given.append(error)

    @property
    def keys(self) -> dict[str, bytes]:
        """What is known."""
        found: dict[str, bytes] = {}
        for one in self.given:
            match one:
                case Snapshot():
                    found = {kv.key: kv.value for kv in one.kvs}
                case Changes():
                    for event in one.events:
                        match event:
                            case KeyValue():
                                found[event.key] = event.value
                            case Deleted():
                                found.pop(event.key, None)
                case EtcdUnavailable():
                    pass
        return found

    @property
    def outages(self) -> list[EtcdUnavailable]:
        return [one for one in self.given if isinstance(one, EtcdUnavailable)]

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20 * patience()):
            while not holds():
                assert not self._task.done(), self._task.exception()
                await asyncio.sleep(0.01)

    async def knows(self, key: str, value: bytes) -> None:
        await self.until(lambda: self.keys.get(key) == value)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@contextlib.asynccontextmanager
async def mirrored(etcd: Etcd, prefix: str) -> AsyncIterator[Mirror]:
    made = Mirror(etcd, prefix)
    try:
        await made.until(lambda: made.given)
        yield made
    finally:
        await made.close()


async def persist(etcd: Etcd, puts: dict[str, bytes]) -> int:
    """Write until it is done: members that are about to choose a leader refuse it."""
    async with asyncio.timeout(30 * patience()):
        while True:
            with contextlib.suppress(EtcdUnavailable):
                return await commit(etcd, puts)
            await asyncio.sleep(0.05)


async def test_a_write_is_read_with_its_revisions(etcd: Etcd, below: str) -> None:
    revision = await commit(etcd, {f"{below}a": b"1", f"{below}b": b"\xff\n"})
    found = await etcd.read(below, prefix_end(below))
    assert found.revision >= revision
    assert found.kvs == [
        KeyValue(f"{below}a", b"1", revision, revision),
        KeyValue(f"{below}b", b"\xff\n", revision, revision),
    ]
    assert [one.version for one in found.kvs] == [1, 1]
    assert (await etcd.read(f"{below}b")).kvs == found.kvs[1:]


async def test_a_compare_that_does_not_hold_writes_nothing_and_shows_what_is_there(
    etcd: Etcd, below: str
) -> None:
    key = f"{below}a"
    first = await etcd.commit([absent(key)], {key: b"1"})
    assert isinstance(first, Committed)
    taken = await etcd.commit([absent(key)], {key: b"2", f"{below}b": b"2"})
    assert isinstance(taken, Conflict)
    assert taken.kvs == [KeyValue(key, b"1", first.revision, first.revision)]
    assert isinstance(
        await etcd.commit([unchanged(key, first.revision - 1)], deletes=[key]), Conflict
    )
    changed = await etcd.commit([unchanged(key, first.revision)], {key: b"3"})
    assert isinstance(changed, Committed)
    found = await etcd.read(below, prefix_end(below))
    assert found.kvs == [KeyValue(key, b"3", changed.revision, first.revision)]


async def test_a_prefix_is_compared_whole(etcd: Etcd, below: str) -> None:
    child, parent = f"{below}port/1", f"{below}network"
    await commit(etcd, {child: b"", parent: b""})
    refused = await etcd.commit([none_below(f"{below}port/")], deletes=[parent])
    assert isinstance(refused, Conflict)
    assert [one.key for one in refused.kvs] == [child]
    assert isinstance(await etcd.commit(deletes=[child]), Committed)
    assert isinstance(await etcd.commit([none_below(f"{below}port/")], deletes=[parent]), Committed)


async def test_a_read_of_many_pages_is_of_one_revision(etcd: Etcd, below: str) -> None:
    names = [f"{below}{number:03}" for number in range(250)]
    for start in range(0, 250, 50):
        await commit(etcd, dict.fromkeys(names[start : start + 50], b"0"))

    async def write() -> None:
        for count in range(1, 1000):
            await commit(etcd, {names[0]: b"%d" % count, names[-1]: b"%d" % count})

    writer = asyncio.create_task(write())
    for _ in range(5):
        found = (await etcd.read(below, prefix_end(below))).kvs
        assert [one.key for one in found] == names
        assert found[0].value == found[-1].value
        await asyncio.sleep(0.01)
    writer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writer


async def test_a_revision_that_was_compacted_is_not_read(
    etcd: Etcd, cluster: EtcdLab, below: str
) -> None:
    old = await commit(etcd, {f"{below}a": b"1"})
    new = await commit(etcd, {f"{below}a": b"2"})
    assert (await etcd.read(f"{below}a", revision=old)).kvs[0].value == b"1"
    cluster.ctl("compact", str(new))
    with pytest.raises(Compacted):
        await etcd.read(f"{below}a", revision=old)


async def test_changes_of_a_transaction_come_together_and_deletions_too(
    etcd: Etcd, below: str
) -> None:
    a, b = f"{below}a", f"{below}b"
    first = await commit(etcd, {a: b"1", b: b"1"})
    second = await etcd.commit(puts={b: b"2"}, deletes=[a])
    await commit(etcd, {"/elsewhere": b""})
    third = await commit(etcd, {a: b"3"})
    assert isinstance(second, Committed)
    seen: list[KeyValue | Deleted] = []
    async with contextlib.aclosing(etcd.follow(below, first)) as follow:
        async for changes in follow:
            assert changes.revision == changes.events[-1].mod_revision
            seen += changes.events
            if changes.revision == third:
                break
    assert seen == [
        KeyValue(a, b"1", first, first),
        KeyValue(b, b"1", first, first),
        KeyValue(b, b"2", second.revision, first),
        Deleted(a, second.revision),
        KeyValue(a, b"3", third, third),
    ]


async def test_a_revision_in_fragments_is_given_whole(etcd: Etcd, below: str) -> None:
    first = await commit(etcd, {f"{below}0": b"x" * 1_200_000})
    both = {f"{below}1": b"y" * 700_000, f"{below}2": b"z" * 700_000}
    second = await commit(etcd, both)
    async with contextlib.aclosing(etcd.follow(below, first)) as follow:
        async for changes in follow:
            if changes.revision == second:
                break
    assert {
        one.key: one.value for one in changes.events if isinstance(one, KeyValue)
    }.items() >= both.items()


async def test_changes_that_were_compacted_are_not_skipped(
    etcd: Etcd, cluster: EtcdLab, below: str
) -> None:
    old = await commit(etcd, {f"{below}a": b"1"})
    await etcd.commit(deletes=[f"{below}a"])
    cluster.ctl("compact", str(await commit(etcd, {f"{below}b": b"2"})))
    async with contextlib.aclosing(etcd.follow(below, old)) as follow:
        with pytest.raises(Compacted):
            await anext(follow)


async def test_a_member_that_is_killed_loses_no_change(cluster: EtcdLab, below: str) -> None:
    async with opened(cluster) as etcd, mirrored(etcd, below) as mirror:
        for victim in cluster.members:
            with cluster.killed(victim):
                await persist(etcd, {f"{below}{victim.name}": b""})
                await mirror.knows(f"{below}{victim.name}", b"")
        assert [type(one) for one in mirror.given].count(Snapshot) == 1


async def test_a_member_that_hangs_is_left_for_another(cluster: EtcdLab, below: str) -> None:
    leader = cluster.leader()
    rest = [one.number for one in cluster.members if one is not leader]
    async with (
        opened(cluster, leader.number, silence_s=1.0, timeout_s=1.0) as alone,
        opened(cluster, silence_s=1.0, timeout_s=10.0) as etcd,
        opened(cluster, *rest, timeout_s=10.0) as others,
        mirrored(alone, below) as hanging,
        mirrored(etcd, below) as mirror,
    ):
        with cluster.paused(leader):
            await persist(others, {f"{below}a": b"1"})
            await mirror.knows(f"{below}a", b"1")
            assert (await etcd.read(f"{below}a")).kvs[0].value == b"1"
            await hanging.until(lambda: hanging.outages)
        await hanging.knows(f"{below}a", b"1")


async def test_a_leader_without_the_others_answers_nothing_old(
    cluster: EtcdLab, below: str
) -> None:
    leader = cluster.leader()
    rest = [one.number for one in cluster.members if one is not leader]
    async with (
        opened(cluster, leader.number, silence_s=2.0, timeout_s=1.0) as alone,
        opened(cluster, *rest, timeout_s=10.0) as others,
    ):
        await commit(others, {f"{below}a": b"1"})
        await alone.read(f"{below}a")
        async with mirrored(alone, below) as mirror:
            with cluster.partitioned(leader):
                await persist(others, {f"{below}a": b"2"})
                with pytest.raises(EtcdUnavailable):
                    await alone.read(f"{below}a")
                with pytest.raises(EtcdUnavailable):
                    await alone.commit(puts={f"{below}a": b"3"})
                await mirror.until(lambda: mirror.outages)
                assert mirror.keys == {f"{below}a": b"1"}
            await mirror.until(lambda: mirror.keys == {f"{below}a": b"2"})


async def test_a_member_that_clients_do_not_reach_is_left(cluster: EtcdLab, below: str) -> None:
    async with (
        opened(cluster, silence_s=1.0, timeout_s=2.0) as etcd,
        mirrored(etcd, below) as mirror,
    ):
        url, _ = etcd._members.choose()
        with cluster.partitioned(cluster.members[cluster.endpoints.index(url)], clients=True):
            await persist(etcd, {f"{below}a": b""})
            await mirror.knows(f"{below}a", b"")


async def test_a_client_goes_from_a_member_without_leader_to_one_with(
    cluster: EtcdLab, below: str
) -> None:
    leader = cluster.leader()
    async with opened(cluster, timeout_s=20.0) as etcd, mirrored(etcd, below) as mirror:
        with cluster.partitioned(leader):
            await persist(etcd, {f"{below}a": b"1"})
            await mirror.knows(f"{below}a", b"1")
            assert (await etcd.read(f"{below}a")).kvs[0].value == b"1"


async def test_an_etcd_without_quorum_is_called_that_with_what_mends_it(
    cluster: EtcdLab, below: str
) -> None:
    async with opened(cluster, timeout_s=3.0) as etcd:
        await etcd.read(below)
        errors: list[str] = []

        async def is_called() -> bool:
            with pytest.raises(EtcdUnavailable) as caught:
                await etcd.read(below)
            errors.append(f"{caught.value.message} {caught.value.hint}")
            return "no quorum: 1 of 3 members answer" in errors[-1]

        with cluster.killed(*cluster.members[1:]):
            async with asyncio.timeout(60 * patience()):
                while not await is_called():
                    pass
            assert "start the other members" in errors[-1]
            members = [one for one in await etcd.status() if isinstance(one, MemberSilent)]
            assert [one.leaderless for one in members].count(True) == 1
        await persist(etcd, {f"{below}a": b""})


async def test_a_write_without_an_answer_is_unknown(cluster: EtcdLab, below: str) -> None:
    async with opened(cluster, 1, timeout_s=1.0) as etcd:
        await etcd.read(below)
        with cluster.paused(*cluster.members[1:]), pytest.raises(WriteUnknown):
            await etcd.commit([absent(f"{below}a")], {f"{below}a": b"1"})
        await persist(etcd, {f"{below}b": b"2"})
        # What was under way is settled by now.
        await etcd.commit([absent(f"{below}a")], {f"{below}a": b"1"})
        assert [one.value for one in (await etcd.read(f"{below}a")).kvs] == [b"1"]


async def test_a_write_that_reached_no_member_is_not_unknown(cluster: EtcdLab, below: str) -> None:
    async with opened(cluster, 3, timeout_s=1.0) as etcd:
        with cluster.killed(cluster.members[2]), pytest.raises(EtcdUnavailable) as caught:
            await etcd.commit(puts={f"{below}a": b"1"})
        assert type(caught.value) is EtcdUnavailable
        assert (await etcd.read(f"{below}a")).kvs == []


async def test_a_change_of_leader_loses_no_change(cluster: EtcdLab, below: str) -> None:
    async with opened(cluster, timeout_s=10.0) as etcd, mirrored(etcd, below) as mirror:
        for count in range(3):
            cluster.move_leader()
            await persist(etcd, {f"{below}{count}": b""})
        await mirror.until(lambda: len(mirror.keys) == 3)


async def test_changes_go_on_while_members_are_compacted_and_defragmented(
    cluster: EtcdLab, below: str
) -> None:
    async with opened(cluster, timeout_s=10.0) as etcd, mirrored(etcd, below) as mirror:
        for member in cluster.members:
            revision = await persist(etcd, {f"{below}{member.name}": b""})
            cluster.ctl("compact", str(revision))
            cluster.ctl("defrag", member=member)
        await persist(etcd, {f"{below}last": b""})
        await mirror.knows(f"{below}last", b"")
        assert len(mirror.keys) == 4
        assert [type(one) for one in mirror.given].count(Snapshot) == 1


async def test_keys_go_with_their_lease(etcd: Etcd, below: str) -> None:
    key = f"{below}hub"
    lease = await etcd.grant(60)
    assert isinstance(await etcd.commit(puts={key: b"url"}, lease=lease), Committed)
    assert (await etcd.read(key)).kvs[0].lease == lease
    assert await etcd.keep_alive(lease) == 60
    async with mirrored(etcd, below) as mirror:
        assert mirror.keys == {key: b"url"}
        await etcd.revoke(lease)
        await mirror.until(lambda: not mirror.keys)
    await etcd.revoke(lease)
    assert await etcd.keep_alive(lease) == 0
    with pytest.raises(LeaseGone):
        await etcd.commit(puts={key: b"url"}, lease=lease)


async def test_a_lease_that_is_not_kept_alive_ends(etcd: Etcd, below: str) -> None:
    lease = await etcd.grant(1)
    await etcd.commit(puts={f"{below}hub": b"url"}, lease=lease)
    async with mirrored(etcd, below) as mirror:
        await mirror.until(lambda: not mirror.keys)


async def test_members_say_what_they_are(etcd: Etcd, cluster: EtcdLab) -> None:
    with cluster.killed(cluster.members[2]):
        async with asyncio.timeout(20 * patience()):
            while not all(
                one.leader for one in await etcd.status() if isinstance(one, MemberStatus)
            ):
                await asyncio.sleep(0.05)
        first, second, third = await etcd.status()
    assert isinstance(first, MemberStatus)
    assert isinstance(second, MemberStatus)
    assert isinstance(third, MemberSilent)
    assert first.version.startswith("3.")
    assert first.url == cluster.endpoints[0]
    assert first.leader == second.leader
    assert first.leader in (first.id, second.id)
    assert 0 < first.in_use <= first.db_size < first.quota
    assert first.header.term > 1
    assert not first.full


async def test_no_certificate_or_another_authority_is_an_outage(cluster: EtcdLab) -> None:
    authority = cluster.directory / "etcd-ca.crt"
    without = open_tls(authority)
    other = open_tls(cluster.directory / "server.crt")
    for context in (without, other):
        with cluster.entered():
            etcd = cluster.client(timeout_s=1.0, tls=context)
            with pytest.raises(EtcdUnavailable):
                await etcd.read("/a")
            await etcd.close()


async def test_a_write_that_is_too_large_is_refused(etcd: Etcd, below: str) -> None:
    with pytest.raises(SourceRefused):
        await etcd.commit(puts={f"{below}a": b"x" * 3_000_000})
    with pytest.raises(SourceRefused):
        await etcd.commit(puts={f"{below}{number}": b"" for number in range(129)})


# A full etcd, one with users, and one that is restored


@pytest.fixture(scope="module")
def single() -> Iterator[EtcdLab]:
    """One member with room for 8 MiB."""
    with etcd_lab(1, tls=False, flags=[f"--quota-backend-bytes={8 << 20}"]) as lab:
        yield lab


async def test_a_full_etcd_is_read_and_watched_and_takes_no_writes(
    single: EtcdLab, below: str
) -> None:
    async with opened(single, silence_s=0.5) as etcd:
        await commit(etcd, {f"{below}a": b"1"})
        async with mirrored(etcd, below) as mirror:
            with pytest.raises(EtcdFull):
                await fill(etcd)
            assert (await etcd.read(f"{below}a")).kvs[0].value == b"1"
            (status,) = await etcd.status()
            assert isinstance(status, MemberStatus)
            assert status.full
            assert status.quota == 8 << 20
            mirror.given.clear()
            await mirror.until(lambda: mirror.given)
            assert {type(one) for one in mirror.outages} == {EtcdFull}
            # Deletions are still taken.
            assert isinstance(await etcd.commit(deletes=[f"{below}a"]), Committed)
            single.ctl("compact", str((await etcd.read("/filling")).revision))
            single.ctl("defrag")
            single.ctl("alarm", "disarm")
            await commit(etcd, {f"{below}b": b"2"})
            await mirror.knows(f"{below}b", b"2")


@pytest.mark.parametrize("bump", [False, True])
async def test_an_etcd_that_was_restored_is_behind_until_that_is_accepted(
    single: EtcdLab, below: str, *, bump: bool
) -> None:
    backup = single.directory / "backup"
    async with opened(single, timeout_s=1.0) as etcd:
        kept = await commit(etcd, {f"{below}a": b"1"})
        single.ctl("snapshot", "save", str(backup))
        for count in range(2):
            # Each start is an election, and so a higher raft term than the restored one will have.
            single.kill(*single.members)
            single.start(*single.members)
            lost = await persist(etcd, {f"{below}a": b"2", f"{below}b": b"%d" % count})
        async with mirrored(etcd, below) as mirror:
            single.restore(backup, *(("--bump-revision=1000", "--mark-compacted") if bump else ()))
            with pytest.raises(Behind):
                await etcd.read(f"{below}a")
            await mirror.until(lambda: any(isinstance(one, Behind) for one in mirror.outages))
            assert mirror.keys == {f"{below}a": b"2", f"{below}b": b"1"}
        etcd.accept_older()
        found = await etcd.read(below, prefix_end(below))
        assert [(one.key, one.value, one.mod_revision) for one in found.kvs] == [
            (f"{below}a", b"1", kept)
        ]
        assert (found.revision > lost) == bump
        if bump:
            with pytest.raises(Compacted):
                await anext(etcd.follow(below, lost + 1))


async def fill(etcd: Etcd) -> None:
    for _ in range(20):
        await etcd.commit(puts={"/filling": b"x" * 1_000_000})


ROOT = "root-password"
LIMITED = "limited-password"


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdLab]:
    """One member with authentication: `hub` may do what is below /imds/ only. Tokens last for a second."""
    with etcd_lab(1, flags=["--auth-token-ttl=1"]) as lab:
        guard(lab)
        yield lab


def guard(lab: EtcdLab) -> None:
    for words in (
        ("put", "/other/key", "of another"),
        ("user", "add", f"root:{ROOT}"),
        ("user", "grant-role", "root", "root"),
        ("user", "add", f"hub:{LIMITED}"),
        ("role", "add", "hub"),
        ("role", "grant-permission", "hub", "--prefix=true", "readwrite", "/imds/"),
        ("user", "grant-role", "hub", "hub"),
        ("auth", "enable"),
    ):
        lab.ctl(*words)


async def test_a_token_that_ended_is_got_again(guarded: EtcdLab) -> None:
    async with (
        opened(guarded, user="hub", password=LIMITED) as etcd,
        mirrored(etcd, "/imds/") as mirror,
    ):
        guarded.kill(*guarded.members)
        guarded.start(*guarded.members)
        await persist(etcd, {"/imds/a": b"1"})
        await mirror.knows("/imds/a", b"1")
        # Each change of users or roles makes tokens of an older revision useless.
        guarded.ctl("user", "add", "later:password", user=f"root:{ROOT}")
        await commit(etcd, {"/imds/a": b"2"})
        token = etcd._gateway.token
        async with asyncio.timeout(30 * patience()):
            while etcd._gateway.token == token:
                # Each use begins its time again.
                await asyncio.sleep(2.1)
                await commit(etcd, {"/imds/a": b"3"})
        await mirror.knows("/imds/a", b"3")


async def test_a_wrong_password_or_no_right_is_refused_without_secrets(guarded: EtcdLab) -> None:
    async with opened(guarded, user="hub", password="wrong-password") as etcd:
        with pytest.raises(EtcdUnavailable, match="authentication failed") as caught:
            await etcd.read("/imds/a")
        assert "wrong-password" not in str(caught.value)
    async with opened(guarded) as etcd:
        with pytest.raises(EtcdUnavailable, match="user name is empty"):
            await etcd.read("/imds/a")
    async with opened(guarded, user="hub", password=LIMITED) as etcd:
        with pytest.raises(EtcdUnavailable, match="permission denied"):
            await etcd.read("/other/key")
        with pytest.raises(EtcdUnavailable, match="permission denied"):
            await etcd.commit(puts={"/other/key": b"taken"})


async def test_a_certificate_that_names_a_user_is_an_outage_that_says_so(guarded: EtcdLab) -> None:
    named = guarded.context_of("hub-with-name", "/CN=hub")
    async with opened(guarded, user="hub", password=LIMITED, tls=named, timeout_s=1.0) as etcd:
        with pytest.raises(EtcdUnavailable, match="CommonName of client"):
            await etcd.read("/imds/a")


async def test_etcds_own_rights_do_not_keep_a_user_from_other_keys(guarded: EtcdLab) -> None:
    """Why hosts never reach etcd: with this release a user of one prefix has all keys."""
    async with opened(guarded, user="hub", password=LIMITED) as attacker:
        with pytest.raises(EtcdUnavailable):
            await attacker.read("/other/key")
        whole = await attacker._ask(
            "/v3/kv/txn", nested({"request_range": {"key": encode("/other/key")}}), dict
        )
        assert encode("of another") in str(whole)
        put = {"request_put": {"key": encode("/other/key"), "value": encode("taken")}}
        await attacker._ask("/v3/kv/txn", nested(put), dict)
        create = {"key": encode("/imds/"), "range_end": encode("\0"), "start_revision": "1"}
        async with contextlib.aclosing(
            attacker._gateway.follow(
                guarded.endpoints[0], "/v3/watch", {"create_request": create}, 15.0
            )
        ) as lines:
            async with asyncio.timeout(20 * patience()):
                async for line in lines:
                    if encode("/other/key") in str(line):
                        break
    async with opened(guarded, user="root", password=ROOT) as root:
        assert (await root.read("/other/key")).kvs[0].value == b"taken"


def nested(operation: Mapping[str, object]) -> dict[str, object]:
    return {"success": [{"request_txn": {"success": [operation]}}]}
