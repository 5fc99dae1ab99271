"""OVN: replaces neutron-ovn-metadata-agent, or neutron-ovn-agent with its extension `metadata`."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import Problem
from imdsproxy.host.process import ProcessHandle, open_process, read_stat
from imdsproxy.tools.takeover.actor import Actor, migrating
from imdsproxy.tools.takeover.agents import read_options
from imdsproxy.tools.takeover.observe import find_proxies
from imdsproxy.tools.takeover.seen import Agent, Seen, option_of
from imdsproxy.tools.takeover.steps import (
    SETTINGS_MODE,
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

_SECRET_MODE: Final = 0o600
_PREFIX: Final = "ovnmeta-"
_EXTENSION: Final = "metadata"
_FILES: Final = {
    "private_key_file": "ovn_sb_private_key",
    "certificate_file": "ovn_sb_certificate",
    "ca_file": "ovn_sb_ca_cert",
}


@dataclass(frozen=True, slots=True)
class ImportSettings(Step):
    agent: Agent
    settings: str
    secret: str

    @classmethod
    def of(cls, agent: Agent, settings: str, secret: str) -> Self:
        return cls(
            f"import Nova's address and secret from the agent's settings into {settings}",
            f"imdsproxy config import --neutron {' '.join(agent.files)} --output {settings} --secret-file {secret}",
            f"rm {settings} {secret}",
            *(agent, settings, secret),
        )

    def run(self, actor: Actor) -> str:
        from imdsproxy.config.neutron_import import plan_import

        options = [read_options(path, self.agent.reach) for path in self.agent.files]
        imported = plan_import(options, Path(self.secret), behind_proxies=False)
        actor.write(
            {
                Path(self.secret): (imported.secret.encode(), _SECRET_MODE),
                Path(self.settings): (imported.text.encode(), SETTINGS_MODE),
            }
        )
        return f"written, and {self.secret}"


@dataclass(frozen=True, slots=True)
class StopAgent(Step):
    """Stop the agent after its last HAProxy ended; a running agent starts them again.

    `agent`: agent to pause (SIGSTOP) during the check for HAProxies; `None` if it has no systemd unit.
    """

    prefix: str
    agent: Agent | None

    @classmethod
    def of(cls, seen: Seen, prefix: str, agent: Agent) -> Self:
        words, commands = f"stop {agent.program} (pid {agent.pid})", seen.commands
        return cls(words, commands.stop, commands.start, prefix, agent if agent.unit else None)

    def run(self, actor: Actor) -> str:
        # A paused agent starts no HAProxy. systemd resumes the agent when it stops the unit.
        held = None if self.agent is None else _open_agent(self.agent)
        with migrating(self.prefix), contextlib.ExitStack() as stack:
            if held is not None:
                stack.callback(held.close)
                stack.callback(held.kill, signal.SIGCONT)
                held.kill(signal.SIGSTOP)
                while find_proxies(self.prefix):
                    held.kill(signal.SIGCONT)
                    actor.end_proxies(self.prefix)
                    held.kill(signal.SIGSTOP)
            actor.command(self.by_hand)
            actor.end_proxies(self.prefix)
        return self.by_hand


def _open_agent(agent: Agent) -> ProcessHandle | None:
    """Open an agent's process; return `None` if the agent ended, even if another process has its pid."""
    handle, stat = open_process(agent.pid), read_stat(agent.pid)
    if handle is not None and (stat is None or stat.started != agent.started):
        handle.close()
        return None
    return handle


def _takeover(seen: Seen) -> Iterator[Step]:
    if not (seen.agents or seen.proxies) and seen.source:
        return
    if not seen.nova and seen.agents:
        yield ImportSettings.of(seen.agents[0], *seen.imported)
    text = render_settings(seen)
    yield from WriteSettings.if_missing(
        seen, "enable the source `ovn`, and disable the socket for the agent's HAProxies", text
    )
    if not (seen.source and seen.nova and seen.present is not None):
        yield Restart.of(seen)
    yield WaitServed(
        "wait until imdsproxy listens in all of the agent's networks, and answers a request in each",
        "imdsproxy status; imdsproxy explain --probe --network NETWORK --from ADDRESS",
        "",
        _PREFIX,
    )
    yield from EndProxies.if_any(
        seen,
        _PREFIX,
        "connections not yet accepted move to imdsproxy",
        "the agent starts them again if it runs",
    )
    for agent in seen.agents:
        yield StopAgent.of(seen, _PREFIX, agent)


def _handback(seen: Seen) -> Iterator[Step]:
    yield from StartAgent.if_stopped(seen)
    if seen.present is None:
        return
    yield WaitProxies.of(_PREFIX)
    words = (
        f"stop imdsproxy's listeners gracefully, remove {seen.drop_in}, and restart its controller"
    )
    yield ReleaseNetworks.of(seen, words, "ovn", _PREFIX)


def _refuse(seen: Seen) -> Iterator[Problem]:
    if seen.import_error:
        yield Problem("sources.ovn", seen.import_error)
    if not seen.nova and not seen.agents:
        yield Problem(
            "nova.endpoint_sets",
            "no Nova is configured, and no agent runs to import settings from",
            "imdsproxy config import --neutron FILE…",
        )
    others = [
        one.strip()
        for one in option_of(seen, "agent", "extensions").split(",")
        if one.strip() and one.strip() != _EXTENSION
    ]
    if others and any(one.unit for one in seen.agents) and "--now" in seen.commands.stop:
        yield Problem(
            "[agent] extensions",
            f"the agent also has the extensions {', '.join(others)}, which would stop too",
            "remove `metadata` from its extensions, and use --stop-agent 'systemctl restart UNIT'",
        )


def render_settings(seen: Seen) -> str:
    """Return the text of the settings file, with the agent's database addresses and TLS files."""
    values = {
        "open_vswitch": option_of(seen, "ovs", "ovsdb_connection").replace(" ", ""),
        "southbound": option_of(seen, "ovn", "ovn_sb_connection").replace(" ", ""),
        **{name: option_of(seen, "ovn", option) for name, option in _FILES.items()},
    }
    lines = [f"    {name}: {render_value(value)}" for name, value in values.items() if value]
    return "\n".join(
        [
            "# Made by `imdsproxy takeover ovn`; `imdsproxy handback ovn` removes it.",
            "sources:",
            "  ovn:",
            "    enabled: true",
            *lines,
            "unix_listener:",
            "  enabled: false",
            "",
        ]
    )


KIND: Final = Takeover(
    "ovn",
    ("neutron-ovn-metadata-agent", "neutron-ovn-agent"),
    _PREFIX,
    "ovn",
    _takeover,
    _handback,
    _refuse,
)
