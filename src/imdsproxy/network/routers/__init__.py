"""Tables in the namespaces of Neutron's agents that let imdsproxy answer there."""
