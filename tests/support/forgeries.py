"""What guests may send to be taken for somebody else, or to reach another document, and what Nova may see of it.

Each case is the bytes that a guest sends, and the requests that Nova must receive: exactly these, with the
identity headers that the proxy sets by itself, and nothing else. Where Nova must receive nothing, the proxy
answers by itself. Sources: RFC 9110, RFC 9112, RFC 3986; OSSA-2013-033, CVE-2013-6419, LP#1865036, and the
ways in which Neutron's agents and Nova's `nova/api/metadata/handler.py` read these headers.
"""

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

    data: bytes
    seen: tuple[Seen, ...] = (Seen(),)


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


_SPELLINGS: Final = (
    *("{name}: {value}", "{lower}: {value}", "{upper}: {value}", "{name}:", "{name}:{value}", "{name}:\t{value}"),
    *("{name}: {value}, {value}", "{name}: {value} \t ", '{name}: "{value}"', "{name}: {value}\xff\xfe"),
    *("{name}:\r\n {value}", "{name}: {value}\r\n\t{value}", "{name}:\r\n{name}: {value}"),
    *("{name}: {value}\r\n{name}: {value}", "{name}: {value}\r\n{name}: x\r\n{upper}: y"),
    *("{name}: {value}\r\n{underscored}: {value}", "{name}: {value}\r\nConnection: keep-alive, {name}"),
    *("Connection: close, {name}\r\n{name}: {value}", "Proxy-Connection: {name}\r\n{name}: {value}"),
)  # fmt: skip
"""Ways to write a header down, in each of which some program on the way might know it again."""

_NO_HEADER: Final = ("{underscored}: {value}", "{half_underscored}: {value}", "Connection: {lower}")
"""What is not taken for the header."""


def request(
    *lines: bytes, method: bytes = b"GET", target: bytes = TARGET, body: bytes = b""
) -> bytes:
    """A request with a Host and these lines."""
    head = (method + b" " + target + b" HTTP/1.1", b"Host: " + HOST, *lines)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _post(*lines: bytes, body: bytes) -> bytes:
    return request(*lines, method=b"POST", target=PASSWORD, body=body)


def _spelled() -> Iterator[Forgery]:
    for name, value in IDENTITY_HEADERS.items():
        for spelling in (*_SPELLINGS, *_NO_HEADER):
            lines = spelling.format(
                name=name,
                value=value,
                lower=name.lower(),
                upper=name.upper(),
                underscored=name.replace("-", "_"),
                half_underscored=name.replace("-", "_", 1),
            )
            refused = name == TOKEN and spelling not in _NO_HEADER
            yield Forgery(request(lines.encode("latin-1")), () if refused else (Seen(),))


_ID: Final = OTHER_INSTANCE.encode()
_MALFORMED: Final = (
    *(b"X-Instance-ID : " + _ID, b"X-Instance-ID\t: " + _ID, b"X: y\r\na X-Instance-ID: " + _ID, b": " + _ID),
    *(b"X-Instance-ID", b"X-Instance-ID\0: x", b"X-Instance-ID: \0x", b"X-Instance-\xe9D: x"),
    *(b"Accept: a\rX-Instance-ID: " + _ID, b"Host: nova", b"Content-Length: 0\r\nContent-Length: 5"),
    *(b"Content-Length: " + value for value in (b"0, 5", b"+0", b"-1", b"0x0", b"")),
    # 2 to the power of 64, and one more.
    *(b"Content-Length: 18446744073709551616", b"Content-Length: 18446744073709551617"),
    *(b"Transfer-Encoding: " + value for value in (b"xchunked", b"chunked, chunked", b"chunked, identity")),
    b"Transfer-Encoding : chunked",
)  # fmt: skip

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


def _framed() -> Iterator[Forgery]:
    """Bodies whose length two programs might read differently."""
    for data in (
        _post(_LENGTH, *_OTHERS, body=_BODY),
        _post(_CHUNKS, *_OTHERS, body=_CHUNKED + b"\r\n"),
        _post(_CHUNKS, b"Trailer: X-Instance-ID, X-Tenant-ID", b"TE: trailers", body=_CHUNKED + _BEYOND),
        _post(_CHUNKS, body=_CHUNKED + _BEYOND[:-2] + b"X_Instance_ID: x\r\n\r\n"),
        *(_post(_CHUNKS, body=_CHUNKED + f"{name}: {value}\r\n\r\n".encode())
          for name, value in IDENTITY_HEADERS.items()),
        _post(_CHUNKS, body=b"a;x-instance-id=" + b"b" * 36 + b"\r\na password\r\n0;a=b\r\n\r\n"),
        _post(_CHUNKS, body=b"1\r\na\r\n9\r\n password\r\n0\r\n\r\n"),
        _post(_CHUNKS.upper(), body=_CHUNKED + b"\r\n"),
        _post(_LENGTH, _LENGTH, body=_BODY),
        _post(b"Content-Length: 0010", body=_BODY),
        _post(_LENGTH, b"Transfer_Encoding: chunked", body=_BODY),
        # A length and chunks, and the other way round.
        _post(b"Content-Length: 4", _CHUNKS, body=_CHUNKED + b"\r\n" + _SMUGGLED),
        _post(_CHUNKS, b"Content-Length: %d" % (len(_SMUGGLED) + 22), body=_CHUNKED + b"\r\n" + _SMUGGLED),
        _post(b"Expect: 100-continue", _LENGTH, body=_BODY),
    ):  # fmt: skip
        yield Forgery(data, (_SENT,))
    for data, seen in (
        (request(_CHUNKS, body=_CHUNKED + _BEYOND), (Seen(body=_BODY),)),
        (request(_CHUNKS, body=b"0\r\n" + _BEYOND), (Seen(),)),
        (request(_LONG.replace(b"-", b"_"), body=_SMUGGLED), _TWO),
        (_post(_LONG, body=_SMUGGLED), (Seen("POST", PASSWORD, body=_SMUGGLED),)),
        (request() + _SMUGGLED, _TWO),
        (request(_LONG, body=_SMUGGLED), (Seen(body=_SMUGGLED),)),
        *((_post(_CHUNKS, body=size + b"\r\na password\r\n0\r\n\r\n"), ())
          for size in (b"zz", b"-1", b"+a", b"0xa", b"f" * 17)),
    ):  # fmt: skip
        yield Forgery(data, seen)


_UPGRADE: Final = b"Connection: Upgrade"
_IGNORED: Final = (
    request(),
    request(*(f"{name}: {value}".encode() for name, value in IDENTITY_HEADERS.items() if name != TOKEN)),
    # To speak another protocol, or to wait.
    request(_UPGRADE + b", HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
    request(_UPGRADE, b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
    request(_UPGRADE, b"Upgrade: TLS/1.2"),
    request(b"TE: trailers, deflate", b"Connection: TE"),
    request(b"Keep-Alive: timeout=1000", b"Connection: keep-alive"),
    request(b"Expect: 100-continue"),
    request(b"Expect: x-instance-id"),
    b"GET " + TARGET + b" HTTP/1.2\r\nHost: x\r\n\r\n",
    # Nova must never be told the guest's word of its host.
    *(b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (TARGET, host) for host in (
        b"127.0.0.1:8775", b"nova.internal", b"[fe80::a9fe:a9fe]", b"", b"METADATA.GOOGLE.INTERNAL")),
    request(b"Acceptance: x", b"X-Accept: y", b"If: x", b"If-: y", b"Ranges: z"),
)  # fmt: skip
_ANSWERED_BY_THE_PROXY: Final = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n",
    request(*_OTHERS, method=b"TRACE"),
    request(method=b"get"),
    b"GET " + TARGET + b"\r\n\r\n",
    *(request(lines) for lines in _MALFORMED),
)

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
    every = request(*(name + b": " + value for name, value in _ALLOWED))
    yield Forgery(every, (Seen(headers=tuple((name.lower(), value) for name, value in _ALLOWED)),))
    for name, value in _ALLOWED:
        seen = (Seen(headers=((name.lower(), value),)),)
        yield Forgery(request(name + b": " + value), seen)
        yield Forgery(request(name.upper() + b":" + value), seen)
        if b"-" in name:
            yield Forgery(request(name.replace(b"-", b"_") + b": " + value))
    folded = b"a/b   X-Instance-ID: " + _ID
    yield Forgery(
        request(b"Accept: a/b", b" X-Instance-ID: " + _ID), (Seen(headers=((b"accept", folded),)),)
    )
    without_host = b"GET " + TARGET + b" HTTP/1.1\r\nAccept: a/b\r\n\r\n"
    yield Forgery(without_host, (Seen(headers=((b"accept", b"a/b"),)),))
    # HAProxy speaks to a server as old as the guest does, and says itself that it keeps connections.
    kept = (Seen(headers=((b"connection", b"keep-alive"),)),)
    for host in (b"", b"Host: nova:8775\r\n"):
        yield Forgery(b"GET " + TARGET + b" HTTP/1.0\r\n" + host + b"\r\n", kept)


FORGERIES: Final = (
    *_spelled(),
    *_framed(),
    *map(Forgery, _IGNORED),
    *(Forgery(data, ()) for data in _ANSWERED_BY_THE_PROXY),
    *_allowed(),
)
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


def _of_target(
    target: bytes, arrives: bytes | None, host: bytes = HOST, method: bytes = b"GET"
) -> Forgery:
    data = b"%s %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (method, target, host)
    return Forgery(data, () if arrives is None else (Seen(method.decode(), arrives),))


TARGETS: Final = (
    *(_of_target(target, target) for target in _ENCODED.split()),
    _of_target(b"/openstack/" + b"a" * 7000, b"/openstack/" + b"a" * 7000),
    _of_target(b"/openstack/latest?" + b"b%2F" * 1700, b"/openstack/latest?" + b"b%2F" * 1700),
    *(_of_target(*line.split()) for line in _ABSOLUTE.strip().splitlines()),
    _of_target(b"*", b"*", method=b"OPTIONS"),
    _of_target(b"http://other?x=/y", None, b"other"),
    # Another host in target and Host.
    _of_target(b"http://other/latest", None, b"third"),
    *(_of_target(target, None) for target in _REFUSED),
)
"""Targets that programs on the way decode, collapse or cut, and what Nova must receive of them."""
