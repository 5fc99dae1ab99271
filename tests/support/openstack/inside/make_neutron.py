"""Makes Neutron's database; runs in Neutron's environment, in the lab's directory.

Neutron's migrations need ALTER of constraints, which SQLite has not: the tables are made of Neutron's models, as its
own unit tests do, and stamped with the migrations' heads.
"""

import contextlib
import datetime as dt
import sys

import sqlalchemy
from alembic import script
from neutron.common import config
from neutron.db.migration import cli
from neutron.db.migration.models import head
from neutron.objects import agent, register_objects
from neutron_lib import context
from neutron_lib.db import api
from oslo_config import cfg
from oslo_utils import uuidutils


def main(config_file: str, *hosts: str) -> None:
    config.register_common_config_options()
    config.init(["--config-file", config_file])
    engine = api.CONTEXT_WRITER.get_engine()
    with contextlib.closing(engine.raw_connection()) as connection:
        # Those who read hinder nobody who writes.
        connection.cursor().execute("PRAGMA journal_mode = WAL")
    head.get_metadata().create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        )
        for alembic_config in cli.get_alembic_configs():
            alembic_config.neutron_config = cfg.CONF
            for version in script.ScriptDirectory.from_config(alembic_config).get_heads():
                connection.execute(
                    sqlalchemy.text("INSERT INTO alembic_version VALUES (:version)"),
                    {"version": version},
                )
    register_objects()
    for host in hosts:
        make_agent(host)


def make_agent(host: str) -> None:
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    agent.Agent(
        context.get_admin_context(),
        id=uuidutils.generate_uuid(),
        agent_type="Open vSwitch agent",
        binary="neutron-openvswitch-agent",
        topic="N/A",
        host=host,
        admin_state_up=True,
        created_at=now,
        started_at=now,
        heartbeat_timestamp=now + dt.timedelta(days=3650),
        configurations={
            "tunnel_types": ["vxlan"],
            "bridge_mappings": {},
            "datapath_type": "system",
            "enable_tunneling": True,
        },
    ).create()


if __name__ == "__main__":
    main(*sys.argv[1:])
