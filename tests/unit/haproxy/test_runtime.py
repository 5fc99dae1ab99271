"""HAProxy's answers on its sockets, read into values: processes, statistics, tables, and each request."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.haproxy.rules.counting import CountedRow, parse_guests, parse_readers
from imdsproxy.haproxy.rules.limits import (
    MOST_SHOWN,
    Asker,
    Usage,
    busiest,
    read_usage,
    refused_lately,
)
from imdsproxy.haproxy.rules.request_log import AnsweredBy, Watched, parse_events, read_audit
from imdsproxy.haproxy.rules.runtime import (
    Load,
    Processes,
    parse_failure,
    parse_features,
    parse_load,
    parse_processes,
    parse_reload,
    parse_stat,
    parse_version,
)
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.policy import Policy
from imdsproxy.model.tokens import TokenKey
from imdsproxy.model.wire import ONE_IN
from support.haproxy_alone import mint_token

# As HAProxy 3.0.11 prints it, with an old worker that still drains.
_SHOW_PROC = """\
#<PID>          <type>          <reloads>       <uptime>        <version>
4031            master          2 [failed: 1]   0d00h03m12s     3.0.11-1+deb13u5
# workers
4077            worker          0               0d00h00m02s     3.0.11-1+deb13u5
# old workers
4050            worker          1               0d00h01m02s     3.0.11-1+deb13u5
# programs

"""


_INFO = "Name: HAProxy\nMaxconn: 8\nHard_maxconn: 8\nCurrConns: 7\nMaxconnReached: 3\nnode: a: b\n"
_VERSION = "HAProxy version {} 2026/11/18 - https://haproxy.org/"
_ALERTS = """\
[NOTICE]   (12) : haproxy version is 3.0.11
[WARNING]  (12) : config : nothing of weight
[ALERT]    (12) : Binding [a.conf:15] for proxy metadata: cannot bind socket
[ALERT]    (12) : Binding [a.conf:15] for proxy metadata: cannot bind socket
[ALERT]    (12) : [haproxy.main()] Exiting.
"""
_STAT = "# pxname,svname,stot,\nguests,red,5,\nguests,cut\n\n"


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_processes, _SHOW_PROC, Processes(4031, 4077, (4050,), 2)),
        (parse_processes, "12 master 0 [failed: 0] 0d 3.0\n# workers\n", Processes(12, None)),
        # Without a master there is nothing.
        (parse_processes, "Unknown command\n", None),
        (parse_processes, "# workers\n4077 worker 0 0d 3.0\n", None),
        (parse_load, _INFO, Load(connections=7, most=8, reached=3)),
        (parse_load, _INFO.replace("CurrConns", "Other"), None),
        (parse_load, "Unknown command", None),
        (parse_reload, "Success=1\n--\n[NOTICE] up\n\n", None),
        (parse_reload, "Success=0\n--\n[ALERT] no\n", "[ALERT] no"),
        (parse_reload, "Permission denied\n", ""),
        (parse_version, _VERSION.format("3.0.11-1+deb13u5"), (3, 0, "11-1+deb13u5")),
        (parse_version, _VERSION.format("2.6"), (2, 6, "")),
        (parse_version, _VERSION.format("3.3-dev2-abc"), (3, 3, "dev2-abc")),
        (parse_version, "nginx version: nginx/1.26", None),
        (parse_features, "x\nFeature list : -51DEGREES +NS +PROMEX -WURFL\ny", {"NS", "PROMEX"}),
        (
            parse_stat,
            _STAT,
            [
                {"pxname": "guests", "svname": "red", "stot": "5"},
                {"pxname": "guests", "svname": "cut"},
            ],
        ),
        # Only the columns that are wanted and there.
        (partial(parse_stat, columns={"stot", "nonsense"}), _STAT, [{"stot": "5"}, {}]),
        (parse_stat, "Permission denied\n", []),
        # Each alert once, without pids; where there are none, all of the output.
        (
            parse_failure,
            _ALERTS,
            "Binding [a.conf:15] for proxy metadata: cannot bind socket; [haproxy.main()] Exiting.",
        ),
        (parse_failure, "[NOTICE] x\n[ALERT] unknown keyword", "unknown keyword"),
        (parse_failure, "haproxy: cannot run\n\n  because\n", "haproxy: cannot run; because"),
        (parse_guests, "Unknown table 'x'", []),
    ],
)
def test_an_answer_of_haproxys_is_read_into_values(
    parse: Callable[[str], object], text: str, expected: object
) -> None:
    assert parse(text) == expected


# As HAProxy 3.0.11 gave them; the second has letters of its escaping.
_GUESTS = """\
# table: without-token, type: string, size:51200, used:2
0x7fa62bfe99a0: key=blue|i-1 use=0 exp=604798836 shard=0 gpc0=7 gpc1=0 gpc2=3 gpc3=7 gpc3_rate(3600000)=9
0x7fa62bfe99b0: key=a\\ b|i\\=2 use=1 exp=604800000 shard=0 gpc0=1 gpc1=2 gpc2=0 gpc3=0 gpc0_rate(3600000)=1

"""
_READERS = """\
# table: without-token-readers, type: string, size:10240, used:4
0x7fa62d3a3108: key=blue|i-1|latest%2Fmeta-data%2Fiam|Boto3%2F1.34.0%20md use=0 exp=604740000 gpc0=5 gpc1=1 gpc2=0
0x7fa62d3a3208: key=blue|i-1|| use=0 exp=604740000 shard=0 gpc0=0 gpc1=0 gpc2=2
0x7fa62d3a3308: key=blue|i-1 use=0 exp=604740000 shard=0 gpc0=2 gpc1=0 gpc2=0
what is this?
"""


def test_a_guests_entry_tells_what_it_read_what_was_refused_and_when() -> None:
    rows = parse_guests(_GUESTS)
    assert [replace(row, age_s=round(row.age_s, 3)) for row in rows] == [
        CountedRow(("blue", "i-1"), 7, 3, 1.164),
        CountedRow(("a b", "i=2"), 1 + 2 * ONE_IN, 0, 0.0),
    ]


def test_a_readers_entry_tells_path_and_client_and_lines_that_are_none_are_left_out() -> None:
    assert parse_readers(_READERS) == [
        CountedRow(("blue", "i-1", "latest/meta-data/iam", "Boto3/1.34.0_md"), 6, 0, 60.0),
        CountedRow(("blue", "i-1", "", ""), 2, 2, 60.0),
    ]


_HEAD = "# table: fairness, type: string, size:102400, used:3"
_NOW = 1_800_000_000.0


def _entry(key: str, **counted: int) -> str:
    numbers = " ".join(
        f"{name}({40_000})={number}" if name.endswith("rate") else f"{name}={number}"
        for name, number in counted.items()
    )
    return f"0x55d8: key={key} use=1 exp=139000 shard=0 {numbers}"


def _busiest(*tables: list[str]) -> list[Asker]:
    usual, own = ("\n".join([_HEAD, *table]) for table in tables)
    return busiest(usual, own, requests=4000, connections=160, now=_NOW)


def test_who_is_limited_comes_first_and_then_who_is_closest_to_its_limit() -> None:
    usual = [
        _entry("web", conn_cur=3, gpc0_rate=900),
        _entry("idle", conn_cur=161, gpc0_rate=0),
        _entry("flood", conn_cur=64, gpc0_rate=4000),
        # Unknown guests of a network are never limited as an instance is.
        _entry("/blue", conn_cur=200, gpc0_rate=5000),
        # The next two have limits of their own.
        _entry("lately", conn_cur=1, gpc0_rate=9000),
        _entry("before", conn_cur=1, gpc0_rate=9000),
    ]
    own = [
        _entry("lately", gpt0=int(_NOW) - 3, gpc0_rate=20, gpc1_rate=20),
        _entry("before", gpt0=int(_NOW) - 60, gpc0_rate=30, gpc1_rate=30),
    ]
    assert refused_lately("\n".join(own), _NOW) == ["lately"]
    assert _busiest(usual, own) == [
        Asker("flood", None, 4000, 64, limited=True),
        Asker("lately", None, 20, 1, limited=True),
        Asker("idle", None, 0, 161, limited=True),
        Asker(None, "blue", 5000, 200, limited=False),
        Asker("web", None, 900, 3, limited=False),
        Asker("before", None, 30, 1, limited=False),
    ]
    every = [_entry(f"i-{n}", conn_cur=1, gpc0_rate=n) for n in range(99)]
    assert len(_busiest(every, [])) == MOST_SHOWN


@pytest.mark.parametrize(
    ("policy", "usage"),
    [
        (Policy(), Usage(900, 4000, 40, 3, 160, limited=False)),
        (Policy(requests_per_s=1), Usage(20, 40, 40, 3, 160, limited=False)),
        (Policy(burst=7), Usage(7, 7, 10, 3, 160, limited=True)),
        (Policy(connections=2), Usage(900, 4000, 40, 3, 2, limited=True)),
    ],
)
def test_what_an_instance_asks_for_is_beside_the_limit_that_it_has(
    policy: Policy, usage: Usage
) -> None:
    usual = f"{_HEAD}\n{_entry('web', conn_cur=3, gpc0_rate=900)}"
    own = f"{_HEAD}\n{_entry('web', gpt0=int(_NOW) - 60, gpc0_rate=20, gpc1_rate=7)}"
    asked = partial(read_usage, requests_per_s=100, burst=4000, connections=160, now=_NOW)
    assert asked(usual, own, policy=policy) == usage
    assert asked("", "", policy=Policy()) == Usage(0, 4000, 40, 0, 160, limited=False)


# Requests

_LINE = (
    '{"time":1795684004.318,"number":17,"network":"blue","address":"10.0.0.5","instance":"vm-1",'
    '"method":"GET","path":"\\/latest\\/user-data","status":200,"token":"no","refused":"-",'
    '"by":"documents/documents-0","ms":3,"agent":"curl\\/8"}'
)
_PLAIN = b'{"number":1}\n'


def test_a_line_is_read_as_a_request() -> None:
    others = "Proxy guests stopped (cumulated conns: FE: 1, BE: 0).\n1 event dropped\n\n"
    for bad in (_LINE[:-1], "{}", '{"by":"x"}'):
        others += f"{bad}\n"
    assert parse_events(f"{others}{_LINE}\n") == [
        Watched(
            number=17,
            at=1795684004.318,
            network="blue",
            address="10.0.0.5",
            instance="vm-1",
            method="GET",
            path="/latest/user-data",
            status=200,
            answered_by=AnsweredBy.DOCUMENTS,
            milliseconds=3,
        )
    ]


def test_a_request_that_was_none_is_watched_without_a_method() -> None:
    bad = _LINE.replace('"GET"', '"<BADREQ>"').replace('"\\/latest\\/user-data"', '"-"')
    (found,) = parse_events(bad.replace('"vm-1"', '"!"').replace('"ms":3', '"ms":-1'))
    assert (found.method, found.path, found.instance, found.milliseconds) == ("", "", None, 0)


_SERVED = {
    AnsweredBy.CACHE: "guests/<CACHE> documents/<CACHE> guests/<NOSRV> agents/<NOSRV>",
    AnsweredBy.DOCUMENTS: "documents/documents-1 documents/<NOSRV> documents.checked/<NOSRV>",
    AnsweredBy.NOVA: "nova.default/192.0.2.1:8775 nova.default.once/192.0.2.1:8775",
    AnsweredBy.RESOLVER: "resolver/resolver",
    AnsweredBy.CONFLICT: "conflict/<NOSRV>",
}


@pytest.mark.parametrize(
    ("served", "by"), [(one, by) for by, served in _SERVED.items() for one in served.split()]
)
def test_backend_and_server_name_who_answered(served: str, by: AnsweredBy) -> None:
    (found,) = parse_events(_LINE.replace("documents/documents-0", served))
    assert found.answered_by is by
    refused = _LINE.replace("documents/documents-0", "guests/<NOSRV>").replace("200", "400")
    assert parse_events(refused)[0].answered_by is AnsweredBy.HAPROXY


def test_what_haproxy_has_left_out_is_told_and_what_it_says_of_itself_is_not() -> None:
    text = (
        _PLAIN + b"1234 events dropped\0\n1 event dropped\0\nProxy guests stopped (x).\n" + _PLAIN
    )
    read = read_audit(text, _NOW)
    one, many, single, other = map(json.loads, read.text.splitlines())
    assert (one["number"], many["lost"], single["lost"], other["number"]) == (
        1,
        1234,
        1,
        1,
    )
    assert (many["time"], read.requests, read.lost) == (_NOW, 2, 1235)


def test_text_beyond_ascii_stays_and_what_is_none_is_marked() -> None:
    read = read_audit('{"agent":"é 😀 '.encode() + b'\xff\tz"}\n', _NOW)
    assert json.loads(read.text) == {"agent": "é 😀 \ufffd\tz"}


@pytest.mark.parametrize("cut", [0, 40])
def test_a_token_is_no_part_of_a_line_wherever_a_guest_puts_it(cut: int) -> None:
    key = TokenKey(b"k" * 32)
    token = mint_token(key, NetworkId("blue"), InstanceId("vm"), 0, int(_NOW) + 21_600)
    text = token[: len(token) - cut]
    line = f'{{"path":"/latest/{text}/x","agent":"curl {text}"}}\n'
    line_read = json.loads(read_audit(line.encode(), _NOW).text)
    assert line_read == {"path": "/latest/(token)/x", "agent": "curl (token)"}


def _as_haproxy(agent: bytes) -> bytes:
    # Its log format escapes these two; no header has the other three.
    line_read = agent.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return b'{"agent":"' + line_read.translate(None, b"\0\r\n") + b'"}\n'


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_every_line_is_json_whatever_a_guest_says(agents: list[bytes]) -> None:
    read = read_audit(b"".join(map(_as_haproxy, agents)), _NOW)
    lines = read.text.split(b"\n")
    assert lines.pop() == b""
    assert [list(json.loads(line)) for line in lines] == [["agent"]] * len(agents)
    assert (read.requests, read.lost) == (len(agents), 0)


@given(st.binary(max_size=200))
def test_nothing_at_all_makes_it_fail(text: bytes) -> None:
    read_audit(text, _NOW)
