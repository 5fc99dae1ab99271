"""Access to the operating system: files, processes, namespaces, netlink, logs; no decision."""
