"""How the L3 agent's settings file has its proxies off, and is as it was afterwards."""

import pytest

from imdsproxy.config.neutron_ini import parse_ini
from imdsproxy.tools.takeover.l3 import PROXIES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[DEFAULT]\n",
        "# first\n[DEFAULT]\ninterface_driver = openvswitch\n[AGENT]\nreport_interval = 5\n",
        "[DEFAULT]\nenable_metadata_proxy = True\n[OVS]\n",
        "[DEFAULT]\n# enable_metadata_proxy = true\nenable_metadata_proxy=true\n",
        "[OVS]\ndatapath_type = netdev\n",
    ],
)
def test_the_option_is_off_once_and_the_file_comes_back(text: str) -> None:
    changed = PROXIES.set_in(text)
    found = [
        (one.section, one.value)
        for one in parse_ini(changed, "l3_agent.ini")
        if one.name == "enable_metadata_proxy"
    ]
    assert found == [("DEFAULT", "False")]
    assert PROXIES.set_in(changed) == changed
    back = PROXIES.restore_in(changed)
    assert back == text or parse_ini(back, "") == parse_ini(text, "")
