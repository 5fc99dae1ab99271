"""How much one instance may ask for, where the policy says nothing else."""

from __future__ import annotations

from imdsproxy.config.change import Change
from imdsproxy.config.section import Section, setting
from imdsproxy.core.policy import BOUNDS

__all__ = ["LimitsSettings"]


class LimitsSettings(Section):
    """Of each instance, over IPv4 and IPv6 together; beyond, 503 with Retry-After. `policy` says it for some."""

    enabled: bool = setting(
        True,
        "Count what each instance asks for, and refuse what is beyond. Without it limits in `policy` do nothing.",
        Change.RELOAD,
    )
    requests_per_s: int = setting(
        100,
        "Requests a second on average. Only answered ones count, so being refused lengthens nothing.",
        Change.RELOAD,
        ge=1,
        le=BOUNDS["requests_per_s"][1],
    )
    burst: int = setting(
        4000,
        "Requests at once: a boot asks for much. cloud-init's whole crawl is 150; this is twenty and some. "
        "Counted over the time that so many take at `requests_per_s`, 40 seconds as it is here.",
        Change.RELOAD,
        ge=1,
        le=BOUNDS["burst"][1],
    )
    connections: int = setting(
        160,
        "Connections at once; behind the unix listener, requests. More than `haproxy.maxconn_per_network` can not be "
        "had. The first 32 beyond are told 503, further ones are closed.",
        Change.RELOAD,
        ge=1,
        le=BOUNDS["connections"][1],
    )
    body_kib: int = setting(
        1024,
        "Longest body of a request that goes on to Nova, in KiB; beyond, 413. What we answer ourselves takes 64.",
        Change.RELOAD,
        ge=1,
        le=1024 * 1024,
    )
