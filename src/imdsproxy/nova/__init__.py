"""Upstream `nova`: choice of the API for an instance, endpoints, secrets, signatures; no HAProxy rules."""
