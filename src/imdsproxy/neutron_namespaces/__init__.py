"""What the namespaces of Neutron's agents need on this host so that imdsproxy answers in them."""
