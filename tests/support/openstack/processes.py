"""A lab's directory, and the command lines of its servers."""

from __future__ import annotations

import http.client
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.host.socket_file import find_socket_holder
from support.openstack.install import INSIDE, Environments, run
from support.openstack.neutron_rest import ask
from support.openstack.servers import Server, ends_with_us
from support.openstack.settings import VENDOR_DATA, render_agent, render_neutron, render_nova

_AGENT: Final = "metadata_agent.py"
_THREADS: Final = 4
# Nova's programs run on threads, as its WSGI applications do; without this nova-manage's parts patch for eventlet.
_ON_THREADS: Final = {"OS_NOVA_DISABLE_EVENTLET_PATCHING": "1"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a lab lives; its servers run in this directory and find their databases by it."""

    path: Path
    environments: Environments

    @property
    def etc(self) -> Path:
        return self.path / "etc"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def agent_socket(self) -> Path:
        return self.path / "metadata_proxy"

    def prepare(self) -> None:
        """Makes the directories, and the files that depend on nothing."""
        for name in ("db", "etc", "lock", "log"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        (self.etc / "vendor_data.json").write_text(VENDOR_DATA)
        (self.etc / "neutron.conf").write_text(
            render_neutron(paste=self.environments.paste("neutron"))
        )

    def write_nova(self, name: str, *, neutron_port: int, secret: str, cache_s: int) -> Path:
        """Writes the nova.conf of the server of that name."""
        shutil.copy(self.environments.paste("nova"), self.etc)
        path = self.etc / f"{name}.conf"
        path.write_text(render_nova(neutron_port=neutron_port, secret=secret, cache_s=cache_s))
        return path

    def run_inside(self, name: str, script: str, *arguments: str, stdin: str = "") -> str:
        """Runs one of the scripts that import Nova or Neutron in its environment; its output."""
        python = str(self.environments.python(name))
        argv = [python, "-W", "ignore", str(INSIDE / script), *arguments]
        return run(argv, cwd=self.path, environment=_ON_THREADS, stdin=stdin)


def nova_server(place: Place, name: str, *, port: int) -> Server:
    """The metadata API whose settings `write_nova` has written under the same name."""
    environment = {
        "OS_NOVA_CONFIG_DIR": str(place.etc),
        # The first must be the one for paste.
        "OS_NOVA_CONFIG_FILES": f"api-paste.ini;{name}.conf",
    }
    module = ("--module", "nova.wsgi.metadata:application")
    return _wsgi(place, name, "nova", module, environment, port=port, ready="/")


def neutron_server(place: Place, *, port: int) -> Server:
    """The REST API."""
    environment = {
        "OS_NEUTRON_CONFIG_DIR": str(place.etc),
        "OS_NEUTRON_CONFIG_FILES": "neutron.conf",
    }
    module = ("--wsgi-file", str(INSIDE / "neutron_app.py"))
    ready = "/v2.0/networks"
    return _wsgi(place, "neutron", "neutron", module, environment, port=port, ready=ready)


def agent_server(place: Place, *, nova_port: int, secret: str) -> Server:
    """Neutron's own metadata agent, on the place's unix socket."""
    settings = place.etc / "metadata_agent.ini"
    settings.write_text(render_agent(socket=place.agent_socket, nova_port=nova_port, secret=secret))
    script = INSIDE / _AGENT
    python = place.environments.python("neutron")
    words = (python, script, place.etc / "neutron.conf", settings)
    return Server(
        name="agent",
        argv=[*ends_with_us(), *map(str, words)],
        cwd=place.path,
        environment={},
        log=place.log / "agent.log",
        is_up=lambda: _agent_listens(place.agent_socket),
        keep=(place.environments.made.lock,),
    )


def _agent_listens(path: Path) -> bool:
    # Somebody else may have the place until the agent takes it.
    found = find_socket_holder(path)
    return found is not None and any(_AGENT in word for word in found.command)


def _wsgi(
    place: Place,
    name: str,
    package: str,
    module: tuple[str, str],
    environment: dict[str, str],
    *,
    port: int,
    ready: str,
) -> Server:
    argv: Sequence[str] = (
        *ends_with_us(),
        str(place.environments.uwsgi(package)),
        # As devstack runs them.
        *("--http-socket", f"127.0.0.1:{port}", "--add-header", "Connection: close"),
        *("--virtualenv", str(place.environments.python(package).parents[1])),
        *(*module, "--need-app"),
        *("--processes", "1", "--threads", str(_THREADS), "--buffer-size", "65535"),
        *("--reuse-port", "--die-on-term"),
    )
    url = f"http://127.0.0.1:{port}"
    return Server(
        name=name,
        argv=list(argv),
        cwd=place.path,
        environment=environment,
        log=place.log / f"{name}.log",
        is_up=lambda: _answers(url, ready),
        keep=(place.environments.made.lock,),
    )


def _answers(url: str, path: str) -> bool:
    try:
        return ask(url, "GET", path).status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
