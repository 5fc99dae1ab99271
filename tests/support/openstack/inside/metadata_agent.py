"""Neutron's own metadata agent on its unix socket; runs in Neutron's environment, in the lab's directory.

The agent asks Neutron by RPC. ML2's own end of it is in this process too, so that the in-memory transport carries
it and no message broker is needed. The handler, the signing and the forwarding are Neutron's, unmodified.
"""

import sys

from neutron import manager
from neutron.agent.metadata import agent
from neutron.common import cache_utils, config
from neutron.conf import service
from neutron.conf.agent import common
from neutron.conf.agent.metadata import config as metadata
from neutron.objects import register_objects
from neutron_lib.plugins import directory
from oslo_config import cfg


def main(*config_files: str) -> None:
    config.register_common_config_options()
    metadata.register_meta_conf_opts(metadata.SHARED_OPTS)
    metadata.register_meta_conf_opts(metadata.UNIX_DOMAIN_METADATA_PROXY_OPTS)
    metadata.register_meta_conf_opts(metadata.METADATA_PROXY_HANDLER_OPTS)
    cache_utils.register_oslo_configs(cfg.CONF)
    common.register_agent_state_opts_helper(cfg.CONF)
    service.register_service_opts(service.RPC_EXTRA_OPTS, cfg.CONF)
    config.init([word for file in config_files for word in ("--config-file", file)])
    config.setup_logging()
    config.set_config_defaults()
    register_objects()
    manager.init()
    directory.get_plugin().start_rpc_listeners()
    agent.UnixDomainMetadataProxy(cfg.CONF).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
