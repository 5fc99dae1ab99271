"""Console: web pages on 127.0.0.1 about networks and guests, for an operator of this host."""
