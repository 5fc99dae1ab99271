"""How much one instance may ask for, unless its policy sets another limit."""

from __future__ import annotations

from typing import Any

from imdsproxy.config.change import Change
from imdsproxy.config.section import Section, setting
from imdsproxy.core.policy import RULES


def _number(rule: str, default: int) -> Any:  # noqa: ANN401 - as `setting`
    """A limit with the bounds of a policy's rule."""
    least, most = RULES[rule].bounds or (None, None)
    return setting(default, Change.RELOAD, ge=least, le=most)


class LimitsSettings(Section):
    """Of each instance, over IPv4 and IPv6 together; beyond, 503 with Retry-After. `policy` overrides them for some."""

    enabled: bool = setting(True, Change.RELOAD)
    """Count what each instance asks for, and refuse what is beyond. Without it limits in `policy` do nothing."""

    requests_per_s: int = _number("requests_per_s", 100)
    """Requests a second on average. Only answered ones count, so being refused lengthens nothing."""

    burst: int = _number("burst", 4000)
    """Requests at once: a boot asks for much. cloud-init's whole crawl is 150; this is twenty and some. Counted over
    the time that so many take at `requests_per_s`, 40 seconds as it is here.
    """

    connections: int = _number("connections", 160)
    """Connections at once; behind the unix listener, requests. More than `haproxy.maxconn_per_network` can not be
    had. The first 32 beyond are answered 503, further ones are closed.
    """

    body_kib: int = setting(1024, Change.RELOAD, ge=1, le=1024 * 1024)
    """Longest body of a request that goes on to Nova, in KiB; beyond, 413. What we answer ourselves takes 64."""
