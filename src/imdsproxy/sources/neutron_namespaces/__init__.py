"""The source `neutron_namespaces`: networks and routers whose namespaces Neutron's agents create on this host."""
