"""What guests may send to be taken for somebody else, or to reach another document, and what Nova may see of it.

Each case is the bytes that a guest sends, and the requests that Nova must receive: exactly these, with the
identity headers that the proxy sets by itself, and nothing else. Where Nova must receive nothing, the proxy
answers by itself. Sources: RFC 9110, RFC 9112, RFC 3986; OSSA-2013-033, CVE-2013-6419, LP#1865036, and the
ways in which Neutron's agents and Nova's `nova/api/metadata/handler.py` read these headers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

OTHER_INSTANCE: Final = "bbbbbbbb-0000-4000-8000-00000000000b"
OTHER_PROJECT: Final = "22222222222222222222222222222222"
OTHER_NETWORK: Final = "green"
OTHER_ADDRESS: Final = "10.0.0.6"

HOST: Final = b"169.254.169.254"
TARGET: Final = b"/openstack/latest/meta_data.json"
PASSWORD: Final = b"/openstack/2013-04-04/password"


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that Nova receives.

    Attributes:
        headers: Those of the guest that are among it, names in lower case; length and coding of a body
            are not: how it is framed is the proxy's business.
    """

    method: str = "GET"
    target: bytes = TARGET
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Forgery:
    """Something that a guest sends.

    Attributes:
        data: All of it.
        seen: What Nova receives of it; nothing where the proxy answers by itself, with 4xx.
    """

    name: str
    data: bytes
    seen: tuple[Seen, ...] = (Seen(),)


@dataclass(frozen=True, slots=True)
class EncodedPath:
    """A request target.

    Attributes:
        arrives: As Nova receives it; `None` where the proxy answers by itself, with 4xx.
    """

    target: bytes
    arrives: bytes | None
    method: str = "GET"
    host: bytes = HOST

    @property
    def name(self) -> str:
        return f"{self.method} {self.target[:60]!r} of {self.host.decode()}"

    @property
    def data(self) -> bytes:
        return b"%s %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (
            self.method.encode(),
            self.target,
            self.host,
        )


TOKEN: Final = "X-aws-ec2-metadata-token"
"""One that we have not given is refused: the only one of these headers that a guest may send, and it says nothing."""

IDENTITY_HEADERS: Final[Mapping[str, str]] = {
    "X-Instance-ID": OTHER_INSTANCE,
    "X-Instance-ID-Signature": "ab" * 32,
    "X-Tenant-ID": OTHER_PROJECT,
    "X-Forwarded-For": OTHER_ADDRESS,
    "X-Metadata-Provider": "provider",
    "X-Metadata-Provider-Signature": "cd" * 32,
    "X-Neutron-Network-ID": OTHER_NETWORK,
    "X-Neutron-Router-ID": "cccccccc-0000-4000-8000-00000000000c",
    "X-OVN-Network-ID": OTHER_NETWORK,
    "X-Imdsproxy-Network": OTHER_NETWORK,
    "X-Imdsproxy-Address": OTHER_ADDRESS,
    "X-Imdsproxy-Instance": OTHER_INSTANCE,
    "X-Imdsproxy-Revision": "0123456789abcdef",
    "X-Imdsproxy-Record": f"{OTHER_INSTANCE}|0123456789abcdef",
    "X-Imdsproxy-Scope": "router",
    "X-Imdsproxy-Target": "http://127.0.0.1:1/",
    "Forwarded": f"for={OTHER_ADDRESS};host=nova;proto=https",
    "Via": "1.1 nova",
    "X-Real-IP": OTHER_ADDRESS,
    "X-Client-IP": OTHER_ADDRESS,
    "X-Forwarded-Host": "nova",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/prefix",
    "X-Original-URL": "/latest/user-data",
    "X-Rewrite-URL": "/latest/user-data",
    "X-HTTP-Method-Override": "DELETE",
    TOKEN: "AQAEAMfoo==",
    "X-aws-ec2-metadata-token-ttl-seconds": "21600",
    "X-Auth-Token": "gAAAAABfoo",
    "X-Roles": "admin",
    "X-Identity-Status": "Confirmed",
    "Authorization": "Basic YTpi",
    "Cookie": "a=b",
    "Accept-Encoding": "gzip",
    "Max-Forwards": "0",
    "Metadata-Flavor": "Google",
}
"""What says who somebody is, or is believed by somebody on the way; Nova may see none of them from a guest."""


def _spelled(name: bytes, value: bytes) -> dict[str, tuple[bytes, ...]]:
    """Ways to write a header down, in each of which some program on the way might know it again."""
    plain = name + b": " + value
    one_underscore = name.replace(b"-", b"_", 1)
    return {
        "as documented": (plain,),
        "in lower case": (plain.lower(),),
        "in upper case": (name.upper() + b": " + value,),
        "with underscores": (name.replace(b"-", b"_") + b": " + value,),
        "with one underscore": (one_underscore + b": " + value,),
        "with underscores beside it": (plain, name.upper().replace(b"-", b"_") + b": " + value),
        "twice": (plain, plain),
        "twice with other values": (plain, name + b": x", name.upper() + b": y"),
        "comma-joined": (name + b": " + value + b", " + value,),
        "empty": (name + b":",),
        "empty, then with a value": (name + b":", plain),
        "without a blank": (name + b":" + value,),
        "after a tab": (name + b":\t" + value,),
        "with blanks after it": (plain + b" \t ",),
        "in quotes": (name + b': "' + value + b'"',),
        "folded": (name + b":", b" " + value),
        "folded behind an allowed one": (plain, b"\t" + value),
        "with bytes above ASCII": (plain + b"\xff\xfe",),
        "listed in Connection": (plain, b"Connection: keep-alive, " + name),
        "only listed in Connection": (b"Connection: " + name.lower(),),
        "listed in Connection first": (b"Connection: close, " + name, plain),
        "listed in Proxy-Connection": (b"Proxy-Connection: " + name, plain),
    }


_UNDERSCORED: Final = ("with underscores", "with one underscore")
_NO_HEADER: Final = (*_UNDERSCORED, "only listed in Connection")
"""What is not taken for the header."""

SPELLINGS: Final = tuple(_spelled(b"X", b"y"))


def request(
    *lines: bytes, method: bytes = b"GET", target: bytes = TARGET, body: bytes = b""
) -> bytes:
    """A request with a Host and these lines."""
    head = (method + b" " + target + b" HTTP/1.1", b"Host: " + HOST, *lines)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _post(*lines: bytes, body: bytes) -> bytes:
    return request(*lines, method=b"POST", target=PASSWORD, body=body)


def _spellings() -> Iterator[Forgery]:
    for name, value in IDENTITY_HEADERS.items():
        for spelling, lines in _spelled(name.encode(), value.encode()).items():
            if "-" in name or spelling not in _UNDERSCORED:
                refused = name == TOKEN and spelling not in _NO_HEADER
                seen = () if refused else (Seen(),)
                yield Forgery(f"{name} {spelling}", request(*lines), seen)


_MALFORMED: Final = {
    "a blank before the colon": (b"X-Instance-ID : " + OTHER_INSTANCE.encode(),),
    "a tab before the colon": (b"X-Instance-ID\t: " + OTHER_INSTANCE.encode(),),
    "a blank before the name": (b"X: y", b"a X-Instance-ID: " + OTHER_INSTANCE.encode()),
    "no name": (b": " + OTHER_INSTANCE.encode(),),
    "no colon": (b"X-Instance-ID",),
    "a NUL in the name": (b"X-Instance-ID\0: x",),
    "a NUL in the value": (b"X-Instance-ID: \0x",),
    "bytes above ASCII in the name": (b"X-Instance-\xe9D: x",),
    "a return in the value": (b"Accept: a\rX-Instance-ID: " + OTHER_INSTANCE.encode(),),
    "two hosts": (b"Host: nova",),
    "two lengths": (b"Content-Length: 0", b"Content-Length: 5"),
    "lengths in a list": (b"Content-Length: 0, 5",),
    "a signed length": (b"Content-Length: +0",),
    "a negative length": (b"Content-Length: -1",),
    "a hexadecimal length": (b"Content-Length: 0x0",),
    "an empty length": (b"Content-Length:",),
    "a length of 2 to the power of 64": (b"Content-Length: 18446744073709551616",),
    "a length of one more": (b"Content-Length: 18446744073709551617",),
    "a coding nobody knows": (b"Transfer-Encoding: xchunked",),
    "chunked twice": (b"Transfer-Encoding: chunked, chunked",),
    "chunked, then something else": (b"Transfer-Encoding: chunked, identity",),
    "chunked after a blank before the colon": (b"Transfer-Encoding : chunked",),
}

_OTHERS: Final = (
    f"X-Instance-ID: {OTHER_INSTANCE}".encode(),
    f"X-Tenant-ID: {OTHER_PROJECT}".encode(),
)
_BODY: Final = b"a password"
_CHUNKED: Final = b"a\r\na password\r\n0\r\n"
_SMUGGLED: Final = request(*_OTHERS, target=b"/smuggled")
_SENT: Final = Seen("POST", PASSWORD, body=_BODY)


_CHUNKS: Final = b"Transfer-Encoding: chunked"
_LENGTH: Final = b"Content-Length: 10"
_BEYOND: Final = b"\r\n".join(_OTHERS) + b"\r\n\r\n"
_TWO: Final = (Seen(), Seen(target=b"/smuggled"))
_LONG: Final = b"Content-Length: %d" % len(_SMUGGLED)


def _framing() -> Iterator[Forgery]:
    """Bodies whose length two programs might read differently."""
    for name, data in (
        ("a body", _post(_LENGTH, *_OTHERS, body=_BODY)),
        ("a body in chunks", _post(_CHUNKS, *_OTHERS, body=_CHUNKED + b"\r\n")),
        ("trailers", _post(_CHUNKS, b"Trailer: X-Instance-ID, X-Tenant-ID", b"TE: trailers", body=_CHUNKED + _BEYOND)),
        ("trailers that nobody announced", _post(_CHUNKS, body=_CHUNKED + _BEYOND[:-2] + b"X_Instance_ID: x\r\n\r\n")),
        *((f"{name} in a trailer", _post(_CHUNKS, body=_CHUNKED + f"{name}: {value}\r\n\r\n".encode()))
          for name, value in IDENTITY_HEADERS.items()),
        ("chunk extensions",
         _post(_CHUNKS, body=b"a;x-instance-id=" + b"b" * 36 + b"\r\na password\r\n0;a=b\r\n\r\n")),
        ("chunks in upper case", _post(_CHUNKS.upper(), body=_CHUNKED + b"\r\n")),
        ("a length that is said twice", _post(_LENGTH, _LENGTH, body=_BODY)),
        ("a length with zeros", _post(b"Content-Length: 0010", body=_BODY)),
        ("an underscored coding", _post(_LENGTH, b"Transfer_Encoding: chunked", body=_BODY)),
        ("a length and chunks", _post(b"Content-Length: 4", _CHUNKS, body=_CHUNKED + b"\r\n" + _SMUGGLED)),
        ("chunks and a length",
         _post(_CHUNKS, b"Content-Length: %d" % (len(_SMUGGLED) + 22), body=_CHUNKED + b"\r\n" + _SMUGGLED)),
    ):  # fmt: skip
        yield Forgery(name, data, (_SENT,))
    for name, data, seen in (
        ("trailers of a GET", request(_CHUNKS, body=_CHUNKED + _BEYOND), (Seen(body=_BODY),)),
        ("trailers of nothing", request(_CHUNKS, body=b"0\r\n" + _BEYOND), (Seen(),)),
        ("an underscored length", request(_LONG.replace(b"-", b"_"), body=_SMUGGLED), _TWO),
        ("a request within a body", _post(_LONG, body=_SMUGGLED), (Seen("POST", PASSWORD, body=_SMUGGLED),)),
        ("a request behind another", request() + _SMUGGLED, _TWO),
        ("a body of a GET", request(_LONG, body=_SMUGGLED), (Seen(body=_SMUGGLED),)),
        *((f"{name} of a chunk", _post(_CHUNKS, body=size + b"\r\na password\r\n0\r\n\r\n"), ())
          for name, size in (("a size of words", b"zz"), ("a negative size", b"-1"), ("a size with a sign", b"+a"),
                             ("a hexadecimal size", b"0xa"), ("an endless size", b"f" * 17))),
    ):  # fmt: skip
        yield Forgery(name, data, seen)


def _switches() -> Iterator[Forgery]:
    """Requests to speak another protocol, or to wait."""
    upgrade = b"Connection: Upgrade"
    for name, data in (
        ("an upgrade to h2c",
         request(upgrade + b", HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")),
        ("an upgrade to WebSocket", request(upgrade, b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
                                            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")),
        ("an upgrade to TLS", request(upgrade, b"Upgrade: TLS/1.2")),
        ("TE", request(b"TE: trailers, deflate", b"Connection: TE")),
        ("keep-alive", request(b"Keep-Alive: timeout=1000", b"Connection: keep-alive")),
        ("an expectation without a body", request(b"Expect: 100-continue")),
        ("an unknown expectation", request(b"Expect: x-instance-id")),
        ("HTTP/1.2", b"GET " + TARGET + b" HTTP/1.2\r\nHost: x\r\n\r\n"),
    ):  # fmt: skip
        yield Forgery(name, data)
    for name, data in (
        ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"),
        ("CONNECT", b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n"),
        ("TRACE", request(*_OTHERS, method=b"TRACE")),
        ("a method in lower case", request(method=b"get")),
        ("HTTP/0.9", b"GET " + TARGET + b"\r\n\r\n"),
    ):
        yield Forgery(name, data, ())
    expected = _post(b"Expect: 100-continue", _LENGTH, body=_BODY)
    yield Forgery("an expectation with its body", expected, (_SENT,))
    # HAProxy speaks to a server as old as the guest does, and says itself that it keeps connections.
    kept = (Seen(headers=((b"connection", b"keep-alive"),)),)
    for name, host in (("HTTP/1.0", b""), ("HTTP/1.0 with a Host", b"Host: nova:8775\r\n")):
        yield Forgery(name, b"GET " + TARGET + b" HTTP/1.0\r\n" + host + b"\r\n", kept)


def _hosts() -> Iterator[Forgery]:
    """Hosts: Nova must never be told the guest's word."""
    for name, host in {
        "Nova's own host": b"127.0.0.1:8775",
        "another host": b"nova.internal",
        "a host in brackets": b"[fe80::a9fe:a9fe]",
        "an empty host": b"",
        "a host in upper case": b"METADATA.GOOGLE.INTERNAL",
    }.items():
        data = b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (TARGET, host)
        yield Forgery(name, data)
    yield Forgery("no host", b"GET " + TARGET + b" HTTP/1.1\r\nAccept: a/b\r\n\r\n",
                  (Seen(headers=((b"accept", b"a/b"),)),))  # fmt: skip


_ALLOWED: Final = (
    (b"Accept", b"text/plain, */*;q=0.1"),
    (b"User-Agent", b"Cloud-Init/25.1 \xe4\xff"),
    (b"If-None-Match", b'"abc", W/"d"'),
    (b"If-Modified-Since", b"Thu, 01 Jan 1970 00:00:00 GMT"),
    (b"If-Range", b'"abc"'),
    (b"Range", b"bytes=0-1,5-"),
    (b"Content-Type", b"application/x-www-form-urlencoded; charset=utf-8"),
)


def _allowed() -> Iterator[Forgery]:
    """What passes, so that nothing else rides on it."""
    lines = tuple(name + b": " + value for name, value in _ALLOWED)
    pairs = tuple((name.lower(), value) for name, value in _ALLOWED)
    yield Forgery("all that is allowed", request(*lines), (Seen(headers=pairs),))
    for name, value in _ALLOWED:
        seen = Seen(headers=((name.lower(), value),))
        yield Forgery(f"{name.decode()} alone", request(name + b": " + value), (seen,))
        yield Forgery(
            f"{name.decode()} in upper case", request(name.upper() + b":" + value), (seen,)
        )
        underscored = name.replace(b"-", b"_")
        if underscored != name:
            yield Forgery(f"{name.decode()} with underscores", request(underscored + b": " + value))
    yield Forgery(
        "Acceptance", request(b"Acceptance: x", b"X-Accept: y", b"If: x", b"If-: y", b"Ranges: z")
    )
    yield Forgery(
        "a forgery folded into what is allowed",
        request(b"Accept: a/b", b" X-Instance-ID: " + OTHER_INSTANCE.encode()),
        (Seen(headers=((b"accept", b"a/b   X-Instance-ID: " + OTHER_INSTANCE.encode()),)),),
    )


def _forgeries() -> Iterator[Forgery]:
    yield Forgery("nothing", request())
    yield from _spellings()
    yield Forgery(
        "all at once",
        request(
            *(
                f"{name}: {value}".encode()
                for name, value in IDENTITY_HEADERS.items()
                if name != TOKEN
            )
        ),
    )
    for name, lines in _MALFORMED.items():
        yield Forgery(name, request(*lines), ())
    yield from _framing()
    yield from _switches()
    yield from _hosts()
    yield from _allowed()


FORGERIES: Final = tuple(_forgeries())
"""Every one of them, for a guest whose own request is for `TARGET` or `PASSWORD`."""


_ENCODED: Final = rb"""
    /openstack%2Flatest%2fmeta_data.json /openstack/latest/a%3Fb%3f=c /openstack/%252Flatest/%25
    /openstack/latest/%2e%2e/%2E%2e/user_data /openstack/latest/.%2e/%2e./user_data /%6Fpenstack/l%61test/meta_data.json
    /openstack/latest/a%00b /openstack/latest/a%0d%0aX-Instance-ID:%20b /openstack/latest/%ff%FE%c3%28
    /openstack/latest/%c3%a4%E2%82%AC /openstack/latest/a%20b+c /openstack/latest/a%23b
    /openstack/latest/..%5C..%5cuser_data /openstack/latest/a% /openstack/latest/a%2 /openstack/latest/a%zz%%
    /openstack//latest///meta_data.json //openstack/latest/meta_data.json //elsewhere.example/latest/user-data
    /openstack/./latest/./meta_data.json /openstack/latest/../../latest/user-data /openstack/latest/..
    /openstack/.../latest /openstack/latest/ / /openstack;a=b/latest;c/meta_data.json;d=e;f /openstack/latest/a+b
    /openstack/latest/!$&'()*,:@=~-._ /openstack/latest/"<>[]^`{|}\ /openstack/latest/meta_data.json?
    /openstack/latest/meta_data.json?a=b&c=d;e&&=&f /latest/user-data?a=%2f%3F%00%ff%&b=%zz+c
    /latest/user-data??a=?b?? /latest?/../../openstack//latest/./ /latest?u=http://elsewhere.example/a?b
    /latest?"<>[]^`{|}\ /openstack/%7C|!-/latest?a|b /openstack/2999-01-01/meta_data.json /livez
"""
_ABSOLUTE: Final = b"""
    http://169.254.169.254/openstack/a%2Fb?x /openstack/a%2Fb?x 169.254.169.254
    http://other/path?x                      /path?x            other
    http://other:80/a//b                     /a//b              other:80
    https://other/latest/..                  /latest/..         other
    HTTP://other/latest/%2e                  /latest/%2e        other
    http://other                             /                  other
    http://other/latest?                     /latest?           other
    http://other//latest//a                  //latest//a        other
    http://other/http://third/a?b            /http://third/a?b  other
    http://[fe80::a9fe:a9fe]/latest          /latest            [fe80::a9fe:a9fe]
"""
"""Targets, what arrives of them, and the Host."""

_REFUSED: Final = (
    b"*", b"openstack/latest", b"?a=b", b"/openstack/latest#user-data", b"/openstack/\xc3\xa4\xff", b"/openstack?\xff",
    b"/openstack/\0", b"/openstack/a b", b"/openstack/a\tb", b"/openstack/a\nb", b"/openstack/a\rb",
    b"/openstack/a\x7fb", b"/" + b"a" * 20_000,
)  # fmt: skip

ENCODED_PATHS: Final = (
    *(EncodedPath(target, target) for target in _ENCODED.split()),
    EncodedPath(b"/openstack/" + b"a" * 7000, b"/openstack/" + b"a" * 7000),
    EncodedPath(b"/openstack/latest?" + b"b%2F" * 1700, b"/openstack/latest?" + b"b%2F" * 1700),
    *(
        EncodedPath(target, arrives, host=host)
        for target, arrives, host in map(bytes.split, _ABSOLUTE.strip().splitlines())
    ),
    EncodedPath(b"*", b"*", method="OPTIONS"),
    EncodedPath(b"http://other?x=/y", None, host=b"other"),
    # Another host in target and Host.
    EncodedPath(b"http://other/latest", None, host=b"third"),
    *(EncodedPath(target, None) for target in _REFUSED),
)
"""Targets that programs on the way decode, collapse or cut, and what Nova must receive of them."""
