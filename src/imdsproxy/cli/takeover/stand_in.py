"""The program that Neutron's DHCP agent starts in the place of HAProxy: a process that does nothing. Pure.

The agent starts `haproxy -f …/ns-metadata-proxy/UUID.conf` and looks for a process whose pid is in the pid file that
UUID.conf names, and whose command line has the uuid (`ProcessManager` in neutron/agent/linux/external_process.py). The
stand-in is such a process, with 0.2 MB of its own; SIGTERM ends it. All other calls of `haproxy` get HAProxy.
"""

from typing import Final

STAND_IN: Final = "imdsproxy-for-haproxy"
"""The first word of its command line."""

_MARK: Final = "# Made by `imdsproxy takeover dhcp`; `imdsproxy handback dhcp` removes it."


def is_stand_in(text: str) -> bool:
    """Whether a program is one."""
    return _MARK in text


def render_stand_in(haproxy: str) -> str:
    """The program, in the language of bash.

    Args:
        haproxy: The path of HAProxy.
    """
    return f"""\
#!/bin/bash
{_MARK}
# For Neutron's DHCP agent, whose networks imdsproxy serves: a process that does nothing. All else is HAProxy.
if [[ $1 == -f && $2 == */ns-metadata-proxy/*.conf ]] && grep -q '^ *bind 169\\.254\\.169\\.254:80$' "$2"; then
    pid_file=$(sed -n 's/^ *pidfile  *//p' "$2")
    [[ -n $pid_file ]] || exit 1
    setsid bash -c 'echo $$ >"$1" && exec -a "$3 $2" sleep infinity' bash "$pid_file" "$2" {STAND_IN} \\
        </dev/null >/dev/null 2>&1 &
    exit 0
fi
exec {haproxy} "$@"
"""
