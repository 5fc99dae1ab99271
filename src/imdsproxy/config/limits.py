"""How much one instance may ask for, where the policy says nothing else."""

from __future__ import annotations

from imdsproxy.config.change import Change
from imdsproxy.config.section import Section, setting
from imdsproxy.core.policy import MOST_BURST, MOST_CONNECTIONS, MOST_REQUESTS_PER_S

__all__ = ["LimitsSettings"]


class LimitsSettings(Section):
    """Of each instance, over IPv4 and IPv6 together; beyond, 503 with Retry-After. `policy` says it for some."""

    enabled: bool = setting(
        False,
        "Count what each instance asks for, and refuse what is beyond. Off until its cost is known on real hosts; "
        "without it limits in `policy` are of no account.",
        Change.RELOAD,
    )
    requests_per_s: int = setting(
        100,
        "Requests a second on average over a minute. Only answered ones count, so being refused lengthens nothing.",
        Change.RELOAD,
        ge=1,
        le=MOST_REQUESTS_PER_S,
    )
    burst: int = setting(
        4000,
        "Requests in ten seconds: a boot asks for much at once. cloud-init's whole crawl is 150; this is twenty of "
        "them and some more.",
        Change.RELOAD,
        ge=1,
        le=MOST_BURST,
    )
    connections: int = setting(
        160,
        "Connections at once; behind the unix listener, requests. More than `haproxy.maxconn_per_network` can not be "
        "had. The first 32 beyond are told 503, further ones are closed.",
        Change.RELOAD,
        ge=1,
        le=MOST_CONNECTIONS,
    )
