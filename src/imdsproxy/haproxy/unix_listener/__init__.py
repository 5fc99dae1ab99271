"""The listener `unix`: a socket for Neutron's proxies that replaces neutron-metadata-agent's."""
