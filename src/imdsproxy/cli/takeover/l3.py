"""L3: in the place of the HAProxies that neutron-l3-agent keeps in its routers' namespaces. The agent runs on.

Rules of imdsproxy's redirect each new connection before the agent's own rules do, so both may be there at once.
"""

import re
from collections.abc import Iterator
from typing import Final

from imdsproxy.cli.takeover.plan import (
    EditSettings,
    EndProxies,
    Kind,
    Seen,
    StartAgent,
    Step,
    WaitServed,
    let_go_step,
    list_pids,
    option_of,
    restart_steps,
    settings_steps,
    wait_step,
)
from imdsproxy.errors import Problem

_PREFIX: Final = "qrouter-"
_SOURCE: Final = "neutron_namespaces"
_OPTION: Final = "enable_metadata_proxy"
_MARK: Final = "# imdsproxy takeover l3: "
_OURS: Final = f"{_MARK}the agent's proxies are not needed\n{_OPTION} = False\n"
_LINE: Final = re.compile(rf"^(?={_OPTION}\s*=)", re.MULTILINE)
_DEFAULT: Final = re.compile(r"^\[DEFAULT\][^\n]*\n", re.MULTILINE)
_SETTINGS: Final = f"""\
# Made by `imdsproxy takeover l3`; `imdsproxy handback l3` removes it.
sources:
  {_SOURCE}:
    routers: true
"""


def disable_proxies(text: str) -> str:
    """The agent's settings file with its proxies off; the option as it was becomes a comment."""
    kept = _LINE.sub(_MARK, restore_proxies(text))
    at = _DEFAULT.search(kept)
    if at is None:
        return f"{kept.rstrip()}\n[DEFAULT]\n{_OURS}".lstrip()
    return kept[: at.end()] + _OURS + kept[at.end() :]


def restore_proxies(text: str) -> str:
    """The file as it was before `disable_proxies`."""
    return text.replace(_OURS, "").replace(f"{_MARK}{_OPTION}", _OPTION)


def _takeover(seen: Seen) -> Iterator[Step]:
    ready, off = seen.present is not None and seen.source, _is_off(seen)
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
        path = seen.agents[0].files[-1]
        yield Step(
            f"set {_OPTION} = False in {path}",
            f"sed -i '/^\\[DEFAULT\\]/a {_OPTION} = False' {path}",
            f"take the line out of {path}",
            EditSettings(path, disable_proxies),
        )
        yield from _restart_agent(seen)
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
    if _is_off(seen) and seen.agents:
        path = seen.agents[0].files[-1]
        yield Step(
            f"have {_OPTION} in {path} as it was",
            f"take {_OPTION} = False out of {path}",
            "imdsproxy takeover l3",
            EditSettings(path, restore_proxies),
        )
    yield from _restart_agent(seen)
    yield wait_step(_PREFIX, "behind each router that has addresses here")
    words = f"remove {seen.drop_in}, and restart imdsproxy's controller: its rules go, then its listeners, softly"
    yield let_go_step(seen, words, "l3", _PREFIX)


def _restart_agent(seen: Seen) -> Iterator[Step]:
    command = _restart_command(seen)
    yield Step("restart the agent; its routers go on", command, "", StartAgent(command))


def _restart_command(seen: Seen) -> str:
    unit = next((one.unit for one in seen.agents if one.unit), "")
    return f"systemctl restart {unit}" if unit else seen.commands.start


def _is_off(seen: Seen) -> bool:
    return option_of(seen, "DEFAULT", _OPTION).lower() in {"false", "0", "no", "off"}


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
    if not (seen.agents and seen.agents[0].files):
        yield Problem("neutron-l3-agent", "it does not run, or has no settings file", "start it")
    elif not _restart_command(seen):
        yield Problem(
            "--start-agent",
            f"neutron-l3-agent (pid {seen.agents[0].pid}) has no unit of systemd",
            "--start-agent 'docker restart NAME'",
        )


KIND: Final = Kind(
    "l3",
    ("neutron-l3-agent",),
    _PREFIX,
    _SOURCE,
    _takeover,
    _handback,
    _refuse,
    runs_on=True,
)
