"""What a guest may send that means harm, byte for byte: every part of a request perhaps wrong, and several at once.

Parts are those of `support.forgeries`, where each is tried by itself, and others. Sources: RFC 9112 §2.2, §3, §5, §6,
§7, §11 (line ends, request lines, fields, lengths, chunks, smuggling); Kettle, "HTTP Desync Attacks" (obfuscated
Transfer-Encoding); OSSA-2013-033, CVE-2013-6419, LP#1865036 (whose headers say who asks). What names somebody else
names the other guest of `support.nova_world`.
"""

from dataclasses import dataclass
from typing import Final

from hypothesis import strategies as st

from support.forgeries import FORGERIES, OTHER_INSTANCE, OTHER_PROJECT, TARGETS
from support.spellings import spellings

FOREIGN_TOKEN: Final = b"@ANOTHER-GUESTS-TOKEN@"
"""Stands for a token that another guest was given; `Harm.data_with` puts one there."""


@dataclass(frozen=True, slots=True)
class Harm:
    """All that a guest sends over one connection, before it says that no more comes.

    Attributes:
        whole: The first request is there to its end, so that there must be an answer.
    """

    data: bytes
    whole: bool

    def data_with(self, token: str) -> bytes:
        return self.data.replace(FOREIGN_TOKEN, token.encode())


_ALL: Final = tuple(one.data for one in (*FORGERIES, *TARGETS))
_HEADS, _ENDS = zip(*(one.data.split(b"\r\n\r\n", 1) for one in FORGERIES), strict=True)
_FORGED: Final = tuple(dict.fromkeys(head.split(b"\r\n", 2)[-1] for head in _HEADS))

_FRAMED: Final = (
    *(b"Content-Length: " + one for one in (b"4", b"5", b"4, 4", b"0x4", b"4 4", b"04", b"4_0", b"9" * 26)),
    *(b"Content-Length : 4", b"Content-Length\0: 4", b"Content_Length: 400"),
    *(
        b"Transfer-Encoding:" + one
        for one in (
            *(b" chunked", b"\tchunked", b" chunked\t", b" \x0bchunked", b"\r\n chunked", b" chunked\0"),
            *(b" identity, chunked", b" gzip, chunked", b' "chunked"', b" chunked;a=b", b" ,chunked"),
            b" x\r\nTransfer-Encoding: chunked",
        )
    ),
    *(one + b"Transfer-Encoding: chunked" for one in (b"X: y\n", b"X: y\r", b" ")),
    b"Trailer: X-Instance-ID",
)  # fmt: skip

_TOKEN: Final = b"X-aws-ec2-metadata-token"
_ODD: Final = (
    *(b"Host: " + one for one in (b"169.254.169.254, nova", b"169.254.169.254\0", b"a b", b"a/b?c")),
    b"Connection: Host, Content-Length, Transfer-Encoding, X-Instance-ID",
    b"Range: bytes=0-0,1-1,2-",
    *(b"Accept: " + b"a" * 3_000, b"If-" + b"x" * 200 + b": y", b"Cookie: " + b"c" * 9_000),
    *(b"(): x", b"\x7f: x", b"\xff\xfe: \xfd", b"\0", b"X: " + bytes(range(1, 9))),
    *(_TOKEN + b": " + FOREIGN_TOKEN + one for one in (b"", b"\r\n" + _TOKEN + b": x", b", " + FOREIGN_TOKEN)),
    *(_TOKEN + one + FOREIGN_TOKEN for one in (b":\r\n ", b" : ")),
    _TOKEN.replace(b"-", b"_") + b": " + FOREIGN_TOKEN,
    *(_TOKEN + b": " + one + b".9999999999." + b"A" * 43 for one in (b"00000000", b"@current")),
    *(_TOKEN + b": %s|green|green-5|0", _TOKEN + b": " + b"a" * 8_000),
    *(_TOKEN + b"-ttl-seconds: " + one for one in (b"60", b"%[src]", b"60\r\n" + _TOKEN + b"-ttl-seconds: 61")),
)  # fmt: skip

_METHODS: Final = (
    *(b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT", b"PRI", b"get"),
    *(b"GET\t", b"GET\0", b"G\xcbT", b"", b"A" * 300, b"X-Instance-ID:"),
)  # fmt: skip

_TARGETS: Final = (
    *(one.data.partition(b" ")[2].partition(b" HTTP/1.1\r\n")[0] for one in TARGETS),
    *(
        b"/latest/api/token",
        b"/openstack/latest/password",
        b"green/10.0.0.5",
        b"http://green/10.0.0.5",
    ),
    *(b"http://green-5/latest/user-data", b"/green-5|0123456789abcdef/latest/user-data"),
    *(b"10.0.0.6:80", b"unix:/run/imdsproxy/admin.sock", b"http://127.0.0.1:9465/metrics"),
    *(b"/metrics", b"/v1/status", b"/haproxy?stats", b"/;csv", b"/%[var(txn.record)]", b""),
)

_AUTHORITIES: Final = (
    *(b"169.254.169.254", b"green-5", b"green-5|0123456789abcdef", b"green", b"nova:8775"),
    *(b"127.0.0.1:80", b"[fe80::a9fe:a9fe]"),
)
"""For whom a request says that it is."""

_VERSIONS: Final = (
    *(b"HTTP/1.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.11", b"HTTP/2.0", b"HTTP/1", b"HTTP/1.", b"HTTP/-1.1"),
    *(b"http/1.1", b"RTSP/1.0", b"HTTP/1.1 ", b"HTTP/1.1 x", b"HTTP/1.1\r", b""),
)  # fmt: skip

_SMUGGLED: Final = (
    b"GET /smuggled HTTP/1.1\r\nHost: x\r\nX-Instance-ID: %s\r\nX-Tenant-ID: %s\r\n\r\n"
    % (OTHER_INSTANCE.encode(), OTHER_PROJECT.encode())
)
_BODIES: Final = (
    *filter(None, dict.fromkeys(_ENDS)),
    *(b"abcd", b"4\r\nabcd\r\n0\r\n\r\n", b"0\r\n\r\n", b"\r\n", b"\0" * 2_000),
    *(b"4\r\nabcd0\r\n\r\n", b"4 \r\nabcd\r\n0\r\n\r\n", b"0" * 16 + b"4\r\nabcd\r\n0\r\n\r\n"),
    *(
        before + _SMUGGLED
        for before in (
            *(b"", _SMUGGLED, b"0\r\n\r\n", b'4;"\r\n\r\n', b"4\nabcd\n0\n\n", b"ab\r\n\r\n"),
            b"4\r\nabcdXX0\r\n\r\n",
        )
    ),
)


def _request(
    start: tuple[bytes, bytes, bytes], lines: list[bytes], body: bytes, ends: bytes
) -> bytes:
    """What begins with method, target and version; those that are empty are left out."""
    return ends.join((b" ".join(filter(None, start)), *lines, b"", b"")) + body


def _mostly(usual: bytes, odd: st.SearchStrategy[bytes], *, times: int) -> st.SearchStrategy[bytes]:
    """The usual, but once in so many times."""
    return st.integers(0, times - 1).flatmap(lambda at: odd if at == times - 1 else st.just(usual))


_LINES: Final = st.one_of(
    *[st.sampled_from(_FORGED)] * 4,
    *[st.sampled_from(_FRAMED)] * 2,
    *[st.sampled_from(_ODD)] * 2,
    st.binary(max_size=20),
)


@st.composite
def _requests(draw: st.DrawFn) -> bytes:
    """One request. Most of its parts are right: where all are wrong, only the first one is looked at."""
    spelt = spellings().map(lambda text: text.encode("latin-1"))
    targets = st.one_of(spelt, st.sampled_from(_TARGETS))
    method = draw(st.sampled_from((b"GET", b"GET", b"POST", b"HEAD")))
    start = (
        draw(_mostly(method, st.sampled_from(_METHODS), times=8)),
        draw(_mostly(b"/latest/user-data", targets, times=2)),
        draw(_mostly(b"HTTP/1.1", st.sampled_from(_VERSIONS), times=12)),
    )
    hosts = st.sampled_from((b"Host: evil.example", b""))
    host = draw(_mostly(b"Host: 169.254.169.254", hosts, times=6))
    if start[1].startswith(b"/") and draw(st.integers(0, 7)) == 7:
        name = draw(st.sampled_from(_AUTHORITIES))
        start, host = (start[0], b"http://" + name + start[1], start[2]), b"Host: " + name
    lines = [one for one in (host, *draw(st.lists(_LINES, max_size=3))) if one]
    ends = draw(_mostly(b"\r\n", st.sampled_from((b"\n", b"\r", b"\r\r\n", b"\n\r")), times=16))
    body = draw(_mostly(b"", st.sampled_from(_BODIES), times=3))
    return _request(start, lines, body, ends)


@st.composite
def harms(draw: st.DrawFn) -> Harm:
    """One or several requests, perhaps cut off, or none at all."""
    kind = draw(st.integers(0, 23))
    if kind == 0:
        return Harm(draw(st.binary(max_size=200)), whole=False)
    requests = draw(st.lists(_requests(), min_size=1, max_size=1 if kind < 20 else 3))
    data = b"".join(requests)
    if kind in (1, 2):
        return Harm(data[: draw(st.integers(0, len(data)))], whole=False)
    before = draw(_mostly(b"", st.sampled_from((b"\r\n", b"\n\n", b"\0", b" ")), times=16))
    return Harm(before + data, whole=_is_whole(requests[0]) and not before)


def _is_whole(request: bytes) -> bool:
    """Whether there is a head to its end, and nothing says that a body follows."""
    head, end, _ = request.partition(b"\r\n\r\n")
    return bool(end) and not any(word in head.lower() for word in (b"content-length", b"chunked"))


_WHOLE: Final = b"GET /latest/user-data HTTP/1.1\r\nHost: x\r\nAccept: a/b\r\n\r\n"

HARMFUL: Final = (
    *(Harm(one, whole=_is_whole(one)) for one in _ALL),
    *(Harm(_WHOLE[:length], whole=False) for length in range(0, len(_WHOLE), 3)),
    Harm(b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(120), whole=False),
    Harm(b"PROXY TCP4 10.0.0.6 169.254.169.254 1 80\r\n" + _WHOLE, whole=True),
    Harm(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + _WHOLE, whole=False),
    Harm(b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", whole=True),
    Harm(b"GET / HTTP/1.1\r\n" + b"Accept: a\r\n" * 500 + b"\r\n", whole=True),
    Harm(b"GET / HTTP/1.1\r\nAccept: " + b"a" * 200_000 + b"\r\n\r\n", whole=True),
    Harm(_WHOLE * 40, whole=True),
)
"""Each kind of harm by itself; what Nova sees of most of it is in test_nova_endpoints.py."""
