"""The listener `unix`: a socket for Neutron's proxies, in the place of neutron-metadata-agent's."""
