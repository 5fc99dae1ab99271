"""OVN: replaces neutron-ovn-metadata-agent, or neutron-ovn-agent with its extension `metadata`."""

from collections.abc import Iterator
from typing import Final

from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import Problem
from imdsproxy.tools.takeover.plan import (
    EndProxies,
    ImportSettings,
    Kind,
    Seen,
    Step,
    StopAgent,
    WaitServed,
    let_go_step,
    list_pids,
    option_of,
    restart_steps,
    settings_steps,
    start_steps,
    wait_step,
)

_PREFIX: Final = "ovnmeta-"
_EXTENSION: Final = "metadata"
_FILES: Final = {
    "private_key_file": "ovn_sb_private_key",
    "certificate_file": "ovn_sb_certificate",
    "ca_file": "ovn_sb_ca_cert",
}


def _takeover(seen: Seen) -> Iterator[Step]:
    if not (seen.agents or seen.proxies) and seen.source:
        return
    if not seen.nova and seen.agents:
        files = seen.agents[0].files
        settings, secret = seen.imported
        yield Step(
            f"import Nova's address and secret from the agent's settings into {settings}",
            f"imdsproxy config import --neutron {' '.join(files)} --output {settings} --secret-file {secret}",
            f"rm {settings} {secret}",
            ImportSettings(files, settings, secret, seen.agents[0].reach),
        )
    text = render_settings(seen)
    yield from settings_steps(
        seen, "the source `ovn`, without the socket for the agent's HAProxies", text
    )
    if not (seen.source and seen.nova and seen.present is not None):
        yield from restart_steps(seen)
    yield Step(
        "wait until imdsproxy listens in every network of the agent's, and answers a request in each",
        "imdsproxy status; imdsproxy explain --probe --network NETWORK --from ADDRESS",
        "",
        WaitServed(_PREFIX),
    )
    if seen.proxies:
        yield Step(
            f"end the agent's {len(seen.proxies)} HAProxies softly; what waits to be accepted comes to imdsproxy",
            f"kill -USR1 {list_pids(seen)}",
            "the agent starts them again while it runs",
            EndProxies(_PREFIX),
        )
    for agent in seen.agents:
        yield Step(
            f"stop {agent.program} (pid {agent.pid})",
            seen.commands.stop,
            seen.commands.start,
            StopAgent(seen.commands.stop, agent if agent.unit else None, _PREFIX),
        )


def _handback(seen: Seen) -> Iterator[Step]:
    yield from start_steps(seen)
    if seen.present is None:
        return
    yield wait_step(_PREFIX)
    words = (
        f"end imdsproxy's listeners there softly, remove {seen.drop_in}, and restart its controller"
    )
    yield let_go_step(seen, words, "ovn", _PREFIX)


def _refuse(seen: Seen) -> Iterator[Problem]:
    if seen.import_error:
        yield Problem("sources.ovn", seen.import_error)
    if not seen.nova and not seen.agents:
        yield Problem(
            "nova.endpoint_sets",
            "no Nova is configured, and no agent runs whose settings could be imported",
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
            f"the agent also does {', '.join(others)}, which would end with it",
            "take `metadata` out of its extensions, and give --stop-agent 'systemctl restart UNIT'",
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


KIND: Final = Kind(
    "ovn",
    ("neutron-ovn-metadata-agent", "neutron-ovn-agent"),
    _PREFIX,
    "ovn",
    _takeover,
    _handback,
    _refuse,
)
