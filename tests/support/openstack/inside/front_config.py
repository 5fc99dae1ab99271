"""Says what Neutron's agents write for the HAProxy of a namespace; runs in Neutron's environment.

Standard input is a JSON list of objects: kind (`network`, `router`, `ovn`), resource_id, and what Neutron's
configurator takes by its own names. The texts are written as a JSON list.
"""

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
    json.dump([render(**wanted) for wanted in json.load(sys.stdin)], sys.stdout)


def render(kind: str, resource_id: str, **options: Any) -> str:
    configurator = (ovn_driver if kind == "ovn" else driver).HaproxyConfigurator
    made = configurator(
        network_id=None if kind == "router" else resource_id,
        router_id=resource_id if kind == "router" else None,
        rate_limiting_config=cfg.CONF[config.RATE_LIMITING_GROUP],
        haproxy_config=cfg.CONF[config.HAPROXY_GROUP],
        **options,
    )
    text: str = made.haproxy_cfg
    return text


if __name__ == "__main__":
    main()
