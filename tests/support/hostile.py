"""What a guest may send that means harm, byte for byte: every part of a request perhaps wrong, and several at once.

Sources: RFC 9112 §2.2, §3, §5, §6, §7, §11 (line ends, request lines, fields, lengths, chunks, smuggling); Kettle,
"HTTP Desync Attacks" (obfuscated Transfer-Encoding); OSSA-2013-033, CVE-2013-6419, LP#1865036 (whose headers say who
asks). What names somebody else names the other guest of `support.nova_world`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hypothesis import strategies as st

from support.forgeries import IDENTITY_HEADERS, OTHER_INSTANCE, OTHER_PROJECT
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


_FORGED: Final = tuple(
    line
    for name, value in IDENTITY_HEADERS.items()
    for line in (
        f"{name}: {value}".encode(),
        f"{name.replace('-', '_')}: {value}".encode(),
        f"{name.upper()}:{value}".encode(),
        f"{name} : {value}".encode(),
        f"{name}\t:{value}".encode(),
        f" {name}: {value}".encode(),
        f"{name}:\r\n {value}".encode(),
        f"{name}:\n\t{value}".encode(),
        f"{name}: {value}\rX: y".encode(),
        f"Accept: a\r{name}: {value}".encode(),
        f"Accept: a\n{name}: {value}".encode(),
        f"Accept: a\r\n\t{name}: {value}".encode(),
        f"Accept: a\0{name}: {value}".encode(),
        f"Connection: close, {name}".encode(),
        f"Connection: {name}".encode(),
        f"{name}\0: {value}".encode(),
        f"{name}\xa0: {value}".encode("latin-1"),
        f"{name}: {value}, {value}".encode(),
        f"{name}: \xff{value}".encode("latin-1"),
    )
)

_FRAMED: Final = (
    b"Content-Length: 0",
    b"Content-Length: 4",
    b"Content-Length: 5",
    b"Content-Length: 4, 4",
    b"Content-Length: 4, 5",
    b"Content-Length: +4",
    b"Content-Length: -4",
    b"Content-Length: 0x4",
    b"Content-Length: 4 4",
    b"Content-Length: 04",
    b"Content-Length: 4_0",
    b"Content-Length:",
    b"Content-Length : 4",
    b"Content_Length: 400",
    b"Content-Length: 18446744073709551616",
    b"Content-Length: 99999999999999999999999999",
    b"Content-Length\0: 4",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: Chunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding: chunked\t",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding:\r\n chunked",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: chunked;a=b",
    b"Transfer-Encoding: ,chunked",
    b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
    b"Transfer_Encoding: chunked",
    b"X: y\nTransfer-Encoding: chunked",
    b"X: y\rTransfer-Encoding: chunked",
    b" Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\0",
    b"TE: trailers, chunked",
    b"Trailer: X-Instance-ID",
)

_ODD: Final = (
    b"Host: nova",
    b"Host: 169.254.169.254, nova",
    b"Host: 169.254.169.254\x00",
    b"Host: a b",
    b"Host: a/b?c",
    b"Host:",
    b"Hos\xc3\xb6t: x",
    b"Connection: close",
    b"Connection: keep-alive, upgrade",
    b"Connection: Host, Content-Length, Transfer-Encoding, X-Instance-ID",
    b"Proxy-Connection: keep-alive",
    b"Keep-Alive: timeout=0",
    b"Upgrade: h2c",
    b"Upgrade: websocket",
    b"HTTP2-Settings: AAMAAABkAAQAAP__",
    b"Expect: 100-continue",
    b"Expect: x",
    b"Range: bytes=0-0,1-1,2-",
    b"If-None-Match: *",
    b"Accept: " + b"a" * 3_000,
    b"User-Agent: " + b"(" * 2_000,
    b"If-" + b"x" * 200 + b": y",
    b"Cookie: " + b"c" * 9_000,
    b"no colon at all",
    b": no name",
    b"(): x",
    b"\x7f: x",
    b"\xff\xfe: \xfd",
    b"\0",
    b"X: " + bytes(range(1, 9)),
    b"X-aws-ec2-metadata-token: " + FOREIGN_TOKEN,
    b"X-aws-ec2-metadata-token: " + FOREIGN_TOKEN + b"\r\nX-aws-ec2-metadata-token: x",
    b"X-aws-ec2-metadata-token: " + FOREIGN_TOKEN + b", " + FOREIGN_TOKEN,
    b"X-aws-ec2-metadata-token:\r\n " + FOREIGN_TOKEN,
    b"X_aws_ec2_metadata_token: " + FOREIGN_TOKEN,
    b"X-aws-ec2-metadata-token : " + FOREIGN_TOKEN,
    b"X-aws-ec2-metadata-token: %s|green|green-5|0",
    b"X-aws-ec2-metadata-token: 00000000.9999999999." + b"A" * 43,
    b"X-aws-ec2-metadata-token: @current.9999999999." + b"A" * 43,
    b"X-aws-ec2-metadata-token: " + b"a" * 8_000,
    b"X-aws-ec2-metadata-token-ttl-seconds: 60",
    b"X-aws-ec2-metadata-token-ttl-seconds: 60\r\nX-aws-ec2-metadata-token-ttl-seconds: 61",
    b"X-aws-ec2-metadata-token-ttl-seconds: %[src]",
)

_METHODS: Final = (
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"OPTIONS",
    b"PATCH",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"get",
    b"GET\t",
    b"GET\0",
    b"G\xcbT",
    b"",
    b"A" * 300,
    b"X-Instance-ID:",
)

_TARGETS: Final = (
    b"/latest/api/token",
    b"/openstack/latest/password",
    b"/openstack/2013-04-04/password",
    b"*",
    b"green/10.0.0.5",
    b"http://green-5/latest/user-data",
    b"http://green-5|0123456789abcdef/latest/user-data",
    b"http://green/10.0.0.5",
    b"/green-5|0123456789abcdef/latest/user-data",
    b"/%7C|!-/latest?a|b",
    b"10.0.0.6:80",
    b"unix:/run/imdsproxy/admin.sock",
    b"http://127.0.0.1:9465/metrics",
    b"/livez",
    b"/readyz",
    b"/metrics",
    b"/v1/status",
    b"/haproxy?stats",
    b"/;csv",
    b"/%[var(txn.record)]",
    b"/latest/user-data\nX-Instance-ID: " + OTHER_INSTANCE.encode(),
    b"/latest/user-data%0d%0aX-Instance-ID:%20" + OTHER_INSTANCE.encode(),
    b"/latest user-data",
    b"/\xff",
    b"/" + b"a" * 7_000,
    b"/" + b"b" * 20_000,
    b"/?" + b"%2F" * 2_500,
    b"",
)

_AUTHORITIES: Final = (
    b"169.254.169.254",
    b"green-5",
    b"green-5|0123456789abcdef",
    b"green",
    b"nova:8775",
    b"127.0.0.1:80",
    b"[fe80::a9fe:a9fe]",
)
"""For whom a request says that it is."""

_VERSIONS: Final = (
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/1.2",
    b"HTTP/1.11",
    b"HTTP/2.0",
    b"HTTP/9.9",
    b"HTTP/1",
    b"HTTP/1.",
    b"HTTP/-1.1",
    b"http/1.1",
    b"HTTQ/1.1",
    b"RTSP/1.0",
    b"HTTP/1.1 ",
    b"HTTP/1.1 x",
    b"HTTP/1.1\r",
    b"",
)

_SMUGGLED: Final = (
    b"GET /smuggled HTTP/1.1\r\nHost: x\r\nX-Instance-ID: "
    + OTHER_INSTANCE.encode()
    + b"\r\nX-Tenant-ID: "
    + OTHER_PROJECT.encode()
    + b"\r\n\r\n"
)

_BODIES: Final = (
    b"abcd",
    b"abcde",
    b"4\r\nabcd\r\n0\r\n\r\n",
    b"0\r\n\r\n",
    b"0\r\n\r\n" + _SMUGGLED,
    b"0\r\nX-Instance-ID: " + OTHER_INSTANCE.encode() + b"\r\n\r\n",
    b"4;a=b\r\nabcd\r\n0;c\r\n\r\n",
    b'4;"\r\n\r\n' + _SMUGGLED,
    b"4\nabcd\n0\n\n" + _SMUGGLED,
    b"4\r\nabcd0\r\n\r\n",
    b"4\r\nabcdXX0\r\n\r\n" + _SMUGGLED,
    b"0x4\r\nabcd\r\n0\r\n\r\n",
    b"+4\r\nabcd\r\n0\r\n\r\n",
    b"-4\r\nabcd\r\n0\r\n\r\n",
    b"4 \r\nabcd\r\n0\r\n\r\n",
    b"00000000000000004\r\nabcd\r\n0\r\n\r\n",
    b"fffffffffffffffff\r\nabcd\r\n",
    b"g\r\n",
    b"\r\n",
    b"ab\r\n\r\n" + _SMUGGLED,
    b"%x\r\n" % len(_SMUGGLED) + _SMUGGLED + b"\r\n0\r\n\r\n",
    _SMUGGLED,
    _SMUGGLED + _SMUGGLED,
    b"\0" * 2_000,
)


def _request(
    start: tuple[bytes, bytes, bytes], lines: list[bytes], body: bytes = b"", ends: bytes = b"\r\n"
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
    start = (
        draw(
            _mostly(
                draw(st.sampled_from((b"GET", b"GET", b"POST", b"HEAD"))),
                st.sampled_from(_METHODS),
                times=8,
            )
        ),
        draw(_mostly(b"/latest/user-data", targets, times=2)),
        draw(_mostly(b"HTTP/1.1", st.sampled_from(_VERSIONS), times=12)),
    )
    host = draw(
        _mostly(b"Host: 169.254.169.254", st.sampled_from((b"Host: evil.example", b"")), times=6)
    )
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


def _by_hand() -> tuple[Harm, ...]:
    lines = (*_FORGED, *_FRAMED, *_ODD)
    host = b"Host: 169.254.169.254"
    get = (b"GET", b"/latest/user-data", b"HTTP/1.1")
    post = (b"POST", b"/openstack/latest/password", b"HTTP/1.1")
    found = [_request(get, [host, line]) for line in lines]
    found += [
        _request(post, [host, line], body)
        for line in _FRAMED
        for body in (b"abcd", b"4\r\nabcd\r\n0\r\n\r\n" + _SMUGGLED)
    ]
    found += [
        _request(post, [host, *framing], body)
        for framing in (
            (b"Content-Length: 4", b"Transfer-Encoding: chunked"),
            (b"Transfer-Encoding: chunked", b"Content-Length: 4"),
            (b"Transfer-Encoding: chunked",),
            (b"Content-Length: %d" % len(_SMUGGLED),),
        )
        for body in _BODIES
    ]
    found += [_request((one, *get[1:]), [host]) for one in _METHODS]
    found += [_request((b"GET", one, b"HTTP/1.1"), [host]) for one in _TARGETS]
    found += [_request((*get[:2], one), [host]) for one in _VERSIONS]
    found += [
        _request((method, b"http://%s%s" % (name, path), version), lines)
        for name in _AUTHORITIES
        for path in (
            b"/latest/user-data",
            b"/openstack/latest/meta_data.json",
            b"",
            b"?x",
            b"//latest/user-data",
        )
        for version in (b"HTTP/1.1", b"HTTP/1.0")
        for method in (b"GET", b"POST")
        for lines in ([b"Host: " + name], [])
    ]
    whole = _request(get, [host, b"Accept: a/b"])
    cut = [Harm(whole[:length], whole=False) for length in range(0, len(whole), 3)]
    return (
        *(Harm(one, whole=_is_whole(one)) for one in found),
        *cut,
        Harm(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", whole=True),
        Harm(b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(120), whole=False),
        Harm(b"PROXY TCP4 10.0.0.6 169.254.169.254 1 80\r\n" + whole, whole=True),
        Harm(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + whole, whole=False),
        Harm(b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", whole=True),
        Harm(b"GET / HTTP/1.1\r\n" + b"Accept: a\r\n" * 500 + b"\r\n", whole=True),
        Harm(b"GET / HTTP/1.1\r\nAccept: " + b"a" * 200_000 + b"\r\n\r\n", whole=True),
        Harm(whole * 40, whole=True),
    )  # fmt: skip


HARMFUL: Final = _by_hand()
"""Each kind of harm by itself."""
