"""Defaults and value forms that Neutron's agents have for their metadata proxies. Pure.

Source: neutron/conf/agent/metadata.
"""

import re
from typing import Final

from imdsproxy.errors import RequestRefused

DEFAULT_PORT: Final = 9697
DEFAULT_STATE_PATH: Final = "/var/lib/neutron"
MAX_PORT: Final = 65535

_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)

_FACILITIES: Final = (
    "kern user mail daemon auth syslog lpr news uucp cron auth2 ftp ntp audit alert cron2 "
    "local0 local1 local2 local3 local4 local5 local6 local7"
)
FACILITIES: Final = frozenset(_FACILITIES.split())
"""HAProxy's names of syslog facilities (configuration manual, `log`)."""


def parse_port(text: str | int) -> int:
    """Parse a TCP port. Raises `RequestRefused`: the text is not a port."""
    digits = str(text)
    if _PORT.fullmatch(digits) is None or not 0 < int(digits) <= MAX_PORT:
        raise RequestRefused(
            f"{digits!r} is not a TCP port", hint=f"give a number from 1 to {MAX_PORT}"
        )
    return int(digits)


def parse_facility(text: str) -> str:
    """Return HAProxy's name of a syslog facility; Neutron's `LOG_LOCAL3` is `local3`.

    Raises `RequestRefused`: HAProxy has no such facility.
    """
    name = text.lower().removeprefix("log_")
    # `authpriv` is another name of `auth2`, which HAProxy does not know.
    name = {"authpriv": "auth2"}.get(name, name)
    if name not in FACILITIES:
        raise RequestRefused(
            f"{text!r} is not a syslog facility",
            hint="give LOG_USER, LOG_LOCAL0 or another facility",
        )
    return name
