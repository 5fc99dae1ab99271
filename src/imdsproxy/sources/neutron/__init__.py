"""OpenStack Neutron as a source of records."""
