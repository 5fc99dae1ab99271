"""Routes of a hub for hosts and operators, with callers, scopes of answers, verdict and metrics."""
