"""Python servers for guests' requests: the document server and the resolver."""
