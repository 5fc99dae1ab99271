"""RabbitMQ in a network namespace of its own, as Neutron's server and agents talk over it."""

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.guest import inside
from support.lab import within
from support.openstack.servers import Server, ends_with_us

_PROGRAM: Final = "/usr/lib/rabbitmq/bin/rabbitmq-server"
_PORT: Final = 5672
URL: Final = f"rabbit://guest:guest@127.0.0.1:{_PORT}/"


@contextlib.contextmanager
def open_broker(namespace: str, directory: Path) -> Iterator[Server]:
    """A broker on a namespace's loopback, with its files in a directory.

    Its port mapper, epmd, runs in the namespace too: the machine may have one of its own.
    """
    directory.mkdir()
    settings = directory / "rabbitmq.conf"
    settings.write_text(f"listeners.tcp.local = 127.0.0.1:{_PORT}\n")
    names = {
        "RABBITMQ_MNESIA_BASE": directory / "mnesia",
        "RABBITMQ_LOG_BASE": directory / "log",
        "RABBITMQ_ENABLED_PLUGINS_FILE": directory / "plugins",
        "RABBITMQ_CONFIG_FILE": settings,
        "RABBITMQ_PID_FILE": directory / "pid",
        # Of the machine, which are not this broker's.
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "HOME": directory,
    }
    place = (*ends_with_us(), *within(namespace))
    mapper = subprocess.Popen((*place, "epmd"), stdin=subprocess.DEVNULL)
    server = Server(
        name="RabbitMQ",
        argv=[*place, _PROGRAM],
        cwd=directory,
        environment={
            **{name: str(path) for name, path in names.items()},
            "RABBITMQ_NODENAME": "imdst@localhost",
            # One scheduler: more of them wait busily for work.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        },
        log=directory / "out.log",
        is_up=lambda: _takes_connections(namespace),
    )
    try:
        server.launch()
        yield server
    finally:
        server.kill()
        mapper.kill()
        mapper.wait()


def _takes_connections(namespace: str) -> bool:
    try:
        inside(namespace, lambda: socket.create_connection(("127.0.0.1", _PORT), 5)).close()
    except OSError:
        return False
    return True
