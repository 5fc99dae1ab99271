"""Says what Neutron's agents write for the HAProxy of a namespace; runs in Neutron's environment.

Each line of standard input is a JSON object, and is answered by a line with the text as JSON: kind (`network`,
`router`, `ovn`), resource_id, socket, bind_address, port, bind_address_v6 and bind_interface (or null), user, group,
state_path, pid_file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from neutron.agent.metadata import driver
from neutron.agent.ovn.metadata import driver as ovn_driver
from neutron.conf.agent.metadata import config
from oslo_config import cfg
from oslo_log import log


def main() -> None:
    log.register_options(cfg.CONF)
    config.register_meta_conf_opts(
        config.METADATA_RATE_LIMITING_OPTS, group=config.RATE_LIMITING_GROUP
    )
    config.register_meta_conf_opts(config.METADATA_HAPROXY_OPTS, group=config.HAPROXY_GROUP)
    cfg.CONF([])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(render(json.loads(line))) + "\n")
        sys.stdout.flush()


def render(wanted: dict[str, Any]) -> str:
    ovn = wanted["kind"] == "ovn"
    configurator = (ovn_driver if ovn else driver).HaproxyConfigurator
    made = configurator(
        network_id=None if wanted["kind"] == "router" else wanted["resource_id"],
        router_id=wanted["resource_id"] if wanted["kind"] == "router" else None,
        unix_socket_path=wanted["socket"],
        host=wanted["bind_address"],
        port=wanted["port"],
        user=wanted["user"],
        group=wanted["group"],
        state_path=wanted["state_path"],
        pid_file=wanted["pid_file"],
        rate_limiting_config=cfg.CONF[config.RATE_LIMITING_GROUP],
        haproxy_config=cfg.CONF[config.HAPROXY_GROUP],
        host_v6=wanted["bind_address_v6"],
        bind_interface=wanted["bind_interface"],
    )
    text: str = made.haproxy_cfg
    return text


if __name__ == "__main__":
    main()
