"""Answering guests' requests in Python: the document server and the resolver."""
