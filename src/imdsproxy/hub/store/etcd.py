"""Client of etcd v3 by the JSON gateway: reads at one revision, writes by compare-and-swap, leases, and watches.

The client never takes the answer of a stale, full, lost or restarted member for the state of etcd: such an answer is an
outage (`EtcdUnavailable`), and the client asks the next member.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final, TypeVar, cast

import httpcore

from imdsproxy.errors import EtcdFull, EtcdUnavailable, SourceRefused, WriteUnknown, quoted
from imdsproxy.host.clock import Clock
from imdsproxy.host.http import Unanswered, answering, ask
from imdsproxy.hub.store import etcd_messages as messages
from imdsproxy.hub.store.etcd_members import START_MEMBERS, Members
from imdsproxy.hub.store.etcd_messages import (
    Behind,
    Changes,
    Committed,
    Compacted,
    Compare,
    Conflict,
    Deleted,
    Fault,
    Garbled,
    Header,
    Json,
    KeyValue,
    Kind,
    LeaseGone,
    MemberSilent,
    MemberStatus,
    Snapshot,
)

T = TypeVar("T")

_ANSWER_S: Final = 2.0
"""Timeout for a member's answer before the client asks the next member."""

_PAGE_BYTES: Final = 512 * 1024
_FIRST_PAGE: Final = 100
_LARGEST_PAGE: Final = 2000
_WHOLE_READS: Final = 3
_RIGHTS: Final = (Kind.AUTHENTICATE, Kind.DENIED)
_FULL: Final = "etcd is full: nothing can be written"
_CONNECT_S: Final = 1.0
_SMALL_S: Final = 2.0
_OK: Final = 200


class Etcd:
    """Client for one etcd, whichever member answers.

    Args:
        endpoints: URLs of the JSON gateways, `https://HOST:PORT`; those of `--listen-client-http-urls` if set.
        random: Order of the members, and jitter of pauses.
        timeout_s: Timeout for an answer from any member.
        silence_s: Seconds without an event after which a watch counts as broken; writes must be more frequent.

    Attributes:
        doubted: Set when the watched member does not answer another request: its watch may hang.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: ssl.SSLContext | None = None,
        user: str = "",
        password: str = "",
        random: Random,
        clock: Clock,
        timeout_s: float = 6.0,
        silence_s: float = 15.0,
    ) -> None:
        self._gateway = Gateway(tls=tls, user=user, password=password)
        self._members = Members(endpoints, random=random, clock=clock)
        self._clock, self._timeout_s, self._silence_s = clock, timeout_s, silence_s
        self._newest = Header(0, 0)
        self._quotas: dict[str, int] = {}
        self._followed = ""
        self.doubted = asyncio.Event()

    async def close(self) -> None:
        await self._gateway.close()

    def accept_older(self) -> None:
        """Accept any revision and term in the next answer, after a known restore of etcd."""
        self._newest = Header(0, 0)
        for url in self._members.urls:
            self._members.succeed(url)

    async def read(
        self, key: str, range_end: str = "", *, revision: int = 0, keys_only: bool = False
    ) -> Snapshot:
        """Read a key, or all keys from `key` to before `range_end` (`prefix_end`), at one revision.

        Revision 0 means the newest, with everything that was committed before the call. With `keys_only` the values are
        empty.

        Raises:
            Behind: etcd was restored from a backup.
            Compacted: `revision` was compacted.
            EtcdUnavailable: No member answers.
        """
        for attempt in range(_WHOLE_READS):
            try:
                return await self._read_pages(key, range_end, revision, keys_only=keys_only)
            except Compacted:
                # The client chose the compacted revision itself, so it can retry at a newer one.
                if revision or attempt == _WHOLE_READS - 1:
                    raise
        raise AssertionError

    async def _read_pages(
        self, key: str, range_end: str, revision: int, *, keys_only: bool
    ) -> Snapshot:
        found: list[KeyValue] = []
        limit = _FIRST_PAGE
        while True:
            body = messages.render_range(key, range_end)
            body |= {"limit": str(limit), "revision": str(revision), "keys_only": keys_only}
            page = await self._ask("/v3/kv/range", body, messages.parse_page, linear=True)
            revision = revision or page.revision
            found += page.kvs
            if not page.more:
                return Snapshot(revision, found)
            key = page.kvs[-1].key + "\0"
            size = sum(len(one.value) for one in page.kvs)
            limit = min(_LARGEST_PAGE, max(1, limit * _PAGE_BYTES // max(size, 1)))

    async def commit(
        self,
        compares: Iterable[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Iterable[str] = (),
        *,
        lease: int = 0,
    ) -> Committed | Conflict:
        """Commit puts and deletes in one transaction if all comparisons hold.

        etcd accepts at most 128 operations and 1.5 MiB per transaction. The written keys end with `lease`, if given.

        Raises:
            WriteUnknown: No answer came: etcd may have written, or may write within seconds. Read, and compare again.
            EtcdFull: etcd refuses writes until an operator acts.
            EtcdUnavailable: No member answers; nothing was written.
            LeaseGone: The lease has ended.
            SourceRefused: The transaction is too large.
        """
        body = messages.render_commit(compares, puts or {}, deletes, lease)
        return await self._ask("/v3/kv/txn", body, _parse_commit, linear=True, write=True)

    async def grant(self, ttl_s: int) -> int:
        """Grant a lease and return its id; its keys are deleted unless the lease is kept alive every `ttl_s`."""
        body = {"TTL": str(ttl_s)}
        return await self._ask("/v3/lease/grant", body, messages.parse_lease)

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease; return its length in seconds, or 0 if the lease has ended with its keys."""
        body = {"ID": str(lease)}
        return await self._ask("/v3/lease/keepalive", body, messages.parse_keep_alive)

    async def revoke(self, lease: int) -> None:
        """Revoke a lease with its keys, if it has not ended already."""
        with contextlib.suppress(LeaseGone):
            await self._ask("/v3/lease/revoke", {"ID": str(lease)}, lambda _: None)

    async def status(self) -> tuple[MemberStatus | MemberSilent, ...]:
        return tuple(
            await asyncio.gather(*(self._status(url) for url in sorted(self._members.urls)))
        )

    async def follow(self, prefix: str, start_revision: int) -> AsyncGenerator[Changes, None]:
        """Watch a prefix from a revision on at one member, while its watch is reliable.

        Continue after the last yielded revision: a transaction received in part is yielded complete then.

        Raises:
            Compacted: Changes are missing: read the prefix again.
            EtcdFull: The watch is silent because etcd refuses writes.
            EtcdUnavailable: The watch ended, was silent or lagged; the next attempt takes another member.
        """
        url = await self._choose(self._clock.monotonic() + self._timeout_s)
        token = self._gateway.token
        self._followed = url
        try:
            async with contextlib.aclosing(self._watch(url, prefix, start_revision)) as watch:
                async for changes in watch:
                    yield changes
        except Failed as failed:
            if failed.silent and await self._is_full(url):
                # Every other member would be silent, too.
                raise EtcdFull(_FULL) from failed
            if failed.fault.kind in _RIGHTS and self._gateway.drop_token(token):
                # A member may have older users and rights: the next attempt logs in anew.
                self._members.fail(url, str(failed), answers=messages.is_leaderless(failed.fault))
            else:
                self._give_up(url, failed)
            if failed.behind:
                # One member may lag; the read raises `Behind` if most members do.
                await self.read(prefix)
            raise self._outage(f"{url}: {failed}") from failed

    def leave(self, reason: str) -> None:
        """Let the watched member rest, because its watch is not reliable."""
        self._members.fail(self._followed, reason)

    async def _watch(
        self, url: str, prefix: str, start_revision: int
    ) -> AsyncGenerator[Changes, None]:
        create = messages.render_range(prefix, messages.prefix_end(prefix)) | {
            "start_revision": str(start_revision),
            "fragment": True,
        }
        part: list[KeyValue | Deleted] = []
        next_revision = start_revision
        stream = self._gateway.follow(url, "/v3/watch", {"create_request": create}, self._silence_s)
        async with contextlib.aclosing(stream) as lines:
            async for line in lines:
                with failing():
                    message = messages.parse_watch(line)
                if message.fault is not None:
                    raise Failed(message.fault)
                if message.header.term < self._newest.term:
                    raise _behind(message.header, self._newest)
                if message.created:
                    if message.header.revision < start_revision - 1:
                        raise _behind(
                            message.header, replace(self._newest, revision=start_revision - 1)
                        )
                    self._members.succeed(url)
                # Some releases repeat older events to a watch that begins at a revision to come.
                part += (one for one in message.events if one.mod_revision >= next_revision)
                if part and not message.fragment:
                    revision = part[-1].mod_revision
                    next_revision = revision + 1
                    self._newest = _later(self._newest, Header(revision, 0))
                    yield Changes(revision, tuple(part))
                    part = []
        raise Failed(Fault(Kind.OUTAGE, "the watch ended without a reason", certain=True))

    async def _ask(
        self,
        path: str,
        body: Json,
        parse: Callable[[Json], T],
        *,
        linear: bool = False,
        write: bool = False,
    ) -> T:
        """Return the first answer of a member, parsed by `parse`.

        With `linear`, the client refuses answers of a member that lags behind earlier answers. With `write`, the client
        does not repeat a request that may have been carried out.
        """
        deadline = self._clock.monotonic() + self._timeout_s
        logged_in_anew = False
        older: set[str] = set()
        while True:
            url = await self._choose(deadline)
            token = self._gateway.token
            left_s = max(0.0, deadline - self._clock.monotonic())
            timeout_s = min(left_s, _ANSWER_S)
            try:
                parsed = await self._ask_one(
                    url, path, body, parse, linear=linear, timeout_s=timeout_s
                )
            except Failed as failed:
                if failed.fault.kind is Kind.OUTAGE and url == self._followed:
                    self.doubted.set()
                if failed.fault.kind in _RIGHTS and not logged_in_anew:
                    logged_in_anew = True
                    if self._gateway.drop_token(token):
                        continue
                self._give_up(url, failed, write=write)
                older |= {url} if failed.behind else set()
                if len(older) > len(self._members.urls) // 2:
                    raise Behind(
                        f"etcd was restored to an older revision: {self._members.failures}"
                    ) from failed
            else:
                self._members.succeed(url)
                return parsed

    async def _ask_one(
        self,
        url: str,
        path: str,
        body: Json,
        parse: Callable[[Json], T],
        *,
        linear: bool,
        timeout_s: float,
    ) -> T:
        newest = self._newest
        with failing():
            answer = await self._gateway.ask(url, path, body, timeout_s)
            if linear:
                header = messages.parse_header(answer)
                if header.term < newest.term or header.revision < newest.revision:
                    raise _behind(header, newest)
                self._newest = _later(self._newest, header)
            return parse(answer)

    async def _choose(self, deadline: float) -> str:
        url, pause_s = self._members.choose()
        if self._clock.monotonic() + pause_s >= deadline:
            raise self._outage(self._members.failures)
        await asyncio.sleep(pause_s)
        return url

    def _give_up(self, url: str, failed: Failed, *, write: bool = False) -> None:
        """Raise an error that any other member would answer too; otherwise let the member rest."""
        reason = f"{url}: {failed}"
        match failed.fault.kind:
            case Kind.COMPACTED:
                raise Compacted from failed
            case Kind.NO_LEASE:
                raise LeaseGone(reason) from failed
            case Kind.FULL:
                raise EtcdFull(_FULL) from failed
            case Kind.REFUSED:
                raise SourceRefused(f"etcd refuses the request: {reason}") from failed
            case Kind.AUTHENTICATE | Kind.DENIED:
                # Hosts are still served, and an operator can correct the rights while the hub runs.
                hint = "check the user, its password and its role in etcd"
                raise EtcdUnavailable(f"etcd refuses the request: {reason}", hint=hint) from failed
            case Kind.OUTAGE:
                self._members.fail(url, str(failed), answers=messages.is_leaderless(failed.fault))
        if write and not failed.fault.certain:
            raise WriteUnknown(f"etcd has not confirmed the write: {reason}") from failed

    def _outage(self, reason: str) -> EtcdUnavailable:
        lost = self._members.lost_quorum
        if lost is None:
            return EtcdUnavailable(f"etcd does not answer: {reason}")
        return EtcdUnavailable(f"etcd has {lost} ({reason})", hint=START_MEMBERS)

    async def _is_full(self, url: str) -> bool:
        status = await self._status(url)
        return isinstance(status, MemberStatus) and status.full

    async def _status(self, url: str) -> MemberStatus | MemberSilent:
        try:
            with failing():
                answer = await self._gateway.ask(url, "/v3/maintenance/status", {}, _ANSWER_S)
                status = messages.parse_status(url, answer)
            if not status.quota and url not in self._quotas:
                self._quotas[url] = await self._gateway.quota(url)
        except Failed as failed:
            return MemberSilent(url, str(failed), messages.is_leaderless(failed.fault))
        return replace(status, quota=status.quota or self._quotas[url])


def _parse_commit(answer: Json) -> Committed | Conflict:
    revision = messages.parse_header(answer).revision
    if answer.get("succeeded"):
        return Committed(revision)
    return Conflict(revision, messages.parse_conflict(answer))


def _later(one: Header, other: Header) -> Header:
    return Header(max(one.revision, other.revision), max(one.term, other.term))


def _behind(header: Header, newest: Header) -> Failed:
    reason = (
        f"the member is at revision {header.revision} of raft term {header.term}, "
        f"after revision {newest.revision} of term {newest.term}"
    )
    return Failed(Fault(Kind.OUTAGE, reason, certain=False), behind=True)


class Failed(Exception):
    """A member failed to answer correctly: it was `silent`, or `behind` a known revision or raft term."""

    def __init__(self, fault: Fault, *, behind: bool = False, silent: bool = False) -> None:
        super().__init__(fault.message)
        self.fault, self.behind, self.silent = fault, behind, silent


def open_tls(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return a TLS context with the CA of members, and with the client's certificate, if given; raise `OSError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


class Gateway:
    """Client of all members' gateways; `user` and `password` are for an etcd with authentication."""

    def __init__(self, *, tls: ssl.SSLContext | None, user: str, password: str) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            # Without a limit, since a request that waits for a connection would count as the member's failure.
            ssl_context=tls,
            max_connections=None,
            max_keepalive_connections=64,
            keepalive_expiry=30.0,
        )
        self._user, self._password = user, password
        self._logging_in = asyncio.Lock()
        self.token = ""

    async def close(self) -> None:
        await self._pool.aclose()

    def drop_token(self, token: str) -> bool:
        """Log in again before the next request, unless done already; return whether there is a user at all."""
        if self.token == token:
            self.token = ""
        return bool(self._user)

    async def ask(self, url: str, path: str, body: Json, timeout_s: float) -> Json:
        """Return a member's answer; raise `Failed`."""
        await self._log_in(url)
        return await self._send(url, path, body, timeout_s)

    async def follow(
        self, url: str, path: str, body: Json, silence_s: float
    ) -> AsyncGenerator[Json, None]:
        """Yield the objects of a stream, one per line, whatever the chunks; raise `Failed`."""
        with failing():
            await self._log_in(url)
            async with self._pool.stream(
                "POST",
                f"{url}{path}",
                headers=self._headers,
                content=json.dumps(body).encode(),
                extensions={"timeout": _limits(silence_s)},
            ) as response:
                if response.status != _OK:
                    raise _refused(response.status, await response.aread())
                rest: list[bytes] = []
                async for chunk in response.aiter_stream():
                    *whole, last = chunk.split(b"\n")
                    for line in whole:
                        yield _object(b"".join((*rest, line)))
                        rest.clear()
                    rest.append(last)

    async def quota(self, url: str) -> int:
        """Return the quota of a member's database in bytes, or 0; raise `Failed`."""
        with failing():
            _, content = await ask(self._pool, "GET", f"{url}/metrics", _limits(_SMALL_S))
            return messages.parse_quota(content)

    async def _send(self, url: str, path: str, body: Json, timeout_s: float) -> Json:
        with failing():
            status, content = await ask(
                self._pool,
                "POST",
                f"{url}{path}",
                _limits(timeout_s),
                body=json.dumps(body).encode(),
                headers=self._headers,
            )
            if status != _OK:
                raise _refused(status, content)
            answer = _object(content)
        if "error" in answer:
            raise Failed(messages.parse_fault(answer))
        return answer

    @property
    def _headers(self) -> list[tuple[str, str]]:
        headers = [
            # Without this header, etcd takes the user from the gateway's own certificate.
            ("Accept", "application/json"),
            ("Content-Type", "application/json"),
            # A member without a leader then refuses at once instead of waiting.
            ("Grpc-Metadata-hasleader", "true"),
        ]
        return [*headers, ("Authorization", self.token)] if self.token else headers

    async def _log_in(self, url: str) -> None:
        async with self._logging_in:
            if not self._user or self.token:
                return
            body = {"name": self._user, "password": self._password}
            try:
                answer = await self._send(url, "/v3/auth/authenticate", body, _SMALL_S)
            except Failed as failed:
                if "not enabled" not in failed.fault.message:
                    raise Failed(replace(failed.fault, certain=True)) from failed
                answer = {}
            # Without authentication etcd accepts any token, and refuses this one once authentication is enabled.
            self.token = str(answer.get("token", "none"))


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Convert errors of connections and answers to `Failed`."""
    try:
        with answering():
            yield
    except Unanswered as error:
        fault = Fault(Kind.OUTAGE, str(error), certain=not error.sent)
        raise Failed(fault, silent=error.silent) from error
    except ValueError as error:
        # `Garbled`, or invalid JSON.
        fault = Fault(Kind.OUTAGE, f"not an answer of etcd: {error}", certain=False)
        raise Failed(fault) from error


def _limits(read_s: float) -> dict[str, float]:
    return {"connect": _CONNECT_S, "write": _SMALL_S, "read": read_s}


def _object(content: bytes) -> Json:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise Garbled("an answer that is no object")
    return cast("Json", found)


def _refused(status: int, content: bytes) -> Failed:
    try:
        return Failed(messages.parse_fault(_object(content)))
    except ValueError:
        # The answer comes from etcd's checks of certificates and host names, or from another program.
        words = quoted(content.decode(errors="replace").strip())
        return Failed(Fault(Kind.OUTAGE, f"the member answers {status}, {words}", certain=False))
