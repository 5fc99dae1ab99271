"""What Neutron's agents write for the HAProxy of a namespace, as Neutron's own code makes it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from support.lab import Lab, run, within
from support.openstack.install import INSIDE, environments
from support.openstack.processes import Place
from support.patience import patience

FrontKind = Literal["network", "router", "ovn"]

_END_S: Final = 10.0


@dataclass(slots=True)
class FrontWriter:
    """A process with Neutron's code in it: importing that takes seconds, a configuration does not."""

    place: Place
    process: subprocess.Popen[str] | None = field(default=None, init=False)

    def config(self, kind: FrontKind, resource_id: str, *, socket: Path, **options: object) -> str:
        """The text of a configuration file, unmodified.

        Args:
            kind: `network` as the DHCP agent, `router` as the L3 agent, `ovn` as OVN's metadata agent.
            resource_id: The network's or router's.
            socket: Where the metadata agent is.
            options: `bind_address` and `port` (the L3 agent takes `::`, or 0.0.0.0 without IPv6, and 9697),
                `bind_address_v6`, `bind_interface`; `user` and `group` as whom HAProxy runs; `state_path`, `pid_file`.
        """
        wanted = {
            "kind": kind,
            "resource_id": resource_id,
            "socket": socket,
            "bind_address": "169.254.169.254",
            "port": 80,
            "bind_address_v6": None,
            "bind_interface": None,
            "user": "root",
            "group": "root",
            "state_path": self.place.path,
            "pid_file": self.place.path / f"{resource_id}.pid",
            **options,
        }
        text = self._ask(json.dumps(wanted, default=str))
        assert isinstance(text, str), text
        return text

    def close(self) -> None:
        if self.process is not None:
            with self.process as process:
                if process.stdin is not None:
                    process.stdin.close()
                process.wait(_END_S * patience())
            self.process = None

    def _ask(self, line: str) -> object:
        if self.process is None:
            python = str(self.place.environments.python("neutron"))
            self.process = subprocess.Popen(
                [python, "-W", "ignore", str(INSIDE / "front_config.py")],
                cwd=self.place.path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(line + "\n")
        stdin.flush()
        said: object = json.loads(stdout.readline())
        return said


@dataclass(frozen=True, slots=True)
class Fronts:
    """HAProxies as Neutron's agents start them in namespaces of a lab, in front of one socket."""

    lab: Lab
    writer: FrontWriter
    socket: Path
    state: Path

    def start(self, kind: FrontKind, name: str, **options: object) -> None:
        """Start one in a namespace of its own: it goes into the background, and ends with its namespace."""
        self.lab.furnish(name)
        file = self.state / f"{name}.conf"
        pid_file = self.state / f"{name}.pid"
        places: dict[str, object] = {"state_path": self.state, "pid_file": pid_file}
        file.write_text(self.writer.config(kind, name, socket=self.socket, **places, **options))
        run(*within(self.lab.name(name)), "haproxy", "-f", str(file))


@contextlib.contextmanager
def open_fronts(lab: Lab, directory: Path, socket: Path) -> Iterator[Fronts]:
    """They end with the lab's namespaces."""
    with contextlib.ExitStack() as stack:
        writer = FrontWriter(Place(directory, environments()))
        stack.callback(writer.close)
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imdst-")))
        yield Fronts(lab, writer, socket, state)
