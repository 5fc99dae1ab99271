"""What HAProxy lets guests read, by its real rules and no daemon: policy x request -> answer, by every way in.

In front of our documents, and of Nova. What stands behind HAProxy answers 200 to everything, so that another status is
a rule's. Reads are those of `support.access_table`; `explain` decides the same (tests/unit/model/test_policy.py).
"""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imdsproxy.model.path_rules import PathRules, PathWord
from imdsproxy.model.policy import Policy, TokenMode, render_policy_word
from imdsproxy.model.policy_report import decide_read
from imdsproxy.model.policy_word import ONLY_TOKENS_OFF
from imdsproxy.model.tokens import TOKEN_PATTERN, TTL_LIMIT_S, TokenKey
from imdsproxy.model.wire import HEADER_FORWARDED
from support.access_table import CLOCKS, META, READS, TOKEN, USER_DATA, Clock, Read, path_sets
from support.guest import IPV4, Connection, Reply, with_token
from support.haproxy_alone import KEY, WAYS, Alone, open_alone
from support.lab import until
from support.spellings import HAND_WRITTEN, PATHS, is_plain_http, spellings

pytestmark = pytest.mark.root

_TTL: Final = "X-aws-ec2-metadata-token-ttl-seconds"
_RULE_PATHS: Final = (
    *("/", "/latest", "/latest/meta-data", "/latest/meta-data/hostname", USER_DATA),
    *("/openstack", "/openstack/latest", "/openstack/latest/user_data", "/openstack/content"),
    *("/nocloud", "/nocloud/user-data"),
)
_NOTHING: Final[PathRules] = (("/", PathWord.DENY),)


def _rule_sets() -> tuple[PathRules, ...]:
    """HAProxy reads them when it starts, so they are the same for all examples."""
    random = Random(37)  # noqa: S311 - they are to be various, and always the same
    words = tuple(PathWord)
    chosen = [
        {path: random.choice(words) for path in random.sample(_RULE_PATHS, random.randint(1, 4))}
        for _ in range(250)
    ]
    return tuple(tuple(sorted(one.items())) for one in chosen)


_SETS: Final = (_NOTHING, *_rule_sets())


@pytest.fixture(scope="module", params=["documents", "nova"])
def opened(request: pytest.FixtureRequest) -> Iterator[Alone]:
    with open_alone(nova=request.param == "nova", paths=(*path_sets(), *_SETS)) as alone:
        alone.renew()
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.renew()
    return opened


def _good(alone: Alone, *, epoch: int = 0) -> tuple[str, ...]:
    return with_token(alone.token(epoch=epoch, expires_at=int(time.time()) + 600))


def _in_one_second(work: Callable[[int], None]) -> None:
    """Both HAProxy and the test read a clock: what they find counts where it has not moved on between the two."""
    while True:
        now = int(time.time())
        try:
            work(now)
        except AssertionError:
            if int(time.time()) == now:
                raise
        else:
            if int(time.time()) == now:
                return


def _explain_differs(alone: Alone, word: str, target: str) -> bool:
    """In front of Nova any policy word has odd paths refused; `explain` lets them pass where tokens are off."""
    odd = "%" in target or ".." in target
    return alone.nova and odd and word.startswith(ONLY_TOKENS_OFF)


# Reads


def test_haproxy_answers_reads_as_the_table_has_them(alone: Alone) -> None:
    for _, group in itertools.groupby(READS, key=lambda read: (read.policy, read.clock)):
        rows = list(group)
        _in_one_second(lambda now, rows=rows: _answers_as(alone, rows, now))  # type: ignore[misc]


def _answers_as(alone: Alone, rows: list[Read], now: int) -> None:
    word, epoch = rows[0].word(now)
    alone.put(word=word)
    good = _good(alone, epoch=epoch)
    wrong = []
    for read, way in itertools.product(rows, WAYS):
        if _explain_differs(alone, word, read.target):
            continue
        for headers, status in (((), read.without), (good, read.with_token)):
            # After a good token on the connection nothing is left to pass by, so no odd spelling is refused.
            kept = status not in (400, 404, 405)
            reply = alone.ask(read.target, way=way, headers=headers, kept=kept)
            if reply.status != status or (status != 200 and reply.body):
                wrong.append((way, word, read.target, status, reply.status))
    assert not wrong
    assert alone.ask(USER_DATA, "green").status == 200


def _agree(alone: Alone, policy: Policy, clock: Clock, target: str, way: str) -> None:
    """`explain --path` says of a read what HAProxy does."""

    def ask(now: int) -> None:
        created, override = clock(now)
        word = render_policy_word(policy, override, created)
        if _explain_differs(alone, word, target):
            return
        alone.put(word=word)
        for headers in ((), _good(alone, epoch=override.epoch)):
            decided = decide_read(word, now, target, token=bool(headers), paths=policy.paths)
            answered = alone.ask(target, way=way, headers=headers).status
            assert answered == (decided.status or 200), (word, now, target, headers, decided, way)

    _in_one_second(ask)


_MODES: Final = st.sampled_from(TokenMode)
_POLICIES: Final = st.builds(
    Policy,
    endpoint=st.sampled_from((True,) * 15 + (False,)),
    tokens=_MODES,
    openstack_tokens=_MODES,
    nocloud_tokens=_MODES,
    seal_user_data=st.sampled_from((False, False, False, True)),
    paths=st.sampled_from(((), *_SETS)),
)


# What other tests have done to HAProxy is undone once, and no example does anything to it that the next one finds.
@settings(
    max_examples=600,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    policy=_POLICIES,
    clock=st.sampled_from(list(CLOCKS)),
    target=st.one_of(spellings(), st.sampled_from(PATHS)).filter(is_plain_http),
    way=st.sampled_from(WAYS),
)
@example(policy=Policy(paths=_NOTHING), clock="made long ago", target=TOKEN, way="guests")
@example(policy=Policy(paths=_NOTHING), clock="made long ago", target="/ec2", way="guests")
def test_what_explain_says_of_a_policy_is_what_haproxy_does(
    alone: Alone, policy: Policy, clock: str, target: str, way: str
) -> None:
    _agree(alone, policy, CLOCKS[clock], target, way)


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_end_of_a_boot_is_the_same_to_explain_as_to_haproxy(alone: Alone, clock: str) -> None:
    for policy in dict.fromkeys(read.policy for read in READS):
        for target in (USER_DATA, "/2012-01-12/user-data?x=y", META, "/openstack/latest/user_data"):
            _agree(alone, policy, CLOCKS[clock], target, "guests")


def test_around_each_path_of_a_rule_and_in_every_hand_written_spelling_explain_agrees(
    alone: Alone,
) -> None:
    around = [
        target
        for path in _RULE_PATHS
        for target in (path, f"{path}/x", f"{path}x", path.replace("latest", "2012-08-10"))
    ]
    cases = [*itertools.product(_SETS[:12], around)]
    cases += zip(itertools.cycle(_SETS[:40]), filter(is_plain_http, HAND_WRITTEN), strict=False)
    for rules, target in cases:
        policy = Policy(tokens=TokenMode.REQUIRED, paths=rules)
        _agree(alone, policy, CLOCKS["made long ago"], target, "guests")


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_may_be_read_no_spelling_reads_anything(alone: Alone, way: str) -> None:
    alone.have(Policy(paths=_NOTHING))
    for target in (*HAND_WRITTEN, "*", f"http://{IPV4}"):
        assert alone.ask(target, way=way).status in (400, 403, 404, 405), target
    assert not alone.documents.asked


def test_where_the_rules_of_paths_are_gone_nothing_is_served(alone: Alone) -> None:
    alone.have(Policy(paths=(("/latest/meta-data", PathWord.OPTIONAL), ("/", PathWord.ALLOW))))
    for way in WAYS:
        reply = alone.ask(USER_DATA, way=way)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert alone.ask(USER_DATA, "green").status == 200


# Requests for a token


_LIFETIME: Final = (f"{_TTL}: 300",)
_NO_LIFETIME: Final = ("", "0", "21601", "-1", "+60", "6e1", "1.5", "60 60", "0x10", "9" * 20)
_DENIED: Final = Policy(tokens=TokenMode.REQUIRED, paths=_NOTHING)
_TOKEN_REQUESTS: Final = (
    *((Policy(), "PUT", TOKEN, (f"{_TTL}: {ttl}",), 200) for ttl in (1, TTL_LIMIT_S)),
    *((Policy(), "PUT", TOKEN, (f"{_TTL}: {ttl}",), 400) for ttl in _NO_LIFETIME),
    (Policy(), "PUT", TOKEN, (), 400),
    (Policy(), "PUT", TOKEN, _LIFETIME * 2, 400),
    (Policy(), "PUT", TOKEN, ("Content-Length: 0", *_LIFETIME), 200),
    (Policy(), "PUT", f"/{TOKEN}/", _LIFETIME, 200),
    *((Policy(), "PUT", f"{root}{TOKEN}", _LIFETIME, 403) for root in ("/ec2", "//./%65c2/")),
    (Policy(), "PUT", "/2021-01-03/api/token", _LIFETIME, 403),
    # There is none for what came through a proxy.
    *(
        (Policy(), "PUT", TOKEN, (line, *_LIFETIME), 403)
        for line in ("X-Forwarded-For: 10.0.0.9", "x-forwarded-for:", "X-FORWARDED-FOR: a, b")
    ),
    *(
        (Policy(), method, TOKEN, _LIFETIME, 405)
        for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH")
    ),
    *((Policy(tokens=TokenMode.OFF), one, TOKEN, _LIFETIME, 404) for one in ("PUT", "GET")),
    (Policy(endpoint=False), "PUT", TOKEN, _LIFETIME, 403),
    # Where one is required, or everything is denied, one can be had.
    (_DENIED, "PUT", TOKEN, _LIFETIME, 200),
    (Policy(tokens=TokenMode.OFF, paths=(("/", PathWord.REQUIRED),)), "PUT", TOKEN, _LIFETIME, 200),
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_request_for_a_token_is_answered_as_the_table_has_it(alone: Alone, way: str) -> None:
    for policy, method, target, headers, status in _TOKEN_REQUESTS:
        alone.have(policy)
        reply = alone.ask(target, way=way, method=method, headers=headers)
        assert reply.status == status, (policy, method, target, headers, reply)
        if status == 200:
            assert _is_token(alone, reply)
        else:
            assert reply.body == b""
        assert reply.headers.get("allow") == ("PUT" if status == 405 else None)
    assert not alone.documents.asked


def _is_token(alone: Alone, reply: Reply) -> bool:
    """It is the one that Python makes of the same key, and its lifetime is the one that was asked for."""
    expires_at = int(reply.text.split(".")[1])
    left = expires_at - time.time()
    assert left - 1 <= int(reply.headers[_TTL.lower()]) <= left + 2
    assert reply.headers["content-type"] == "text/plain"
    assert re.fullmatch(TOKEN_PATTERN.strip("^$"), reply.text)
    return reply.text == alone.token(expires_at=expires_at)


def test_without_a_key_there_is_no_token_and_none_is_good(alone: Alone) -> None:
    with alone.connect() as connection:
        for _ in range(2):
            # A body is ignored.
            reply = connection.request(TOKEN, method="PUT", headers=_LIFETIME, body=b"ignored")
            assert _is_token(alone, reply)
    token = _good(alone)
    alone.write_keys()
    for way in WAYS:
        reply = alone.ask(TOKEN, way=way, method="PUT", headers=_LIFETIME)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert alone.ask(USER_DATA, way=way, headers=token).status == 401


# Tokens that are sent


_OTHER: Final = TokenKey(b"o" * 32)
_SPOILT: Final[tuple[Callable[[str], str], ...]] = (
    lambda token: token + "x",
    lambda token: token + ".x",
    lambda token: token[:-1],
    lambda token: token[:-1] + ("A" if token[-1] != "A" else "B"),
    lambda token: token.replace(".", ".9", 1)[: len(token)],
    lambda token: f"00000000{token[8:]}",
    lambda token: f"@current{token[8:]}",
    lambda token: token.rpartition(".")[0] + ".",
    lambda token: token.rpartition(".")[0],
    lambda token: f"{token},{token}",
    lambda token: f" {token.upper()}",
    lambda _: "",
    lambda _: "x",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", [Policy(), Policy(tokens=TokenMode.REQUIRED)])
def test_a_token_that_is_not_good_is_401_though_none_is_needed(
    alone: Alone, policy: Policy, way: str
) -> None:
    later = int(time.time()) + 600
    token = alone.token(expires_at=later)
    alone.have(policy)
    bad = (
        *(with_token(spoil(token)) for spoil in _SPOILT),
        with_token(token) * 2,
        with_token(alone.token("green", expires_at=later)),
        with_token(alone.token("green", instance="i-red", expires_at=later)),
        with_token(alone.token(instance="i-green", expires_at=later)),
        with_token(alone.token(epoch=1, expires_at=later)),
        with_token(alone.token(expires_at=int(time.time()) - 1)),
        with_token(alone.token(key=_OTHER, expires_at=later)),
    )
    # Twice, and good ones between: nothing is taken for what the connection had before.
    for headers in bad * 2:
        assert alone.ask(USER_DATA, way=way, headers=with_token(token)).status == 200
        reply = alone.ask(USER_DATA, way=way, headers=headers)
        assert (reply.status, reply.body) == (401, b""), headers
        assert _TTL.lower() not in reply.headers
    # While there is no token route a token is a header like any other.
    alone.have(Policy(tokens=TokenMode.OFF))
    assert {alone.ask(USER_DATA, way=way, headers=headers).status for headers in bad} == {200}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_answer_to_a_good_token_shows_what_is_left_of_it(
    alone: Alone, method: str, way: str
) -> None:
    expires_at = int(time.time()) + 100
    headers = with_token(alone.token(expires_at=expires_at))
    for _ in range(3):  # the second comes out of the cache
        asked_at = time.time()
        reply = alone.ask(USER_DATA, way=way, method=method, headers=headers)
        assert reply.status == 200
        left = int(reply.headers[_TTL.lower()])
        assert expires_at - time.time() - 1 <= left <= expires_at - asked_at + 1
    assert _TTL.lower() not in alone.ask(USER_DATA, way=way).headers


def test_a_kept_connection_does_not_keep_what_was_good_before(alone: Alone) -> None:
    longer = alone.token(expires_at=int(time.time()) + 600)
    short = alone.token(expires_at=int(time.time()) + 2)

    def status(connection: Connection, token: str = longer, target: str = USER_DATA) -> int:
        return connection.request(target, headers=with_token(token)).status

    with alone.connect() as connection, alone.connect("green") as other:
        assert [status(connection, short) for _ in range(2)] == [200, 200]
        until(lambda: status(connection, short) == 401, what="the token's end")
        assert [status(connection) for _ in range(2)] == [200, 200]
        assert status(connection, f"{longer[:-1]}~") == 401
        assert [status(connection), status(other)] == [200, 401]
        assert status(connection, target=TOKEN) == 405
        for policy, wanted in (
            (Policy(seal_user_data=True), 403),
            (Policy(endpoint=False), 403),
            (Policy(paths=((USER_DATA, PathWord.DENY),)), 403),
            (Policy(), 200),
            (Policy(tokens=TokenMode.REQUIRED), 200),
        ):
            alone.have(policy)
            assert [status(connection) for _ in range(2)] == [wanted] * 2
        # The address goes to another instance of the same policy, the tokens are revoked, the key is replaced.
        alone.put()
        assert status(connection) == 200
        alone.put(instance="i-green")
        assert status(connection) == 401
        alone.put()
        assert status(connection) == 200
        alone.have(Policy(), epoch=1)
        assert status(connection) == 401
        alone.put()
        alone.write_keys(_OTHER)
        assert status(connection) == 401
        alone.write_keys(_OTHER, KEY)
        assert status(connection) == 200


def test_a_token_is_of_one_network_though_a_connection_of_a_proxy_carries_more(
    alone: Alone,
) -> None:
    # In front of Nova the records of an instance are the same in each network.
    alone.put("green", instance="i-red")
    token = with_token(alone.token(expires_at=int(time.time()) + 600))
    with alone.connect(way="agents") as connection:
        for network, status in (("red", 200), ("green", 401), ("red", 200)):
            headers = (*alone.lines(network, "agents"), *token)
            assert connection.request(USER_DATA, headers=headers).status == status


# Requests that another program forwarded


_ADDRESSES: Final = ("X-Forwarded-For: 1.2.3.4", "x-forwarded-for:")
_FORWARDED: Final = (
    *_ADDRESSES,
    "Forwarded: for=1.2.3.4",
    "Via: 1.1 proxy",
    "X-Forwarded-Host: x",
    "X-FORWARDED: x",
    "X-Forwarded-For-Ip4: x",
    "Origin: http://x",
    "Origin: null",
    "Referer:",
    "SEC-Fetch-Site: cross-site",
    "sec-fetch-mode: cors",
)
_OWN: Final = (
    f"{IPV4} {IPV4}:80 [fe80::a9fe:a9fe] [FE80::A9FE:A9FE] [fe80::a9fe:a9fe%25eth0]:80".split()
)
_ANOTHERS: Final = f"evil.example {IPV4}.nip.io 127.0.0.1 {IPV4}:81".split()


@pytest.mark.parametrize("way", WAYS)
def test_what_a_guest_was_made_to_ask_is_refused_without_a_token(alone: Alone, way: str) -> None:
    alone.have(Policy(refuse_forwarded=True))
    token = _good(alone)

    def statuses(*lines: str, host: str = IPV4) -> list[int]:
        """Of a read without a token, with one, and of a request for one."""
        reads = [
            alone.ask(USER_DATA, way=way, host=host, headers=(*lines, *more)).status
            for more in ((), token)
        ]
        put = alone.ask(TOKEN, way=way, host=host, method="PUT", headers=(*lines, *_LIFETIME))
        return [*reads, put.status]

    for line in _FORWARDED:
        # A second one of these makes a request through Neutron's proxies nobody's.
        ambiguous = way == "agents" and line in _ADDRESSES
        assert statuses(line) == ([400, 400, 403] if ambiguous else [403, 200, 403]), line
    for line in ("X-For: x", "Viable: x", "Accept: Via: x"):
        assert statuses(line) == [200] * 3, line
    for host in (*_OWN, *_ANOTHERS):
        # A name that somebody has lead here makes a page of theirs one of ours: it may send any header.
        status = 200 if host in _OWN else 403
        assert statuses(host=host) == [status, 200, status], host


def test_what_the_resolver_has_noted_of_a_request_counts(alone: Alone) -> None:
    for policy, put in ((Policy(), {"by": 200, "for": 403}), (Policy(refuse_forwarded=True), {})):
        alone.have(policy)
        for mark in ("by", "for"):
            lines = (f"{HEADER_FORWARDED}: {mark}",)
            read = alone.ask(USER_DATA, way="found", headers=lines)
            asked = alone.ask(TOKEN, way="found", method="PUT", headers=(*lines, *_LIFETIME))
            assert read.status == (403 if policy.refuse_forwarded else 200)
            assert asked.status == put.get(mark, 403)
