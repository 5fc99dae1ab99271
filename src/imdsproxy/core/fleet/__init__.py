"""What hubs, hosts and etcd say to each other: keys and values of the store, and lines of a host's stream."""
