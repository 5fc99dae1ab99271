"""A lab that stays after the command that started it, for people; one in a checkout."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.openstack.front import FrontWriter
from support.openstack.install import environments
from support.openstack.processes import Place, agent_server, neutron_server, nova_server
from support.openstack.servers import Server, free_port
from support.openstack.settings import render_clouds
from support.openstack.table import Lookup, Seed, lookups_of
from support.openstack.template import fill, read_seed

# In the order in which they start.
SERVERS: Final = ("neutron", "nova", "agent")
_STATE: Final = "state.json"
_CACHE_S: Final = 600
"""Once its cache is over Nova asks Neutron for security groups, and answers 500 while that is stopped."""

_END_S: Final = 20.0


class NotBroughtUp(Exception):
    """There is no lab in that directory."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A lab that was brought up; its servers may have been stopped since."""

    place: Place
    secret: str
    nova_port: int
    neutron_port: int
    seed: Seed

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        return lookups_of(self.seed)

    @property
    def front(self) -> FrontWriter:
        return FrontWriter(self.place)

    def where(self, name: str) -> str:
        """The address of the server of that name."""
        match name:
            case "nova":
                return f"http://127.0.0.1:{self.nova_port}"
            case "neutron":
                return f"http://127.0.0.1:{self.neutron_port}"
            case _:
                return f"unix:{self.place.agent_socket}"

    def pid(self, name: str) -> int | None:
        """Of the server of that name, if it runs."""
        try:
            pid, born = self._pid_file(name).read_text().split()
        except FileNotFoundError:
            return None
        return int(pid) if _birth(int(pid)) == born else None

    def start(self, name: str) -> None:
        """Starts a server; nothing if it runs.

        Raises:
            NotUp: It does not come up.
        """
        if self.pid(name) is not None:
            return
        if name == "agent":
            self.place.agent_socket.unlink(missing_ok=True)
        server = self._server(name)
        try:
            server.start()
            self._pid_file(name).write_text(f"{server.pid} {_birth(server.pid)}")
        except BaseException:
            server.kill()
            raise

    def stop(self, name: str) -> None:
        """Ends a server; nothing if it does not run."""
        pid = self.pid(name)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            _end(pid)
        self._pid_file(name).unlink()

    def _pid_file(self, name: str) -> Path:
        return self.place.path / f"{name}.pid"

    def _server(self, name: str) -> Server:
        match name:
            case "nova":
                return nova_server(self.place, name, port=self.nova_port)
            case "neutron":
                return neutron_server(self.place, port=self.neutron_port)
            case _:
                return agent_server(self.place, nova_port=self.nova_port, secret=self.secret)


def find(directory: Path) -> Standing:
    """The lab of that directory.

    Raises:
        NotBroughtUp: There is none.
    """
    try:
        state = json.loads((directory / _STATE).read_text())
    except FileNotFoundError:
        raise NotBroughtUp(f"there is no lab in {directory}") from None
    installed = environments()
    place = Place(directory, installed, keep=(installed.made.lock,))
    return Standing(
        place, state["secret"], state["nova_port"], state["neutron_port"], read_seed(place)
    )


def bring_up(directory: Path) -> Standing:
    """Starts what does not run of the lab of that directory, which is made if there is none.

    Raises:
        NotUp: A server does not come up; none is left running that was started here.
    """
    with contextlib.suppress(NotBroughtUp):
        return _start(find(directory))
    installed = environments()
    place = Place(directory, installed, keep=(installed.made.lock,))
    directory.mkdir(parents=True, exist_ok=True)
    seed = fill(place)
    secret = secrets.token_hex(16)
    with free_port() as nova, free_port() as neutron:
        nova_port, neutron_port = nova.getsockname()[1], neutron.getsockname()[1]
    place.write_nova("nova", neutron_port=neutron_port, secret=secret, cache_s=_CACHE_S)
    lab = Standing(place, secret, nova_port, neutron_port, seed)
    clouds = directory / "clouds.yaml"
    clouds.write_text(render_clouds(neutron_url=lab.where("neutron")))
    # Elsewhere it holds a password.
    clouds.chmod(0o600)
    secret_file = directory / "secret"
    secret_file.write_text(secret)
    secret_file.chmod(0o600)
    state = {"secret": secret, "nova_port": nova_port, "neutron_port": neutron_port}
    (directory / _STATE).write_text(json.dumps(state))
    return _start(lab)


def bring_down(directory: Path) -> None:
    """Ends the lab of that directory and takes the directory away.

    Raises:
        NotBroughtUp: There is none.
    """
    lab = find(directory)
    for name in reversed(SERVERS):
        lab.stop(name)
    shutil.rmtree(directory)


def _start(lab: Standing) -> Standing:
    with contextlib.ExitStack() as stack:
        for name in SERVERS:
            if lab.pid(name) is None:
                stack.callback(lab.stop, name)
                lab.start(name)
        stack.pop_all()
    return lab


def _end(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGCONT)
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not select.select([descriptor], [], [], _END_S)[0]:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], _END_S)
    finally:
        os.close(descriptor)


def _birth(pid: int) -> str:
    """When a process was started, in ticks since boot; empty if there is none (proc_pid_stat(5), field 22)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]
