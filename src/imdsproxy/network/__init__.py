"""Everything bound, plugged or filtered on the host: listeners, MAC filters, OVN ports, routers; no guest records."""
