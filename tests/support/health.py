"""An operator who asks a controller for its health and metrics, where its host is."""

from support.guest import Guest, Reply
from support.lab import Lab

METRICS: dict[str, object] = {"listen": "127.0.0.1:9465"}
"""The section `metrics` of a daemon that answers there."""


def ask_operator(lab: Lab, path: str, *, timeout_s: float | None = None) -> Reply:
    """The answer.

    Raises:
        Lost: There is none.
    """
    host = Guest("operator", lab.host, "", "", (), "lo", port=9465)
    return host.ask(path, to="127.0.0.1", timeout_s=timeout_s)
