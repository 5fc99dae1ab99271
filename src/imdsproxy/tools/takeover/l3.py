"""L3: replaces the HAProxies that neutron-l3-agent runs in its routers' namespaces. The agent keeps running.

Both can serve at once: imdsproxy's rules redirect each new connection before the agent's rules do.
"""

from collections.abc import Iterator
from typing import Final

from imdsproxy.config.neutron_agents import DEFAULT_PORT
from imdsproxy.errors import Problem
from imdsproxy.tools.takeover.seen import AgentOption, Seen, option_of, refuse_restart
from imdsproxy.tools.takeover.steps import (
    EditSettings,
    EndProxies,
    ReleaseNetworks,
    Restart,
    StartAgent,
    Step,
    Takeover,
    WaitProxies,
    WaitServed,
    WriteSettings,
)

_PREFIX: Final = "qrouter-"
_SOURCE: Final = "neutron_namespaces"
_PROGRAM: Final = "neutron-l3-agent"
_GOES_ON: Final = "its routers keep working"
_SETTINGS: Final = f"""\
# Made by `imdsproxy takeover l3`; `imdsproxy handback l3` removes it.
sources:
  {_SOURCE}:
    routers: true
"""

PROXIES: Final = AgentOption(
    "l3", "enable_metadata_proxy", False, True, "the agent's proxies are not needed"
)


def _takeover(seen: Seen) -> Iterator[Step]:
    ready, off = seen.present is not None and seen.source, PROXIES.is_set(seen)
    if ready and off and not seen.proxies:
        return
    yield from WriteSettings.if_missing(seen, "serve the agent's routers", _SETTINGS)
    if not ready:
        yield Restart.of(seen)
    yield WaitServed(
        "wait until imdsproxy listens behind all of the agent's routers, and new connections are redirected to it",
        "imdsproxy status",
        "",
        _PREFIX,
    )
    if not off:
        yield EditSettings.to_set(seen, PROXIES)
    if not off or seen.proxies:
        # An interrupted takeover may have set the option without restarting the agent.
        yield StartAgent.again(seen, _GOES_ON)
    effect = "new connections already go to imdsproxy"
    yield from EndProxies.if_any(seen, _PREFIX, effect, "")


def _handback(seen: Seen) -> Iterator[Step]:
    if seen.present is None:
        return
    if seen.files and PROXIES.is_set(seen):
        yield EditSettings.to_restore(seen, PROXIES)
    yield StartAgent.again(seen, _GOES_ON)
    port = int(option_of(seen, "DEFAULT", "metadata_port") or DEFAULT_PORT)
    yield WaitProxies.of(_PREFIX, "behind each router that is active on this node", port=port)
    words = f"remove imdsproxy's rules and listeners gracefully, remove {seen.drop_in}, and restart its controller"
    yield ReleaseNetworks.of(seen, words, "l3", _PREFIX)


def _refuse(seen: Seen) -> Iterator[Problem]:
    if "neutron" not in seen.sources:
        yield Problem(
            "sources.neutron",
            "the source that knows these routers' instances is disabled",
            "enable the source, and set `cloud`",
        )
    if not seen.nova:
        yield Problem(
            "nova.endpoint_sets",
            "no Nova is configured",
            "imdsproxy config import --neutron /etc/neutron/neutron.conf /etc/neutron/metadata_agent.ini",
        )
    yield from refuse_restart(seen, _PROGRAM)


KIND: Final = Takeover(
    "l3",
    (_PROGRAM,),
    _PREFIX,
    _SOURCE,
    _takeover,
    _handback,
    _refuse,
    runs_on=True,
)
