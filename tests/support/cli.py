"""The command line against an admin API on a real unix socket, in this process."""

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from imdsproxy.cli.main import main
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from support.admin_server import AdminServer
from support.record_builders import instance, port


@dataclass
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def words(self) -> str:
        """Both outputs on one line, without the spaces of tables."""
        return " ".join(f"{self.out} {self.err}".split())


def run_main(*arguments: str, stdin: str | None = None) -> Ran:
    """Run a command line in this process; without `stdin` with this process's own."""
    given = sys.stdin
    if stdin is not None:
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with mock.patch.multiple(sys, stdin=given, stdout=out, stderr=err):
        status = main(list(arguments))
    out.seek(0)
    err.seek(0)
    return Ran(status, out.read(), err.read())


@dataclass
class Cli:
    server: AdminServer

    def __call__(self, *arguments: str) -> Ran:
        return run_main("--socket", str(self.server.socket), *arguments)

    def instance(self, name: str = "web-1") -> Instance:
        return self.server.instances[InstanceId(name)]

    def network(self, name: str = "blue") -> Network:
        return self.server.networks[NetworkId(name)]

    def claim_twice(self) -> None:
        """Another source has an instance with the address of web-1."""
        self.server.claim_twice(instance("web-2", ports=[port("blue", "10.0.0.5")]))


def on_a_terminal(
    cli: Cli, command: str, columns: int = 80, environment: Mapping[str, str] | None = None
) -> list[str]:
    """The lines that a command writes to a terminal."""
    program = shlex.join([sys.executable, "-m", "imdsproxy", "--socket", str(cli.server.socket)])
    ran = subprocess.run(
        [
            "/usr/bin/script",
            "-qec",
            f"stty cols {columns} rows 24; {program} {command}",
            "/dev/null",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", **(environment or {})},
        check=False,
        timeout=30,
    )
    return ran.stdout.decode().splitlines()
