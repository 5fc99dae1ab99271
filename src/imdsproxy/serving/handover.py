"""How a document server becomes its own successor: same process, same sockets, new program.

The parent writes what it holds into a file and executes its own command line again. The next program finds
the file with its own pid in it, forks new workers on the same sockets, and ends the old ones when the new
ones answer. No connection is refused meanwhile, and the process that a supervisor watches stays.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from imdsproxy.host.files import write_atomic
from imdsproxy.serving.worker import Place


@dataclass(frozen=True, slots=True)
class Handover:
    """What the predecessor held.

    Attributes:
        lock: The pid file's descriptor.
        alive: The writing end of the pipe by which its workers know that their parent lives.
        places: Its sockets.
        workers: Its workers, which still serve.
    """

    lock: int
    alive: int
    places: tuple[Place, ...]
    workers: tuple[int, ...]


class _Socket(TypedDict):
    path: str
    descriptor: int
    identity: list[int]


class _Text(TypedDict):
    pid: int
    lock: int
    alive: int
    sockets: list[_Socket]
    workers: list[int]


def write_handover(path: Path, handover: Handover) -> None:
    """Write the file and make the descriptors survive the execution.

    Raises:
        HostRefused: The file cannot be written.
        PrivilegeMissing: This process may not write there.
    """
    text: _Text = {
        "pid": os.getpid(),
        "lock": handover.lock,
        "alive": handover.alive,
        "sockets": [
            {
                "path": str(place.path),
                "descriptor": place.listener.fileno(),
                "identity": list(place.identity),
            }
            for place in handover.places
        ],
        "workers": list(handover.workers),
    }
    write_atomic(path, json.dumps(text).encode("ascii"), mode=0o600)
    listeners = (place.listener.fileno() for place in handover.places)
    for descriptor in (handover.lock, handover.alive, *listeners):
        os.set_inheritable(descriptor, True)


def accept_handover(path: Path) -> Handover | None:
    """What this process's former program left, once; `None` when it was started anew."""
    try:
        parsed = json.loads(path.read_bytes())
    except (OSError, ValueError):
        # Whatever is there was not written for this process in this moment.
        return None
    if not isinstance(parsed, dict) or parsed.get("pid") != os.getpid():
        return None
    text = cast("_Text", parsed)
    path.unlink(missing_ok=True)
    for descriptor in (text["lock"], text["alive"]):
        os.set_inheritable(descriptor, False)
    places = tuple(map(_accept, text["sockets"]))
    return Handover(text["lock"], text["alive"], places, tuple(text["workers"]))


def _accept(text: _Socket) -> Place:
    listener = socket.socket(fileno=text["descriptor"])
    listener.set_inheritable(False)
    device, inode = text["identity"]
    return Place(Path(text["path"]), listener, (device, inode))
