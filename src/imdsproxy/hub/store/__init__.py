"""The fleet's records: etcd, this hub's copy of it, writes and the journal; nothing that knows hosts' streams."""
