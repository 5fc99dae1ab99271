"""A stand-in for Neutron, as a program with an interpreter of its own.

The stand-in has a port for every address in every network, and takes `DELAY_MS` for each answer. All ports of a network
have one MAC: that of the guest which `plug_stranger` plugs in, and which has their addresses.

usage: python -m bench.neutron
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from bench.lab import Lab
from bench.nova import identity
from bench.place import BenchError

__all__ = [
    "DELAY_MS",
    "answer_ports",
    "mac_of",
    "main",
    "neutron_settings",
    "plug_stranger",
    "port_name",
    "run_neutron",
]

DELAY_MS: Final = 5

_REPOSITORY: Final = Path(__file__).resolve().parent.parent


def mac_of(network: str) -> str:
    """Return the MAC of a network's ports."""
    octets = sha256(network.encode()).digest()[:3]
    return ":".join(("fa", "16", "3e", *(f"{octet:02x}" for octet in octets)))


def plug_stranger(lab: Lab, network: str) -> str:
    """Plug in a guest that only Neutron knows, behind a veth link; return the guest's namespace."""
    return lab.plug(network, mac_of(network))


def port_name(network: str, address: str) -> str:
    """Return the name under which `identity` knows the instance of an address that only Neutron knows."""
    return f"{network}/{address}"


def answer_ports(query: str) -> Mapping[str, object]:
    """Return Neutron's answer to a list of ports, filtered by networks and addresses."""
    asked = parse_qs(query)
    prefix = "ip_address="
    addresses = [one.removeprefix(prefix) for one in asked.get("fixed_ips", ())]
    ports = []
    for network in asked.get("network_id", ()):
        for address in addresses:
            owner = identity(port_name(network, address))
            ports.append(
                {
                    "id": owner.instance,
                    "network_id": network,
                    "mac_address": mac_of(network),
                    "fixed_ips": [{"ip_address": address}],
                    "device_id": owner.instance,
                    "device_owner": "compute:nova",
                    "project_id": owner.project,
                }
            )
    return {"ports": ports}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        time.sleep(DELAY_MS / 1000)
        body = json.dumps(answer_ports(urlsplit(self.path).query)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def neutron_settings(port: int) -> Mapping[str, Mapping[str, object]]:
    """Return the settings of a daemon that queries the stand-in."""
    source = {"enabled": True, "endpoint": f"http://127.0.0.1:{port}"}
    return {"sources": {"neutron": source}}


@contextlib.contextmanager
def run_neutron() -> Iterator[int]:
    """Run the stand-in for the time of the context; yield its port on 127.0.0.1.

    Raises:
        BenchError: The stand-in does not start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.neutron"], cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        told = process.stdout.readline().strip() if process.stdout is not None else ""
        if not told.isdecimal():
            raise BenchError("the stand-in for Neutron does not start")
        yield int(told)
    finally:
        process.kill()
        process.communicate()


def main(_argv: Sequence[str]) -> int:
    """Serve until killed; the first line of output is the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
