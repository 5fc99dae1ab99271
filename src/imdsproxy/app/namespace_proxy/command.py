"""The program: start a proxy, or remove what one has left, and say in one line what is in the way."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from imdsproxy.app.namespace_proxy.daemon import ProxyDaemon, cleanup_pid_file
from imdsproxy.app.namespace_proxy.handler import cleanup_config_file
from imdsproxy.app.namespace_proxy.options import CleanUp, Run, parse_command_line
from imdsproxy.errors import ImdsproxyError
from imdsproxy.host.refusal import host_refused

if TYPE_CHECKING:
    from imdsproxy.app.namespace_proxy.surroundings import Surroundings

__all__ = ["main"]

_INTERRUPTED: Final = 130
_STANDARD_ERROR: Final = 2


def main(
    arguments: Sequence[str] | None = None,
    *,
    program: str = "neutron-ns-metadata-proxy",
    config: Path | None = None,
    surroundings: Surroundings | None = None,
    say: Callable[[str], object] | None = None,
) -> int:
    """Be the program, and give its exit status (`imdsproxy.cli.exitcodes`).

    Args:
        arguments: Without the program's name; `None` takes this process's own.
        program: Its name, for the help.
        config: imdsproxy's settings file, where the command line named it before this program's own words.
        surroundings: The host.
        say: Takes an error's text; `None` for standard error.
    """
    _open_standard_files()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        match parse_command_line(words, program=program, environment=os.environ, config=config):
            case CleanUp() as asked:
                _clean_up(asked)
            case Run() as asked:
                _run(asked, surroundings)
    except (ImdsproxyError, OSError) as error:
        # Whatever nobody has thought of is a line too, not a traceback in an agent's log.
        told = error if isinstance(error, ImdsproxyError) else host_refused("be the proxy", error)
        (say or _say)(_told(told))
        return told.exit_status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit as ended:
        # argparse has given its help.
        return 0 if ended.code is None else int(ended.code)
    return 0


def _run(asked: Run, surroundings: Surroundings | None) -> None:
    daemon = ProxyDaemon(
        asked.pid_file,
        asked.port,
        asked.network_id,
        asked.router_id,
        asked.user,
        asked.group,
        proxy_socket=asked.socket,
        state_path=asked.state_path,
        use_syslog=asked.use_syslog,
        facility=asked.facility,
        debug=asked.debug,
        surroundings=surroundings,
    )
    if asked.daemonize:
        daemon.start()
    else:
        daemon.run()


def _clean_up(asked: CleanUp) -> None:
    cleanup_config_file(asked.uuid, asked.state_path)
    if asked.pid_file is not None:
        cleanup_pid_file(Path(asked.pid_file), f"{asked.uuid}.conf")


def _say(text: str) -> None:
    # There is none where whoever started us has closed it.
    if sys.stderr is not None:
        sys.stderr.write(text)


def _open_standard_files() -> None:
    """Have something open at 0, 1 and 2: a lock of that number would be replaced by HAProxy's."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > _STANDARD_ERROR:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


def _told(error: ImdsproxyError) -> str:
    """The command line's usual form, without what makes it coloured, which takes longer than all the rest."""
    message = " ".join(error.message.split())
    lines = [f"imdsproxy: {message}", *(f"  {problem}" for problem in error.problems)]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return "\n".join(lines) + "\n"
