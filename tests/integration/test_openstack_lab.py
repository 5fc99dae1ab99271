"""The lab is what it is taken for: genuine Nova and Neutron, with everybody of the table in them."""

import pytest

from support.openstack.lab import OpenStack
from support.openstack.table import LOOKUP_NAMES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LOOKUP_NAMES)
def test_neutrons_own_agent_agrees_with_the_table(openstack: OpenStack, name: str) -> None:
    row = openstack.lookup(name)
    answer = openstack.ask_agent("/latest/meta-data/hostname", row.scope_header, row.address)
    if row.instance is None:
        assert answer.status == 404
    else:
        assert (answer.status, answer.body.decode()) == (200, f"{row.instance.name}.novalocal")
