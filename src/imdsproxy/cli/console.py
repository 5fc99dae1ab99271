"""`imdsproxy console`: web pages about networks and guests, for a browser on this host or over `ssh -L`."""

from dataclasses import replace
from typing import Annotated, Final

from imdsproxy.cli import options
from imdsproxy.cli.options import flag
from imdsproxy.errors import RequestRefused, optional_library
from imdsproxy.host.servers import open_tcp_socket

_HIGHEST: Final = 65535
_HINT: Final = "apt install python3-jinja2, or pip install 'imdsproxy[console]'"


@options.host_command
def console(
    run: options.Invocation,
    *,
    port: Annotated[
        int, flag("--port -p PORT", "Port on 127.0.0.1, for ssh -L (default: 0, any free port).")
    ] = 0,
) -> None:
    """Serve web pages on 127.0.0.1 that show networks, guests, requests and problems, until Ctrl-C.

    The link works once, within five minutes, in one browser.
    """
    if not 0 <= port <= _HIGHEST:
        raise RequestRefused(f"there is no port {port}", hint=f"use 0 to {_HIGHEST}")
    daemon = run.daemon()
    with optional_library("jinja2", _HINT):
        from imdsproxy.console.server import run_console
    # This request fails for accounts without access to the daemon.
    daemon.get("/v1/status")
    listener = open_tcp_socket("127.0.0.1", port)

    def announce(link: str) -> None:
        if run.output.as_json:
            run.output.json({"link": link})
        else:
            run.output.text(
                f"{link}\nThe link works once, within five minutes. Ctrl-C ends the console."
            )

    with listener:
        # A page reports a starting daemon instead of waiting for it.
        reason = run_console(replace(daemon, waiting=None), listener, announce)
    run.output.styled(f"[dim]ended:[/] {reason}")
