"""A lab's directory, and the command lines of its servers."""

import http.client
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.host.socket_file import find_socket_holder
from support.lab import run, within
from support.openstack.install import INSIDE, Environments
from support.openstack.neutron_rest import ask
from support.openstack.servers import Server, ends_with_us
from support.openstack.settings import (
    COMPUTE_PASTE,
    VENDOR_DATA,
    render_agent,
    render_neutron,
    render_nova,
)

_AGENT: Final = "metadata_agent.py"
_THREADS: Final = 4
_MAKE_S: Final = 600.0
# Nova's programs run on threads, as its WSGI applications do; without this nova-manage's parts patch for eventlet.
_ON_THREADS: Final = {"OS_NOVA_DISABLE_EVENTLET_PATCHING": "1"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a lab lives; its servers run in this directory and find their databases by it.

    Attributes:
        namespace: In which network namespace they run; the machine's own by default.
        broker: A message broker's URL, where agents of Neutron's run.
    """

    path: Path
    environments: Environments
    namespace: str = ""
    broker: str = ""

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
        (self.etc / "compute-paste.ini").write_text(COMPUTE_PASTE)
        (self.etc / "neutron.conf").write_text(
            render_neutron(paste=self.environments.paste("neutron"), broker=self.broker)
        )

    @property
    def prefix(self) -> list[str]:
        """The words before a server's own."""
        return [*ends_with_us(), *(within(self.namespace) if self.namespace else ())]

    def write_nova(self, *, neutron_port: int, secret: str) -> Path:
        """Writes nova.conf."""
        shutil.copy(self.environments.paste("nova"), self.etc)
        path = self.etc / "nova.conf"
        path.write_text(render_nova(neutron_port=neutron_port, secret=secret))
        return path

    def run_inside(self, name: str, script: str, *arguments: str, stdin: str = "") -> str:
        """Runs one of the scripts that import Nova or Neutron in its environment; its output."""
        words = (str(self.environments.python(name)), "-W", "ignore", str(INSIDE / script))
        return run(
            *words,
            *arguments,
            cwd=self.path,
            stdin=stdin,
            timeout_s=_MAKE_S,
            environment=_ON_THREADS,
        )


def nova_server(place: Place, *, port: int) -> Server:
    """The metadata API."""
    # The first must be the one for paste.
    files = "api-paste.ini;nova.conf"
    module = ("--module", "nova.wsgi.metadata:application")
    return _wsgi(place, "nova", module, files, port=port, ready="/")


def compute_server(place: Place, *, port: int) -> Server:
    """Nova's own API, to which every caller is an administrator."""
    module = ("--module", "nova.wsgi.osapi_compute:application", "--pythonpath", str(INSIDE))
    ready = "/v2.1/servers"
    return _wsgi(place, "nova", module, "compute-paste.ini;nova.conf", port=port, ready=ready)


def neutron_server(place: Place, *, port: int) -> Server:
    """The REST API."""
    module = ("--wsgi-file", str(INSIDE / "neutron_app.py"))
    files, ready = "neutron.conf", "/v2.0/networks"
    return _wsgi(place, "neutron", module, files, port=port, ready=ready)


def agent_server(place: Place, *, nova_port: int, secret: str) -> Server:
    """Neutron's own metadata agent, on the place's unix socket."""
    settings = place.etc / "metadata_agent.ini"
    settings.write_text(render_agent(socket=place.agent_socket, nova_port=nova_port, secret=secret))
    script = INSIDE / _AGENT
    python = place.environments.python("neutron")
    words = (python, script, place.etc / "neutron.conf", settings)
    return Server(
        name="agent",
        argv=[*place.prefix, *map(str, words)],
        cwd=place.path,
        environment={},
        log=place.log / "agent.log",
        is_up=lambda: _agent_listens(place.agent_socket),
    )


def _agent_listens(path: Path) -> bool:
    # Somebody else may have the place until the agent takes it.
    found = find_socket_holder(path)
    return found is not None and any(_AGENT in word for word in found.command)


def _wsgi(
    place: Place, name: str, module: tuple[str, ...], files: str, *, port: int, ready: str
) -> Server:
    argv = [
        *place.prefix,
        str(place.environments.uwsgi(name)),
        # As devstack runs them.
        *("--http-socket", f"127.0.0.1:{port}", "--add-header", "Connection: close"),
        *("--virtualenv", str(place.environments.python(name).parents[1])),
        *(*module, "--need-app"),
        *("--processes", "1", "--threads", str(_THREADS), "--buffer-size", "65535"),
        *("--reuse-port", "--die-on-term"),
    ]
    url = f"http://127.0.0.1:{port}"
    option = f"OS_{name.upper()}_CONFIG"
    return Server(
        name=name,
        argv=argv,
        cwd=place.path,
        environment={f"{option}_DIR": str(place.etc), f"{option}_FILES": files},
        log=place.log / f"{name}.log",
        is_up=lambda: _answers(url, ready, place.namespace),
    )


def _answers(url: str, path: str, namespace: str) -> bool:
    try:
        return ask(url, "GET", path, namespace=namespace).status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
