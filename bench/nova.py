"""A stand-in for Nova that checks signatures, and the records of guests whose documents it has."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.bare import run_bare
from bench.guest import Answer
from bench.lab import guest
from bench.place import BenchError

__all__ = [
    "PATH",
    "SLOW_MS",
    "Identity",
    "Stub",
    "identity",
    "names_itself",
    "nova_guest",
    "nova_settings",
    "render_stub",
    "run_stub",
]

PATH: Final = "/openstack/latest/meta_data.json"
SLOW_MS: Final = 20

_SECRET: Final = "imdsproxy-bench-secret"  # noqa: S105 - of a stand-in
_SPACE: Final = uuid.UUID("0c1f6cf4-6f5f-4d7c-9a1c-6b7f1b0e7f42")
_KEY_BYTES: Final = 724
_TENANTS: Final = 7


@dataclass(frozen=True, slots=True)
class Identity:
    """A guest's identity for Nova: instance, project, and the signature that proves it."""

    instance: str
    project: str
    signature: str

    def headers(self, address: str) -> tuple[tuple[str, str], ...]:
        """Return the headers that a proxy sends to Nova."""
        return (
            ("x-instance-id", self.instance),
            ("x-tenant-id", self.project),
            ("x-instance-id-signature", self.signature),
            ("x-forwarded-for", address),
        )


def identity(network: str) -> Identity:
    """Return the identity of the first guest of a network."""
    instance = str(uuid.uuid5(_SPACE, network))
    project = uuid.uuid5(_SPACE, f"project-{sum(network.encode()) % _TENANTS}").hex
    signature = hmac.new(_SECRET.encode(), instance.encode(), hashlib.sha256).hexdigest()
    return Identity(instance, project, signature)


def nova_guest(network: str) -> dict[str, object]:
    """Return the record of the first guest of a network; its documents are Nova's."""
    one = identity(network)
    return {
        "id": one.instance,
        "name": network,
        "project": one.project,
        "upstream": "nova",
        "ports": [{"network": network, "addresses": [guest(0)]}],
    }


def nova_settings(directory: Path, port: int) -> Mapping[str, Mapping[str, object]]:
    """Return the settings of a daemon in front of the stand-in alone, as `config import` would from Neutron's files.

    The function writes the secret's file.
    """
    file = directory / "nova.secret"
    file.write_text(f"{_SECRET}\n")
    file.chmod(0o600)
    endpoints = [{"url": f"http://127.0.0.1:{port}"}]
    chosen = {"default": {"endpoints": endpoints, "secret_file": str(file)}}
    return {"nova": {"endpoint_sets": chosen}, "documents": {"enabled": False}}


def names_itself(network: str, answer: Answer) -> bool:
    """Return whether a guest was answered 200 with its own instance's document."""
    if answer.status != 200:  # noqa: PLR2004 - HTTP's OK
        return False
    try:
        told = json.loads(answer.body)
    except ValueError:
        return False
    return isinstance(told, dict) and told.get("uuid") == identity(network).instance


@dataclass(frozen=True, slots=True)
class Stub:
    """A running stand-in.

    Attributes:
        port: Port on 127.0.0.1 that answers at once.
        slow_port: Port that answers after `SLOW_MS`.
    """

    pid: int
    port: int
    slow_port: int


def _body() -> str:
    fields = {
        "uuid": "%[req.hdr(x-instance-id)]",
        "project_id": "%[req.hdr(x-tenant-id)]",
        "remote": "%[req.hdr(x-forwarded-for)]",
        "hostname": "guest.novalocal",
        "name": "guest",
        "launch_index": 0,
        "availability_zone": "nova",
        "random_seed": "Qk" * 64,
        "public_keys": {"key": "ssh-rsa " + "A" * _KEY_BYTES},
    }
    return json.dumps(fields).replace('"', r"\"")


def render_stub(port: int, slow_port: int) -> str:
    """Render HAProxy's configuration: 1.1 kB of `meta_data.json` for signed requests, 403 for all others."""
    key = base64.b64encode(_SECRET.encode()).decode()
    answer = (
        f"http-request set-var(txn.right) req.hdr(x-instance-id),hmac(sha256,{key}),hex,lower",
        "http-request return status 403 unless { req.hdr(x-instance-id-signature),secure_memcmp(txn.right) }",
        f'http-request return status 200 content-type application/json lf-string "{_body()}"',
    )
    late = (
        f"tcp-request inspect-delay {SLOW_MS}ms",
        "tcp-request content accept if WAIT_END",
    )
    lines = [
        "global",
        "  nbthread 2",
        "  maxconn 8000",
        "defaults",
        "  mode http",
        "  timeout connect 5s",
        "  timeout client 60s",
        "  timeout server 60s",
        "  timeout http-request 30s",
        "  timeout http-keep-alive 60s",
        "frontend nova",
        f"  bind 127.0.0.1:{port} backlog 4096",
        *(f"  {line}" for line in answer),
        "frontend slow",
        f"  bind 127.0.0.1:{slow_port} backlog 4096",
        *(f"  {line}" for line in (*late, *answer)),
    ]
    return "\n".join(lines) + "\n"


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@contextlib.contextmanager
def run_stub(binary: str, directory: Path) -> Iterator[Stub]:
    """Run the stand-in for the time of the context.

    Raises:
        BenchError: The stand-in does not start, or accepts an unsigned request.
    """
    port, slow_port = _free_ports()
    with run_bare(binary, directory, "nova", render_stub(port, slow_port)) as running:
        if _status(port, ()) != "403" or _status(port, identity("n").headers("10.0.0.5")) != "200":
            raise BenchError("the stand-in for Nova does not look at signatures")
        yield Stub(running.pid, port, slow_port)


def _status(port: int, headers: tuple[tuple[str, str], ...]) -> str:
    lines = [f"GET {PATH} HTTP/1.1", "Host: nova", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return connection.recv(4096)[9:12].decode("ascii", "replace")
