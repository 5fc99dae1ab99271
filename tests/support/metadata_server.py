"""A metadata server of any badness, on loopback."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from imdsproxy.tools.doctor import Answer, Ask


@dataclass(frozen=True)
class Reply:
    """What a path is answered.

    Attributes:
        delay_s: Before the first byte.
        length: What Content-Length says; `None` is the truth, and less than nothing leaves it out.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    length: int | None = None


_META_DATA: Final = {
    "uuid": "ac7e3c7e-1111-4222-8333-444455556666",
    "hostname": "web-1",
    "random_seed": "AAAA",
    "keys": [],
    "files": [{"path": "/etc/motd", "content_path": "/content/0000"}],
}
_NETWORK_DATA: Final = {
    "links": [{"id": "i0", "type": "phy", "ethernet_mac_address": "52:54:00:12:34:56"}],
    "networks": [{"id": "n0", "link": "i0", "type": "ipv4_dhcp"}],
    "services": [],
}
_LEAVES: Final = {
    "instance-id": b"i-0ac7e3c7e11114222",
    "hostname": b"web-1",
    "local-hostname": b"web-1",
    "placement/availability-zone": b"az1",
    "public-keys/0/openssh-key": b"ssh-ed25519 AAAA me",
    "tags/instance/role": b"web",
}
_LISTINGS: Final = {
    "": b"hostname\ninstance-id\nlocal-hostname\nplacement/\npublic-keys/\ntags/",
    "placement": b"availability-zone",
    "public-keys": b"0=me",
    "public-keys/0": b"openssh-key",
    "tags": b"instance/",
    "tags/instance": b"role",
}


def _good() -> dict[str, Reply]:
    paths: dict[str, bytes] = {
        "/": b"1.0\n2009-04-04\nlatest",
        "/openstack": b"2012-08-10\n2018-08-27\nlatest",
        "/openstack/content/0000": b"welcome\n",
        "/openstack/2013-04-04/password": b"",
    }
    for version in ("latest", "2012-08-10", "2013-04-04", "2018-08-27"):
        below = f"/openstack/{version}"
        paths[f"{below}/meta_data.json"] = json.dumps(_META_DATA).encode()
        paths[f"{below}/network_data.json"] = json.dumps(_NETWORK_DATA).encode()
        paths[f"{below}/vendor_data.json"] = paths[f"{below}/vendor_data2.json"] = b"{}"
        paths[f"{below}/user_data"] = b"#cloud-config\n{}\n"
    for version in ("latest", "2009-04-04"):
        paths[f"/{version}/user-data"] = b"#cloud-config\n{}\n"
        paths[f"/{version}/dynamic/instance-identity"] = b""
        for name, body in (*_LEAVES.items(), *_LISTINGS.items()):
            paths[f"/{version}/meta-data/{name}".rstrip("/")] = body
    paths["/nocloud/meta-data"] = b"instance-id: i-1\n"
    paths["/nocloud/user-data"] = b"#cloud-config\n{}\n"
    paths["/nocloud/vendor-data"] = paths["/nocloud/network-config"] = b""
    return {path: Reply(body) for path, body in paths.items()}


GOOD: Final = _good()
"""What a server without a fault answers, by path without slashes at its end."""


@dataclass
class MetadataServer:
    """Answers `replies`, or else 404 with nothing in it.

    Attributes:
        replies: By path; with a slash at the end only where that is to differ.
        token: To PUT /latest/api/token.
        everywhere: Headers of every answer.
        version: Of HTTP.
        instead: Answers without a socket to questions without headers, by the beginning of the path.
        asked: Methods and paths, in order.
    """

    url: str = ""
    replies: dict[str, Reply] = field(default_factory=lambda: dict(GOOD))
    token: Reply = field(default_factory=lambda: Reply(status=404))
    everywhere: dict[str, str] = field(default_factory=dict)
    version: str = "HTTP/1.1"
    instead: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def reply(self, method: str, path: str) -> Reply:
        """What a request is answered."""
        if method == "PUT":
            return self.token if path == "/latest/api/token" else Reply(status=404)
        while "//" in path and path not in self.replies:
            path = path.replace("//", "/")
        return self.replies.get(path) or self.replies.get(
            path.rstrip("/") or "/", Reply(status=404)
        )

    def fetch(self, ask: Ask) -> Answer:
        """The same without a socket, for whom a crawl is enough."""
        for start, answer in self.instead.items():
            if ask.path.startswith(start) and not ask.headers:
                return answer
        path = ask.path.partition("?")[0]
        reply = self.reply(ask.method, path)
        wanted = dict(ask.headers)
        headers = {**self.everywhere, **reply.headers}
        self.asked.append((ask.method, ask.path, wanted))
        length = len(reply.body) if reply.length is None else reply.length
        return Answer(
            reply.status,
            {name.lower(): value for name, value in headers.items()},
            reply.body,
            first_byte_s=reply.delay_s,
            until_close=length < 0,
            version=10 if self.version == "HTTP/1.0" else 11,
            cut=length > len(reply.body),
        )


@contextlib.contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """Runs until the context ends; change its attributes as you like."""
    answers = MetadataServer()

    class Handler(BaseHTTPRequestHandler):
        """Answers as `answers` describes."""

        @property
        def protocol_version(self) -> str:  # type: ignore[override]
            return answers.version

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answers.asked.append((self.command, self.path, headers))
            reply = answers.reply(self.command, self.path)
            if reply.delay_s:
                time.sleep(reply.delay_s)
            self.send_response_only(reply.status)
            length = len(reply.body) if reply.length is None else reply.length
            if length >= 0:
                self.send_header("Content-Length", str(length))
            for name, value in {**answers.everywhere, **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(reply.body)

        do_PUT = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: object) -> None:
            """Not on the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    answers.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield answers
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
