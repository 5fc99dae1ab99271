from dataclasses import replace

import pytest

from imdsproxy.config.neutron_ini import parse_ini
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.tools.takeover.ovn import KIND, StopAgent
from imdsproxy.tools.takeover.seen import Agent, Commands, Proxy, Seen
from imdsproxy.tools.takeover.steps import WriteSettings

_INI = """
[ovs]
ovsdb_connection = unix:/run/ovs.sock
[ovn]
ovn_sb_connection = ssl:192.0.2.1:6642, ssl:192.0.2.2:6642
ovn_sb_private_key = /etc/neutron/key.pem
ovn_sb_certificate = /etc/neutron/cert.pem
ovn_sb_ca_cert = /etc/neutron/ca.pem
"""
_AGENT = Agent(7, "neutron-ovn-agent", "neutron-ovn-agent.service", ("/etc/neutron/ovn.ini",))
_COMMANDS = Commands("systemctl disable --now x", "systemctl enable --now x", "systemctl restart y")
_SERVING = Seen(
    agents=(_AGENT,),
    proxies=(Proxy(9, "ovnmeta-a"), Proxy(8, "ovnmeta-b")),
    options=(parse_ini(_INI, "ovn.ini"),),
    commands=_COMMANDS,
    drop_in="/etc/imdsproxy/conf.d/ovn.yaml",
    imported=("/etc/imdsproxy/conf.d/openstack.yaml", "/etc/imdsproxy/nova.secret"),
)


def _kinds(seen: Seen, *, back: bool = False) -> list[str]:
    steps = KIND.handback(seen) if back else KIND.takeover(seen)
    return [type(step).__name__ for step in steps]


def test_the_agent_is_stopped_last_and_its_proxies_end_only_when_imdsproxy_serves() -> None:
    assert _kinds(_SERVING) == [
        *("ImportSettings", "WriteSettings", "Restart", "WaitServed", "EndProxies", "StopAgent"),
    ]
    assert "kill -USR1 8 9" in [step.by_hand for step in KIND.takeover(_SERVING)]


@pytest.mark.parametrize(
    ("seen", "steps"),
    [
        (replace(_SERVING, nova=True, present="…"), ["Restart", "WaitServed", "EndProxies"]),
        (replace(_SERVING, nova=True, present="…", source=True), ["WaitServed", "EndProxies"]),
        (replace(_SERVING, nova=True, present="…", source=True, proxies=()), ["WaitServed"]),
    ],
)
def test_what_is_done_already_is_not_in_the_plan(seen: Seen, steps: list[str]) -> None:
    assert _kinds(seen) == [*steps, "StopAgent"]
    done = replace(seen, source=True, agents=(), proxies=())
    assert _kinds(done) == []


def test_the_databases_of_the_agent_are_those_of_the_source() -> None:
    (written,) = (step for step in KIND.takeover(_SERVING) if isinstance(step, WriteSettings))
    assert parse_yaml(written.text, "ovn.yaml").value == {
        "sources": {
            "ovn": {
                "enabled": True,
                "open_vswitch": "unix:/run/ovs.sock",
                "southbound": "ssl:192.0.2.1:6642,ssl:192.0.2.2:6642",
                "private_key_file": "/etc/neutron/key.pem",
                "certificate_file": "/etc/neutron/cert.pem",
                "ca_file": "/etc/neutron/ca.pem",
            }
        },
        "unix_listener": {"enabled": False},
    }


def test_only_an_agent_that_is_a_unit_is_held_still_before_it_is_stopped() -> None:
    def held(agent: Agent) -> Agent | None:
        steps = KIND.takeover(replace(_SERVING, agents=(agent,)))
        (stop,) = (step for step in steps if isinstance(step, StopAgent))
        return stop.agent

    assert held(_AGENT) == _AGENT
    assert held(replace(_AGENT, unit="")) is None


def test_a_handback_waits_for_the_agent_before_imdsproxy_lets_go() -> None:
    taken = replace(_SERVING, agents=(), proxies=(), nova=True, present="…", source=True)
    assert _kinds(taken, back=True) == ["StartAgent", "WaitProxies", "ReleaseNetworks"]
    assert _kinds(replace(taken, agents=(_AGENT,)), back=True) == ["WaitProxies", "ReleaseNetworks"]
    assert _kinds(_SERVING, back=True) == []


@pytest.mark.parametrize(
    ("seen", "field"),
    [
        (replace(_SERVING, agents=()), "nova.endpoint_sets"),
        (replace(_SERVING, import_error="python-ovs cannot be imported"), "sources.ovn"),
        (
            replace(_SERVING, options=(parse_ini("[agent]\nextensions = metadata,qos\n", "a"),)),
            "[agent] extensions",
        ),
    ],
)
def test_what_an_operator_has_to_mend_first_refuses_the_plan(seen: Seen, field: str) -> None:
    assert [problem.field for problem in KIND.refuse(seen)] == [field]
    assert list(KIND.refuse(_SERVING)) == []
    # A plan is made of each, though nothing is done.
    list(KIND.takeover(seen))
