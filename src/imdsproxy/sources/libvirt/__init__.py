"""libvirt as a source of records."""
