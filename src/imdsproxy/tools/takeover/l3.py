"""L3: replaces the HAProxies that neutron-l3-agent runs in its routers' namespaces. The agent keeps running.

Both can serve at once: imdsproxy's rules redirect each new connection before the agent's rules do.
"""

from collections.abc import Iterator
from typing import Final

from imdsproxy.config.neutron_agents import DEFAULT_PORT
from imdsproxy.errors import Problem
from imdsproxy.tools.takeover.agent_settings import (
    AgentOption,
    refuse_restart,
    restart_agent_steps,
    restore_steps,
    set_steps,
)
from imdsproxy.tools.takeover.plan import (
    EndProxies,
    Kind,
    Seen,
    Step,
    WaitServed,
    let_go_step,
    list_pids,
    option_of,
    restart_steps,
    settings_steps,
    wait_step,
)

_PREFIX: Final = "qrouter-"
_SOURCE: Final = "neutron_namespaces"
_PROGRAM: Final = "neutron-l3-agent"
_GOES_ON: Final = "its routers go on"
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
    yield from settings_steps(seen, "the agent's routers are served", _SETTINGS)
    if not ready:
        yield from restart_steps(seen)
    yield Step(
        "wait until imdsproxy listens behind every router of the agent's, and new connections are redirected to it",
        "imdsproxy status",
        "",
        WaitServed(_PREFIX),
    )
    if not off:
        yield from set_steps(seen, PROXIES)
    if not off or seen.proxies:
        # An interrupted takeover may have set the option without restarting the agent.
        yield from restart_agent_steps(seen, _GOES_ON)
    if seen.proxies:
        yield Step(
            f"end the agent's {len(seen.proxies)} HAProxies softly; none gets a new connection any more",
            f"kill -USR1 {list_pids(seen)}",
            "",
            EndProxies(_PREFIX),
        )


def _handback(seen: Seen) -> Iterator[Step]:
    if seen.present is None:
        return
    if seen.files and PROXIES.is_set(seen):
        yield from restore_steps(seen, PROXIES)
    yield from restart_agent_steps(seen, _GOES_ON)
    port = int(option_of(seen, "DEFAULT", "metadata_port") or DEFAULT_PORT)
    yield wait_step(_PREFIX, "behind each router that has addresses here", port=port)
    words = f"remove {seen.drop_in}, and restart imdsproxy's controller: its rules go, then its listeners, softly"
    yield let_go_step(seen, words, "l3", _PREFIX)


def _refuse(seen: Seen) -> Iterator[Problem]:
    if "neutron" not in seen.sources:
        yield Problem(
            "sources.neutron",
            "instances behind these routers are Neutron's",
            "enable it, and set `cloud`",
        )
    if not seen.nova:
        yield Problem(
            "nova.endpoint_sets",
            "no Nova is configured",
            "imdsproxy config import --neutron /etc/neutron/neutron.conf /etc/neutron/metadata_agent.ini",
        )
    yield from refuse_restart(seen, _PROGRAM)


KIND: Final = Kind(
    "l3",
    (_PROGRAM,),
    _PREFIX,
    _SOURCE,
    _takeover,
    _handback,
    _refuse,
    runs_on=True,
)
