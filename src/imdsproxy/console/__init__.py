"""Console: web pages on 127.0.0.1 about networks and guests, a client of the API; no access to the daemon itself."""
