"""The source `ovn`: this chassis's ports, followed in OVN's Southbound database."""
